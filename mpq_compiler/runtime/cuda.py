"""Runs an artifact on an NVIDIA GPU: the driver loads its kernels as they are, for they are machine code already."""

from __future__ import annotations

import ctypes
import functools
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mpq_compiler.artifact.bundle import CUDART, Artifact
from mpq_compiler.runtime import tvm
from mpq_compiler.runtime.memo import REUSE_BYTES
from mpq_compiler.runtime.on_gpu import There
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


def _require_memory(artifact: Artifact, number: int, free: int | None = None) -> None:
    """Raises a UserError where a GPU's memory cannot hold the weights, stored and prepared, and a call's activations.

    free: bytes that are free; None checks the whole memory alone.
    """
    memory = artifact.manifest.get("memory", {})
    needed = memory.get("prepared_bytes", 0) + max(memory.get("activation_bytes", {}).values(), default=0)
    needed += artifact.manifest.get("weights", {}).get("payload_bytes", 0)
    device = nvidia.gpus()[number]
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
    failed = _runtime().cudaMemGetInfo(ctypes.byref(free), ctypes.byref(total))
    return None if failed else free.value


_FROM_HOST, _TO_HOST, _ON_DEVICE = 1, 2, 3  # cudaMemcpyKind
_RELAXED = 2  # cudaStreamCaptureModeRelaxed
_RUN_OR_CAPTURE = "vm.builtin.cuda_graph.run_or_capture"


Tensor = Any
"""One of the runtime's, on the GPU."""


class _Turns:
    """What threads do side by side, and what one does alone.

    While TVM captures a graph no thread may allocate memory or use the default stream, or the capture fails with it.
    """

    def __init__(self) -> None:
        self.forget()
        if hasattr(os, "register_at_fork"):
            os.register_at_fork(after_in_child=self.forget)

    def forget(self) -> None:
        """Begins anew, as where a process was forked: the other threads are not there."""
        self._changed = threading.Condition()  # a thread may take it again
        self._threads = 0

    @contextmanager
    def beside_others(self) -> Iterator[None]:
        with self._changed:
            self._threads += 1
        try:
            yield
        finally:
            with self._changed:
                self._threads -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        with self._changed:
            self._changed.wait_for(lambda: self._threads <= 0)  # below where one forked within its own call
            yield


_TURNS = _Turns()


@functools.cache
def _runtime() -> ctypes.CDLL:
    """CUDA's runtime library, which `load` has loaded for all."""
    runtime = ctypes.CDLL(None)
    runtime.cudaGetErrorString.restype = ctypes.c_char_p
    return runtime


def _error(code: int) -> str:
    return f"{_runtime().cudaGetErrorString(code).decode()} ({code})"


