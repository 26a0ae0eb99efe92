"""The `View` of a program that all rules read, and their form: `Rule` and `Rules`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats import base as formats_base
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import ActivationPlan, Program, Stage
from mpq_compiler.ir.views import Call, Layer, Levels, Quantizer, stored
from mpq_compiler.support.errors import UserError

BATCHES = (2, 3)
"""The batch sizes at which shapes are compared."""
ALL = frozenset(Stage)
CHANNELS_LAST = ALL - {Stage.FLOAT}
PLANNED = frozenset({Stage.PLANNED, Stage.FAKE_QUANTIZED, Stage.PACKED})
QUANTIZED = frozenset({Stage.FAKE_QUANTIZED, Stage.PACKED})
PACKED = frozenset({Stage.PACKED})
SIMULATED = frozenset({Stage.FAKE_QUANTIZED})
Findings = Iterator[tuple[str, str]]
"""(node name, what is wrong), one for each violation."""


@dataclass(frozen=True)
class Rule:
    """A named property of programs and the stages that it holds in; ``structural`` rules are asked first."""

    name: str
    stages: frozenset[Stage]
    structural: bool
    check: Callable[[View], Findings]


class Rules(list[Rule]):
    """The rules of one subject, in the order in which they are asked."""

    def add(
        self, name: str, stages: frozenset[Stage] = ALL, structural: bool = False
    ) -> Callable[[Callable[[View], Findings]], Callable[[View], Findings]]:
        """Decorator that appends a generator of findings as a rule."""

        def append(check: Callable[[View], Findings]) -> Callable[[View], Findings]:
            self.append(Rule(name, stages, structural, check))
            return check

        return append


@dataclass(frozen=True)
class Branch:
    """A binary branch, by store names, and the base it is added to."""

    call: Call
    base: Levels | None
    signs: str | None
    scale: str | None
    alpha: str | None


class View:
    """A program and its properties that rules ask for, each computed once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.nodes: list[fx.Node] = list(program.graph.nodes)

    @cached_property
    def calls(self) -> list[Call]:
        return views.flatten(self.program)

    @cached_property
    def levels(self) -> list[Levels]:
        return views.levels_of(self.calls)

    @cached_property
    def quantizers(self) -> list[Quantizer]:
        return views.quantizers_of(self.calls)

    @cached_property
    def static_plans(self) -> list[tuple[str, ActivationPlan]]:
        """(edge, plan) of the activation plans that have tables."""
        return [(edge, plan) for edge, plan in self.program.activations.items() if plan.scale is not None]

    @cached_property
    def layers(self) -> list[Layer]:
        return views.layers_of(self.calls)

    @cached_property
    def paths(self) -> dict[str, str]:
        """Linear and conv2d call -> the parameter it multiplies with."""
        levels = {found.call.name: found for found in self.levels}
        named = {call.name: views.weight_path(call, levels) for call in self.calls}
        return {name: path for name, path in named.items() if path is not None}

    def format(self, path: str) -> formats_base.Format | None:
        """The planned format of a weight; None without a plan or such a format."""
        plan = self.program.weights.get(path)
        try:
            return None if plan is None else formats.get(plan.format)
        except UserError:
            return None

    def computes_in_float(self, path: str) -> bool:
        """Whether the planned format has no integer kernel."""
        planned = self.format(path)
        return planned is not None and not planned.integer

    @cached_property
    def branches(self) -> list[Branch]:
        made = {levels.call.name: levels for levels in self.levels}
        added: dict[str, Levels | None] = {}
        for call in self.calls:
            if call.target is aten.add.Tensor:
                left, right = (getattr(a, "name", "") for a in call.args[:2])
                added[right] = made.get(left)
        return [
            Branch(call, added.get(call.name), stored(call.args[0]), stored(call.args[1]), stored(call.args[2]))
            for call in self.calls
            if call.target is ops.binary_branch
        ]

    @cached_property
    def shapes(self) -> dict[int, dict[str, Any]] | str:
        """Batch size -> node -> meta tensor, or why they do not fit."""
        found = {}
        for batch in BATCHES:
            try:
                found[batch] = shapes(self.program, batch)
            except Exception as error:
                reason = str(error).strip().splitlines()
                return f"at batch {batch} its shapes do not fit: {reason[0] if reason else type(error).__name__}"
        return found

    @cached_property
    def boundaries(self) -> Tensor | None:
        groups = [n for n in self.nodes if n.target is ops.time_group]
        name = stored(groups[0].args[1]) if groups else None
        return None if name is None else self.tensor(name)

    @cached_property
    def reads(self) -> list[tuple[str, str]]:
        """(node, store name) of everything the graph reads."""
        return [(n.name, str(n.target)) for n in self.nodes if n.op == "get_attr"]

    def tensor(self, name: str) -> Tensor:
        return self.program.tensors[name]
