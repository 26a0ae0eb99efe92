"""Why each layer is as it is: what passes found out and chose, written with dumps and artifacts.

A pass leaves what it decided with `note`, by layer (the parameter's path) or, with the layer `PROGRAM`, for all of
them. What every pass of its kind decides is noted here, by `observe`, after the pass. Numbers have six significant
digits; times have no place here. `mpqc inspect --why` reads it back.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpq_compiler.ir.program import Program

VERSION = 1
PROGRAM = ""
"""The layer that stands for all."""
KEY = "decisions"
_DIGITS = 6


def note(program: Program, layer: str, step: str, **what: Any) -> None:
    """Adds what the pass ``step`` decided of a layer; equal keys are replaced.

    Values are numbers, strings, booleans, None, or lists and dicts of them.
    """
    known: Mapping[str, Any] = program.facts.get(KEY, {})
    own = known.get(layer, {})
    entry = {**own.get(step, {}), **{key: plain(value) for key, value in what.items()}}
    program.facts[KEY] = {**known, layer: {**own, step: entry}}


def plain(value: Any) -> Any:
    """A value as JSON holds it."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, bool) or value is None or isinstance(value, str | int):
        return value
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value]


def boundaries(program: Program) -> list[float] | None:
    """The time-group boundaries that were decided on, whatever became of them; None before there are any."""
    passes = program.facts.get(KEY, {}).get(PROGRAM, {}).values()
    return next((said["decided"] for said in passes if "decided" in said), None)


def document(program: Program, kernels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Everything that was decided, as it is written; ``kernels`` by layer is what the backend says."""
    known = program.facts.get(KEY, {})
    found = {layer: dict(passes) for layer, passes in known.items()}
    for layer, said in (kernels or {}).items():
        found.setdefault(layer, {})["backend"] = plain(said)
    whole = found.pop(PROGRAM, {})
    return {
        "version": VERSION,
        "model": program.model,
        "program": whole,
        "layers": found,
        "fallbacks": dict(sorted(program.fallbacks.items())),
    }


def encode(found: Mapping[str, Any]) -> bytes:
    return (json.dumps(found, separators=(",", ":"), allow_nan=False) + "\n").encode()
