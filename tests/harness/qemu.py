"""Runs TIR kernels as AArch64 code under qemu-user: cross-compiled here, called by the program runner.c.

One library and one qemu process serve any number of kernels and calls, since starting them costs more
than most kernels do: build an `Aarch64Library` of all kernels of a test, hand all its calls to one `run`.
"""

from __future__ import annotations

import atexit
import functools
import os
import shutil
import struct
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import tvm
from tvm.support import cc

from mpq_compiler.backends.tvm.toolchain.linker import VECTOR_GRANULE

TARGET = {"kind": "llvm", "mtriple": "aarch64-linux-gnu", "mattr": ["+neon", "+dotprod"]}
_COMPILER = "aarch64-linux-gnu-gcc"
_QEMU = "qemu-aarch64"
_ROOT = ("-L", "/usr/aarch64-linux-gnu")
NEWER = "MPQ_TEST_QEMU"
"""The variable with the path of a newer `_QEMU`, for CPUs that the distribution's does not emulate."""
STREAMING_RELEASE = 11
"""The first release that has SME2. Before release 9 three products of USMOPA in four are wrong."""
STREAMING = "max,sme512=on,sme_fa64=off"
"""A CPU with SME2 and one length of streaming vectors, on which NEON in streaming mode is an illegal instruction."""
SHORT = "max,sme256=on,sme512=on,sme_fa64=off,sme-default-vector-length=32"
"""One that starts threads with vectors of 256 bits, as Linux does, and gives 512 to those that ask."""
_CPUS = {"+sme2": STREAMING, "+i8mm": "max", "+dotprod": "cortex-a76", "+neon": "cortex-a53"}
"""By the first attribute that a target has: a CPU without those before it, so that their instructions would end it."""
_TYPE_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}

Argument = np.ndarray | int | float


def missing(target: str = "") -> str | None:
    """Why kernels for a target cannot be run here (for ``pytest.mark.skipif``), None where they can."""
    absent = [tool for tool in (_COMPILER, _QEMU) if shutil.which(tool) is None]
    if absent:
        return f"not installed: {', '.join(absent)}"
    if target == "aarch64-sme2" and not streaming():
        return f"qemu-aarch64 {STREAMING_RELEASE} is not installed, nor named by {NEWER}"
    return None


@functools.cache
def streaming() -> str | None:
    """The emulator of CPUs with SME2: what `NEWER` names or the one installed, or none where both are older."""
    for path in filter(None, (os.environ.get(NEWER), shutil.which(_QEMU))):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, check=True).stdout
        if int(said.split("version ")[1].split(".")[0]) >= STREAMING_RELEASE:
            return path
    return None


def command(cpu: str) -> list[str]:
    """What runs a program on that CPU."""
    return [(streaming() if "sme" in cpu else None) or _QEMU, *_ROOT, "-cpu", cpu]


@functools.cache
def _folder() -> Path:
    path = tempfile.mkdtemp(prefix="mpq-qemu-")
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)


@functools.cache
def _runner() -> Path:
    source, program = Path(__file__).with_name("runner.c"), _folder() / "runner"
    command = [_COMPILER, "-O1", "-Wall", "-Werror", "-rdynamic", str(source), "-o", str(program), "-ldl"]
    subprocess.run(command, check=True)
    return program


def _encode(argument: Argument) -> bytes:
    if isinstance(argument, np.ndarray):
        head = struct.pack(
            f"<iBBi{argument.ndim}q",
            0,
            _TYPE_CODES[argument.dtype.kind],
            argument.dtype.itemsize * 8,
            argument.ndim,
            *argument.shape,
        )
        return head + np.ascontiguousarray(argument).tobytes()
    return struct.pack("<iq", 1, argument) if isinstance(argument, int) else struct.pack("<id", 2, argument)


class Aarch64Library:
    """Kernels compiled for AArch64: an IRModule, or PrimFuncs by name."""

    def __init__(
        self,
        kernels: tvm.IRModule | dict[str, tvm.tirx.PrimFunc],
        target: dict | None = None,
    ) -> None:
        module = tvm.IRModule(kernels) if isinstance(kernels, dict) else kernels
        target = target or TARGET
        cpu = next(cpu for attribute, cpu in _CPUS.items() if attribute in target["mattr"])
        self.emulator = command(cpu)
        compiled = tvm.compile(module, target=target)
        handle, path = tempfile.mkstemp(suffix=".so", dir=_folder())
        os.close(handle)
        self.path = Path(path)
        options = ["-O2", str(VECTOR_GRANULE)] if "sme" in cpu else []
        compiled.export_library(path, fcompile=cc.cross_compiler(_COMPILER, options=options))

    def run(self, calls: Sequence[tuple[str, Sequence[Argument]]]) -> list[list[np.ndarray]]:
        """Makes all calls in one process; for each its tensor arguments as they are afterwards."""
        with tempfile.TemporaryDirectory(dir=_folder()) as folder:
            source, result = Path(folder, "calls"), Path(folder, "results")
            with source.open("wb") as file:
                file.write(struct.pack("<i", len(calls)))
                for name, arguments in calls:
                    file.write(
                        struct.pack("<i", len(name)) + name.encode() + struct.pack("<i", len(arguments))
                    )
                    for argument in arguments:
                        file.write(_encode(argument))
            command = [*self.emulator, str(_runner()), str(self.path), str(source), str(result)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"qemu-aarch64 ended with {done.returncode}: {done.stderr.strip()}")
            data, offset, out = result.read_bytes(), 0, []
            for _, arguments in calls:
                tensors = []
                for argument in arguments:
                    if isinstance(argument, np.ndarray):
                        tensors.append(
                            np.frombuffer(data, argument.dtype, argument.size, offset).reshape(argument.shape)
                        )
                        offset += argument.nbytes
                out.append(tensors)
            return out


def run_aarch64(
    kernel: tvm.IRModule | tvm.tirx.PrimFunc, name: str, args: Sequence[Argument], target: dict | None = None
) -> list[np.ndarray]:
    """One call of one kernel; all tensor arguments as they are afterwards. See also `Aarch64Library`."""
    module = kernel if isinstance(kernel, tvm.IRModule) else {name: kernel}
    return Aarch64Library(module, target).run([(name, args)])[0]
