"""Runs an artifact on an NVIDIA GPU: its kernels are machine code already, and the driver loads them as they are."""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mpq_compiler import gpu, tvm_runtime
from mpq_compiler.artifact import Artifact
from mpq_compiler.errors import UserError
from mpq_compiler.hoisting import REUSE_BYTES

_CUDA = 2  # kDLCUDA
_LIBRARY = "libtvm_runtime_cuda.so"
_CUDART = "libcudart.so.13"
_RELEASE = 13000


@functools.cache
def _load() -> ModuleType:
    """tvm_ffi with TVM's runtime for CUDA, beside its other one. UserError: something that it needs is missing."""
    tvm_ffi = tvm_runtime.load()
    with suppress(OSError):  # the next library says what is missing
        ctypes.CDLL(_cudart(), mode=ctypes.RTLD_GLOBAL)
    library = tvm_runtime.library_path().with_name(_LIBRARY)
    if not library.is_file():
        raise UserError(f"{library} is missing, TVM's runtime for CUDA: pip install 'mpq-compiler[runtime]'")
    try:
        ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(
            f"TVM's runtime for CUDA cannot be loaded ({error}): it needs the NVIDIA driver of CUDA 13 and "
            f"{_CUDART} (pip install nvidia-cuda-runtime==13.*)"
        ) from error
    return tvm_ffi


def _cudart() -> str:
    """The runtime that the loader finds, else that of the wheel nvidia-cuda-runtime."""
    with suppress(OSError):
        ctypes.CDLL(_CUDART)
        return _CUDART
    spec = importlib.util.find_spec("nvidia")
    places = [Path(place, "cu13", "lib", _CUDART) for place in (spec and spec.submodule_search_locations) or ()]
    return next((str(path) for path in places if path.is_file()), _CUDART)


def _require_driver() -> None:
    """UserError: the driver is of an earlier release than TVM's runtime and the machine code."""
    if (version := gpu.driver_version()) < _RELEASE:
        raise UserError(
            f"the NVIDIA driver is of CUDA {version // 1000}.{version % 1000 // 10}, and artifacts need "
            f"{_RELEASE // 1000}.0 or later: update the driver (of a Jetson, JetPack 7)"
        )


def _require_memory(artifact: Artifact) -> None:
    """UserError: the GPU cannot hold stored and prepared weights and one call's activations at once."""
    memory = artifact.manifest.get("memory", {})
    needed = memory.get("prepared_bytes", 0) + max(memory.get("activation_bytes", {}).values(), default=0)
    needed += artifact.manifest.get("weights", {}).get("payload_bytes", 0)
    device = gpu.gpus()[0]
    if needed > device.memory:
        raise UserError(
            f"{artifact.path} takes {needed / 1e6:.0f} MB of the GPU's memory, and {device.name} has "
            f"{device.memory / 1e6:.0f} MB: compile it with fewer bits or a smaller batch"
        )


class CudaMachine(tvm_runtime.VirtualMachine):
    """As of a CPU, with tensors in the memory of the first GPU.

    The first call of a function captures its launches in a CUDA graph, later ones launch the graph.
    """

    devices = (_CUDA, *tvm_runtime.VirtualMachine.devices)

    def __init__(self, artifact: Artifact, threads: int, reuse_bytes: int = REUSE_BYTES) -> None:
        """As of a CPU; one thread launches. UserError: the driver is too old, or the GPU's memory too small."""
        _require_driver()
        _require_memory(artifact)
        super().__init__(artifact, threads, reuse_bytes)

    def _load(self) -> ModuleType:
        return _load()

    def _place(self, prepared: Any) -> None:
        """Where they were made."""

    @contextmanager
    def _calling(self) -> Iterator[None]:
        yield

    def _tensor(self, array: np.ndarray) -> Any:
        device, dtype = self._ffi.device("cuda", 0), self._ffi.dtype(str(array.dtype))
        allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        tensor = allocate(self._ffi.Shape(array.shape), dtype, device, None)
        self._send(array, tensor)
        return tensor

    def _send(self, buffer: np.ndarray, tensor: Any) -> None:
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(tensor, ctypes.c_void_p(buffer.ctypes.data), buffer.nbytes)

    def _received(self, tensor: Any) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array
