"""Makes passes of options, which are checked against their declared types."""

from __future__ import annotations

import dataclasses
import typing
from types import UnionType
from typing import Any

from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.registry import find
from mpq_compiler.support.errors import UserError, nearest


def make(name: str, options: dict[str, Any]) -> Pass:
    """Makes the pass called ``name`` with options. UserError: an unknown pass or option, or a value of another type."""
    cls = find(name)
    hints = typing.get_type_hints(cls)
    known = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    values = {}
    for key, value in options.items():
        key = key.replace("-", "_")
        if key not in known:
            hint = nearest(key, known) if known else "it has none"
            raise UserError(f"pass '{name}' has no option '{key}': {hint}")
        values[key] = _convert(value, known[key], f"option '{key}' of pass '{name}'")
    return cls(**values)


def _convert(value: Any, expected: Any, where: str) -> Any:
    alternatives = typing.get_args(expected) if isinstance(expected, UnionType) else (expected,)
    if typing.get_origin(expected) is typing.Literal:
        choices = typing.get_args(expected)
        if value not in choices:
            raise UserError(f"{where} is '{value}': {nearest(str(value), map(str, choices))}")
        return value
    if type(None) in alternatives and value in (None, "none"):
        return None
    for kind in alternatives:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, list | tuple | str):
            parts = value.split("/") if isinstance(value, str) else value
            inner = typing.get_args(kind)[0]
            return tuple(_convert(p, inner, where) for p in parts)
        if origin is bool and str(value).lower() in ("true", "false"):
            return str(value).lower() == "true"
        if origin is int and isinstance(value, float) and not value.is_integer():
            continue  # int() would cut it
        if origin in (int, float, str) and not isinstance(value, bool | list | dict):
            try:
                return origin(value)
            except (TypeError, ValueError):
                continue
    names = " or ".join("none" if k is type(None) else getattr(k, "__name__", str(k)) for k in alternatives)
    raise UserError(f"{where} must be {names}, not '{value}'")
