"""Compiles integer kernels with their load-time preparation and runs them, here or as AArch64 code under qemu."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import tvm

from mpq_compiler.backends.tvm.kernels.common import template
from mpq_compiler.backends.tvm.kernels.cpu import gemm, prepare
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, stored_arguments
from mpq_compiler.targets.table import TARGETS, missing_features
from tests.harness import qemu
from tests.harness.shapes import Case, concrete

X86 = tuple(name for name in ISAS if name.startswith("x86"))
AARCH64 = tuple(name for name in ISAS if name.startswith("aarch64"))
_GUARD, _FILL = 256, 0xA5


def needs(name: str) -> Isa:
    """The ISA; skips the test where this machine cannot run it."""
    lacking = missing_features(TARGETS[name])
    if name in AARCH64 and lacking:
        reason = qemu.missing(name)
        if reason:
            pytest.skip(reason)
    elif lacking:
        pytest.skip(f"this CPU lacks {', '.join(lacking)}")
    return ISAS[name]


def here() -> list[str]:
    """The x86 targets that this machine runs."""
    found = [name for name in X86 if not missing_features(TARGETS[name])]
    return found or pytest.skip("this machine runs no x86 target")


class Guarded:
    """A tensor of TVM within a larger array, whose bytes before and behind it must not change."""

    def __init__(self, argument: Argument, batch: int) -> None:
        shape = concrete(argument.shape, batch)
        size = int(np.prod(shape)) * np.dtype(argument.dtype).itemsize
        whole = np.full(size + 2 * _GUARD + 64, _FILL, np.uint8)
        begin = _GUARD + -(whole.ctypes.data + _GUARD) % 64
        self._before, self._behind = whole[:begin], whole[begin + size :]
        self.array = whole[begin : begin + size].view(argument.dtype).reshape(shape)
        empty = tvm.runtime.tensor(self.array) if size == 0 else None  # DLPack refuses to share nothing
        self.tensor = empty or tvm.runtime.from_dlpack(self.array)

    def result(self) -> np.ndarray:
        assert (self._before == _FILL).all() and (self._behind == _FILL).all(), "written out of bounds"
        return self.array


class Kernels:
    """Kernels of some problems in one library."""

    def __init__(self, isa: Isa, problems: Sequence[QuantMatmul]) -> None:
        self.isa, self.problems = isa, list(problems)
        functions = {}
        for i, problem in enumerate(self.problems):
            functions[f"kernel{i}"] = gemm.build(problem, isa, f"kernel{i}")
            functions[f"prepare{i}"] = prepare.build(problem, isa, f"prepare{i}")
        module = template.module(functions)
        self.remote = isa.name in AARCH64
        compile_ = qemu.Aarch64Library if self.remote else tvm.compile
        self._library: Any = compile_(module, target=isa.target())

    def run(self, calls: Sequence[tuple[int, Case]]) -> list[np.ndarray]:
        """For each (index of a problem, case): the kernel's output."""
        return self._run_remote(calls) if self.remote else [self._run_here(i, case) for i, case in calls]

    def _run_here(self, index: int, case: Case) -> np.ndarray:
        problem, data = self.problems[index], case.stored()
        tensors = {name: tvm.runtime.tensor(np.ascontiguousarray(value)) for name, value in data.items()}
        made = {a.name: Guarded(a, case.batch) for a in prepare.outputs(problem, self.isa)}
        tensors |= {name: buffer.tensor for name, buffer in made.items()}
        order = [*stored_arguments(problem), *prepare.outputs(problem, self.isa)]
        self._library[f"prepare{index}"](*[tensors[a.name] for a in order])
        for buffer in made.values():
            buffer.result()
        arguments = gemm.arguments(problem, self.isa)
        out = Guarded(arguments[-1], case.batch)
        tensors["out"] = out.tensor
        self._library[f"kernel{index}"](*[tensors[a.name] for a in arguments])
        return out.result()

    def _run_remote(self, calls: Sequence[tuple[int, Case]]) -> list[np.ndarray]:
        datas = [case.stored() for _, case in calls]
        first = []
        for (index, case), data in zip(calls, datas, strict=True):
            outputs = prepare.outputs(self.problems[index], self.isa)
            data |= {a.name: np.zeros(concrete(a.shape, case.batch), a.dtype) for a in outputs}
            order = [*stored_arguments(self.problems[index]), *outputs]
            first.append((f"prepare{index}", [data[a.name] for a in order]))
        second = []
        for (index, case), data, made in zip(calls, datas, self._library.run(first), strict=True):
            outputs = prepare.outputs(self.problems[index], self.isa)
            data |= {a.name: value for a, value in zip(outputs, made[-len(outputs) :], strict=True)}
            arguments = gemm.arguments(self.problems[index], self.isa)
            data["out"] = np.zeros(concrete(arguments[-1].shape, case.batch), arguments[-1].dtype)
            second.append((f"kernel{index}", [data[a.name] for a in arguments]))
        return [tensors[-1] for tensors in self._library.run(second)]


def assert_same_bits(got: np.ndarray, wanted: np.ndarray, what: object = "") -> None:
    """Equality of every bit, with the first difference in the message."""
    assert got.shape == wanted.shape and got.dtype == wanted.dtype, what
    differ = got.view(f"u{got.itemsize}") != wanted.view(f"u{wanted.itemsize}")
    if differ.any():
        at = tuple(int(i) for i in np.argwhere(differ)[0])
        pytest.fail(
            f"{what}: {differ.sum()} of {differ.size} differ, first {got[at]} != {wanted[at]} at {at}"
        )
