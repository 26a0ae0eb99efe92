"""FP8 weights: the kernel that decodes them when an artifact is loaded, on all codes."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import float8
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems.float8 import DequantizeFloat8
from mpq_compiler.ir import ops
from tests.harness.integer_kernels import assert_same_bits, here

FINITE = {4: [c for c in range(256) if c & 0x7F != 0x7F], 5: [c for c in range(256) if c & 0x7F < 0x7C]}
"""Codes that are numbers in OCP's FP8 too."""


@pytest.mark.parametrize("exponent", [2, 3, 4, 5])
def test_every_code_on_every_target(exponent):
    codes = np.resize(np.arange(256, dtype=np.uint8), (7, 269))
    scale = np.array([1, 2**-24, 6.1e-5, 0.02, 3.7, 1000, 65504], np.float16)
    expected = ops.dequantize_float8(torch.from_numpy(codes), torch.from_numpy(scale), codes.shape, exponent).numpy()
    problem = DequantizeFloat8(*codes.shape, exponent)
    for name in here():
        isa = ISAS[name]
        library = tvm.compile(tvm.IRModule({"kernel": float8.build(problem, name, "kernel")}), target=isa.target())
        y = tvm.runtime.tensor(np.zeros(codes.shape, np.float32))
        library["kernel"](tvm.runtime.tensor(codes), tvm.runtime.tensor(scale), y)
        assert_same_bits(y.numpy(), expected, name)


@pytest.mark.parametrize("exponent, kind", [(4, torch.float8_e4m3fn), (5, torch.float8_e5m2)])
def test_codes_are_the_numbers_that_torch_reads(exponent, kind):
    codes = torch.tensor(FINITE[exponent], dtype=torch.uint8)[None]
    value = ops.dequantize_float8(codes, torch.ones(1, dtype=torch.float16), codes.shape, exponent)
    assert torch.equal(value, codes.view(kind).to(torch.float32))


def test_other_widths_of_the_exponent_are_refused():
    with pytest.raises(ValueError, match="2 to 5 bits of exponent"):
        DequantizeFloat8(1, 1, 6)
