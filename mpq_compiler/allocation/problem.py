"""The allocation problem: layers, choices, budgets, ties, links; read from JSON and checked, without torch."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from mpq_compiler import schemas
from mpq_compiler.support.errors import BudgetError, UserError, nearest
from mpq_compiler.support.files import decode_json

GAP = 1e-6
"""The relative gap at which a solution counts as optimal."""


@dataclass(frozen=True)
class Choice:
    """One way to treat a layer: its loss, its costs by name, and attributes that links compare."""

    name: str
    loss: float
    costs: Mapping[str, float] = field(default_factory=dict)
    attributes: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Layer:
    """A layer and its choices; a budget may be on the layers of one `group`."""

    name: str
    choices: tuple[Choice, ...]
    group: str = ""


@dataclass(frozen=True)
class Budget:
    """A constraint: the sum of `cost` over all layers, or over those of `group`, is at most `max`."""

    cost: str
    max: float
    group: str | None = None

    def __str__(self) -> str:
        return f"{self.cost} of group '{self.group}'" if self.group is not None else self.cost


@dataclass(frozen=True)
class Link:
    """A constraint: the choices of all `layers` have the same value of `attribute`."""

    layers: tuple[str, ...]
    attribute: str


@dataclass(frozen=True)
class Problem:
    """A checked allocation problem; names that do not fit together raise a UserError."""

    layers: tuple[Layer, ...]
    budgets: tuple[Budget, ...] = ()
    ties: tuple[tuple[str, ...], ...] = ()
    fixed: Mapping[str, str] = field(default_factory=dict)
    links: tuple[Link, ...] = ()

    def __post_init__(self) -> None:
        _check_names(self)

    @classmethod
    def from_json(cls, value: Any) -> Problem:
        """The problem that a decoded JSON document describes. UserError: a key is wrong; the sentence names it."""
        return _parse(value)

    @classmethod
    def load(cls, path: str | Path) -> Problem:
        """Reads the problem in a JSON file. UserError: it cannot be read, or a key is wrong."""
        value = _read(path)
        try:
            return _parse(value)
        except UserError as error:
            raise UserError(f"in '{path}': {error}") from error

    def to_json(self) -> dict[str, Any]:
        """The JSON document from which `from_json` makes an equal problem."""
        return {
            "version": 1,
            "layers": [
                {
                    "name": layer.name,
                    "group": layer.group,
                    "choices": [
                        {
                            "name": choice.name,
                            "loss": choice.loss,
                            "costs": dict(choice.costs),
                            **({"attributes": dict(choice.attributes)} if choice.attributes else {}),
                        }
                        for choice in layer.choices
                    ],
                }
                for layer in self.layers
            ],
            "budgets": [
                {"cost": b.cost, "max": b.max, **({} if b.group is None else {"group": b.group})} for b in self.budgets
            ],
            "ties": [list(tie) for tie in self.ties],
            "fixed": dict(self.fixed),
            "links": [{"layers": list(link.layers), "attribute": link.attribute} for link in self.links],
        }


@dataclass(frozen=True)
class Solution:
    """One choice per layer that meets all budgets."""

    choices: dict[str, str]
    objective: float
    """The summed loss."""
    costs: dict[str, float]
    """The sum of every cost over all layers."""
    gap: float
    """How far the objective may be above the optimum, relative to its distance from the sum of all least losses.

    Unlike a gap relative to the objective itself, it does not change when a constant is added to all losses.
    """
    optimal: bool
    """Whether `gap` is as small as was asked for; False when the time ran out first."""

    def to_json(self) -> dict[str, Any]:
        """The solution as a JSON document (schemas/allocation-solution.json)."""
        return {
            "optimal": self.optimal,
            "objective": self.objective,
            "choices": self.choices,
            "costs": self.costs,
            "gap": self.gap,
        }


class InfeasibleError(BudgetError):
    """No allocation meets all budgets.

    `least` has the least feasible value of each budget given the others; None where the others alone are infeasible.
    """

    def __init__(self, message: str, least: Mapping[Budget, float | None]) -> None:
        super().__init__(message)
        self.least = dict(least)


# Reading


def load_plan(path: str | Path) -> dict[str, str]:
    """Reads the choices of the solution in a JSON file, as `mpqc allocate -o` writes it. UserError: it is none."""
    value = _read(path)
    if fault := schemas.check(value, "allocation-solution"):
        raise UserError(f"'{path}' is no plan as `mpqc allocate -o` writes it: {fault}")
    assert isinstance(value, dict)
    choices: dict[str, str] = value["choices"]
    return choices


def _read(path: str | Path) -> object:
    try:
        return decode_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read '{path}': {error.strerror}") from error
    except ValueError as error:
        raise UserError(f"'{path}' is not valid JSON: {error}") from error


def _parse(value: Any) -> Problem:
    if fault := schemas.check(value, "allocation-problem"):
        raise UserError(f"the allocation problem is malformed: {fault}")
    return Problem(
        layers=tuple(
            Layer(
                layer["name"],
                tuple(
                    Choice(choice["name"], choice["loss"], choice["costs"], choice.get("attributes", {}))
                    for choice in layer["choices"]
                ),
                layer.get("group", ""),
            )
            for layer in value["layers"]
        ),
        budgets=tuple(Budget(b["cost"], b["max"], b.get("group")) for b in value.get("budgets", [])),
        ties=tuple(tuple(tie) for tie in value.get("ties", [])),
        fixed=value.get("fixed", {}),
        links=tuple(Link(tuple(link["layers"]), link["attribute"]) for link in value.get("links", [])),
    )


def _finite(value: float, key: str) -> None:
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        finite = False
    if not finite:
        raise UserError(f"'{key}' must be a finite number")


def _check_names(problem: Problem) -> None:
    layers: dict[str, Layer] = {}
    for i, layer in enumerate(problem.layers):
        if layer.name in layers:
            raise UserError(f"layers[{i}].name '{layer.name}' is the name of an earlier layer too")
        if not layer.choices:
            raise UserError(f"layers[{i}].choices of '{layer.name}' is empty")
        for k, option in enumerate(layer.choices):
            _finite(option.loss, f"layers[{i}].choices[{k}].loss")
            for cost, value in option.costs.items():
                _finite(value, f"layers[{i}].choices[{k}].costs.{cost}")
        names = [choice.name for choice in layer.choices]
        if len(set(names)) != len(names):
            twice = next(name for name in names if names.count(name) > 1)
            raise UserError(f"layers[{i}].choices of '{layer.name}' has two choices named '{twice}'")
        layers[layer.name] = layer

    def known(name: str, key: str) -> Layer:
        if name not in layers:
            raise UserError(
                f"{key} names the unknown layer '{name}'" + (f"; {nearest(name, layers)}" if layers else "")
            )
        return layers[name]

    for i, tie in enumerate(problem.ties):
        for name in tie:
            known(name, f"ties[{i}]")
    for name, choice in problem.fixed.items():
        names = [c.name for c in known(name, "fixed").choices]
        if choice not in names:
            raise UserError(f"fixed.{name} is the unknown choice '{choice}'; {nearest(choice, names)}")
    for i, link in enumerate(problem.links):
        for name in link.layers:
            for option in known(name, f"links[{i}].layers").choices:
                if link.attribute not in option.attributes:
                    raise UserError(
                        f"links[{i}].attribute is '{link.attribute}', "
                        f"which the choice '{option.name}' of '{name}' lacks"
                    )
    for i, budget in enumerate(problem.budgets):
        _finite(budget.max, f"budgets[{i}].max")
        members = [layer for layer in problem.layers if budget.group in (None, layer.group)]
        if not members and problem.layers:
            groups = {layer.group for layer in problem.layers if layer.group}
            raise UserError(f"budgets[{i}].group '{budget.group}' has no layers; {nearest(str(budget.group), groups)}")
        for layer in members:
            for option in layer.choices:
                if budget.cost not in option.costs:
                    raise UserError(
                        f"budgets[{i}].cost is '{budget.cost}', "
                        f"which the choice '{option.name}' of '{layer.name}' lacks"
                    )
