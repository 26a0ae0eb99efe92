"""Which steps reuse what, decided by the same program as the bits.

A layer that some steps leave out takes so much less time an image: time is then a product of two choices, the layer's
format and the steps that compute it. It depends on the second by the number of steps that reuse alone. For each cut of
the network and each such number, with the steps that lose least, the problem is a multiple-choice program again; the
least of their optima is that of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from mpq_compiler.analysis.reuse_losses import Gap, ReuseLosses
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.findings import FormatCosts, SensitivityTable
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.reuse import Cut
from mpq_compiler.pipeline.session import Times

Document = dict[str, Any]
"""A problem as JSON (schemas/allocation-problem.json)."""
GROUP, STEPS = "reuse", "steps"
"""The group of the choice which steps reuse, and its name among the layers."""
COMPUTED = "computed"
"""Its cost: the steps that compute all."""


@dataclass(frozen=True)
class Inside:
    """What a step leaves out that reuses the value of a cut."""

    layers: frozenset[str]
    """By the path of the parameter."""
    fixed: float
    """Microseconds that no format changes."""

    @classmethod
    def of(cls, cut: Cut, times: Times, program: Program) -> Inside:
        """What is inside of a cut, with the times of a call."""
        sites: dict[str, list[str]] = {}
        for node in program.quantizable:
            sites.setdefault(str(weight_path(node)), []).append(node.name)
        layers = frozenset(path for path, names in sites.items() if cut.inside.issuperset(names))
        return cls(layers, sum(spent for node, spent in times.nodes.items() if node in cut.inside))

    def saved(self, times: Times, formats: Mapping[str, str]) -> float:
        """Microseconds of a step that reuses, less than those of one that computes all."""
        return self.fixed + sum(times.layers[path][formats[path]] for path in self.layers)


@dataclass(frozen=True)
class Candidate:
    """A cut, and how many steps reuse its value, at least."""

    losses: ReuseLosses
    cut: Cut
    inside: Inside
    count: int
    ladder: Mapping[int, tuple[float, tuple[Gap, ...]]]
    """The least loss of every number of steps that reuse, and the gaps that have it."""

    @property
    def least(self) -> float:
        """The least loss of so many."""
        return self.ladder[self.count][0]

    @property
    def share(self) -> float:
        """The share of the steps that reuse."""
        return self.count / len(self.losses.timesteps)

    def table(self, table: SensitivityTable) -> SensitivityTable:
        """The table with the times of a step on average."""
        layers = [
            layer | {"formats": {name: self._averaged(costs) for name, costs in layer["formats"].items()}}
            if layer["name"] in self.inside.layers
            else layer
            for layer in table["layers"]
        ]
        fixed = table["fixed_microseconds"] - self.share * self.inside.fixed
        return {**table, "layers": layers, "fixed_microseconds": fixed}

    def _averaged(self, costs: FormatCosts) -> FormatCosts:
        """The costs of a format of a layer inside; of formats that were not measured there is no time."""
        if "microseconds" not in costs:
            return costs
        return costs | {"microseconds": costs["microseconds"] * (1 - self.share)}

    def added(self, problem: Document) -> Document:
        """The problem of bits with the steps among its layers."""
        none = dict.fromkeys((budget["cost"] for budget in problem["budgets"]), 0.0)
        steps = len(self.losses.timesteps)
        choices = [
            {"name": str(count), "loss": loss, "costs": none | {COMPUTED: steps - count}}
            for count, (loss, _) in self.ladder.items()
        ]
        layer = {"name": STEPS, "group": GROUP, "choices": choices}
        most = {"cost": COMPUTED, "max": steps - self.count, "group": GROUP}
        return {**problem, "layers": [*problem["layers"], layer], "budgets": [*problem["budgets"], most]}

    def loss(self, choices: Mapping[str, str]) -> float:
        """The summed loss of what a solution has steps reuse."""
        return self.ladder[int(choices[STEPS])][0]

    def chosen(self, choices: Mapping[str, str]) -> tuple[Gap, ...]:
        """The gaps that a solution chose."""
        return self.ladder[int(choices[STEPS])][1]


def candidates(losses: ReuseLosses, times: Times, program: Program) -> Iterator[Candidate]:
    """The cuts with each number of steps that can reuse, for each cut the most first."""
    for cut, measured in losses.losses.items():
        inside, ladder = Inside.of(cut, times, program), ladder_of(measured, len(losses.timesteps))
        for count in sorted(ladder, reverse=True):
            if count:
                yield Candidate(losses, cut, inside, count, ladder)


def ladder_of(losses: Mapping[Gap, float], steps: int) -> dict[int, tuple[float, tuple[Gap, ...]]]:
    """The least summed loss of every number of steps that reuse, with the gaps that have it: a shortest path."""
    behind: dict[int, list[tuple[Gap, float]]] = {}
    for gap, loss in losses.items():
        behind.setdefault(gap.begin, []).append((gap, loss))
    best: list[dict[int, tuple[float, tuple[Gap, ...]]]] = [{} for _ in range(steps + 1)]
    best[0][0] = (0.0, ())
    for step in range(steps):
        for count, (loss, gaps) in best[step].items():
            for gap, more in ((Gap(step, 0), 0.0), *behind.get(step, ())):
                found = loss + more, (*gaps, gap) if gap.length else gaps
                there = best[gap.end]
                there[count + gap.length] = min(there.get(count + gap.length, found), found)
    return best[steps]
