"""Files written whole or not at all, and places checked before hours are spent."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, BinaryIO

from mpq_compiler.support.errors import UserError


def check_place(path: Path) -> None:
    """Raises a UserError where the parent folder of `path` does not exist or cannot be written to."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {path.parent} cannot be written to; choose another place")


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: `fill` writes a temporary file beside `path`, which is then renamed.

    A symbolic link stays one: its target is replaced. A pipe or device is written to directly.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            fill(stream)
        return
    beside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with beside.open("wb") as stream:
            fill(stream)
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A scratch folder next to `path`, on the same file system, which is removed at the end.

    Raises:
        UserError: the file system refuses to write, there or within the block.
    """
    scratch = None
    try:
        scratch = Path(tempfile.mkdtemp(prefix=f".{path.name}.", suffix=".partial", dir=path.parent))
        yield scratch
    except OSError as error:
        hint = "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"
        raise UserError(f"cannot write {path}: {error.strerror}; {hint}") from error
    finally:
        if scratch:
            shutil.rmtree(scratch, ignore_errors=True)


def sha256(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def sha512(path: str | Path) -> str:
    """The SHA-512 of a file's content, in hexadecimal."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha512").hexdigest()


def encode_json(document: Any, indent: int | None = 1) -> bytes:
    """A document as UTF-8 JSON with a newline at the end; with ``indent=None`` in one line without spaces.

    ValueError: it holds NaN or infinity.
    """
    separators = (",", ":") if indent is None else None
    return (json.dumps(document, indent=indent, separators=separators, allow_nan=False) + "\n").encode()


def sync(stream: IO[bytes]) -> None:
    """Flushes a file to the disk itself, so that a rename after it never exposes an empty file."""
    stream.flush()
    os.fsync(stream.fileno())


def umask() -> int:
    """The process's mask of file permissions; it is set and restored, for no call only reads it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
