from __future__ import annotations

import pytest

from mpq_compiler import schemas

SCHEMA = {
    "type": "object",
    "required": ["version"],
    "additionalProperties": False,
    "properties": {
        "version": {"const": 1},
        "kind": {"enum": ["a", "b"]},
        "name": {"type": "string", "pattern": "^[a-z]+$"},
        "count": {"type": ["integer", "null"], "minimum": 0, "maximum": 9},
        "rows": {"type": "array", "minItems": 1, "items": {"$ref": "#/$defs/row"}},
        "tags": {"type": "object", "additionalProperties": {"type": "number"}},
        "either": {"anyOf": [{"type": "string"}, {"type": "boolean"}]},
    },
    "$defs": {"row": {"type": "object", "required": ["x"], "additionalProperties": True}},
}


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        ({"version": 1}, None),
        ({"version": 1, "kind": "b", "name": "q", "count": None, "rows": [{"x": 1, "y": 2}]}, None),
        ({"version": 1, "tags": {"a": 1.5, "b": 2}, "either": True}, None),
        ([], "the document must be object"),
        ({}, "the document lacks 'version'"),
        ({"version": 2}, "'version' must be 1"),
        ({"version": 1, "kind": "c"}, "'kind' must be one of a, b"),
        ({"version": 1, "name": "Q"}, "'name' must match ^[a-z]+$"),
        ({"version": 1, "count": True}, "'count' must be integer or null"),
        ({"version": 1, "count": -1}, "'count' must be at least 0"),
        ({"version": 1, "count": 10}, "'count' must be at most 9"),
        ({"version": 1, "rows": []}, "'rows' must have at least 1 items"),
        ({"version": 1, "rows": [{"x": 1}, {}]}, "'rows[1]' lacks 'x'"),
        ({"version": 1, "tags": {"a": "b"}}, "'tags.a' must be number"),
        ({"version": 1, "either": 3}, "'either' must be string or 'either' must be boolean"),
        ({"version": 1, "other": 3}, "the document has an unknown key 'other'"),
    ],
)
def test_check_names_the_first_departure(monkeypatch, document, problem):
    monkeypatch.setattr(schemas, "schema", lambda name: SCHEMA)
    assert schemas.check(document, "any") == problem


def test_an_unknown_keyword_is_refused_rather_than_ignored(monkeypatch):
    monkeypatch.setattr(schemas, "schema", lambda name: {"maxItems": 3})
    with pytest.raises(ValueError, match="'maxItems' is not supported"):
        schemas.check(1, "any")
