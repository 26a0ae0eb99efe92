"""What calibration knows: recorded inputs, and statistics of the tensors that may be quantized.

Passes ask for statistics by name; `calibrate` collects what the whole pipeline asks for in one run over the inputs.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import ops
from mpq_compiler.program import Program, arguments, operand, run, weight_of

RANGE, VALUES, GRAM = "range", "values", "gram"
"""The statistics there are: extremes per input; a sample of values per input; second moments of layer inputs."""

VALUES_PER_INPUT = 256
GRAM_ROWS = 8192
GRAM_COLUMNS = 4096
"""Layers with more inputs than this keep the diagonal of their second moments only: memory and time grow as K^2."""
BATCH = 32


@dataclass
class EdgeStatistics:
    """Of one tensor edge over the N recorded inputs."""

    low: Tensor
    """f32 [N]"""
    high: Tensor
    """f32 [N]"""
    values: Tensor
    """f32 [N, S], a fixed sample of positions."""
    elements: int
    """Elements of the edge per input."""


@dataclass
class Calibration:
    """Recorded inputs [N, ...] by name, ordered by time, and what was measured on them."""

    inputs: dict[str, Tensor]
    edges: dict[str, EdgeStatistics] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    """Call node -> mean of x x^T [K, K], or its diagonal [K], over rows of its input (patches for a convolution).

    Calls that multiply the same rows, such as those of q, k and v, share one tensor.
    """
    means: dict[str, Tensor] = field(default_factory=dict)
    """Call node -> mean of x [K]."""

    @property
    def timesteps(self) -> Tensor:
        return self.inputs["timestep"].to(torch.float32)

    def select(self, count: int) -> dict[str, Tensor]:
        """``count`` inputs spread evenly over the recording, so over time."""
        n = len(next(iter(self.inputs.values())))
        index = torch.linspace(0, n - 1, min(count, n)).round().long()
        return {name: value[index] for name, value in self.inputs.items()}


def batches(inputs: Mapping[str, Tensor], size: int = BATCH) -> Iterator[dict[str, Tensor]]:
    count = len(next(iter(inputs.values())))
    for start in range(0, count, size):
        yield {name: value[start : start + size] for name, value in inputs.items()}


def input_edge(node: fx.Node) -> fx.Node:
    """The node whose value a quantizable call reads."""
    return operand(node, 0)


def input_rows(node: fx.Node, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """About ``rows`` rows [R, K] that the call multiplies with its weight, K in the order of the stored weight."""
    if node.target is not ops.conv2d:
        flat = x.reshape(-1, x.shape[-1])
        return flat[_choice(len(flat), rows, generator)]
    weight = operand(node, 1).meta["shape"]
    (sh, sw), (top, bottom, left, right) = arguments(node)[3:5]
    padded = torch.nn.functional.pad(x, (0, 0, left, right, top, bottom))
    windows = padded.unfold(1, weight[1], sh).unfold(2, weight[2], sw)  # [B, OH, OW, C, kh, kw]
    b, oh, ow = windows.shape[:3]
    index = _choice(b * oh * ow, rows, generator)
    patches = windows[index // (oh * ow), index // ow % oh, index % ow]
    return patches.permute(0, 2, 3, 1).reshape(len(index), -1)


def row_geometry(node: fx.Node) -> tuple[Any, ...]:
    """What besides its operand decides the rows of `input_rows`: nothing for a linear layer, the window of a conv."""
    if node.target is not ops.conv2d:
        return ()
    return (tuple(operand(node, 1).meta["shape"][1:3]), *(tuple(a) for a in arguments(node)[3:5]))


def _choice(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    if count <= wanted:
        return torch.arange(count)
    return torch.randperm(count, generator=generator)[:wanted].sort().values


def collect(
    program: Program, inputs: dict[str, Tensor], wanted: frozenset[str], seed: int, advance: Callable[[int], None]
) -> Calibration:
    """Runs the program over the inputs once and measures every edge and layer that may be quantized."""
    found = Calibration(inputs)
    layers = program.quantizable
    edges = {input_edge(n).name for n in layers}
    readers: dict[str, dict[tuple[Any, ...], list[fx.Node]]] = {}
    for n in layers:
        operand(n, 1).meta["shape"] = tuple(program.tensors[str(weight_of(n))].shape)
        readers.setdefault(input_edge(n).name, {}).setdefault(row_geometry(n), []).append(n)
    parts: dict[str, list[EdgeStatistics]] = {name: [] for name in edges}
    sums: dict[tuple[str, tuple[Any, ...]], tuple[Tensor, Tensor, int]] = {}
    total = len(next(iter(inputs.values())))
    generator = torch.Generator().manual_seed(seed)

    def watch(node: fx.Node, value: Any) -> None:
        if node.name not in edges:
            return
        flat = value.reshape(size, -1)
        low, high = flat.aminmax(dim=1)
        positions = _choice(flat.shape[1], VALUES_PER_INPUT if VALUES in wanted else 1, generator)
        parts[node.name].append(EdgeStatistics(low, high, flat[:, positions], flat.shape[1]))
        for geometry, calls in readers[node.name].items() if GRAM in wanted else ():
            rows = input_rows(calls[0], value, max(1, GRAM_ROWS * size // total), generator)
            gram, mean, count = sums.get((node.name, geometry), (0, 0, 0))
            moments = rows.T @ rows if rows.shape[1] <= GRAM_COLUMNS else rows.square().sum(0)
            sums[node.name, geometry] = (gram + moments, mean + rows.sum(0), count + len(rows))

    for batch in batches(inputs):
        size = len(next(iter(batch.values())))
        run(program, batch, watch)
        advance(size)
    for name, pieces in parts.items():
        # Each batch draws its own positions; the number drawn is the same.
        found.edges[name] = EdgeStatistics(
            torch.cat([p.low for p in pieces]),
            torch.cat([p.high for p in pieces]),
            torch.cat([p.values for p in pieces]),
            pieces[0].elements,
        )
    for (edge, geometry), (gram, mean, count) in sums.items():
        moments = gram / count, mean / count
        for call in readers[edge][geometry]:
            found.grams[call.name], found.means[call.name] = moments
    return found
