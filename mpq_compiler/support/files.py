"""Files written whole or not at all, and places checked before hours are spent."""

from __future__ import annotations

import ctypes
import errno
import fcntl
import hashlib
import json
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import IO, Any, BinaryIO

from mpq_compiler.support.errors import UserError


def check_place(path: Path) -> None:
    """Raises a UserError where the parent folder of `path` does not exist, or takes no new file."""
    if not path.parent.is_dir():
        raise UserError(f"cannot write {path}: there is no folder {path.parent}; create it first")
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"cannot write {path}: {path.parent} cannot be written to; choose another place")
    if path.exists() and not path.is_file() and not path.is_dir():
        return  # a pipe or device, which is written to directly
    try:  # permissions do not say it all: /proc grants them to root, and makes no file
        with _partial(path, _new_file):
            pass
    except OSError as error:
        what = f"no file can be made in {path.parent} ({error.strerror})"
        raise UserError(f"cannot write {path}: {what}; {_hint(error)}") from error


def _hint(error: OSError) -> str:
    return "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "choose another place"


def write_whole(path: Path, fill: Callable[[BinaryIO], object]) -> None:
    """Writes a file atomically: `fill` writes a temporary file beside `path`, which is synced and renamed.

    A symbolic link stays one: its target is replaced. A pipe or device is written to directly.
    """
    path = path.resolve() if path.is_symlink() else path
    if path.exists() and not path.is_file():
        with path.open("wb") as stream:
            fill(stream)
        return
    with _partial(path, _new_file) as made:
        with made.open("wb") as stream:
            fill(stream)
            sync(stream)
        made.replace(path)


@contextmanager
def beside(path: Path) -> Iterator[Path]:
    """A scratch folder next to `path`, on the same file system, which is removed at the end.

    Raises:
        UserError: the file system refuses to write, there or within the block.
    """
    try:
        with _partial(path, _new_folder) as scratch:
            yield scratch
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}; {_hint(error)}") from error


def put(new: Path, path: Path, scratch: Path) -> None:
    """Puts a file or folder at `path`, in one step; what was there moves to `scratch`, a folder of `beside`.

    Where the system cannot exchange two names, a folder's old one goes first: a run that is killed in between leaves it
    in `scratch`, from where `sweep` takes it back.
    """
    with uninterrupted():
        if not os.path.lexists(path) or (new.is_file() and path.is_file()):
            os.replace(new, path)
        elif not _exchanged(new, path):
            os.rename(path, scratch / PREVIOUS)
            try:
                os.rename(new, path)
            except OSError:
                os.rename(scratch / PREVIOUS, path)
                raise
        folder = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(folder)  # the names are on the disk, too
        finally:
            os.close(folder)


def sweep(folder: Path, name: str | None = None) -> None:
    """Removes what killed writers of files and folders have left in a folder, of a name or of all.

    Writers that live hold a lock on what they write. What one has taken from its place and not replaced returns there.
    """
    with suppress(OSError):
        for entry in os.listdir(folder):
            found = _PARTIAL.fullmatch(entry)
            if found is None or name not in (None, found["name"]):
                continue
            left, place = folder / entry, folder / found["name"]
            with suppress(OSError), uninterrupted():
                lock = os.open(left, os.O_RDONLY | os.O_NOFOLLOW)
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    if not os.path.lexists(place) and os.path.lexists(left / PREVIOUS):
                        os.rename(left / PREVIOUS, place)
                    _remove(left)
                finally:
                    os.close(lock)


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Keeps Ctrl-C and SIGTERM back until the block has ended; of the main thread, which alone they interrupt."""
    came: list[tuple[int, FrameType | None]] = []
    before: dict[int, Callable[[int, FrameType | None], object]] = {}
    if threading.current_thread() is threading.main_thread():
        for each in (signal.SIGINT, signal.SIGTERM):
            if callable(handler := signal.getsignal(each)):  # else it ends the process or does nothing
                before[each] = handler
                signal.signal(each, lambda *got: came.append(got))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        for number, frame in came[:1]:
            before[number](number, frame)


PREVIOUS = "previous"
"""What a folder of `beside` holds of the one that was in its place."""
_PARTIAL = re.compile(r"\.(?P<name>.+)\.[a-z0-9_]{8}\.partial")
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextmanager
def _partial(path: Path, make: Callable[[Path], object]) -> Iterator[Path]:
    """What is to become `path`, beside it, locked as long as this process writes it, and removed at the end."""
    with uninterrupted():
        made, lock = _locked(path, make)
    try:
        yield made
    finally:
        with uninterrupted():
            _remove(made)
            os.close(lock)


def _locked(path: Path, make: Callable[[Path], object]) -> tuple[Path, int]:
    while True:
        made = path.with_name(f".{path.name}.{secrets.token_hex(4)}.partial")
        make(made)
        try:
            lock = os.open(made, os.O_RDONLY)
        except FileNotFoundError:
            continue  # another process has swept it before it was locked
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if os.path.samestat(os.stat(made), os.fstat(lock)):
                return made, lock
        except (BlockingIOError, FileNotFoundError):
            pass  # likewise
        except OSError:
            return made, lock  # a file system without locks: nobody sweeps there, either
        os.close(lock)


def _new_folder(path: Path) -> None:
    path.mkdir(0o700)


def _new_file(path: Path) -> None:
    path.touch(0o666, exist_ok=False)  # as umask says, which threads share


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Whether two names have been exchanged in one step, which not every system and file system can."""
    try:
        rename = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:
        return False
    return bool(rename(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0)


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


def decode_json(text: str | bytes) -> Any:
    """The document that a text is. ValueError: it is none, or nested so deeply that nobody has written it."""
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested deeper than any is") from error


def sync(stream: IO[bytes]) -> None:
    """Flushes a file to the disk itself, so that a rename after it never exposes an empty file."""
    stream.flush()
    os.fsync(stream.fileno())


def umask() -> int:
    """The process's mask of file permissions; it is set and restored, for no call only reads it."""
    mask = os.umask(0)
    os.umask(mask)
    return mask
