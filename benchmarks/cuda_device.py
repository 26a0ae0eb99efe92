"""The GPU's clock, its graphs and its memory, by the CUDA runtime that TVM and torch share."""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpq_compiler.runtime import cuda

Call = Callable[[], object]
_L2_CACHE_SIZE = 38  # cudaDevAttrL2CacheSize
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal


class Device:
    """The first GPU. Everything runs on the default stream, in order."""

    def __init__(self) -> None:
        self._ffi = cuda.load()
        self._runtime = ctypes.CDLL("libcudart.so.13")  # loaded by now, whoever brought it
        self._do("cudaSetDevice", 0)
        self._begin, self._end = ctypes.c_void_p(), ctypes.c_void_p()
        for event in (self._begin, self._end):
            self._do("cudaEventCreate", ctypes.byref(event))

    def _do(self, name: str, *arguments: Any) -> None:
        if code := getattr(self._runtime, name)(*arguments):
            self._runtime.cudaGetErrorString.restype = ctypes.c_char_p
            raise RuntimeError(f"{name}: {self._runtime.cudaGetErrorString(code).decode()} ({code})")

    def synchronize(self) -> None:
        """Waits for all that was launched. RuntimeError: some of it has failed."""
        self._do("cudaDeviceSynchronize")

    def seconds(self, call: Call, repeats: int) -> float:
        """Of a call, by events around several."""
        self._do("cudaEventRecord", self._begin, None)
        for _ in range(repeats):
            call()
        self._do("cudaEventRecord", self._end, None)
        self._do("cudaEventSynchronize", self._end)
        milliseconds = ctypes.c_float()
        self._do("cudaEventElapsedTime", ctypes.byref(milliseconds), self._begin, self._end)
        return milliseconds.value / 1e3 / repeats

    def wall(self, call: Call, repeats: int) -> float:
        """Seconds of a call by the wall, until its result is there."""
        self.synchronize()
        start = time.perf_counter()
        for _ in range(repeats):
            call()
        self.synchronize()
        return (time.perf_counter() - start) / repeats

    def captured(self, calls: Sequence[Call]) -> Call:
        """One launch of all that TVM's kernels of some calls launch."""
        stream, graph, executable = ctypes.c_void_p(), ctypes.c_void_p(), ctypes.c_void_p()
        self._do("cudaStreamCreate", ctypes.byref(stream))
        assert stream.value
        self._do("cudaStreamBeginCapture", stream, _THREAD_LOCAL)
        try:
            with self._ffi.use_raw_stream(self._ffi.device("cuda", 0), stream.value):
                for call in calls:
                    call()
        finally:
            self._do("cudaStreamEndCapture", stream, ctypes.byref(graph))
        self._do("cudaGraphInstantiate", ctypes.byref(executable), graph, ctypes.c_ulonglong(0))
        self._do("cudaGraphDestroy", graph)
        self._do("cudaStreamDestroy", stream)
        return lambda: self._do("cudaGraphLaunch", executable, None)

    def cache_bytes(self) -> int:
        """Of the level-2 cache."""
        value = ctypes.c_int()
        self._do("cudaDeviceGetAttribute", ctypes.byref(value), _L2_CACHE_SIZE, 0)
        return value.value

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._do("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value
