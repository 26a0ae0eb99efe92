"""Compiles CUDA C++ to machine code and puts it into the library, so that no device compiles anything.

TVM leaves CUDA source in its modules, to be compiled where they are loaded. Here NVIDIA's compiler makes a fatbin of
it, with code for every architecture of the target, which replaces the source in the bytes of the module. TVM's runtime
hands it to the driver as it is. For drivers of CUDA 12 it is code for one architecture, by the compiler of that release
(`nvrtc`).

TVM keeps everything that a library holds beside its own code in one string, `__tvm_ffi__library_bin`: how modules
import one another, and the bytes of each. `Imports` reads and writes it (tvm-ffi, src/ffi/extra/library_module.cc).
"""

from __future__ import annotations

import functools
import itertools
import os
import shutil
import struct
import subprocess
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mpq_compiler.backends.tvm.toolchain import nvrtc
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.table import Target

SYMBOL = "__tvm_ffi__library_bin"
DEVICE, SOURCE = ".device", ".cu"
"""The suffixes of files beside a kernel's object: the kernel's module for the runtime, and its source."""
OPTIONS = ("-O3", *nvrtc.OPTIONS)


@dataclass(frozen=True)
class DeviceModule:
    """A module of GPU kernels."""

    functions: bytes
    """The description of each kernel, as TVM's runtime encodes it."""
    source: str
    """The CUDA source of all kernels."""

    def packed(self, code: bytes, kind: str = "fatbin") -> bytes:
        """The bytes that the runtime reads, with machine code (`code_for`) in place of the source."""
        return b"".join([_text(kind.encode()), self.functions, _text(code)])


@dataclass
class Imports:
    """The modules that a library imports, the root first.

    The library itself is the module "_lib", which has no bytes here.
    """

    kinds: list[bytes]
    """The kind of each module."""
    contents: list[bytes]
    """The bytes of each module."""
    children: list[list[int]]
    """The modules that each module imports."""

    @classmethod
    def of(cls, module: Any) -> Imports:
        """Reads the imports of a compiled module."""
        import numpy as np
        import tvm_ffi

        tensor = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(module)
        data = bytes(np.from_dlpack(tensor))
        at = 8
        begins, at = _numbers(data, at)
        targets, at = _numbers(data, at)
        kinds, contents = [], []
        for _ in begins[1:]:
            kind, at = _string(data, at)
            content, at = (b"", at) if kind == b"_lib" else _string(data, at)
            kinds.append(kind)
            contents.append(content)
        ranges = itertools.pairwise(begins)
        return cls(kinds, contents, [targets[a:b] for a, b in ranges])

    def add(self, kind: bytes, content: bytes) -> None:
        """Adds a module, which the library imports."""
        self.children[self.kinds.index(b"_lib")].append(len(self.kinds))
        self.kinds.append(kind)
        self.contents.append(content)
        self.children.append([])

    def packed(self) -> bytes:
        """Encodes the imports as the library's string."""
        begins = [0]
        for own in self.children:
            begins.append(begins[-1] + len(own))
        parts = [_packed(begins), _packed([child for own in self.children for child in own])]
        for kind, content in zip(self.kinds, self.contents, strict=True):
            parts += [_text(kind)] if kind == b"_lib" else [_text(kind), _text(content)]
        body = b"".join(parts)
        return struct.pack("<Q", len(body)) + body

    def write_object(self, path: Path, compiler: str) -> None:
        """Writes the string to an object file, for the linker."""
        with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
            data = Path(folder, "imports.bin")
            data.write_bytes(self.packed())
            lines = [".section .rodata", f".globl {SYMBOL}", ".balign 16", f"{SYMBOL}:", f'.incbin "{data}"']
            source = "\n".join([*lines, '.section .note.GNU-stack,"",%progbits', ""])
            command = [compiler, "-c", "-x", "assembler", "-", "-o", str(path)]
            subprocess.run(command, input=source.encode(), check=True, capture_output=True)


def compiled(functions: Mapping[str, Any], target: Target) -> tuple[Any, DeviceModule]:
    """Compiles GPU kernels: the module that launches them, and the module of the kernels, still as source."""
    import tvm

    options = tvm.target.Target({**target.tvm, "host": dict(target.host)})
    with _source_stays():
        module = tvm.compile(tvm.IRModule(dict(functions)), target=options, tir_pipeline="tirx").mod
    (device,) = module.imports
    imports = Imports.of(module)
    content = imports.contents[imports.kinds.index(b"cuda")]
    source = device.inspect_source("cuda")
    module.clear_imports()
    begin = _string(content, 0)[1]
    functions_ = content[begin : len(content) - 8 - len(source.encode())]
    if content[begin + len(functions_) :] != _text(source.encode()):
        raise RuntimeError("this release of TVM packs CUDA modules in another way")
    return module, DeviceModule(functions_, source)


