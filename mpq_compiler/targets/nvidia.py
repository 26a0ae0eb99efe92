"""The NVIDIA GPUs of this machine, queried through the driver's library; no torch and no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_PREFIX = "sm_"
ORIN = 87
"""The compute capability of Jetson Orin; its machine code and a desktop GPU's never run on each other.

Source: CUDA C++ Programming Guide, binary compatibility.
"""
HOPPER = 90
"""The compute capability whose tensor cores have `wgmma`; later ones have another instruction."""
CUDA_13 = 13000
"""The release of CUDA that TVM's wheel is built with, as drivers count; its code needs a driver of this or later."""


@dataclass(frozen=True)
class Gpu:
    """A GPU of this machine, as the driver describes it."""

    name: str
    level: int
    """The compute capability times 10: 87 for a Jetson Orin."""
    memory: int
    """Bytes of memory in all, free or not."""


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The driver's library, initialized; None without a driver or a GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def driver_version() -> int:
    """The release of CUDA that the driver supports: 13000 for 13.0; 0 without a driver."""
    version = ctypes.c_int()
    if (driver := _driver()) is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return 0
    return version.value


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """The GPUs of this machine, in the driver's order."""
    if (driver := _driver()) is None:
        return ()
    count, value, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    name, memory, found = ctypes.create_string_buffer(256), ctypes.c_size_t(), []
    driver.cuDeviceGetCount(ctypes.byref(count))
    for number in range(count.value):
        driver.cuDeviceGet(ctypes.byref(device), number)
        driver.cuDeviceGetName(name, len(name), device)
        driver.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
        level = 0
        for attribute in (_MAJOR, _MINOR):
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            level = 10 * level + value.value
        found.append(Gpu(name.value.decode(), level, memory.value))
    return tuple(found)


def spelled(release: int) -> str:
    """Formats a release of CUDA as people write it: 12060 becomes 12.6."""
    return f"{release // 1000}.{release % 1000 // 10}"


def from_wheels(place: str) -> Path | None:
    """The path of a file in NVIDIA's wheels, given its place in the package `nvidia`; None if not installed."""
    spec = importlib.util.find_spec("nvidia")
    paths = [Path(folder, place) for folder in (spec and spec.submodule_search_locations) or ()]
    return next((path for path in paths if path.is_file()), None)


def levels() -> tuple[int, ...]:
    """The compute capability of each GPU."""
    return tuple(each.level for each in gpus())


def feature(level: int) -> str:
    """The feature by which a target states that it has code for a compute capability: `sm_87`."""
    return f"{_PREFIX}{level}"


def stated(features: Iterable[str]) -> list[int]:
    """The compute capabilities among a target's features; the inverse of `feature`."""
    return [int(name.removeprefix(_PREFIX)) for name in features if name.startswith(_PREFIX)]


def is_for(manifest: Mapping[str, Any]) -> bool:
    """Whether an artifact, given its manifest, runs on a GPU."""
    return bool(stated(manifest["target"]["features"]))


def runs(code: Iterable[int], level: int) -> bool:
    """Whether a GPU of this level runs machine code for one of `code`: of its generation, and no later than itself."""
    return any(own == level or (own // 10 == level // 10 and own < level and ORIN not in (own, level)) for own in code)
