"""What exact rewrites of layers would gain: the error of their outputs with both sides quantized, before and after.

A rewrite changes the tensor that some layers read, and undoes that in their weights. It is tried on rows of what the
layers read, one quantizer for each interval of time, as time groups will have.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.calibration import batches, input_edge, input_rows, row_geometry
from mpq_compiler.fitting import bias_of
from mpq_compiler.formats import activation
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program, operand, run, weight_of

INTERVALS = 4
"""Of time, each with a quantizer of its own."""
FITTED = 4096
"""Values on which a quantizer is fitted."""
HELD_BYTES = 1 << 30
"""Memory for the sampled rows."""

Rows = dict[tuple[Any, ...], Tensor]
"""By window (`row_geometry`): [R, K], in the order of time."""
Change = Callable[[Tensor], Tensor]
"""Of the channels of a tensor [..., C]."""


@dataclass
class Layers:
    """The layers that read one tensor edge, and rows of what they read."""

    edge: fx.Node
    readers: list[fx.Node]
    largest: Tensor
    """Of each channel's magnitudes, f32 [C]."""
    parts: dict[tuple[Any, ...], list[Tensor]] = field(default_factory=dict)
    """The rows as they were found, by window."""

    @property
    def channels(self) -> int:
        return len(self.largest)

    def rows(self) -> Rows:
        return {geometry: torch.cat(parts) for geometry, parts in self.parts.items()}


@dataclass(frozen=True)
class Trial(Pass):
    """A pass that rewrites the layers which gain by it, both sides quantized."""

    contract: ClassVar[Contract] = Contract.REWRITE
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    weights: str = "int4"
    """Weight format for which the error is reckoned."""
    activations: int = 8
    """Activation width for which the error is reckoned."""
    gain: float = 0.2
    """Least gain in dB for which layers are changed."""
    samples: int = 8
    """Trajectories on which channels are measured, where no inputs are given."""
    steps: int = 10
    """Steps of each."""
    rows: int = 512
    """Rows of each layer's input on which errors are measured; fewer in models where that exceeds a gigabyte."""

    def __post_init__(self) -> None:
        formats.get(self.weights)
        self.require("activations", 2, 8)
        self.require("gain", 0)
        for option in ("samples", "steps", "rows"):
            self.require(option, 1)

    def layers(self, program: Program, session: Session) -> list[Layers]:
        """The layers by the edges that they read, in graph order, with `rows` rows each, about.

        They are those of the session's calibration inputs, or else of the trajectories that the options name.
        """
        inputs = self._recorded(session) if session.calibration is None else session.calibration
        groups: dict[fx.Node, Layers] = {}
        columns = 0
        for node in program.quantizable:
            operand(node, 1).meta["shape"] = tuple(program.tensors[str(weight_of(node))].shape)
            group = groups.setdefault(input_edge(node), Layers(input_edge(node), [], torch.zeros(())))
            group.readers.append(node)
            if row_geometry(node) not in group.parts:
                group.parts[row_geometry(node)] = []
                columns += math.prod(operand(node, 1).meta["shape"][1:])
        count = len(next(iter(inputs.values())))
        rows = max(1, min(self.rows, HELD_BYTES // (4 * max(1, columns))))
        generator = torch.Generator().manual_seed(session.seed)

        def watch(node: fx.Node, value: Any) -> None:
            if (group := groups.get(node)) is None:
                return
            group.largest = torch.maximum(group.largest, value.abs().flatten(0, -2).amax(0))
            readers = {row_geometry(n): n for n in group.readers}
            for geometry, reader in readers.items():
                group.parts[geometry].append(input_rows(reader, value, -(-rows * size // count), generator))

        for batch in batches(inputs):
            size = len(next(iter(batch.values())))
            run(program, batch, watch)
        return list(groups.values())

    def _recorded(self, session: Session) -> dict[str, Tensor]:
        """The inputs of the trajectories, which another rewrite of the session may have recorded."""
        from mpq_compiler.denoiser import record_calibration

        known, asked = session.trajectories, (self.samples, self.steps)
        if asked not in known:
            assert session.denoiser is not None
            with session.track("recording inputs to rewrite by", self.steps) as step:
                known[asked] = record_calibration(session.denoiser, *asked, session.seed, lambda done, total: step(1))
        return known[asked]

    def error(self, group: Layers, rows: Rows, weights: list[Tensor], change: Change, undo: Change) -> float:
        """Relative squared errors of the outputs of the layers, summed over them.

        weights: of the layers [O, ..., C]. change: of what they read. undo: of their weights. Both sides are quantized
        then, as the options have it.
        """
        planned = formats.get(self.weights)
        quantized = {
            geometry: _quantized(change(x.unflatten(1, (-1, group.channels))).flatten(1), self.activations)
            for geometry, x in rows.items()
        }
        total = 0.0
        for w, reader in zip(weights, group.readers, strict=True):
            geometry = row_geometry(reader)
            rounded = planned.start(undo(w)).dequantize().reshape(len(w), -1)
            y = rows[geometry] @ w.flatten(1).T
            wrong = quantized[geometry] @ rounded.T - y
            if bias_of(reader) is not None:  # which will take up the mean
                wrong = wrong - wrong.mean(0)
            total += float(wrong.square().sum() / y.square().sum().clamp_min(1e-30))
        return total


def gain_db(before: float, after: float) -> float:
    """Of errors."""
    return 10 * math.log10(max(before, 1e-30) / max(after, 1e-30))


def _quantized(x: Tensor, bits: int) -> Tensor:
    """Rows in the order of time, by one quantizer an interval."""
    found = []
    for interval in x.chunk(INTERVALS):
        values = interval.flatten()
        low, high = values.aminmax()
        stride = max(1, len(values) // FITTED) | 1  # odd, so that all channels have their turn
        scale, zero, _ = activation.fit(values[::stride], low, high, bits)
        s, z = scale.float(), zero.float()
        codes = torch.maximum(torch.minimum(torch.round(interval / s), (2**bits - 1) - z), -z)
        found.append(codes * s)
    return torch.cat(found)
