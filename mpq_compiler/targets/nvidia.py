"""The NVIDIA GPUs of this machine, by the driver's own library. Neither torch nor a CUDA toolkit is needed."""

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
"""Of Jetson Orin: machine code is its own or a desktop's, never both's (CUDA C++ Programming Guide, binary
compatibility)."""
HOPPER = 90
"""The compute capability whose tensor cores have `wgmma`; later ones have another instruction."""
CUDA_13 = 13000
"""The release, as drivers count, that TVM's wheel is built with and nvcc makes code for: for its driver or a later."""


@dataclass(frozen=True)
class Gpu:
    """level: the compute capability, 10 times the number (87 of a Jetson Orin). memory: bytes, in all"""

    name: str
    level: int
    memory: int


@functools.cache
def _driver() -> ctypes.CDLL | None:
    """The driver's library, ready; None where there is none, or no GPU."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    return None if driver.cuInit(0) else driver


def driver_version() -> int:
    """The release of CUDA that the driver is of: 13000 of 13.0; 0 without a driver."""
    version = ctypes.c_int()
    if (driver := _driver()) is None or driver.cuDriverGetVersion(ctypes.byref(version)):
        return 0
    return version.value


@functools.cache
def gpus() -> tuple[Gpu, ...]:
    """Those of this machine, in the driver's order."""
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
    """A release of CUDA as people write it: 12.6 of 12060."""
    return f"{release // 1000}.{release % 1000 // 10}"


def from_wheels(place: str) -> Path | None:
    """A file of NVIDIA's wheels, by its place in the package `nvidia`; None where it is not installed."""
    spec = importlib.util.find_spec("nvidia")
    paths = [Path(folder, place) for folder in (spec and spec.submodule_search_locations) or ()]
    return next((path for path in paths if path.is_file()), None)


def levels() -> tuple[int, ...]:
    """The compute capability of each GPU."""
    return tuple(each.level for each in gpus())


def feature(level: int) -> str:
    """How a target states that it has code for a compute capability."""
    return f"{_PREFIX}{level}"


def stated(features: Iterable[str]) -> list[int]:
    """The compute capabilities that features state."""
    return [int(name.removeprefix(_PREFIX)) for name in features if name.startswith(_PREFIX)]


def is_for(manifest: Mapping[str, Any]) -> bool:
    """Whether an artifact is for a GPU."""
    return bool(stated(manifest["target"]["features"]))


def runs(code: Iterable[int], level: int) -> bool:
    """Whether a GPU runs machine code for one of these: of its own generation, and no later than itself."""
    return any(own == level or (own // 10 == level // 10 and own < level and ORIN not in (own, level)) for own in code)
