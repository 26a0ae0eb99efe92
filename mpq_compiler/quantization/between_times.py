"""Rows of layers that see the time and no image, at times between the recorded ones.

A layer that reads an embedding of the time sees as many different rows as times were recorded: some 20, of hundreds of
numbers. GPTQ puts its errors where those rows are not, so that at other times there is some 100 times as much error as
calibration saw, and a plan by the losses there gives such layers next to no bits. What needs no image is computed at
any number of times for next to nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.parts import extract
from mpq_compiler.ir.program import Program
from mpq_compiler.support.execution import batches

TIMES = 1024
"""The fewest rows of such a layer; as many as inputs were recorded, where those are more."""
TIME = "timestep"
"""The input that is the time."""
VECTOR = 2
"""The dimensions of an input that has a vector for each sample."""


@dataclass(frozen=True)
class TimedRows:
    """The edges of a program that have one row for each input, by its time, and by vectors of conditions perhaps."""

    part: Program
    """What computes them from those inputs: its outputs."""
    edges: tuple[str, ...]

    @staticmethod
    def of(program: Program, edges: Iterable[str]) -> TimedRows:
        """Those among the edges; an input of more dimensions than a vector, as texts are, computes none of them."""
        _, *conditions = program.inputs  # latents come first
        vectors = {spec.name for spec in conditions if len(spec.shape) <= VECTOR}
        timed = any(spec.name == TIME and len(spec.shape) == 1 for spec in conditions)
        wanted, known = set(edges) if timed else set(), shapes(program, 1)
        reads: dict[fx.Node, frozenset[str]] = {}
        found: dict[str, frozenset[str]] = {}
        for node in program.graph.nodes:
            own = frozenset({node.name} if node.op == "placeholder" else ())
            reads[node] = own.union(*(reads[source] for source in node.all_input_nodes))
            one = node.name in wanted and known[node.name].numel() == known[node.name].shape[-1]
            if one and TIME in reads[node] <= vectors:
                found[node.name] = reads[node]
        needed = frozenset[str]().union(*found.values())
        names = [spec.name for spec in program.inputs if spec.name in needed]
        return TimedRows(extract(program, names, [*found], known), tuple(found))

    def computed(self, inputs: Mapping[str, Tensor], device: str) -> Iterator[dict[str, Tensor]]:
        """The rows [R, K] by edge, part by part, at times evenly between those of recorded inputs [N, ...]."""
        if not self.edges:
            return
        needed = {spec.name: inputs[spec.name] for spec in self.part.inputs}
        for batch in batches(between(needed)):
            values = run(self.part, batch, device=device)
            yield {name: value.reshape(-1, value.shape[-1]) for name, value in zip(self.edges, values, strict=True)}


def between(inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs [N, ...] at times evenly between neighbours of those that occur, with conditions of the time before.

    There are `TIMES` of them, or N where those are more; where all have one time, it recurs.
    """
    times, which = inputs[TIME].unique(return_inverse=True)
    count = max(TIMES, len(which))
    place = torch.linspace(0, len(times) - 1, count, dtype=torch.float64)
    before = place.long()
    after = (before + 1).clamp_max(len(times) - 1)
    at = torch.lerp(times[before].double(), times[after].double(), place - before)
    if not times.is_floating_point():
        at = at.round()
    ordered, counts = which.argsort(stable=True), which.bincount()
    index = ordered[(counts.cumsum(0) - counts)[before] + torch.arange(count) % counts[before]]
    return {name: value[index] for name, value in inputs.items()} | {TIME: at.to(times.dtype)}
