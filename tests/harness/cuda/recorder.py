"""Records what tests call and find on the emulator, for a machine with a GPU to call again (`benchmarks.gpu_kit`).

A record is a library with machine code in place of the emulator's, `N.so`, and its calls, `N.json`: each array as it is
given, and as it is afterwards where that differs. Arrays lie beside the records under what they hold, each once: many
kernels are called with the same.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.targets import nvidia

FOLDER, LEVELS = "MPQ_TEST_RECORD", "MPQ_TEST_RECORD_LEVELS"
_KERNEL = re.compile(r'extern "C" __global__ void __launch_bounds__\(\d+(?:, \d+)?\) (\w+)_kernel\(')
_PRODUCT, _SOFTMAX = "f32_bf16_bf16", "mpq_exp2"
"""In the names of what multiplies in bfloat16, and of what makes a sum's row an operand of another product."""
SUMS, UNIT = 2e-6, 2.0**-9
"""How far results of such kernels may be from the emulator's, relative to the largest; a unit of bfloat16 where sums
are rounded to it again for another product, and one falls to the other side."""


def asked() -> bool:
    """Whether this run of tests is recorded."""
    return FOLDER in os.environ


def levels(source: str) -> list[int]:
    """The compute capabilities that a source is compiled for: Hopper's alone where four warps multiply together."""
    asked_for = [int(level) for level in os.environ[LEVELS].split()]
    return [level for level in asked_for if level == nvidia.HOPPER or "wgmma" not in source]


def summing(source: str) -> dict[str, float]:
    """The kernels of a source whose sums are floats of the tensor cores, in an order of their own, and how far off."""
    starts = [(match.group(1), match.start()) for match in _KERNEL.finditer(source)]
    ends = [start for _, start in starts[1:]] + [len(source)]
    texts = {name: source[start:end] for (name, start), end in zip(starts, ends, strict=True)}
    return {name: UNIT if _SOFTMAX in text else SUMS for name, text in texts.items() if _PRODUCT in text}


class Record:
    """The calls of one library."""

    def __init__(self, functions: Mapping[str, Any]) -> None:
        from tests.harness.cuda import kernels

        self._sources: list[str] = []

        def code(source: str) -> bytes:
            self._sources.append(source)
            return machine_code.fatbin(source, levels(source))

        test = os.environ["PYTEST_CURRENT_TEST"].split(" ")[0].rsplit("/", 1)[-1]
        self._path = Path(os.environ[FOLDER], hashlib.sha256(f"{test} {sorted(functions)}".encode()).hexdigest()[:12])
        kernels.write(functions, self._path.with_suffix(".so"), code)
        self._seen: set[tuple[str, ...]] = set()
        self._calls: list[dict[str, Any]] = []
        source = self._sources[0]
        self._about = {"test": test, "levels": levels(source), "off": summing(source)}

    def add(self, calls: Sequence[tuple[str, Sequence[np.ndarray]]], found: Sequence[Sequence[np.ndarray]]) -> None:
        """Adds calls that went well, those which are new."""
        for (name, given), results in zip(calls, found, strict=True):
            before = [self._stored(array) for array in given]
            if (name, *before) in self._seen:
                continue
            self._seen.add((name, *before))
            after = [self._stored(array) for array in results]
            changed = {i: b for i, (a, b) in enumerate(zip(before, after, strict=True)) if a != b}
            self._calls.append({"kernel": name, "given": before, "results": changed})
        self._path.with_suffix(".json").write_text(json.dumps({**self._about, "calls": self._calls}))

    def _stored(self, array: np.ndarray) -> str:
        """The path of an array's file beside the record; other processes may store the same one."""
        stream = io.BytesIO()
        np.save(stream, np.ascontiguousarray(array))
        name = f"arrays/{hashlib.sha256(stream.getvalue()).hexdigest()[:24]}.npy"
        path = self._path.parent / name
        if not path.exists():
            path.parent.mkdir(exist_ok=True)
            scratch = path.with_suffix(f".{os.getpid()}")
            scratch.write_bytes(stream.getvalue())
            scratch.rename(path)
        return name
