"""Memory and time of this process and its children, as the operating system counts them."""

from __future__ import annotations

import ctypes
import gc
import os
import resource
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Self

RETURNED = 4 << 20
"""Bytes of a block of memory that is given back as soon as it is free."""
INTERVAL = 0.05
"""Seconds between two looks at the memory."""


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
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * sum(int(line.split()[1]) for line in lines if line.startswith(("RssAnon:", "RssShmem:")))


def return_freed_memory() -> None:
    """Makes the C library give blocks of `RETURNED` bytes and more back to the system as they are freed.

    glibc raises that bound to 32 MiB by itself, as it sees large blocks come and go, and keeps what is smaller: after
    calibration that was a third of the memory. Blocks then come anew each time, page by page; so torch is told to ask
    for large pages, which must be before it is imported: element-wise operators on activations take less than half of
    the time. Systems with another library stay as they are.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    threshold = -3  # M_MMAP_THRESHOLD of malloc.h
    try:
        ctypes.CDLL(None).mallopt(threshold, RETURNED)
    except (AttributeError, OSError, TypeError):
        return


def collect_seldom() -> None:
    """Lets Python look for cycles of garbage after 20,000 new objects, where it does so after 700.

    Imports and tracing make a million objects that stay, and each look walks through them: a tenth of what a small
    compilation takes. Tensors are freed as they are let go; cycles that hold some would wait for longer.
    """
    gc.set_threshold(20_000, 10, 10)


class PeakMemory:
    """The peak of `memory`, watched by a thread within the block."""

    def __init__(self, pid: int | None = None) -> None:
        self._pid = pid
        self._peak = memory(pid)
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
        while not self._ended.wait(INTERVAL):
            self._peak = max(self._peak, memory(self._pid))

    def take(self) -> int:
        """The peak in bytes since the last call, or since the beginning."""
        now = memory(self._pid)
        peak, self._peak = max(self._peak, now), now
        return peak
