"""Locks that a fork waits for, so that a child finds no call in the middle.

The thread that makes the call is not there in the child. It would hold its locks for ever, and those that TVM's runtime
has inside cannot be made anew.
"""

from __future__ import annotations

import itertools
import os
import threading
from types import TracebackType
from typing import Protocol
from weakref import WeakValueDictionary

LONGEST_WAIT = 1.0
"""Seconds that a call waits at most for who forks; it comes first anyway where the lock does not let it."""


class Lock(Protocol):
    """A lock of a thread, which may take it again."""

    def acquire(self, blocking: bool = True) -> bool: ...

    def release(self) -> None: ...

    def __enter__(self) -> bool: ...

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None, /
    ) -> None: ...


_locks: WeakValueDictionary[int, Lock] = WeakValueDictionary()
_numbers = itertools.count()
_nobody_forks = threading.Event()
_nobody_forks.set()


class _Forking(threading.local):
    held: tuple[Lock, ...] = ()


_forking = _Forking()


def lock() -> Lock:
    """Makes a lock that every fork of this process waits for."""
    made: Lock = threading.RLock()
    _locks[next(_numbers)] = made
    return made


def give_way() -> None:
    """Lets a thread that waits to fork come first; else calls in a loop would hardly leave it a moment."""
    if not _nobody_forks.is_set():
        _nobody_forks.wait(LONGEST_WAIT)


def _before() -> None:
    """Takes all locks. It holds none while it waits, for their holders may need others to come to an end."""
    _nobody_forks.clear()
    locks = [each for reference in _locks.valuerefs() if (each := reference()) is not None]
    held: list[Lock] = []
    while (taken := _take(held, locks)) is not None:
        for each in held:
            each.release()
        taken.acquire()
        held = [taken]
    _forking.held = tuple(held)


def _take(held: list[Lock], locks: list[Lock]) -> Lock | None:
    """Adds the locks to those that are held, until one is another thread's; that one, or None."""
    for each in locks:
        if each not in held:
            if not each.acquire(blocking=False):
                return each
            held.append(each)
    return None


def _release() -> None:
    held, _forking.held = _forking.held, ()
    for each in held:
        each.release()
    _nobody_forks.set()


def _in_child() -> None:
    global _nobody_forks
    _nobody_forks = threading.Event()  # another thread may have been inside the old one
    _release()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_before, after_in_parent=_release, after_in_child=_in_child)
