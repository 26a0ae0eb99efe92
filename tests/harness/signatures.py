"""Keys to sign with in tests, damaged signatures, and files that are no keys."""

from __future__ import annotations

import random
from pathlib import Path
from typing import NamedTuple

from mpq_compiler.artifact import signing
from tests.harness import once


class Pair(NamedTuple):
    """The files of a key, and the public one in hexadecimal."""

    private: Path
    public: Path
    hex: str


def keys() -> tuple[Pair, Pair]:
    """Two keys of this run: that of an owner, and another's."""
    found = [
        once.made(name, lambda folder: folder.mkdir() or signing.new_key(folder / "k.pem")) / "k.pem"
        for name in ("own.key", "other.key")
    ]
    own, other = (
        Pair(path, path.with_suffix(".pub.pem"), signing.private_key(path).public_key().public_bytes_raw().hex())
        for path in found
    )
    return own, other


def signed(path: Path, pair: Pair) -> Path:
    """An artifact or pipeline, signed."""
    signing.sign(path, signing.private_key(pair.private))
    return path


def mutant(text: bytes, rng: random.Random) -> bytes:
    """The text with something removed, doubled, exchanged or changed."""
    a, b = sorted(rng.randrange(len(text) + 1) for _ in range(2))
    lines = text.splitlines(keepends=True)
    first, second = rng.randrange(len(lines)), rng.randrange(len(lines))
    changed = bytearray(text)
    changed[min(a, len(text) - 1)] = rng.randrange(256)
    exchanged = [*lines]
    exchanged[first], exchanged[second] = lines[second], lines[first]
    return rng.choice(
        [
            bytes(changed),
            text[:a],
            text[a:],
            text[:a] + text[b:],
            text[:a] + text[a:b] * 2 + text[b:],
            text[:a] + rng.choice([b"\n", b" ", b"\0", b"0", b"\r"]) + text[a:],
            text + rng.choice([b"\n", b"x", lines[first]]),
            text[:a] + text[a:b].upper() + text[b:],
            b"".join(exchanged),
            b"".join(lines[:first] + lines[first + 1 :]),
            b"".join(lines[: first + 1] + lines[first:]),
            text.replace(b"\n", b"\r\n"),
        ]
    )


def mutants(text: bytes, count: int) -> list[bytes]:
    """So many damaged texts, the same in every run."""
    rng = random.Random(0)
    return [mutant(text, rng) for _ in range(count)]


def no_keys(folder: Path) -> dict[str, str]:
    """Files that hold no key to check with, and what is said of each."""
    (folder / "empty").touch()
    (folder / "noise").write_bytes(bytes(range(256)))
    (folder / "short").write_text("0123abc\n")
    (folder / "large").write_bytes(b"0" * 100_000)
    (folder / "pem").write_text("-----BEGIN PUBLIC KEY-----\nMCowBQYDK2VwAyEA\n-----END PUBLIC KEY-----\n")
    return {"empty": "holds no", "noise": "holds no", "short": "holds no", "large": "holds no key", "pem": "holds no"}
