"""TVM's runtime library without TVM's compiler and without torch: where it is, its threads, and its virtual machine.

One file of the apache-tvm wheel is loaded, `libtvm_runtime.so` (3.4 MB), through apache-tvm-ffi.
"""

from __future__ import annotations

import ctypes
import fcntl
import functools
import importlib.metadata
import importlib.util
import io
import math
import mmap
import os
import re
import sys
import tempfile
import time
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np

from mpq_compiler.artifact import interface
from mpq_compiler.artifact.bundle import KERNELS, Artifact
from mpq_compiler.runtime.memo import REUSE_BYTES, Part, Staged, stage
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.tensorfile import ALIGNMENT, aligned

ENVIRONMENT = "MPQ_TVM_RUNTIME"
_LIBRARY = "libtvm_runtime.so"
_CPU, _POOLED = 1, 2  # kDLCPU; the memory allocator that keeps its buffers for the next call
_LARGE_PAGE, _MADV_COLLAPSE = 1 << 21, 25
_SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL
_KERNEL = re.compile(r".+_[0-9a-f]{16}")
"""The name of a kernel's function; the machine's own have others."""
_GO_ON, _SKIP = 0, 1  # VMInstrumentReturnKind: what the machine does with the call


def usable_cores() -> int:
    """The number of cores that this process may use."""
    return len(os.sched_getaffinity(0))


def library_path() -> Path:
    """The path of the runtime library: MPQ_TVM_RUNTIME, else in the installed apache-tvm, which is not imported.

    Where the process has imported tvm already, it is that package's library.

    Raises:
        UserError: there is no library.
    """
    stated = os.environ.get(ENVIRONMENT)
    if stated and "tvm" not in sys.modules:
        if not Path(stated).is_file():
            raise UserError(f"{ENVIRONMENT} names {stated}, which is not a file; name a copy of {_LIBRARY}")
        return Path(stated)
    spec = importlib.util.find_spec("tvm")
    for folder in (spec and spec.submodule_search_locations) or ():
        if (path := Path(folder, "lib", _LIBRARY)).is_file():
            return path
    raise UserError(
        "the TVM runtime is not installed: pip install 'mpq-compiler[runtime]', "
        f"or name a copy of {_LIBRARY} in {ENVIRONMENT}"
    )


def _import_tvm_ffi() -> ModuleType:
    """Imports apache-tvm-ffi without torch, which it would load where it can: half a second and 200 MB for nothing.

    Torch looks absent for the time of this import, unless it is loaded already. `import torch` works afterwards.
    """
    hidden = "tvm_ffi" not in sys.modules and "torch" not in sys.modules
    if hidden:
        sys.modules["torch"] = None  # type: ignore[assignment]
    try:
        import tvm_ffi
    finally:
        if hidden:
            del sys.modules["torch"]
    return tvm_ffi


@functools.cache
def load() -> ModuleType:
    """Loads the runtime library, once; returns tvm_ffi."""
    path = library_path()
    tvm_ffi = _import_tvm_ffi()
    try:
        ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
    except OSError as error:
        raise UserError(f"the TVM runtime {path} cannot be loaded ({error}); install it again") from error
    return tvm_ffi


@functools.cache
def _libm() -> ctypes.CDLL:
    return ctypes.CDLL("libm.so.6")


@contextmanager
def _default_float_environment() -> Iterator[None]:
    """Sets rounding to nearest and keeps denormals, whatever the process has set (torch.set_flush_denormal).

    Artifacts promise the same bits everywhere.
    """
    saved = (ctypes.c_char * 64)()  # fenv_t: 32 bytes on x86-64, 8 on AArch64
    libm = _libm()
    libm.fegetenv(saved)
    libm.fesetenv(ctypes.c_void_p(-1))  # FE_DFL_ENV
    try:
        yield
    finally:
        libm.fesetenv(saved)


