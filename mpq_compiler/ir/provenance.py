"""The provenance of each layer's plan: the record of what passes measured and decided, in dumps and artifacts.

A pass records its decisions with `note`, for a layer (the parameter's path) or, with the layer `PROGRAM`, for all
layers. Fractions have six significant digits, and times are never recorded. `mpqc inspect --why` reads the record.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypedDict

from torch import Tensor

from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.program import Program

VERSION = 1
"""The version of the record's format."""
PROGRAM = ""
"""The layer that stands for the whole program."""
Said = dict[str, dict[str, Any]]
"""The decisions on something, by pass."""
DECISIONS = Fact[dict[str, Said]]("decisions")
"""The record, by layer and pass."""
_DIGITS = 6


class Decisions(TypedDict):
    """The record as a document (schemas/decisions.json)."""

    version: int
    model: str
    program: Said
    """The decisions on the whole program, by pass."""
    layers: dict[str, Said]
    """The decisions on each layer, by parameter and pass."""
    fallbacks: dict[str, str]
    """The reason of each float leftover, by node or weight."""


def note(program: Program, layer: str, step: str, **what: Any) -> None:
    """Records decisions of a pass on a layer; equal keys are replaced.

    Args:
        program: keeps the record.
        layer: the parameter's path, or `PROGRAM`.
        step: the name of the pass.
        what: numbers, strings, booleans, None, tensors, or lists and dicts of them.
    """
    known = program.facts.get(DECISIONS, {})
    own = known.get(layer, {})
    entry = {**own.get(step, {}), **{key: plain(value) for key, value in what.items()}}
    program.facts[DECISIONS] = {**known, layer: {**own, step: entry}}


def plain(value: Any) -> Any:
    """Converts a value to JSON's types, floats to six significant digits; whole numbers, such as budgets, stay."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if isinstance(value, float) and not value.is_integer():
        return float(f"{value:.{_DIGITS}g}")
    if value is None or isinstance(value, bool | str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    return [plain(v) for v in value]


def boundaries(program: Program) -> list[float] | None:
    """The time-group boundaries that were decided, whatever became of them later; None before there are any."""
    passes = program.facts.get(DECISIONS, {}).get(PROGRAM, {}).values()
    return next((said["decided"] for said in passes if "decided" in said), None)


def document(program: Program, kernels: Mapping[str, Any] | None = None) -> Decisions:
    """The whole record as a JSON document; ``kernels`` adds the backend's description of each layer."""
    known = program.facts.get(DECISIONS, {})
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
