"""Damaged safetensors files, the same for the same seed: what readers of such files are tried on.

>>> for what, data in mutants(seed=0, count=100, whole=path.read_bytes()): ...    # "offsets", the bytes
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator

Header = dict[str, dict[str, object]]
EDGES = (0, 1, 3, 7, 8, 1 << 31, 1 << 32, (1 << 63) - 8, 1 << 63, (1 << 64) - 8, (1 << 64) - 1)
TOKENS = (
    *(b"{", b"}", b"[", b"]", b":", b",", b'"', b"\\", b"\0", b"\xff", b"\xc0\x80", b"\\u0000", b"\\ud800", b"-1"),
    *(b"1e3", b"1.0", b"01", b"99999999999999999999999", b"null", b"true", b"NaN", b'"x":0,', b'"x":{},', b"[" * 3000),
    b'"__metadata__":{"a":"b","a":"c"},',
)


def joined(header: bytes, payload: bytes) -> bytes:
    return len(header).to_bytes(8, "little") + header + payload


def mutants(seed: int, count: int, whole: bytes) -> Iterator[tuple[str, bytes]]:
    """`count` changes of a sound file: what was changed, and the bytes. Some of them are sound too."""
    chance, size = random.Random(seed), 8 + int.from_bytes(whole[:8], "little")
    for _ in range(count):
        name = chance.choice([*KINDS])
        yield name, KINDS[name](chance, whole[8:size], whole[size:])


def _length(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    size = chance.choice([*EDGES, len(header) - 1, len(header) + 1, len(header) + len(payload)])
    return size.to_bytes(8, "little") + header + payload


def _cut(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    whole = joined(header, payload)
    return whole[: chance.randrange(len(whole))] if chance.random() < 0.7 else whole + bytes(chance.randint(1, 9))


def _payload(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    changed = bytearray(payload)
    changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return joined(header, bytes(changed))


def _bytes(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    changed = bytearray(header)
    for _ in range(chance.randint(1, 5)):
        changed[chance.randrange(len(changed))] = chance.randrange(256)
    return joined(bytes(changed), payload)


def _tokens(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    changed = bytearray(header)
    for _ in range(chance.randint(1, 3)):
        at = chance.randrange(len(changed))
        changed[at : at + chance.choice([0, 0, 1, 5])] = chance.choice(TOKENS)
    return joined(bytes(changed), payload)


def _escape(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    """A letter of a string in another spelling, which is the same name."""
    places = [at for at, byte in enumerate(header) if chr(byte).isalpha()]
    at = chance.choice(places)
    return joined(header[:at] + b"\\u%04x" % header[at] + header[at + 1 :], payload)


def _repeat(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    """A tensor twice."""
    name, entry = chance.choice([*json.loads(header).items()])
    return joined(b"{" + json.dumps({name: entry})[1:-1].encode() + b"," + header.lstrip()[1:], payload)


def _entry(chance: random.Random, header: bytes, payload: bytes) -> bytes:
    """An entry that says something else, in sound JSON."""
    document: Header = json.loads(header)
    name = chance.choice([name for name in document if name != "__metadata__"])
    entry = document[name]
    begin, end = (int(place) for place in json.loads(json.dumps(entry["data_offsets"])))
    shape = json.loads(json.dumps(entry["shape"]))
    first = chance.choice([*EDGES, begin + 4, len(payload), -1])
    changes: dict[str, object] = {
        "dtype": chance.choice(["F32", "I32", "I64", "F64", "U8", "BF16", "F4", "f32", "", 4, None]),
        "shape": chance.choice([shape[::-1], [*shape, 1], [1, *shape], [], [-1, *shape], [1 << 62] * 4, "x", [2.0]]),
        "data_offsets": chance.choice([[first, first + end - begin], [end, begin], [begin], [begin, end, end]]),
        "more": 1,
    }
    key = chance.choice([*changes])
    entry[key] = changes[key]
    if chance.random() < 0.2:
        document[chance.choice(["other", "__metadata__", "__pad0", "sample "])] = document.pop(name)
    return joined(json.dumps(document).encode(), payload)


Mutation = Callable[[random.Random, bytes, bytes], bytes]
KINDS: dict[str, Mutation] = {
    **{"length": _length, "cut": _cut, "payload": _payload, "bytes": _bytes, "tokens": _tokens},
    **{"escape": _escape, "repeat": _repeat, "entry": _entry},
}