def _require_version(artifact: Artifact) -> None:
    """Raises a UserError where the installed TVM is not of the release that compiled the artifact.

    Kernels call the runtime, whose interface changes between releases.
    """
    needed = artifact.manifest["versions"].get("apache-tvm")
    if needed is None or ENVIRONMENT in os.environ:
        return
    try:
        installed = importlib.metadata.version("apache-tvm")
    except importlib.metadata.PackageNotFoundError:
        return
    if installed.split(".")[:2] != needed.split(".")[:2]:
        raise UserError(
            f"{artifact.path} was compiled with TVM {needed}, and {installed} is installed: "
            f"pip install apache-tvm=={needed}, or compile it again"
        )


class VirtualMachine:
    """Executes the functions of an artifact's `kernels.so` with its prepared weights, one call at a time."""

    def __init__(self, artifact: Artifact, threads: int, reuse_bytes: int = REUSE_BYTES) -> None:
        """Loads the kernels and prepares the weights.

        Args:
            artifact: a verified artifact of the TVM backend.
            threads: threads of every call, at most the cores that this process may use.
            reuse_bytes: memory for results that do not depend on the latents; 0 computes them in every call.

        Raises:
            UserError: TVM's runtime is missing or of another release, or the threads cannot be started.
        """
        _require_version(artifact)
        self._ffi = self._load()
        self.threads = min(threads, usable_cores())
        self._library = self._load_kernels(artifact.content(KERNELS), artifact.manifest["files"][KERNELS]["sha256"])
        self._require_interface(artifact)
        self._machine = self._new_machine()
        self._functions = {f["name"]: self._machine[f["name"]] for f in artifact.manifest["functions"]}
        self._staged: dict[str, list[Staged]] = {
            function["name"]: [
                stage(tuple(value["shape"]), np.dtype(value["dtype"]), self._tensor) for value in function["inputs"]
            ]
            for function in artifact.manifest["functions"]
        }
        self._artifact = artifact
        self._prepared: Any = self._ffi.convert([])
        self._prepare({})
        entries = artifact.manifest.get("parts", [])
        self._reuses = reuse_bytes > 0
        self.parts = {
            entry["name"]: Part(entry, self._tensor, self._part(entry["name"]), reuse_bytes // len(entries))
            for entry in entries
        }
        """The parts, by name: what the functions share and keep between calls."""
        self._described = {function["name"]: function for function in artifact.manifest["functions"]}

    def _require_interface(self, artifact: Artifact) -> None:
        """Raises a UserError where the manifest states other shapes or types than the kernels were compiled for."""
        manifest = artifact.manifest
        prepare = manifest.get("prepare")
        read = (prepare or {}).get("tensors", ())
        tensors = {t["name"]: (t["dtype"], t["shape"]) for t in manifest["tensors"] if t["name"] in read}
        digest = interface.digest(manifest["functions"], manifest.get("parts", []), prepare, tensors)
        stated = self._library.get_function(interface.SYMBOL, query_imports=True)
        if stated is None or ctypes.string_at(stated(), interface.HEX).decode() != digest:
            raise UserError(
                f"{artifact.path} is damaged: its manifest states other inputs, outputs or tensors than its kernels "
                "were compiled for; copy or compile it again"
            )

    def _new_machine(self) -> Any:
        """A machine of TVM's that executes the library."""
        machine = self._library["vm_load_executable"]()
        places = [(kind, self.device if kind == self.devices[0] else 0, _POOLED) for kind in self.devices]
        machine["vm_initialization"](*(part for place in places for part in place))
        return machine

    def _prepare(self, replaced: Mapping[str, np.ndarray]) -> None:
        """Prepares the stored tensors, those in ``replaced`` with other values.

        UserError: the file is no longer that of the artifact; what was prepared before is still there.
        """
        stored = {**self._artifact.tensors(), **replaced}  # compares their hash, too
        if prepare := self._artifact.manifest.get("prepare"):
            self._prepared = self._ffi.convert([])  # before others take as much memory
            arrays = [aligned(stored.pop(name)) for name in prepare["tensors"]]
            arguments = [self._tensor(array) for array in arrays]
            with self._calling(), self._dropping(arrays, prepare.get("reads", ())):
                self._prepared = self._machine[prepare["name"]](*arguments)
            self._place(self._prepared)

    @contextmanager
    def _dropping(self, arrays: Sequence[np.ndarray], reads: Sequence[int]) -> Iterator[None]:
        """Gives the memory of every stored tensor back behind the kernel call that is the last to read it.

        Else weights would stand there twice, as they are stored and as they are prepared.
        """
        stored = {array.ctypes.data: array for array in arrays}
        left = dict(zip(stored, reads, strict=False))
        if not left or not hasattr(mmap, "MADV_DONTNEED"):
            yield
            return

        def drop(called: object, name: str, before: bool, result: object, *operands: object) -> int:
            if before or not _KERNEL.fullmatch(name):  # others are the machine's own: views, tuples
                return _GO_ON
            for operand in operands:
                address = operand.data_ptr() if isinstance(operand, self._ffi.Tensor) else None
                if address in left:
                    left[address] -= 1
                    if not left[address]:
                        _drop(stored[address])
            return _GO_ON

        set_instrument = self._machine["set_instrument"]
        set_instrument(self._ffi.convert(drop))
        try:
            yield
        finally:
            set_instrument(None)

    def replace(self, tensors: Mapping[str, np.ndarray]) -> None:
        """Replaces stored tensors, by name, by others of their shapes and types, until the next call.

        All others are those of the artifact. What was kept between calls is evicted. UserError: as `_prepare`.
        """
        self._prepare(tensors)
        self.forget()

    devices: tuple[int, ...] = (_CPU,)
    """DLPack's kinds of the devices that the machine uses; its tensors are on the first."""
    device = 0
    """The number of the device that its tensors are on, among those of its kind."""

    def _load(self) -> ModuleType:
        """Loads the runtime for its devices; returns tvm_ffi."""
        return load()

    @functools.cached_property
    def _use_threads(self) -> Any:
        return self._library.get_function("mpq_use_threads", query_imports=True)

    def _place(self, prepared: Any) -> None:
        """Moves prepared weights to where reading them is fastest."""
        _use_large_pages(prepared)

    def _part(self, name: str) -> Callable[..., Sequence[Any]]:
        function = self._machine[name]
        return lambda *tensors: function(*tensors, self._prepared)

    def forget(self) -> None:
        """Evicts all results of the parts."""
        for part in self.parts.values():
            part.forget()

    def _load_kernels(self, content: bytes, sha256: str) -> Any:
        """Loads a copy, of this hash, that nobody else can write to."""
        self._sealed = _sealed(content, sha256)
        # The dynamic loader knows libraries by path and keeps them, and the number of a descriptor is used again: a
        # name in a folder of its own is new, whatever has been loaded before. By its inode it still knows a file that
        # several artifacts share: so do they their threads.
        with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
            library = Path(folder, f"{sha256}.so")
            if self._sealed is not None:
                library.symlink_to(f"/proc/self/fd/{self._sealed.fileno()}")
                with suppress(RuntimeError, OSError):  # where such files may not be executed (vm.memfd_noexec)
                    return self._ffi.load_module(str(library), keep_module_alive=False)
                library.unlink()
            library.write_bytes(content)
            return self._ffi.load_module(str(library), keep_module_alive=False)

    @contextmanager
    def _calling(self) -> Iterator[None]:
        """Sets the float environment and the number of threads among which kernels split their loops."""
        with _default_float_environment():
            if code := self._use_threads(self.threads):
                raise UserError(f"{self.threads} threads cannot be started ({os.strerror(code)}); load it with fewer")
            yield

    def _tensor(self, array: np.ndarray) -> Any:
        """Makes a tensor on the device with the content of an aligned array."""
        return self._ffi.from_dlpack(array, require_alignment=ALIGNMENT)

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Calls `function` on arrays of its shapes and types, with any strides and alignment; returns its output."""
        staged = self._staged[function]
        for (buffer, tensor), array in zip(staged, inputs, strict=True):
            np.copyto(buffer, array)
            self._send(buffer, tensor)
        with self._calling():
            shared = self._shared(function, staged)
            result = self._functions[function](*(tensor for _, tensor in staged), *shared, self._prepared)
        return self._received(result)

    def _send(self, buffer: np.ndarray, tensor: Any) -> None:
        """Copies a staging buffer to its tensor; on a CPU both are the same memory."""

    def _received(self, tensor: Any) -> np.ndarray:
        """Copies a tensor of the device to an array; on a CPU the array shares its memory."""
        return np.from_dlpack(tensor)

    def _shared(self, function: str, staged: Sequence[Staged]) -> list[Any]:
        """The results of the parts of `function` for its inputs, computed where they are not cached."""
        described = self._described[function]
        if not (names := described.get("parts")):
            return []
        if not self._reuses:
            self.forget()
        arrays = {value["name"]: array for value, (array, _) in zip(described["inputs"], staged, strict=True)}
        found = []
        for part in map(self.parts.__getitem__, names):
            results = part.results(arrays, described["batch"])
            arrays |= {name: array for name, (array, _) in zip(part.outputs, results, strict=True)}
            found += [tensor for _, tensor in results]
        return found

    def profile(
        self, function: str, inputs: Sequence[np.ndarray], kernels: Collection[str]
    ) -> list[tuple[str, float, float, int]]:
        """Times every call of ``kernels`` in one run of `function`.

        The machine hands every call to an instrument, which makes the call itself and has the machine skip it.

        Returns:
            For each call the kernel, CPU seconds of this thread, elapsed seconds, and bytes of its operands.
        """
        found: list[tuple[str, float, float, int]] = []

        def timed(called: Any, name: str, before: bool, result: Any, *operands: Any) -> int:
            if not before or name not in kernels:
                return _GO_ON
            size = sum(math.prod(t.shape) * _bytes(t.dtype) for t in operands)
            wall, used = time.perf_counter(), time.thread_time()
            called(*operands)
            used, wall = time.thread_time() - used, time.perf_counter() - wall
            found.append((name, used, wall, size))
            return _SKIP

        set_instrument = self._machine["set_instrument"]
        set_instrument(self._ffi.convert(timed))
        try:
            self.run(function, inputs)
        finally:
            set_instrument(None)
        return found


_SEALED: weakref.WeakValueDictionary[str, io.FileIO] = weakref.WeakValueDictionary()
"""The sealed files of loaded kernels, by their hash."""


def _sealed(content: bytes, sha256: str) -> io.FileIO | None:
    """A file in memory with this content, which nothing can change; None where the system has none, or no /proc."""
    if (found := _SEALED.get(sha256)) is not None:
        return found
    try:
        handle = os.memfd_create("kernels.so", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        file = io.FileIO(handle, "r+")
        written = file.write(content)
        fcntl.fcntl(handle, fcntl.F_ADD_SEALS, _SEALS)
        if written != len(content) or os.stat(f"/proc/self/fd/{handle}").st_ino != os.fstat(handle).st_ino:
            return None
    except OSError:
        return None
    _SEALED[sha256] = file
    return file


def _drop(array: np.ndarray) -> None:
    """Gives the whole pages of an array in memory of `tensorfile.load_verified` back."""
    if (memory := tensorfile.mapping(array)) is None:
        return
    base = np.frombuffer(memory, np.uint8).ctypes.data
    begin = -(-(array.ctypes.data - base) // mmap.PAGESIZE) * mmap.PAGESIZE
    end = (array.ctypes.data - base + array.nbytes) // mmap.PAGESIZE * mmap.PAGESIZE
    if begin < end:
        memory.madvise(mmap.MADV_DONTNEED, begin, end - begin)


def _use_large_pages(tensors: Iterable[Any]) -> None:
    """Moves `tensors` into pages of 2 MiB where the system can (Linux 6.1), since every call reads all weights.

    This saves 1 to 3 % of a step of a UNet of 70 M parameters. Where the system refuses, small pages do as well.
    """
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for tensor in tensors:
        begin = tensor.data_ptr() // _LARGE_PAGE * _LARGE_PAGE
        end = tensor.data_ptr() + math.prod(tensor.shape) * _bytes(tensor.dtype)
        madvise(ctypes.c_void_p(begin), ctypes.c_size_t(-(-(end - begin) // _LARGE_PAGE) * _LARGE_PAGE), _MADV_COLLAPSE)


def _bytes(dtype: Any) -> int:
    """Bytes of an element, by its type as tvm_ffi spells it: "float32", "uint8", "bool"."""
    bits = "".join(c for c in str(dtype) if c.isdigit())
    return -(-int(bits) // 8) if bits else 1
