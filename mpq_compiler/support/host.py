"""The identity of this machine: the names of its CPUs."""

from __future__ import annotations

import platform
from pathlib import Path


def cpus() -> list[str]:
    """The name of each logical CPU; empty where the system does not say."""
    return _told("model name")


def identity() -> str:
    """The CPU under which measured times are cached: its name, family, model, stepping and cache size.

    The name alone does not tell machines apart, since a hypervisor may give many the same one.
    """
    return " ".join([cpu(), *_told("cpu family", "model\t", "stepping", "cache size")[:4]])


def vendor() -> str:
    """The maker of the CPU, by which libraries choose their kernels; empty where the system does not say."""
    return next(iter(_told("vendor_id")), "")


def _told(*keys: str) -> list[str]:
    """The values of these keys in /proc/cpuinfo, for all logical CPUs; empty where there is no such file."""
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    return [line.partition(":")[2].strip() for line in lines if line.startswith(keys)]


def cpu() -> str:
    """The name of the CPU; the board's name where the system states none, else the architecture's."""
    board = Path("/proc/device-tree/model")
    known = [*cpus(), *([board.read_text(encoding="utf-8").strip("\0")] if board.exists() else [])]
    return next(iter(known), platform.machine())
