"""The provenance of each layer's plan: the record of what passes measured and decided, in dumps and artifacts.

A pass records its decisions with `note`, for a layer (the parameter's path) or, with the layer `PROGRAM`, for all
layers. Numbers have six significant digits, and times are never recorded. `mpqc inspect --why` reads the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from mpq_compiler.ir.program import Program

VERSION = 1
"""The version of the record's format."""
PROGRAM = ""
"""The layer that stands for the whole program."""
KEY = "decisions"
"""The program's fact that holds the record."""
_DIGITS = 6


def note(program: Program, layer: str, step: str, **what: Any) -> None:
    """Records decisions of a pass on a layer; equal keys are replaced.

    Args:
        program: keeps the record.
        layer: the parameter's path, or `PROGRAM`.
        step: the name of the pass.
        what: numbers, strings, booleans, None, tensors, or lists and dicts of them.
    """
    known: Mapping[str, Any] = program.facts.get(KEY, {})
    own = known.get(layer, {})
    entry = {**own.get(step, {}), **{key: plain(value) for key, value in what.items()}}
    program.facts[KEY] = {**known, layer: {**own, step: entry}}


def plain(value: Any) -> Any:
    """Converts a value to JSON's types, floats to six significant digits."""
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
    """The time-group boundaries that were decided, whatever became of them later; None before there are any."""
    passes = program.facts.get(KEY, {}).get(PROGRAM, {}).values()
    return next((said["decided"] for said in passes if "decided" in said), None)


def document(program: Program, kernels: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The whole record as a JSON document; ``kernels`` adds the backend's description of each layer."""
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
