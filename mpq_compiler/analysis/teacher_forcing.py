"""A program run with the inputs of every node forced to known values: what each node does wrong by itself.

Errors that a node inherits are not seen, because what it reads is right. Values of one node before and after a pass
are compared by the node's name; what has no counterpart is computed from what it reads.
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
"""Channels that are named of those in which a value departs."""
ROUNDING = 1e-5
"""Of the largest magnitude: what f32 rounding may change (docs/ir.md, contract of a rewrite)."""


@dataclass(frozen=True)
class Departure:
    """How a value departs from the known one; all zero where no bit does."""

    largest: float = 0.0
    """``max|y - y'| / max|y'|`` of floats, ``max|y - y'|`` of integers; infinite where y is not finite and y' is."""
    noise: float = 0.0
    """``sum (y - y')^2 / sum y'^2``"""
    share: float = 0.0
    """Of the elements that differ."""
    channels: tuple[int, ...] = ()
    """The first channels (last dimension) in which floats depart by more than `ROUNDING`, integers at all."""
    departing: int = 0
    """How many channels do."""


def departure(known: Tensor, value: Tensor) -> Departure:
    """How ``value`` departs from ``known``, a tensor of the same shape."""
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


def always(node: fx.Node, found: Departure) -> bool:
    return True


class Forced(Interpreter):
    """Runs ``program``; each value that has a counterpart in ``known`` is compared, and replaced where ``force`` says.

    channels_first: whether ``known`` is from before `layout`, and the program is not.
    """

    def __init__(
        self,
        program: Program,
        known: Mapping[str, Any],
        force: Force = always,
        channels_first: bool = False,
    ) -> None:
        super().__init__(program)
        self.known, self.force, self.channels_first = known, force, channels_first
        self.departures: dict[str, Departure] = {}
        """By node, in the order in which they are made."""
        self.values: dict[str, Any] = {}
        """As computed or forced."""
        self.contaminated: dict[str, bool] = {}
        """Whether a value that was not forced though it departed has gone into it."""

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
    """``known`` in the form of ``value``: codes as codes, channels last; None where they are not the same thing.

    channels_first: whether ``known`` is from before `layout`. Of a tensor with equal sides several forms may fit: it is
    the one that agrees.
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
    """What `layout` may make of a tensor, the likeliest first."""
    if known.dim() == 4:
        yield known.permute(0, 2, 3, 1)
        major = known.permute(0, 2, 1, 3)  # heads of an attention, [B, H, T, D] as [B, T, H*D]
        yield major.reshape(*major.shape[:2], -1)
    yield known
    if known.dim() == 3:
        yield known.permute(0, 2, 1)


def roots(program: Program, contaminated: Mapping[str, bool]) -> list[str]:
    """The nodes where the contamination that reaches the output begins, in graph order; empty where it all healed."""
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
