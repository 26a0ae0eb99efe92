"""JSON documents that strangers may have written: bounded before they are parsed, held against a schema at once.

A canonical form is written in Python, a thousand times as slow as parsing: nothing gets as far that the schema refuses.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, BinaryIO

from mpq_compiler import schemas
from mpq_compiler.support.files import decode_json

MOST_BYTES = 16 << 20
MOST_VALUES = 1 << 20
"""Values in arrays and objects; the manifest of a UNet of 420 M parameters has 30,000."""
MOST_LEVELS = 32


class Unsound(Exception):
    """What is wrong with a document, in a clause about it."""


def read(stream: BinaryIO) -> bytes:
    """The text of a document. Unsound: it is larger than any."""
    text = stream.read(MOST_BYTES + 1)
    if len(text) > MOST_BYTES:
        raise Unsound("is larger than any is")
    return text


def parse(text: bytes) -> dict[str, Any]:
    """The object that a text is. Unsound: it is none, or larger or deeper than any that is written here."""
    if sum(text.count(mark) for mark in (b",", b"[", b"{")) > MOST_VALUES:
        raise Unsound("holds more values than any does")
    try:
        document = decode_json(text)
    except ValueError as error:
        raise Unsound("is not JSON (truncated or altered)") from error
    if not isinstance(document, dict):
        raise Unsound("is no object")
    level: list[object] = [document]
    for _ in range(MOST_LEVELS):
        level = [child for each in level for child in _children(each)]
        if not level:
            return document
    raise Unsound("is nested deeper than any is")


def require(document: Mapping[str, object], schema: str) -> None:
    """Unsound: the document does not obey a schema of the package."""
    if problem := schemas.check(document, schema):
        raise Unsound(f"does not obey the schema ({problem})")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return [*value.values()]
    return value if isinstance(value, list) else []
