"""What this machine is called."""

from __future__ import annotations

import platform
from pathlib import Path


def cpus() -> list[str]:
    """The name of each logical CPU; empty where the system does not say."""
    return _told("model name")


def identity() -> str:
    """What times that are kept stand for: machines may share the name that a hypervisor gives them."""
    return " ".join([cpu(), *_told("cpu family", "model\t", "stepping", "cache size")[:4]])


def _told(*keys: str) -> list[str]:
    """What the system says under these keys, of all logical CPUs."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(keys)]


def cpu() -> str:
    """The name of the CPU; where the system does not say, of the board, else of the architecture."""
    board = Path("/proc/device-tree/model")
    known = [*cpus(), *([board.read_text(encoding="utf-8").strip("\0")] if board.exists() else [])]
    return next(iter(known), platform.machine())
