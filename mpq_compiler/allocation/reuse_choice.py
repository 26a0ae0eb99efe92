"""Which steps reuse what, decided by the same program as the bits.

A layer that some steps leave out takes so much less time an image: time is then a product of two choices, the layer's
format and the steps that compute it. It depends on the second by the number of steps that reuse alone. For each cut of
the network and each such number the problem is a multiple-choice program again, in which the options of each stretch of
steps are one more choice; the least of their optima is that of all.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from mpq_compiler.analysis.reuse_losses import Option, ReuseLosses
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.findings import FormatCosts, SensitivityTable
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.reuse import Cut
from mpq_compiler.pipeline.session import Times

Document = dict[str, Any]
"""A problem as JSON (schemas/allocation-problem.json)."""
WHOLE = "whole"
"""The choice of a stretch all of whose steps compute all."""
GROUP = "reuse"
COMPUTED = "computed"
"""The cost of a stretch: its steps that compute all."""


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
    least: float
    """The least loss of so many."""
    options: Mapping[str, Mapping[str, Option]] = field(compare=False)
    """The options of each stretch, by the names of both in the problem."""

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
        """The problem of bits with the stretches among its layers."""
        none = dict.fromkeys((budget["cost"] for budget in problem["budgets"]), 0.0)
        layers = []
        for name, options in self.options.items():
            (begin, end) = self.losses.stretches[next(iter(options.values())).stretch]
            choices = [{"name": WHOLE, "loss": 0.0, "costs": none | {COMPUTED: end - begin}}]
            choices += [
                {
                    "name": text,
                    "loss": self.losses.losses[self.cut][option],
                    "costs": none | {COMPUTED: end - begin - self.losses.reused(option)},
                }
                for text, option in options.items()
            ]
            layers.append({"name": name, "group": GROUP, "choices": choices})
        most = {"cost": COMPUTED, "max": len(self.losses.timesteps) - self.count, "group": GROUP}
        return {**problem, "layers": [*problem["layers"], *layers], "budgets": [*problem["budgets"], most]}

    def loss(self, choices: Mapping[str, str]) -> float:
        """The summed loss of what a solution has steps reuse."""
        return sum(self.losses.losses[self.cut][option] for option in self.chosen(choices))

    def chosen(self, choices: Mapping[str, str]) -> list[Option]:
        """The options that a solution chose."""
        return [options[choices[name]] for name, options in self.options.items() if choices[name] != WHOLE]


def candidates(losses: ReuseLosses, times: Times, program: Program) -> Iterator[Candidate]:
    """The cuts with each number of steps that can reuse, for each cut the most first."""
    for cut, measured in losses.losses.items():
        inside = Inside.of(cut, times, program)
        options: dict[str, dict[str, Option]] = {}
        for option in measured:
            begin, end = losses.stretches[option.stretch]
            options.setdefault(f"steps {begin + 1} to {end}", {})[option.name] = option
        least = _least(losses, cut, list(options.values()))
        for count in range(len(least) - 1, 0, -1):
            yield Candidate(losses, cut, inside, count, least[count], options)


def _least(losses: ReuseLosses, cut: Cut, stretches: list[dict[str, Option]]) -> list[float]:
    """The least loss of at least so many steps that reuse, for each number of them."""
    best = [0.0]
    for options in stretches:
        found = {0: 0.0}
        for option in options.values():
            count = losses.reused(option)
            found[count] = min(found.get(count, float("inf")), losses.losses[cut][option])
        joined = [float("inf")] * (len(best) + max(found))
        for a, loss in enumerate(best):
            for b, more in found.items():
                joined[a + b] = min(joined[a + b], loss + more)
        best = joined
    for count in range(len(best) - 2, -1, -1):
        best[count] = min(best[count], best[count + 1])
    return best
