"""Memory and time of this process and its children, as the operating system counts them."""

from __future__ import annotations

import ctypes
import gc
import itertools
import os
import resource
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import TracebackType
from typing import ParamSpec, Self, TypeVar

_Given = ParamSpec("_Given")
_Result = TypeVar("_Result")
RETURNED = 4 << 20
"""Bytes of a block of memory that is given back as soon as it is free."""
INTERVAL = 0.05
"""Seconds between two looks at the memory."""
LOOKS = 10
"""Looks for which a process that has begun can be missing."""
ROOM = 33_000
"""The words that a frame asks for, so that its block of frames is the next power of two, and half of it is left."""


def cpu_seconds() -> float:
    """CPU seconds of this process and of its children, user and system.

    Children that run count where the system has a /proc, others when they have ended.
    """
    own, children = (resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    running = sum(map(_cpu_seconds, [*_family(os.getpid())][1:])) if sys.platform.startswith("linux") else 0.0
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime + running


def _cpu_seconds(pid: int) -> float:
    """CPU seconds of a process and of its children that have ended; 0 where it has ended itself."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK")


def trim() -> None:
    """Gives back what the C library keeps of freed memory in small blocks. Other libraries than glibc: nothing."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):
        return


def memory(pid: int | None = None) -> int:
    """Resident bytes, anonymous and shared, of a process and its children; pages of mapped files do not count.

    pid: of the process; None: this one.

    Where the system has no /proc, the peak of this process stands for it.
    """
    if not sys.platform.startswith("linux"):
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak * 1024
    return sum(map(_resident, _family(os.getpid() if pid is None else pid)))


def memory_once(pid: int) -> int:
    """What `memory` counts, but pages that processes share once: a process that forks does not have twice as many.

    It takes the system a walk through all pages. Where it does not say, what `memory` counts.
    """
    found = 0
    for one in _family(pid):
        try:
            lines = Path(f"/proc/{one}/smaps_rollup").read_text(encoding="ascii").splitlines()
        except FileNotFoundError:
            if Path(f"/proc/{one}").exists():  # a system without it
                return memory(pid)
            continue  # it has ended
        except OSError:
            return memory(pid)
        found += 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("Pss_Anon:", "Pss_Shmem:")))
    return found


def own_memory() -> int:
    """Resident bytes of this process alone, as `memory` counts them."""
    return _resident(os.getpid()) if sys.platform.startswith("linux") else memory()


def free_memory() -> int:
    """Bytes that processes can still take: of the machine, or of the control group that this process is in.

    Where the system has no /proc, half of the machine's memory.
    """
    try:
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
    except OSError:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2
    free = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return min(free, *_free_in_group())


def _free_in_group() -> Iterator[int]:
    """What the limits of version 2 control groups leave; pages of files that can be dropped count as free."""
    try:
        own = Path("/proc/self/cgroup").read_text(encoding="utf-8").splitlines()[-1].rpartition(":")[2]
    except (OSError, IndexError):
        own = "/"
    root = Path("/sys/fs/cgroup")
    place = root / own.lstrip("/")
    for group in [place, *place.parents]:
        try:
            limit = (group / "memory.max").read_text(encoding="ascii").strip()
            used = int((group / "memory.current").read_text(encoding="ascii"))
            stat = dict(line.split() for line in (group / "memory.stat").read_text(encoding="ascii").splitlines())
        except (OSError, ValueError):
            limit = "max"
        if limit != "max":
            yield max(0, int(limit) - used + int(stat.get("inactive_file", 0)))
        if group == root:
            break
    yield sys.maxsize


def _family(pid: int) -> Iterator[int]:
    yield pid
    try:
        threads = list(Path(f"/proc/{pid}/task").iterdir())
        children = [int(word) for thread in threads for word in (thread / "children").read_text().split()]
    except (OSError, ValueError):
        return  # it has ended
    for child in children:
        yield from _family(child)


def _resident(pid: int) -> int:
    try:  # three system calls, where `read_text` makes seven: threads that compute wait while one of these begins
        file = os.open(f"/proc/{pid}/status", os.O_RDONLY)
    except OSError:
        return 0
    try:
        lines = os.read(file, 1 << 14).splitlines()
    except OSError:
        return 0
    finally:
        os.close(file)
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith((b"RssAnon:", b"RssShmem:")))


def ask_for_large_pages() -> None:
    """Makes torch ask for large pages, where it is not imported yet.

    Memory that comes anew, page by page, is what element-wise operators on activations wait for: by large pages they
    take less than half of the time.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")


def keep_freed_memory() -> None:
    """Makes the C library keep freed blocks of up to 32 MiB: what comes anew does so page by page, which takes time.

    glibc raises these bounds by itself, as it sees large blocks come and go. Other libraries stay as they are.
    """
    _bound(32 << 20, 64 << 20)


def return_freed_memory() -> None:
    """Makes the C library give blocks of `RETURNED` bytes and more back to the system as they are freed.

    What glibc keeps by itself was a third of the memory after calibration of a large model. Other libraries stay as
    they are.
    """
    _bound(RETURNED, 128 << 10)
    trim()


def _bound(block: int, top: int) -> None:
    """Sets from how many bytes on blocks are the system's, and how many are kept at the end of the heap."""
    for option, value in ((-3, block), (-1, top)):  # M_MMAP_THRESHOLD and M_TRIM_THRESHOLD of malloc.h
        try:
            ctypes.CDLL(None).mallopt(option, value)
        except (AttributeError, OSError, TypeError):
            return


def collect_seldom() -> None:
    """Lets Python look for cycles of garbage after 20,000 new objects, where it does so after 700.

    Imports and tracing make a million objects that stay, and each look walks through them: a tenth of what a small
    compilation takes. Tensors are freed as they are let go; cycles that hold some would wait for longer.
    """
    gc.set_threshold(20_000, 10, 10)


def with_room(function: Callable[_Given, _Result]) -> Callable[_Given, _Result]:
    """A function that is called with room for the frames of all that it calls, in one block of memory.

    CPython keeps the frames of a thread in blocks of 16 KiB, and gives a block back when its first frame ends: where
    calls cross such a border again and again, as imports and tracing can, each maps memory anew, up to a twentieth of
    what a small compilation takes. A frame that asks for much gets a block for itself, and what it calls shares that.
    """

    def roomy(*given: _Given.args, **named: _Given.kwargs) -> _Result:
        return function(*given, **named)

    roomy.__code__ = roomy.__code__.replace(co_stacksize=ROOM)
    return roomy


class PeakMemory:
    """The peak of `memory`, watched by a thread within the block."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = os.getpid() if pid is None else pid
        self._peak = memory(self._pid)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        if not sys.platform.startswith("linux"):
            return  # `memory` is the peak there
        family: list[int] = []
        for look in itertools.count():
            if self._ended.wait(INTERVAL):
                return
            if look % LOOKS == 0:
                family = [*_family(self._pid)]
            self._peak = max(self._peak, sum(map(_resident, family)))

    def take(self) -> int:
        """The peak in bytes since the last call, or since the beginning."""
        now = memory(self._pid)
        peak, self._peak = max(self._peak, now), now
        return peak
