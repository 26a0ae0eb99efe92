"""Teacher forcing: runs a program with every node's inputs forced to known values, to see the errors of each alone.

A node inherits no error, because the values that it reads are right. The values of a node before and after a pass are
compared by the node's name. A node without a counterpart is computed from what it reads.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir.exact_interpreter import Codes
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program

CHANNELS = 4
"""The number of departing channels of a value that are named."""
ROUNDING = 1e-5
"""The change that f32 rounding may cause, relative to the largest magnitude (docs/ir.md, contract of a rewrite)."""


@dataclass(frozen=True)
class Departure:
    """How a value departs from the known one; all fields are zero where every bit agrees."""

    largest: float = 0.0
    """The largest error: ``max|y - y'| / max|y'|`` of floats, ``max|y - y'|`` of integers; infinite if not finite."""
    noise: float = 0.0
    """The relative noise power ``sum (y - y')^2 / sum y'^2``."""
    share: float = 0.0
    """The share of elements that differ."""
    channels: tuple[int, ...] = ()
    """The first channels (last dimension) in which floats depart by more than `ROUNDING`, or integers at all."""
    departing: int = 0
    """The number of such channels."""


def departure(known: Tensor, value: Tensor) -> Departure:
    """Compares ``value`` with ``known``, a tensor of the same shape."""
    if torch.equal(known, value):
        return Departure()
    exact = not (value.is_floating_point() and known.is_floating_point())
    difference = (value.to(torch.float32) - known.to(torch.float32)).abs()
    scale = 1.0 if exact else float(known.abs().max())
    broken = not bool(torch.isfinite(difference).all())
    differing = difference != 0
    rows = difference.reshape(-1, difference.shape[-1]) if difference.dim() else difference.reshape(1, 1)
    limit = 0.0 if exact else ROUNDING * scale
    channels = torch.nonzero(~(rows.amax(0) <= limit)).flatten()
    power = float(known.double().square().sum())
    error = float(difference.double().square().sum())
    return Departure(
        math.inf if broken or not scale else float(difference.max()) / scale,
        math.inf if broken or not power else error / power,
        float(differing.double().mean()),
        tuple(channels[:CHANNELS].tolist()),
        len(channels),
    )


Force = Callable[[fx.Node, Departure], bool]
"""Decides whether a node's value, given its departure, is replaced by the known one."""


def always(node: fx.Node, found: Departure) -> bool:
    """Forces every value."""
    return True


class Forced(Interpreter):
    """Runs a program, compares every value that has a counterpart among known ones, and replaces it where asked."""

    def __init__(
        self,
        program: Program,
        known: Mapping[str, Any],
        force: Force = always,
        channels_first: bool = False,
    ) -> None:
        """Prepares a run.

        Args:
            program: the program to run.
            known: the known values by node name.
            force: decides which values are replaced.
            channels_first: whether ``known`` is from before `layout`, and the program is not.
        """
        super().__init__(program)
        self.known, self.force, self.channels_first = known, force, channels_first
        self.departures: dict[str, Departure] = {}
        """The departure of each node with a counterpart, in the order of execution."""
        self.values: dict[str, Any] = {}
        """The value of each node, computed or forced."""
        self.contaminated: dict[str, bool] = {}
        """Whether a node's value depends on one that departed and was not forced."""

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        value = super().evaluate(node, env)
        if node.op == "call_function":
            value = self._judged(node, value)
            self.values[node.name] = value
        return value

    def _judged(self, node: fx.Node, value: Any) -> Any:
        inherited = any(self.contaminated.get(n.name, False) for n in node.all_input_nodes)
        known = counterpart(self.known.get(node.name), value, self.channels_first)
        if known is None:
            self.contaminated[node.name] = inherited
            return value
        found = self.departures[node.name] = departure(known, value)
        forced = self.force(node, found)
        self.contaminated[node.name] = not forced
        return known if forced else value


def counterpart(known: Any, value: Any, channels_first: bool = False) -> Tensor | None:
    """Converts ``known`` to the form of ``value``: codes as codes, channels last; None where none fits.

    Args:
        known: the known value.
        value: the computed value.
        channels_first: whether ``known`` is from before `layout`. Several layouts may fit a tensor with equal sides;
            the one whose values agree is taken.
    """
    if isinstance(known, Codes) and isinstance(value, Tensor):
        known = known.codes
    if not isinstance(known, Tensor) or not isinstance(value, Tensor):
        return None
    if known.is_floating_point() != value.is_floating_point():
        return None
    if not channels_first:
        return known if known.shape == value.shape else None
    forms = [form for form in _layouts(known) if form.shape == value.shape]
    return next((form for form in forms if departure(form, value).largest <= ROUNDING), forms[0] if forms else None)


def _layouts(known: Tensor) -> Iterator[Tensor]:
    """The layouts that `layout` may give a tensor, the likeliest first."""
    if known.dim() == 4:
        yield known.permute(0, 2, 3, 1)
        major = known.permute(0, 2, 1, 3)  # heads of an attention, [B, H, T, D] as [B, T, H*D]
        yield major.reshape(*major.shape[:2], -1)
    yield known
    if known.dim() == 3:
        yield known.permute(0, 2, 1)


def roots(program: Program, contaminated: Mapping[str, bool]) -> list[str]:
    """The nodes where contamination that reaches the output begins, in graph order; none where the output has none."""
    result = program.graph.output_node().args[0]
    pending = [n for n in (result if isinstance(result, tuple | list) else [result]) if isinstance(n, fx.Node)]
    found: set[str] = set()
    seen: set[fx.Node] = set()
    while pending:
        node = pending.pop()
        if node in seen or not contaminated.get(node.name, False):
            continue
        seen.add(node)
        sources = [n for n in node.all_input_nodes if contaminated.get(n.name, False)]
        if not sources:
            found.add(node.name)
        pending += sources
    return [n.name for n in program.graph.nodes if n.name in found]
