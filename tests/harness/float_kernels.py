"""Runs float kernels on every CPU target that this machine can run or emulate, and compares the bits.

A test module lists its `Case`s in a `Suite`. Each target compiles them as one library, once, and runs them in one
go: in process where the CPU allows, AArch64 under qemu.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import torch
import tvm

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.targets import table as targets
from tests.harness import qemu

TARGETS = ("x86-64-avx2", "x86-64-avx512vnni", "aarch64-dotprod")


def tvm_target(name: str) -> tvm.target.Target:
    return tvm.target.Target(dict(targets.TARGETS[name].tvm))


def unavailable(name: str) -> str | None:
    """Why kernels for a target cannot be run here; None where they can."""
    lacking = targets.missing_features(targets.TARGETS[name])
    if not lacking:
        return None
    if targets.TARGETS[name].arch == "aarch64":
        return qemu.missing()
    return f"this machine lacks {', '.join(lacking)}"


def bfloat16(x: np.ndarray) -> np.ndarray:
    """Float32 rounded to bfloat16, to the nearest, ties to even: the upper halves."""
    return torch.from_numpy(x).bfloat16().view(torch.int16).numpy().view(np.uint16)


def shape_of(argument: Argument, batch: int) -> tuple[int, ...]:
    return tuple(batch if extent == BATCH else int(extent) for extent in argument.shape)


@dataclass(frozen=True)
class Case:
    """A kernel and its inputs; the output's shape follows from the arguments."""

    kernel: Callable[[str, str], tvm.tirx.PrimFunc]  # (isa, name)
    arguments: Sequence[Argument]
    inputs: Sequence[np.ndarray]
    batch: int

    def buffers(self) -> list[np.ndarray]:
        """Copies of the inputs, and an output full of a byte that no kernel leaves behind by chance."""
        for argument, value in zip(self.arguments, self.inputs, strict=False):
            assert value.shape == shape_of(argument, self.batch), argument
            assert value.dtype == argument.dtype, argument
        assert len(self.inputs) + 1 == len(self.arguments)
        output = np.empty(shape_of(self.arguments[-1], self.batch), self.arguments[-1].dtype)
        output.view(np.uint8)[...] = 0xA5
        return [*(np.ascontiguousarray(value) for value in self.inputs), output]


class Suite:
    """Cases by name."""

    def __init__(self, cases: dict[str, Case]):
        self.cases = cases

    @functools.cached_property
    def names(self) -> dict[str, str]:
        return {case: f"kernel_{i}" for i, case in enumerate(self.cases)}

    @functools.cache  # noqa: B019 (suites live as long as their module)
    def outputs(self, target: str) -> dict[str, np.ndarray]:
        """The output of every case on a target."""
        row = targets.TARGETS[target]
        kernels = {self.names[c]: case.kernel(row.isa, self.names[c]) for c, case in self.cases.items()}
        buffers = {c: case.buffers() for c, case in self.cases.items()}
        if targets.missing_features(row):
            library = qemu.Aarch64Library(kernels, dict(row.tvm))
            results = library.run([(self.names[c], buffers[c]) for c in self.cases])
            return {c: result[-1] for c, result in zip(self.cases, results, strict=True)}
        module = tvm.compile(tvm.IRModule(kernels), target=tvm_target(target))
        outputs = {}
        for case, arrays in buffers.items():
            tensors = [tvm.runtime.tensor(array) for array in arrays]
            module[self.names[case]](*tensors)
            outputs[case] = tensors[-1].numpy()
        return outputs

    @functools.cached_property
    def first(self) -> dict[str, np.ndarray]:
        """The outputs on the first target that runs here."""
        for target in TARGETS:
            if unavailable(target) is None:
                return self.outputs(target)
        pytest.skip("no CPU target of the float kernels runs on this machine")

    def check_same_bits(self, target: str) -> None:
        """The outputs on `target` are those of the first target, bit for bit (any NaN equals any NaN)."""
        assert target != TARGETS[0]
        if reason := unavailable(target) or unavailable(TARGETS[0]):
            pytest.skip(reason)
        outputs, first = self.outputs(target), self.outputs(TARGETS[0])
        different = [case for case in self.cases if not same_bits(outputs[case], first[case])]
        assert not different, f"{target} differs from {TARGETS[0]} in {different}"


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    if a.dtype != b.dtype or a.shape != b.shape:
        return False
    if a.dtype.kind != "f":
        return bool((a == b).all())
    both_nan = np.isnan(a) & np.isnan(b)
    return bool((both_nan | (a.view(f"i{a.itemsize}") == b.view(f"i{a.itemsize}"))).all())


def error(value: np.ndarray, exact: np.ndarray) -> float:
    """max |y - y'| / max |y'|, the bound of contract (a)."""
    assert value.shape == exact.shape
    return float(np.abs(value - exact).max() / np.abs(exact).max())


def quantized(y: np.ndarray, scale: np.ndarray, zero: np.ndarray, group: np.ndarray, bits: int) -> np.ndarray:
    """The definition of `quantize`, in NumPy float32."""
    shape = (-1, *[1] * (y.ndim - 1))
    inverse = (np.float32(1) / scale[group]).reshape(shape)
    z = zero[group].astype(np.float32).reshape(shape)
    codes = np.rint(np.clip(y * inverse, -z, np.float32(2**bits - 1) - z)) + z
    return codes.astype(np.uint8)


def quantizer_inputs(y: np.ndarray, groups: int, bits: int, seed: int = 0) -> list[np.ndarray]:
    """qscale, qzero and group that make use of the codes of `y` and clip a little of it."""
    rng = np.random.default_rng(seed)
    spread = 2 * np.abs(y).std() + 1e-3
    scale = (spread * rng.uniform(1.5, 2.5, groups) / 2**bits).astype(np.float32)
    zero = rng.integers(0, 2**bits, groups).astype(np.int32)
    return [scale, zero, rng.integers(0, groups, y.shape[0]).astype(np.int64)]


def random_inputs(arguments: Sequence[Argument], batch: int, seed: int) -> list[np.ndarray]:
    """Standard normal float32 for every argument but the output."""
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape_of(a, batch)).astype(np.float32) for a in arguments[:-1]]
