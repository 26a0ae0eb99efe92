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

from mpq_compiler import tvm_runtime
from mpq_compiler.errors import UserError

_CUDA = 2  # kDLCUDA
_LIBRARY = "libtvm_runtime_cuda.so"
_CUDART = "libcudart.so.13"


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


class CudaMachine(tvm_runtime.VirtualMachine):
    """As of a CPU, with tensors in the memory of the first GPU."""

    devices = (_CUDA, *tvm_runtime.VirtualMachine.devices)

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
