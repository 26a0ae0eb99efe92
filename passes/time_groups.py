"""Cuts timesteps into intervals that share activation quantizers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from mpq_compiler.formats import activation
from mpq_compiler.ir import provenance
from mpq_compiler.ir.program import BOUNDARIES, TIME_GROUPS, Program
from mpq_compiler.pipeline.demand import VALUE_PASSES, Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, RANGE, VALUES, Calibration, Statistic

VALUES_PER_STEP = 160
"""The most values of an edge per timestep on which the cost of a quantizer is computed."""


@dataclass(frozen=True)
class TimeGroups(Pass):
    """Cuts the range of timestep values into intervals by dynamic programming.

    The cost of an interval is the relative squared error of one quantizer for all its values, summed over the tensor
    edges; the cut with the least total is found exactly. Groups are intervals of the timestep's value, so other step
    counts and samplers work, and a value outside the calibrated range falls into the nearest group.

        (no change; the boundaries are a tensor, read by %g = mpq::time_group(%timestep) once quantizers are inserted)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.GROUPS_TIME
    width: ClassVar[str | None] = "bits"
    requires: ClassVar[frozenset[str]] = frozenset({"calibration"})
    provides: ClassVar[frozenset[str]] = frozenset({"time-groups"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES})

    groups: int = 4
    """Most groups; there are fewer where the calibration has fewer timesteps."""
    bits: int = 8
    """Width of the activations for which the cost is reckoned."""
    places: int = 20
    """Most intervals between which cuts are looked for: of more timesteps, neighbours are taken together."""

    def __post_init__(self) -> None:
        for option in ("groups", "places"):
            self.require(option, 1)
        self.require("bits", 2, 8)

    def demand(self, asked: Asked) -> Demand:
        edges, places = len({layer.edge for layer in asked.sizes.layers}), min(self.places, asked.rows)
        tried = VALUES_PER_STEP * places**3 / 6 * len(activation.SHRINK[::2])
        return Demand(traffic=12 * VALUE_PASSES * edges * tried, serial=True)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        calibration = program.facts[CALIBRATION]
        steps = calibration.timesteps.unique()
        ends = [step[-1] for step in steps.tensor_split(min(self.places, len(steps)))]
        costs = torch.zeros(len(ends), len(ends), dtype=torch.float64)
        with session.track("time groups", len(calibration.edges)) as advance:
            for name in sorted(calibration.edges):
                costs += self._interval_costs(calibration, name, ends)
                advance(1)
        starts = best_cut(costs, min(self.groups, len(ends)))
        boundaries = [(ends[s - 1] + steps[steps > ends[s - 1]][0]) / 2 for s in starts[1:]]
        program.facts[TIME_GROUPS] = torch.tensor(boundaries, dtype=torch.float32)
        program.tensors.add(BOUNDARIES, program.facts[TIME_GROUPS])
        errors = [_total(costs, best_cut(costs, count)) / len(calibration.edges) for count in range(1, len(starts) + 1)]
        provenance.note(program, provenance.PROGRAM, self.name(), decided=boundaries, error_by_groups=errors)
        return program

    def _interval_costs(self, calibration: Calibration, name: str, ends: list[Tensor]) -> Tensor:
        """The costs of intervals for one edge, f64 [T, T]: the relative error of one quantizer for the places a..b.

        The costs are infinite below the diagonal. ends: the last timestep of each place, ascending.
        """
        edge, times = calibration.edges[name], calibration.timesteps
        places = torch.searchsorted(torch.stack(ends), times)
        chosen = [places == i for i in range(len(ends))]
        values = [edge.values[rows].flatten() for rows in chosen]
        count = min(VALUES_PER_STEP, *(len(v) for v in values))
        sample = torch.stack([v[torch.arange(count) * len(v) // count] for v in values])
        low = torch.stack([edge.low[rows].min() for rows in chosen])
        high = torch.stack([edge.high[rows].max() for rows in chosen])
        costs = torch.full((len(ends), len(ends)), torch.inf, dtype=torch.float64)
        for length in range(1, len(ends) + 1):  # every interval of so many places at once
            intervals = sample.unfold(0, length, 1).flatten(1)
            span = low.unfold(0, length, 1).amin(1), high.unfold(0, length, 1).amax(1)
            costs.diagonal(length - 1).copy_(activation.least_error(intervals, *span, self.bits))
        return costs / sample.square().sum().clamp_min(1e-30)


def _total(costs: Tensor, starts: list[int]) -> float:
    """The cost of a cut into intervals that begin at ``starts``; costs [T, T]."""
    ends = [*starts[1:], len(costs)]
    return float(sum(costs[start, end - 1] for start, end in zip(starts, ends, strict=True)))


def best_cut(costs: Tensor, groups: int) -> list[int]:
    """The first indices of the intervals of the cheapest cut of 0..T-1 into at most ``groups``; costs [T, T]."""
    count = len(costs)
    table = costs.tolist()
    best = [[float("inf")] * (count + 1) for _ in range(groups + 1)]
    previous = [[0] * (count + 1) for _ in range(groups + 1)]
    best[0][0] = 0.0
    for g in range(1, groups + 1):
        for end in range(1, count + 1):
            for start in range(end):
                total = best[g - 1][start] + table[start][end - 1]
                if total < best[g][end]:
                    best[g][end], previous[g][end] = total, start
    used = min(range(1, groups + 1), key=lambda g: best[g][count])
    starts, end = [], count
    for g in range(used, 0, -1):
        end = previous[g][end]
        starts.append(end)
    return starts[::-1]
