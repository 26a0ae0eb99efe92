"""Runs an artifact on an NVIDIA GPU: the driver loads its kernels as they are, for they are machine code already."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mpq_compiler.artifact.bundle import CUDART, Artifact
from mpq_compiler.runtime import tvm
from mpq_compiler.runtime.memo import REUSE_BYTES
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia

_CUDA = 2  # kDLCUDA
_LIBRARY = "libtvm_runtime_cuda.so"
_CUDARTS = {
    12: ("cuda_runtime/lib", "nvidia-cuda-runtime-cu12==12.*"),
    13: ("cu13/lib", "nvidia-cuda-runtime==13.*"),
}
"""Where each release of CUDA's runtime library is in its wheel, and the wheel to install."""


@functools.cache
def load(cudart: Path | None = None) -> ModuleType:
    """Loads TVM's runtime for CUDA beside its runtime for CPUs, once; returns tvm_ffi.

    Args:
        cudart: with a driver of CUDA 12, a shim for the runtime of CUDA 13 that TVM's wheel was built with. The dynamic
            loader goes by the name that a library gives itself, so it takes the shim if that is loaded before.

    Raises:
        UserError: a library that it needs is missing or does not load.
    """
    tvm_ffi = tvm.load()
    library = tvm.library_path().with_name(_LIBRARY)
    if not library.is_file():
        raise UserError(f"{library} is missing, TVM's runtime for CUDA: pip install 'mpq-compiler[runtime]'")
    release = 12 if cudart else 13
    try:
        for path in (_cudart(release), *filter(None, [cudart]), library):
            ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(
            f"TVM's runtime for CUDA cannot be loaded ({error}): it needs the NVIDIA driver of CUDA {release} and "
            f"libcudart.so.{release} (pip install {_CUDARTS[release][1]})"
        ) from error
    return tvm_ffi


def _cudart(release: int) -> str:
    """The path of CUDA's runtime library: the one that the loader finds, else the one in its wheel."""
    name = f"libcudart.so.{release}"
    with suppress(OSError):
        ctypes.CDLL(name)
        return name
    return str(nvidia.from_wheels(f"{_CUDARTS[release][0]}/{name}") or name)


def _require_driver(artifact: Artifact) -> None:
    """Raises a UserError where the driver supports only earlier releases of CUDA than the artifact needs."""
    version, needed = nvidia.driver_version(), artifact.manifest["target"].get("cuda", nvidia.CUDA_13)
    if version < needed:
        other = ", or compile for CUDA 12.6 (--target cuda12-sm87 and others)" if needed >= nvidia.CUDA_13 else ""
        raise UserError(
            f"the NVIDIA driver is of CUDA {nvidia.spelled(version)}, and {artifact.path} needs "
            f"{nvidia.spelled(needed)} or "
            f"later: update the driver (of a Jetson, JetPack {7 if other else 6}){other}"
        )


def _require_memory(artifact: Artifact, free: int | None = None) -> None:
    """Raises a UserError where the GPU's memory cannot hold the weights, stored and prepared, and a call's activations.

    free: bytes that are free; None checks the whole memory alone.
    """
    memory = artifact.manifest.get("memory", {})
    needed = memory.get("prepared_bytes", 0) + max(memory.get("activation_bytes", {}).values(), default=0)
    needed += artifact.manifest.get("weights", {}).get("payload_bytes", 0)
    device = nvidia.gpus()[0]
    takes = f"{artifact.path} takes {needed / 1e6:.0f} MB of the GPU's memory, and"
    if needed > device.memory:
        raise UserError(
            f"{takes} {device.name} has {device.memory / 1e6:.0f} MB: compile it with fewer bits or a smaller batch"
        )
    if free is not None and needed > free:
        raise UserError(f"{takes} {free / 1e6:.0f} MB of {device.name} are free: end what else is in it")


def _free_memory() -> int | None:
    """Free bytes of the GPU that is used; None where CUDA's runtime does not tell."""
    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    failed = ctypes.CDLL(None).cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value


class CudaMachine(tvm.VirtualMachine):
    """A virtual machine whose tensors are in the memory of the first GPU.

    The first call of a function captures its launches in a CUDA graph; later calls launch the graph.
    """

    devices = (_CUDA, *tvm.VirtualMachine.devices)

    def __init__(self, artifact: Artifact, threads: int, reuse_bytes: int = REUSE_BYTES) -> None:
        """Loads kernels and weights onto the GPU. UserError: the driver is too old, or the GPU's memory too small."""
        _require_driver(artifact)
        _require_memory(artifact)
        self._artifact, old = artifact, nvidia.driver_version() < nvidia.CUDA_13
        self._cudart = artifact.file(CUDART) if old else None
        super().__init__(artifact, threads, reuse_bytes)

    def _load(self) -> ModuleType:
        loaded = load(self._cudart)
        _require_memory(self._artifact, _free_memory())
        return loaded

    def _place(self, prepared: Any) -> None:
        """Leaves prepared weights where the GPU has written them."""

    @contextmanager
    def _calling(self) -> Iterator[None]:
        yield

    @contextmanager
    def _dropping(self, stored: Iterable[np.ndarray]) -> Iterator[None]:
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
