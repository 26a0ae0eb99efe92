"""Builds CUDA kernels, and runs them: on the emulator, or with `pytest --gpu` on the GPU of this machine."""

from __future__ import annotations

import io
import os
import pickle
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.targets.table import TARGETS, Target
from tests.harness.cuda import emulator, recorder, silicon

TARGET = TARGETS["cuda-sm80"]
Call = tuple[str, Sequence[np.ndarray]]

SECONDS = 120
"""Of a call, which else counts as crashed."""

_RUN = f"""
import ctypes, os, pickle, signal, sys
from mpq_compiler.runtime import cuda as cuda_runtime
ffi = cuda_runtime.load()  # without TVM's compiler and torch, which take seconds to load
library = ffi.load_module(sys.argv[1])
allocate = ffi.get_global_func("runtime.TVMTensorAllocWithScope")
send, receive = (ffi.get_global_func(f"runtime.TVMTensorCopy{{way}}Bytes") for way in ("From", "To"))
for name, arrays in pickle.load(sys.stdin.buffer):
    reading, writing = os.pipe()
    if not (child := os.fork()):  # so that one that crashes ends nothing else; nothing has called the driver before
        signal.alarm({SECONDS})
        device, tensors = ffi.device("cuda", 0), []
        for array in arrays:
            tensors.append(allocate(ffi.Shape(array.shape), ffi.dtype(str(array.dtype)), device, None))
            send(tensors[-1], ctypes.c_void_p(array.ctypes.data), array.nbytes)
        library[name](*tensors)
        for tensor, array in zip(tensors, arrays):
            receive(tensor, ctypes.c_void_p(array.ctypes.data), array.nbytes)
        with os.fdopen(writing, "wb") as stream:
            pickle.dump(arrays, stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        result = stream.read()
    failed = os.waitpid(child, 0)[1]
    pickle.dump(None if failed else pickle.loads(result), sys.stdout.buffer)
"""


def needs() -> None:
    """Skips the test where kernels run on neither."""
    if not silicon.asked():
        emulator.needs()


def environment(release: int = 13, **variables: str) -> dict[str, str]:
    """Of a process in which TVM's CUDA runtime finds a driver; release, variables: of CUDA, and for the emulator's."""
    return dict(os.environ) if silicon.asked() else emulator.environment(release, **variables)


def write(functions: Mapping[str, Any], path: Path, code: Callable[[str], bytes]) -> None:
    """The library of some kernels. code: what makes machine code of their source."""
    launching, device = machine_code.compiled(functions, TARGET)
    imports = machine_code.Imports([b"_lib"], [b""], [[]])
    imports.add(b"cuda", device.packed(code(device.source)))
    with tempfile.TemporaryDirectory(prefix="mpq-cuda-") as folder:
        host, packed = Path(folder, "host.o"), Path(folder, "imports.o")
        launching.write_to_file(str(host))
        imports.write_object(packed, "gcc")
        subprocess.run(["gcc", "-shared", "-o", str(path), str(host), str(packed)], check=True)


class Library:
    """Kernels in one library."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mpq-cuda-")
        self.path = Path(self._folder.name, "kernels.so")
        write(functions, self.path, silicon.compiled if silicon.asked() else emulator.compiled)
        self._record = recorder.Record(functions) if recorder.asked() else None

    def tried(
        self, calls: Sequence[Call], early: bool = False, truncating: bool = False
    ) -> list[list[np.ndarray] | None]:
        """What the arrays of each call hold after it; None where the emulator found something wrong, or it crashed.

        early: copies happen when they are asked for
        truncating: sums of floats of tensor cores are cut off as no GPU does it worse
        A GPU copies when it likes, adds up as it does, and does it all once more.
        """
        asked = {"EARLY": early, "TRUNCATING": truncating}
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(self.path)],
            input=pickle.dumps([(name, [np.ascontiguousarray(a) for a in arrays]) for name, arrays in calls]),
            capture_output=True,
            env=environment(**{f"MPQ_EMULATED_{name}": "1" for name, wanted in asked.items() if wanted}),
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        stream = io.BytesIO(done.stdout)
        self.said = done.stderr.decode()
        return [pickle.load(stream) for _ in calls]

    def run(self, calls: Sequence[Call], early: bool = False, truncating: bool = False) -> list[list[np.ndarray]]:
        """As `tried`, of kernels that are right."""
        found = self.tried(calls, early, truncating)
        bad = [name for (name, _), result in zip(calls, found, strict=True) if result is None]
        assert not bad, f"{', '.join(bad)}: {self.said[-2000:]}"
        results = [result for result in found if result is not None]
        if self._record and not truncating:
            self._record.add(calls, results)
        return results


def cuobjdump(option: str, code: Path) -> str:
    """What it says of the machine code in a file."""
    done = subprocess.run([machine_code.tool("cuobjdump"), option, code], capture_output=True, text=True)
    assert done.returncode == 0, f"{option} of {code.stat().st_size} bytes: {done.returncode}, {done.stderr[-1000:]}"
    return done.stdout


def disassembled(functions: Mapping[str, Any], target: Target, folder: Path) -> tuple[str, str]:
    """(the resources, the instructions) of the machine code of some kernels, which keeps no register in memory."""
    _, device = machine_code.compiled(functions, target)
    code = folder / "kernels.fatbin"
    code.write_bytes(machine_code.fatbin(device.source, target.levels))
    used = cuobjdump("-res-usage", code)
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", used)) == {"0"}, used
    return used, cuobjdump("-sass", code)


def empty(argument: Argument, batch: int) -> np.ndarray:
    """A result to be written, full of a byte that no kernel leaves behind by chance."""
    shape = tuple(batch if extent == BATCH else int(extent) for extent in argument.shape)
    array = np.empty(shape, argument.dtype)
    array.view(np.uint8)[...] = 0xA5
    return array