@contextmanager
def _source_stays() -> Iterator[None]:
    """Keeps TVM from compiling the source for a GPU that it finds: the source stands in for its machine code."""
    import tvm_ffi

    name = "tvm_callback_cuda_compile"
    own = tvm_ffi.get_global_func(name)
    tvm_ffi.register_global_func(name, str.encode, override=True)
    try:
        yield
    finally:
        tvm_ffi.register_global_func(name, own, override=True)


def code_for(source: str, target: Target) -> tuple[bytes, str]:
    """Compiles CUDA source to machine code for a target, of kind "fatbin" or "cubin". UserError: no compiler."""
    if target.is_cuda12:
        (name,) = _architectures(target.levels)
        return nvrtc.cubin(source, name), "cubin"
    return fatbin(source, target.levels), "fatbin"


def require_compiler(target: Target) -> None:
    """Raises a UserError where the compiler of the target's kernels is not installed."""
    nvrtc.library() if target.is_cuda12 else compiler()


def compiler_version(target: Target) -> str:
    """The version of the compiler for the target, for the keys of the cache."""
    return nvrtc.version() if target.is_cuda12 else version(compiler())


def fatbin(source: str, levels: Sequence[int]) -> bytes:
    """Compiles CUDA source to a fatbin for some compute capabilities (80, ...) by nvcc.

    Raises:
        UserError: nvcc is not installed.
        RuntimeError: it refuses the source.
    """
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        kernel, output = Path(folder, "kernels.cu"), Path(folder, "kernels.fatbin")
        kernel.write_text(source)
        # One pass over the source for all: it uses nothing that the first of them has not.
        first, *others = _architectures(levels)
        wanted = ",".join(f"sm_{name}" for name in (first, *others))
        target = f"-gencode=arch=compute_{first},code=[{wanted}]"
        command = [str(compiler()), "-fatbin", *OPTIONS, target, "-o", str(output), str(kernel)]
        done = subprocess.run(command, capture_output=True, text=True, cwd=folder)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line.lower()] or done.stderr.splitlines()
            raise RuntimeError(f"nvcc refuses a kernel: {(lines or ['it says nothing'])[0].strip()}")
        for line in filter(_is_complaint, done.stderr.splitlines()):
            warnings.warn(f"NVIDIA's assembler complains of a kernel: {line.strip()}", stacklevel=2)
        return output.read_bytes()


def _is_complaint(line: str) -> bool:
    """Whether the assembler warns: of products that wait for one another (C75..), of what it does not keep."""
    return line.startswith("ptxas") and ("warning" in line or "(C7" in line)


def _architectures(levels: Sequence[int]) -> list[str]:
    """The compilers' names of compute capabilities; code for Hopper alone may use its own instructions (`wgmma`)."""
    return ["90a"] if [*levels] == [nvidia.HOPPER] else [str(level) for level in levels]


def compiler() -> Path:
    """The path of nvcc: in $CUDA_HOME, else in the wheels of the extra `cuda`, else in PATH. UserError: none."""
    return tool("nvcc")


def tool(name: str) -> Path:
    """The path of a program of the CUDA toolkit, searched for like `compiler`."""
    if (home := os.environ.get("CUDA_HOME")) and (path := Path(home, "bin", name)).is_file():
        return path
    if found := nvidia.from_wheels(f"cu13/bin/{name}") or shutil.which(name):
        return Path(found)
    raise UserError(
        f"{name} is not installed, which compiles kernels for CUDA: pip install 'mpq-compiler[cuda]', "
        "or name a CUDA toolkit of release 13 in CUDA_HOME"
    )


@functools.cache
def version(nvcc: Path) -> str:
    """The version that a compiler prints."""
    return subprocess.run([str(nvcc), "--version"], capture_output=True, text=True).stdout


def _text(content: bytes) -> bytes:
    return struct.pack("<Q", len(content)) + content


def _string(data: bytes, at: int) -> tuple[bytes, int]:
    size = struct.unpack_from("<Q", data, at)[0]
    return data[at + 8 : at + 8 + size], at + 8 + size


def _packed(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"<{len(numbers) + 1}Q", len(numbers), *numbers)


def _numbers(data: bytes, at: int) -> tuple[list[int], int]:
    count = struct.unpack_from("<Q", data, at)[0]
    return list(struct.unpack_from(f"<{count}Q", data, at + 8)), at + 8 * (count + 1)
