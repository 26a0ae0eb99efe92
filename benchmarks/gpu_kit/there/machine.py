"""The GPU by CUDA's runtime library: tensors, clock and graphs, with TVM's runtime of the kit."""

from __future__ import annotations

import ctypes
import functools
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

Call = Callable[[], object]
HERE = Path(__file__).resolve().parents[1]
_L2_CACHE_SIZE = 38  # cudaDevAttrL2CacheSize
_THREAD_LOCAL = 1  # cudaStreamCaptureModeThreadLocal
_EVENTS = 200
"""Events at most of one measurement."""


@functools.cache
def load() -> ModuleType:
    """TVM's runtime for CUDA, of the kit; returns tvm_ffi."""
    os.environ.setdefault("MPQ_TVM_RUNTIME", str(HERE / "lib" / "libtvm_runtime.so"))
    os.environ.setdefault("TVM_FFI_DISABLE_TORCH_C_DLPACK", "1")  # else it compiles something where torch is there
    from mpq_compiler.runtime import cuda

    return cuda.load()


class Tensors:
    """Arrays on the first GPU."""

    def __init__(self) -> None:
        self._ffi = load()
        self._device = self._ffi.device("cuda", 0)
        self._allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        self._send = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        self._receive = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")

    def put(self, array: np.ndarray) -> Any:
        tensor = self._allocate(self._ffi.Shape(array.shape), self._ffi.dtype(str(array.dtype)), self._device, None)
        array = np.ascontiguousarray(array)
        self._send(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return tensor

    def take(self, tensor: Any) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        self._receive(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array

    def poison(self, size: int = 64 << 20) -> None:
        """Leaves memory that is allocated next full of NaN."""
        held = [self.put(np.full(size // 4, np.nan, np.float32)) for _ in range(2)]
        del held


class Device:
    """The first GPU. Everything runs on the default stream, in order."""

    def __init__(self) -> None:
        self._ffi = load()
        self._runtime = ctypes.CDLL(None)  # its CUDA runtime is loaded by now, whoever brought it
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

    @functools.cached_property
    def cache_bytes(self) -> int:
        """Of the level-2 cache."""
        value = ctypes.c_int()
        self._do("cudaDeviceGetAttribute", ctypes.byref(value), _L2_CACHE_SIZE, 0)
        return value.value

    def free_bytes(self) -> int:
        free, total = ctypes.c_size_t(), ctypes.c_size_t()
        self._do("cudaMemGetInfo", ctypes.byref(free), ctypes.byref(total))
        return free.value


def interleaved(
    calls: Mapping[str, Call], rounds: int, window: float, seconds: Callable[[Call, int], float]
) -> dict[str, list[float]]:
    """Seconds of each call in each round; they take turns, each turn at least a window long."""
    repeats = {}
    for name, call in calls.items():
        seconds(call, 1)
        repeats[name] = max(1, min(_EVENTS, round(window / max(seconds(call, 1), 1e-7))))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            found[name].append(seconds(call, repeats[name]))
    return found


def median_row(name: str, times: Mapping[str, Sequence[float]]) -> dict[str, Any]:
    """Microseconds of one, with least and most, and how many times as long the others take within rounds."""
    own = times[name]
    return {
        "name": name,
        "us": 1e6 * statistics.median(own),
        "spread": [1e6 * min(own), 1e6 * max(own)],
        "times_as_long": {
            other: statistics.median(b / a for a, b in zip(own, theirs, strict=True))
            for other, theirs in times.items()
            if other != name
        },
    }


def torch_or_none() -> ModuleType | None:
    """The machine's torch with its GPU; None, and a line that says so, where there is none."""
    load()  # before torch, whose CUDA runtime is then shared
    try:
        import torch
    except ImportError:
        say("torch is not installed here: nothing is compared with it")
        return None
    if not torch.cuda.is_available():
        say(f"torch {torch.__version__} finds no GPU: nothing is compared with it")
        return None
    return torch


def facts() -> dict[str, Any]:
    """What is measured on."""
    from mpq_compiler.targets import nvidia

    device = nvidia.gpus()[0]
    found = {"gpu": device.name, "level": device.level, "bytes": device.memory, "driver": nvidia.driver_version()}
    if smi := shutil.which("nvidia-smi"):
        query = "--query-gpu=clocks.sm,clocks.max.sm,temperature.gpu,driver_version"
        done = subprocess.run([smi, query, "--format=csv,noheader"], capture_output=True, text=True, check=False)
        found["clocks, temperature, driver"] = done.stdout.strip()
    options = [word for word in sys.argv[1:] if "/" not in word and word != "--out"]
    return {**found, "python": sys.version.split()[0], "command": " ".join(["run.py", *options])}


def write(path: Path, found: Mapping[str, Any]) -> None:
    """Writes results, and what they were measured on."""
    path.write_text(json.dumps({**facts(), **found}, indent=1) + "\n")


def tool(name: str, without: str) -> str | None:
    """The path of one of NVIDIA's programs; None, and a line that says what comes of it, where it is not installed."""
    program = shutil.which(name) or f"/usr/local/cuda/bin/{name}"
    if Path(program).exists():
        return program
    say(f"{name} is not installed here: {without}")
    return None


def reason(error: BaseException) -> str:
    """The kind of an error and its first line."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


def say(line: str) -> None:
    print(line, flush=True)
