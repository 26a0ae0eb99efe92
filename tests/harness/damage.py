"""Damage to bytes and to JSON documents, the same for the same source of chance."""

from __future__ import annotations

import json
import random

Json = dict[str, "Json"] | list["Json"] | str | int | float | bool | None
VALUES: tuple[Json, ...] = (
    *(None, True, False, 0, 1, -1, 2**31, 2**63, -(2**63), 10**30, 0.5, -0.0, 1e308, 3e38),
    *("", "x", "../x", "/etc/passwd", "\0", "float16", "float32", "uint8", "é" * 200, "9" * 400),
    *([], {}, [[]] * 50, {"x": {}}, [0], [1, 1], [2**40], ["x"]),
)
"""What takes the place of something else."""
ODD = (-1, 0, 1, 2, 11, 63, 1 << 20, 1 << 40, -(1 << 62), (1 << 63) - 1)
"""Numbers that an instruction of a pipeline's program should not have."""
MARKS = ("=", ",", "{", "}", "[", "]", '"', "'", "#", "\n", "-1", "1e99", "nan", "x", "true", "é", "")


def damaged(content: bytes, chance: random.Random) -> bytes:
    """The content with bits or bytes changed, removed, doubled, exchanged or added; perhaps as it was."""
    if not content:
        return chance.randbytes(chance.randint(1, 40))
    at, to = sorted(chance.randrange(len(content) + 1) for _ in range(2))
    spot, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
    return chance.choice([
        content[:spot] + bytes([content[spot] ^ bit]) + content[spot + 1 :],
        content[:spot] + bytes([chance.randrange(256)]) + content[spot + 1 :],
        content[:spot],
        content[:to] + content[at:],
        content[:at] + content[to:],
        content[:at] + chance.randbytes(min(to - at, 64)) + content[at + min(to - at, 64) :],
        content[:at] + b"\0" * (to - at) + content[to:],
        content + chance.randbytes(chance.randint(1, 40)),
        content[: chance.choice([0, 1, 8, len(content) // 2])],
        b"",
    ])  # fmt: skip


def words(content: bytes, chance: random.Random) -> bytes:
    """Text with words, numbers and marks changed, which stays near to what its language allows."""
    text = content.decode()
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(text) + 1)
        text = text[:at] + chance.choice(MARKS) + text[at + chance.choice([0, 1, 1, 4]) :]
    return text.encode()


def text_of(document: Json, chance: random.Random) -> bytes:
    """JSON of the document with values changed, now and then nested as deeply as nobody writes it."""
    text = json.dumps(changed(document, chance))
    if chance.random() < 0.03:
        deep = chance.choice(['{"a":', "["]) * 100_000
        text = chance.choice([deep, text[:-1] + ',"x":' + deep, text.replace(": ", ": " + deep, 1)])
    return text.encode()


def changed(document: Json, chance: random.Random) -> Json:
    """The document with one to three values changed, removed, doubled, exchanged or nested."""
    copy: Json = json.loads(json.dumps(document))
    for _ in range(chance.choice([1, 1, 1, 2, 3])):
        copy = _changed(copy, chance)
    return copy


def _changed(document: Json, chance: random.Random) -> Json:
    places = [*_places(document)]
    if not places:
        return chance.choice(VALUES)
    holder, key = chance.choice(places)
    value = holder[key]  # type: ignore[call-overload, index]
    kind = chance.randrange(8)
    if kind == 0:
        del holder[key]  # type: ignore[arg-type]
    elif kind == 1:
        other, at = chance.choice(places)
        holder[key] = json.loads(json.dumps(other[at])) if at in _keys(other) else None  # type: ignore
    elif kind == 2 and isinstance(value, list):
        holder[key] = value + value if chance.random() < 0.5 else value[::-1]  # type: ignore
    elif kind == 3 and isinstance(value, int | float) and not isinstance(value, bool):
        holder[key] = chance.choice([value + 1, value - 1, -value, value * 2, value * 1000, float(value)])  # type: ignore
    elif kind == 4 and isinstance(value, str) and value:
        holder[key] = damaged(value.encode(), chance).decode(errors="replace")  # type: ignore
    elif kind == 5:
        for _ in range(chance.choice([1, 3, 60])):
            value = [value]
        holder[key] = value  # type: ignore
    elif kind == 6 and isinstance(holder, dict):
        holder[chance.choice(["x", str(key) + "x", ""])] = chance.choice(VALUES)
    else:
        holder[key] = chance.choice(VALUES)  # type: ignore
    return document


def _keys(holder: Json) -> list[object]:
    return [*holder] if isinstance(holder, dict) else [*range(len(holder))] if isinstance(holder, list) else []


def _places(document: Json) -> list[tuple[Json, object]]:
    """Every value within a document, by what holds it and its key."""
    found: list[tuple[Json, object]] = []
    for key in _keys(document):
        found += [(document, key), *_places(document[key])]  # type: ignore
    return found
