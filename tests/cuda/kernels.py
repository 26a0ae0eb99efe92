"""Builds CUDA kernels for the emulator, and runs them there."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import tvm

from mpq_compiler.backends.tvm.cuda import machine_code
from mpq_compiler.backends.tvm.kernels.template import BATCH, Argument
from tests.cuda import emulator

TARGET = {"kind": "cuda", "arch": "sm_80"}
Call = tuple[str, Sequence[np.ndarray]]

_RUN = """
import ctypes, os, pickle, sys
from pathlib import Path
import tvm
ctypes.CDLL(str(Path(tvm.__file__).parent / "lib" / "libtvm_runtime_cuda.so"), mode=ctypes.RTLD_GLOBAL)
library = tvm.runtime.load_module(sys.argv[1])
device = tvm.cuda(0)
for name, arrays in pickle.load(sys.stdin.buffer):
    reading, writing = os.pipe()
    if not (child := os.fork()):  # so that one that crashes ends nothing else
        tensors = [tvm.runtime.tensor(array, device) for array in arrays]
        library[name](*tensors)
        with os.fdopen(writing, "wb") as stream:
            pickle.dump([tensor.numpy() for tensor in tensors], stream)
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading, "rb") as stream:
        result = stream.read()
    failed = os.waitpid(child, 0)[1]
    pickle.dump(None if failed else pickle.loads(result), sys.stdout.buffer)
"""


class Library:
    """Kernels in one library."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="mpq-cuda-")
        self.path = Path(self._folder.name, "kernels.so")
        target = tvm.target.Target(TARGET, host={"kind": "llvm"})
        compiled = tvm.compile(tvm.IRModule(dict(functions)), target=target, tir_pipeline="tirx").mod
        device = machine_code.split(compiled)
        imports = machine_code.Imports([b"_lib"], [b""], [[]])
        imports.add(b"cuda", device.packed(emulator.compiled(device.source)))
        host, packed = Path(self._folder.name, "host.o"), Path(self._folder.name, "imports.o")
        compiled.write_to_file(str(host))
        imports.write_object(packed, "gcc")
        subprocess.run(["gcc", "-shared", "-o", str(self.path), str(host), str(packed)], check=True)

    def tried(self, calls: Sequence[Call], early: bool = False) -> list[list[np.ndarray] | None]:
        """What the arrays of each call hold after it; None where the emulator found something wrong, or crashed.

        early: copies happen when they are asked for
        """
        done = subprocess.run(
            [sys.executable, "-c", _RUN, str(self.path)],
            input=pickle.dumps([(name, [np.ascontiguousarray(a) for a in arrays]) for name, arrays in calls]),
            capture_output=True,
            env=emulator.environment(**({"MPQ_EMULATED_EARLY": "1"} if early else {})),
            timeout=300,
        )
        assert done.returncode == 0, done.stderr.decode()[-2000:]
        stream = io.BytesIO(done.stdout)
        self.said = done.stderr.decode()
        return [pickle.load(stream) for _ in calls]

    def run(self, calls: Sequence[Call], early: bool = False) -> list[list[np.ndarray]]:
        """As `tried`, of kernels that are right."""
        found = self.tried(calls, early)
        bad = [name for (name, _), result in zip(calls, found, strict=True) if result is None]
        assert not bad, f"{', '.join(bad)}: {self.said[-2000:]}"
        return [result for result in found if result is not None]


def cuobjdump(option: str, code: Path) -> str:
    """What it says of the machine code in a file."""
    command = [machine_code.tool("cuobjdump"), option, str(code)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def empty(argument: Argument, batch: int) -> np.ndarray:
    """A result to be written, full of a byte that no kernel leaves behind by chance."""
    shape = tuple(batch if extent == BATCH else int(extent) for extent in argument.shape)
    array = np.empty(shape, argument.dtype)
    array.view(np.uint8)[...] = 0xA5
    return array
