"""The NVIDIA GPUs of this machine, by the driver's own library. Neither torch nor a CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable

_MAJOR, _MINOR = 75, 76  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_*
_PREFIX = "sm_"


@functools.cache
def levels() -> tuple[int, ...]:
    """The compute capability of each GPU, 10 times the number (87 of a Jetson Orin); none without a driver."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return ()
    count, value, device = ctypes.c_int(), ctypes.c_int(), ctypes.c_int()
    if driver.cuInit(0) or driver.cuDeviceGetCount(ctypes.byref(count)):
        return ()
    found = []
    for number in range(count.value):
        parts = []
        for attribute in (_MAJOR, _MINOR):
            if driver.cuDeviceGet(ctypes.byref(device), number):
                return ()
            driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device)
            parts.append(value.value)
        found.append(10 * parts[0] + parts[1])
    return tuple(found)


def feature(level: int) -> str:
    """How a target states that it has code for a compute capability."""
    return f"{_PREFIX}{level}"


def stated(features: Iterable[str]) -> list[int]:
    """The compute capabilities that features state."""
    return [int(name.removeprefix(_PREFIX)) for name in features if name.startswith(_PREFIX)]


def runs(code: Iterable[int], level: int) -> bool:
    """Whether a GPU runs machine code for one of these: of its own generation, and no later than itself."""
    return any(own // 10 == level // 10 and own <= level for own in code)
