"""A cache of expensive results across runs: one JSON-lines file per key, appended to as results arrive.

A file survives the death of its writer: every line is one whole result, and a torn last line is ignored.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.support.errors import UserError
from mpq_compiler.support.files import write_whole

KINDS = ("calibration", "fits", "kernels", "latency", "rows", "sensitivity", "tiles", "training")
"""The kinds of results; each has a folder of its own in the cache."""


def folder(path: Path | None = None) -> Path:
    """The cache folder: ``path``, or $MPQ_CACHE, or mpq-compiler in the XDG cache folder."""
    if path is not None:
        return path
    if given := os.environ.get("MPQ_CACHE"):
        return Path(given)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "mpq-compiler"


def digest(*parts: str | bytes | Mapping[str, Any]) -> str:
    """The sha256 of the parts; a mapping of arrays or tensors enters by name, dtype, shape and bytes."""
    state = hashlib.sha256()
    for part in parts:
        if isinstance(part, str):
            part = part.encode()
        if isinstance(part, bytes):
            state.update(len(part).to_bytes(8, "little") + part)
            continue
        for name in sorted(part):
            array = np.ascontiguousarray(np.asarray(part[name]))
            state.update(f"{name} {array.dtype} {array.shape}".encode())
            state.update(array.reshape(-1).view(np.uint8).data)  # whole tensors of large models, and no copies
    return state.hexdigest()


class Results:
    """Named results under one key; ``results[name] = value`` writes through."""

    def __init__(self, kind: str, key: str, path: Path | None = None) -> None:
        self.path = folder(path) / kind / f"{key}.jsonl"
        self._values: dict[str, Any] = {}
        if self.path.exists():
            for line in self.path.read_text(encoding="utf-8").splitlines():
                try:
                    name, value = json.loads(line)
                except ValueError:
                    continue
                self._values[name] = value

    def __contains__(self, name: str) -> bool:
        return name in self._values

    def __getitem__(self, name: str) -> Any:
        return self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __setitem__(self, name: str, value: Any) -> None:
        self._values[name] = value
        line = json.dumps([name, value]) + "\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                # A writer that died in the middle of a line must not swallow this one.
                if file.tell() and not self._ends_line():
                    file.write(b"\n")
                file.write(line.encode())
        except OSError as error:
            raise _unwritable(self.path.parent, error) from error

    def _ends_line(self) -> bool:
        with self.path.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) == b"\n"


def make(folder: Path) -> None:
    """Makes a folder of the cache, where there is none. UserError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error


def write(path: Path, content: bytes) -> None:
    """Writes a file of the cache whole or not at all. UserError: it cannot be written."""
    make(path.parent)
    try:
        write_whole(path, lambda stream: stream.write(content))
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def _unwritable(where: Path, error: OSError) -> UserError:
    return UserError(
        f"the cache {where} cannot be written ({error.strerror}); "
        "free some space there or name another folder with --cache"
    )


def entries(path: Path | None = None) -> Iterable[tuple[str, Path, int]]:
    """Kind, file and size in bytes of everything in the cache."""
    for kind in KINDS:
        for file in sorted((folder(path) / kind).rglob("*")):
            if file.is_file():
                yield kind, file, file.stat().st_size


def clear(path: Path | None = None) -> int:
    """Empties the cache; returns the bytes that were freed. Whatever else the folder holds stays."""
    before = sum(size for _, _, size in entries(path))
    for kind in KINDS:
        shutil.rmtree((folder(path) / kind).resolve(), ignore_errors=True)
    return before - sum(size for _, _, size in entries(path))
