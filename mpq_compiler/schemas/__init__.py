"""The JSON schemas that ship with the package, and a validator for the part of JSON Schema they use.

The schemas are draft 2020-12 documents that any validator reads. This one knows type, const, enum, pattern,
minimum, maximum, minItems, items, properties, required, additionalProperties, anyOf and $ref to #/$defs, and refuses a
schema with any other keyword, so that nothing is silently left unchecked.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

_TYPES: dict[str, type | tuple[type, ...]] = {
    "object": dict,
    "array": list,
    "string": str,
    "boolean": bool,
    "integer": int,
    "number": (int, float),
    "null": type(None),
}
_ANNOTATIONS = {"$schema", "$id", "$defs", "title", "description"}


@cache
def schema(name: str) -> dict[str, Any]:
    """The schema `<name>.json` of this folder."""
    found: dict[str, Any] = json.loads((Path(__file__).parent / f"{name}.json").read_text(encoding="utf-8"))
    return found


def check(document: Any, name: str) -> str | None:
    """None when `document` obeys the schema `name`, else one clause: where it first departs, and how."""
    root = schema(name)
    return _check(document, root, root, "")


def _check(value: Any, rule: dict[str, Any], root: dict[str, Any], where: str) -> str | None:
    for keyword, argument in rule.items():
        if keyword in _ANNOTATIONS:
            continue
        if keyword not in _KEYWORDS:
            raise ValueError(f"schema keyword '{keyword}' is not supported")
        if problem := _KEYWORDS[keyword](value, argument, rule, root, where):
            return problem
    return None


def _is(value: Any, kind: str) -> bool:
    return isinstance(value, _TYPES[kind]) and not (isinstance(value, bool) and kind in ("integer", "number"))


def _type(value: Any, kinds: str | list[str], rule: Any, root: Any, where: str) -> str | None:
    kinds = [kinds] if isinstance(kinds, str) else kinds
    return None if any(_is(value, kind) for kind in kinds) else f"{_at(where)} must be {' or '.join(kinds)}"


def _const(value: Any, expected: Any, rule: Any, root: Any, where: str) -> str | None:
    return None if value == expected else f"{_at(where)} must be {expected!r}"


def _enum(value: Any, choices: list[Any], rule: Any, root: Any, where: str) -> str | None:
    return None if value in choices else f"{_at(where)} must be one of {', '.join(map(str, choices))}"


def _pattern(value: Any, pattern: str, rule: Any, root: Any, where: str) -> str | None:
    fits = not isinstance(value, str) or re.search(pattern, value)
    return None if fits else f"{_at(where)} must match {pattern}"


def _minimum(value: Any, least: float, rule: Any, root: Any, where: str) -> str | None:
    return f"{_at(where)} must be at least {least}" if _is(value, "number") and value < least else None


def _maximum(value: float, most: float, rule: object, root: object, where: str) -> str | None:
    return f"{_at(where)} must be at most {most}" if _is(value, "number") and value > most else None


def _min_items(value: Any, least: int, rule: Any, root: Any, where: str) -> str | None:
    short = isinstance(value, list) and len(value) < least
    return f"{_at(where)} must have at least {least} items" if short else None


def _items(value: Any, item: dict[str, Any], rule: Any, root: Any, where: str) -> str | None:
    if not isinstance(value, list):
        return None
    problems = (_check(element, item, root, f"{where}[{i}]") for i, element in enumerate(value))
    return next(filter(None, problems), None)


def _properties(value: Any, rules: dict[str, Any], rule: Any, root: Any, where: str) -> str | None:
    if not isinstance(value, dict):
        return None
    present = (key for key in rules if key in value)
    return next(
        filter(None, (_check(value[key], rules[key], root, f"{where}.{key}") for key in present)), None
    )


def _required(value: Any, keys: list[str], rule: Any, root: Any, where: str) -> str | None:
    if not isinstance(value, dict):
        return None
    return next((f"{_at(where)} lacks '{key}'" for key in keys if key not in value), None)


def _additional(value: Any, extra: Any, rule: dict[str, Any], root: Any, where: str) -> str | None:
    if not isinstance(value, dict) or extra is True:
        return None
    others = [key for key in value if key not in rule.get("properties", {})]
    if extra is False:
        return f"{_at(where)} has an unknown key '{others[0]}'" if others else None
    return next(filter(None, (_check(value[key], extra, root, f"{where}.{key}") for key in others)), None)


def _any_of(value: Any, rules: list[dict[str, Any]], rule: Any, root: Any, where: str) -> str | None:
    problems = [_check(value, choice, root, where) for choice in rules]
    return None if None in problems else " or ".join(problem for problem in problems if problem)


def _ref(value: Any, path: str, rule: Any, root: dict[str, Any], where: str) -> str | None:
    return _check(value, root["$defs"][path.removeprefix("#/$defs/")], root, where)


def _at(where: str) -> str:
    return f"'{where.removeprefix('.')}'" if where else "the document"


_KEYWORDS: dict[str, Callable[[Any, Any, Any, Any, str], str | None]] = {
    "type": _type,
    "const": _const,
    "enum": _enum,
    "pattern": _pattern,
    "minimum": _minimum,
    "maximum": _maximum,
    "minItems": _min_items,
    "items": _items,
    "properties": _properties,
    "required": _required,
    "additionalProperties": _additional,
    "anyOf": _any_of,
    "$ref": _ref,
}
