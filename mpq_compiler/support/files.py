"""Files written whole or not at all, and places checked before hours are spent."""

from __future__ import annotations

import errno
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, BinaryIO

from mpq_compiler.support.errors import UserError


def check_place(path: Path) -> None:
    """UserError when there is no folder, or none that can be written to, for a file or folder `path`."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {path.parent} cannot be written to; choose another place")


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes beside, then renames: nothing half-written is ever seen. A link stays one; a pipe is written to."""
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
    """A scratch folder next to `path`, on the same file system; gone at the end, whatever happens."""
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


def sync(stream: IO[bytes]) -> None:
    stream.flush()
    os.fsync(stream.fileno())


def umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