class CudaMachine(tvm.VirtualMachine):
    """A virtual machine whose tensors are in the memory of a GPU.

    The first call of a function captures its launches in a CUDA graph; later calls launch the graph. The current device
    of a calling thread stays what it was.
    """

    devices = (_CUDA, *tvm.VirtualMachine.devices)

    def __init__(self, artifact: Artifact, threads: int, reuse_bytes: int = REUSE_BYTES, device: int = 0) -> None:
        """Loads kernels and weights onto a GPU.

        Raises:
            UserError: there is no GPU of this number, the driver is too old, or the GPU's memory too small.
        """
        _require_driver(artifact)
        if not 0 <= device < len(nvidia.gpus()):
            count = len(nvidia.gpus())
            raise UserError(f"there is no cuda:{device} on this machine: it has {count} GPUs, from cuda:0 on")
        self.device = device
        self._called: set[str] = set()
        self._stream: int | None = None
        """The stream of the last call that may go on, which ends at the event."""
        self._captured: list[Tensor] = []
        """What graphs of callers write to."""
        _require_memory(artifact, device)
        self._artifact, old = artifact, nvidia.driver_version() < nvidia.CUDA_13
        self._cudart = artifact.file(CUDART) if old else None
        load(self._cudart)
        with self._calling():
            super().__init__(artifact, threads, reuse_bytes)

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Calls `function` as `VirtualMachine.run` does; the thread's current device stays."""
        with self._calling(function):
            self._wait(0)
            self._called.add(function)
            found = super().run(function, inputs)  # which waits
        self._stream = None
        return found

    def _load(self) -> ModuleType:
        loaded = load(self._cudart)
        _require_memory(self._artifact, self.device, _free_memory())
        return loaded

    def _place(self, prepared: object) -> None:
        """Leaves prepared weights where the GPU has written them."""

    @contextmanager
    def _calling(self, function: str | None = None) -> Iterator[None]:
        """The machine's device is current; a function that is called for the first time is alone."""
        captures = function is not None and function not in self._called
        before = ctypes.c_int()
        with _TURNS.alone() if captures else _TURNS.beside_others():
            self._do("cudaGetDevice", ctypes.byref(before))
            try:
                self._do("cudaSetDevice", self.device)
                yield
            finally:
                self._do("cudaSetDevice", before)

    def _do(self, name: str, *arguments: object) -> None:
        """Calls CUDA's runtime. UserError: it fails."""
        if code := getattr(_runtime(), name)(*arguments):
            raise UserError(f"the GPU does not go on: {name} says {_error(code)}")

    def call(
        self, function: str, inputs: Sequence[Sequence[tuple[int, int]] | np.ndarray], stream: int, capturing: bool
    ) -> Tensor:
        """Calls `function` on a stream, without waiting for it; returns its output, a tensor on the GPU.

        `end` takes it before the next call, for its memory is the machine's.

        Args:
            inputs: of each its pieces in the memory of the GPU, in order, addresses and bytes; or its values.
            stream: of CUDA, the caller's. Calls on several streams wait for one another.
            capturing: whether the stream is being captured in a graph.

        Raises:
            UserError: a function that was not called before, or values that are not on the GPU, while capturing.
        """
        staged = self._staged[function]
        if capturing and (function not in self._called or any(isinstance(given, np.ndarray) for given in inputs)):
            raise UserError(
                "what is captured in a CUDA graph is called once before, and reads tensors on the GPU alone (the "
                "timestep too): call it once, then capture"
            )
        handle = ctypes.c_void_p(stream)
        with self._calling(function), self._ffi.use_raw_stream(self._ffi.device("cuda", self.device), stream):
            if not capturing:
                self._wait(stream)
            for (buffer, tensor), given in zip(staged, inputs, strict=True):
                target = tensor.data_ptr()
                if isinstance(given, np.ndarray):
                    np.copyto(buffer, given)
                    self._copy(target, buffer.ctypes.data, buffer.nbytes, _FROM_HOST, handle)
                    continue
                for pointer, size in given:
                    self._copy(target, pointer, size, _ON_DEVICE, handle)
                    target += size
            operands = *(tensor for _, tensor in staged), self._prepared
            if capturing:
                with self._capture_allowed():
                    result = self._launching[function](*operands)
                self._captured.append(result)
            else:
                result = self._functions[function](*operands)
        self._called.add(function)
        return result

    @functools.cached_property
    def _launching(self) -> dict[str, Callable[..., Tensor]]:
        """The functions by name, of a machine that launches kernels one by one: no graph is launched into another.

        Its activations are memory of its own. What builds graphs is looked up when an executable is loaded.
        """
        built, invoke = (self._ffi.get_global_func(name) for name in (_RUN_OR_CAPTURE, "vm.builtin.invoke_closure"))

        def run(machine: object, function: object, operands: Iterable[object], *rest: object) -> object:
            return invoke(machine, function, *operands)

        self._ffi.register_global_func(_RUN_OR_CAPTURE, run, override=True)
        try:
            machine = self._new_machine()
        finally:
            self._ffi.register_global_func(_RUN_OR_CAPTURE, built, override=True)
        self._launcher = machine  # which its functions need
        return {name: machine[name] for name in self._functions}

    @contextmanager
    def _capture_allowed(self) -> Iterator[None]:
        """What a captured call may do besides launching: allocate memory, the first time."""
        mode = ctypes.c_int(_RELAXED)
        self._do("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))
        try:
            yield
        finally:
            self._do("cudaThreadExchangeStreamCaptureMode", ctypes.byref(mode))

    def end(
        self,
        output: Tensor,
        parts: Sequence[tuple[int, int]],
        begin: int,
        count: int,
        stream: int,
        capturing: bool,
    ) -> None:
        """Ends a call on its stream: samples of its output go to where sample `begin` of a larger one lies.

        Args:
            output: of `call`.
            parts: what a sample has, one behind the other: where those of all samples go to, and the bytes of one.
            begin: the first sample.
            count: of samples.
            stream: as of `call`.
            capturing: as of `call`.
        """
        size, source = sum(size for _, size in parts), output.data_ptr()
        with self._calling():
            handle = ctypes.c_void_p(stream)
            if len(parts) == 1:
                self._copy(parts[0][0] + begin * size, source, count * size, _ON_DEVICE, handle)
            else:
                for sample in range(count):
                    at = source + sample * size
                    for target, own in parts:
                        self._copy(target + (begin + sample) * own, at, own, _ON_DEVICE, handle)
                        at += own
            if not capturing:
                self._do("cudaEventRecord", self._event, handle)
                self._stream = stream

    def empty(self, shape: tuple[int, ...], dtype: str) -> Tensor:
        """A tensor on the GPU, of the runtime's own."""
        allocate = self._ffi.get_global_func("runtime.TVMTensorAllocWithScope")
        with self._calling():
            return allocate(self._ffi.Shape(shape), self._ffi.dtype(dtype), self._ffi.device("cuda", self.device), None)

    def from_dlpack(self, value: object) -> Tensor:
        """The runtime's tensor on the memory of another library's."""
        return self._ffi.from_dlpack(value)

    def values(self, tensor: There) -> np.ndarray:
        """Waits for a tensor on the GPU, and copies it."""
        array = np.empty(tensor.shape, tensor.dtype)
        with self._calling():
            self._do("cudaDeviceSynchronize")
            places = ctypes.c_void_p(array.ctypes.data), ctypes.c_void_p(tensor.pointer)
            self._do("cudaMemcpyAsync", *places, ctypes.c_size_t(array.nbytes), _TO_HOST, ctypes.c_void_p())
            self._do("cudaDeviceSynchronize")
        return array

    def _copy(self, target: int, source: int, size: int, kind: int, stream: ctypes.c_void_p) -> None:
        places = ctypes.c_void_p(target), ctypes.c_void_p(source)
        self._do("cudaMemcpyAsync", *places, ctypes.c_size_t(size), kind, stream)

    @functools.cached_property
    def _event(self) -> ctypes.c_void_p:
        event = ctypes.c_void_p()
        self._do("cudaEventCreate", ctypes.byref(event))
        return event

    def _wait(self, stream: int) -> None:
        """What comes next on a stream waits for the last call, if that was on another one."""
        if self._stream not in (None, stream):
            self._do("cudaStreamWaitEvent", ctypes.c_void_p(stream), self._event, ctypes.c_uint(0))

    @contextmanager
    def _dropping(self, arrays: Sequence[np.ndarray], reads: Sequence[int]) -> Iterator[None]:
        yield

    def _tensor(self, array: np.ndarray) -> Tensor:
        tensor = self.empty(array.shape, str(array.dtype))
        self._send(array, tensor)
        return tensor

    def _send(self, buffer: np.ndarray, tensor: Tensor) -> None:
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyFromBytes")
        copy(tensor, ctypes.c_void_p(buffer.ctypes.data), buffer.nbytes)

    def _received(self, tensor: Tensor) -> np.ndarray:
        array = np.empty(tuple(tensor.shape), str(tensor.dtype))
        copy = self._ffi.get_global_func("runtime.TVMTensorCopyToBytes")
        copy(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        return array
