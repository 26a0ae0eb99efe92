"""The kernel that decodes entropy-coded weights: the integers that were coded, and no read beyond the end."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import rans as kernel
from mpq_compiler.backends.tvm.kernels.problems.rans import DecodeRans, arguments
from mpq_compiler.formats.packing import pack_codes
from mpq_compiler.support import rans
from mpq_compiler.targets.table import TARGETS
from tests.harness import qemu
from tests.harness.integer_kernels import Guarded, here

CASES = [(1, 1, 0), (3, 1, 1), (100, 0.3, 0), (4097, 1.2, 5), (rans.STREAM, 3, 0), (3 * rans.STREAM + 7, 0.8, 64)]
"""Integers, their deviation, and bytes of room behind them."""


def coded(count: int, deviation: float, room: int) -> tuple[np.ndarray, np.ndarray]:
    drawn = np.random.default_rng(count).normal(0, deviation, count)
    values = np.clip(np.rint(drawn), -127, 127).astype(np.int8)
    return values, np.concatenate([rans.encode(values), np.zeros(room, np.uint8)])


@functools.cache
def library(target: str, *sizes: tuple[int, int]):
    functions = {f"decode{i}": kernel.build(DecodeRans(*each), target, f"decode{i}") for i, each in enumerate(sizes)}
    return tvm.compile(tvm.IRModule(functions), target=tvm.target.Target(dict(TARGETS[target].tvm)))


@pytest.mark.invariant("compiler-1")
def test_it_decodes_what_was_coded():
    made = [coded(*case) for case in CASES]
    for target in here():
        module = library(target, *((len(values), len(stream)) for values, stream in made))
        for i, (values, stream) in enumerate(made):
            source, output = (Guarded(a, 1) for a in arguments(DecodeRans(len(values), len(stream))))
            source.array[:] = stream
            module[f"decode{i}"](source.tensor, output.tensor)
            assert np.array_equal(output.result().view(np.int8), values)


@pytest.mark.parametrize("count", [1, 4, 777, rans.STREAM + 3])
def test_codes_of_four_bits_are_packed(count):
    values, stream = coded(count, 1.5, 0)
    values = np.clip(values, -8, 7)
    stream = rans.encode(values)
    problem = DecodeRans(count, len(stream), 4)
    function = kernel.build(problem, here()[0], "decode")
    module = tvm.compile(tvm.IRModule({"decode": function}), target=tvm.target.Target(dict(TARGETS[here()[0]].tvm)))
    source, output = (Guarded(a, 1) for a in arguments(problem))
    source.array[:] = stream
    module["decode"](source.tensor, output.tensor)
    assert np.array_equal(output.result(), pack_codes((values + 8).astype(np.uint8), 4))


def test_on_arm():
    if reason := qemu.missing():
        pytest.skip(reason)
    made = [coded(*case) for case in CASES[2:]]
    sizes = [DecodeRans(len(values), len(stream)) for values, stream in made]
    functions = {f"decode{i}": kernel.build(each, "neon", f"decode{i}") for i, each in enumerate(sizes)}
    calls = [(f"decode{i}", [stream, np.zeros(len(values), np.uint8)]) for i, (values, stream) in enumerate(made)]
    found = qemu.Aarch64Library(functions, dict(TARGETS["aarch64-neon"].tvm)).run(calls)
    for (values, _), (_, output) in zip(made, found, strict=True):
        assert np.array_equal(output.view(np.int8), values)


@pytest.mark.parametrize("count", [900, 2 * rans.STREAM + 11])
def test_whatever_the_bytes_are_it_stays_within_them(count):
    """Damage is said, or changes nothing that is read; pages behind the end are none that may be read."""
    values, stream = coded(count, 1.3, 0)
    module, draw = library(here()[0], (count, len(stream))), np.random.default_rng(0)
    header = rans.header_bytes(int(stream[1]) + 1, count)
    for kind in range(8 * header + 40):
        other, behind = stream.copy(), kind - 8 * header
        if behind < 20:  # each bit of what says where streams are, and some of the words
            other[kind // 8 if behind < 0 else draw.integers(header, len(other))] ^= np.uint8(1 << kind % 8)
        else:
            other[:] = draw.integers(0, 256, len(other)) if behind < 30 else (0, 255)[kind % 2]
        source, output = (Guarded(a, 1) for a in arguments(DecodeRans(count, len(stream))))
        source.array[:] = other
        try:
            module["decode0"](source.tensor, output.tensor)
        except RuntimeError as error:
            assert "an entropy-coded weight is damaged" in str(error)
        else:
            assert np.array_equal(output.array.view(np.int8), values), kind
        output.result()
