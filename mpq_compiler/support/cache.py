"""A cache of expensive results across runs, none of which is believed unseen.

Every file begins with the SHA-256 of its content, and every line of a file of results with that of the line: what a
failing disk or a power failure has left of it is thrown away, said once, and made again. Files are written whole or not
at all; results are appended as they arrive, and a line that a killed writer has torn costs that line.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import warnings
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from mpq_compiler.support.errors import Notice, UserError
from mpq_compiler.support.files import sweep, write_whole

KINDS = ("calibration", "fits", "kernels", "latency", "rows", "sensitivity", "stages", "tiles", "training")
"""The kinds of results; each has a folder of its own in the cache."""
_swept: set[Path] = set()
"""The folders that this process has swept."""


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
        self.path = folder(path) / kind / f"{key}.results"
        self._values: dict[str, Any] = {}
        try:
            with self.path.open("rb") as file:
                fcntl.flock(file, fcntl.LOCK_SH)  # so that nobody is in the middle of a line
                found, sound, damaged = _parse(content := file.read())
        except FileNotFoundError:
            return
        except OSError as error:
            raise UserError(
                f"the cache file {self.path} cannot be read ({error.strerror}); name another folder with --cache"
            ) from error
        self._values.update(found)
        if damaged:
            _say(self.path, f"{damaged} of its lines")
        if sum(map(len, sound)) < len(content):
            self._keep_sound()

    def _keep_sound(self) -> None:
        """Leaves nothing but sound lines in the file, as it is by now."""
        try:
            with self.path.open("r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                _, sound, _ = _parse(file.read())
                file.seek(0)
                file.write(b"".join(sound))
                file.truncate()
        except OSError as error:
            raise _unwritable(self.path.parent, error) from error

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
        line = _line(json.dumps([name, value]))
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("a+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX)
                file.truncate(_end_of_lines(file))
                file.write(line)
        except OSError as error:
            raise _unwritable(self.path.parent, error) from error


def make(folder: Path) -> None:
    """Makes a folder of the cache, where there is none, and sweeps it once. UserError: it cannot be made."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(folder, error) from error
    if folder not in _swept:
        _swept.add(folder)
        sweep(folder)


def write(path: Path, content: bytes) -> None:
    """Writes a file of the cache, sealed, whole or not at all. UserError: it cannot be written."""
    make(path.parent)
    try:
        write_whole(path, lambda stream: (stream.write(_seal(content)), stream.write(content)))
    except OSError as error:
        raise _unwritable(path.parent, error) from error


def read(path: Path) -> bytes | None:
    """The content of a file that `write` wrote; None where there is none, or none that is whole, which is deleted."""
    try:
        with path.open("rb") as stream:
            seal, content = stream.read(len(_seal(b""))), stream.read()
    except OSError:
        return None
    if seal == _seal(content):
        return content
    _say(path, "all of it")
    path.unlink(missing_ok=True)
    return None


def _seal(content: bytes) -> bytes:
    """The first line of a file: its kind and version, and the hash of what follows."""
    return f"mpq-cache 1 {hashlib.sha256(content).hexdigest()}\n".encode()


def _line(result: str) -> bytes:
    """The line of a result, which begins with a hash of it."""
    return f"{hashlib.sha256(result.encode()).hexdigest()[:16]} {result}\n".encode()


def _end_of_lines(file: BinaryIO) -> int:
    """The size of a file without what a killed writer has left of a last line."""
    size = file.seek(0, os.SEEK_END)
    file.seek(max(0, size - 1))
    if file.read(1) in (b"\n", b""):
        return size
    file.seek(0)
    return file.read().rfind(b"\n") + 1


def _parse(content: bytes) -> tuple[list[tuple[str, object]], list[bytes], int]:
    """Results by name, their lines, and the number of other lines that were written whole."""
    found: list[tuple[str, object]] = []
    sound = []
    *lines, _ = content.split(b"\n")  # behind the last newline is what a killed writer has torn
    for line in lines:
        try:
            text = line.decode()[17:]
            if _line(text) != line + b"\n":
                continue
            name, value = json.loads(text)
        except (ValueError, RecursionError):
            continue
        found.append((name, value))
        sound.append(line + b"\n")
    return found, sound, len(lines) - len(sound)


def _say(path: Path, what: str) -> None:
    text = f"the cache file {path} was damaged: {what} is thrown away, and made again where it is needed"
    warnings.warn(text, Notice, stacklevel=3)


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
