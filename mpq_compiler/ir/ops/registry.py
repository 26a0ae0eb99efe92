"""The table of `mpq::` operators: their printed names and the error that kernels may make."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar

_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Op:
    """Properties of an operator besides its meaning, which is its function."""

    name: str
    bound: float
    """Largest allowed ``max|y - y'| / max|y'|`` of a lowered kernel on the same inputs; 0 is bit-exact."""


OPS: dict[Callable[..., Any], Op] = {}
"""Operator function -> its properties; the functions are the targets of call nodes."""


def op(name: str, bound: float = 0.0) -> Callable[[_F], _F]:
    """Decorator that enters a function in `OPS` as ``mpq::name``; ``bound`` is that of `Op`."""

    def register(function: _F) -> _F:
        OPS[function] = Op(f"mpq::{name}", bound)
        return function

    return register


def name_of(target: Any) -> str:
    """Printed name of a call target: ``mpq::quantize`` or ``aten.silu.default`` without its default overload."""
    if target in OPS:
        return OPS[target].name
    return str(target).removesuffix(".default")
