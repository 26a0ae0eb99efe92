"""Tables that float layers read: the kernel that decodes them when an artifact is loaded, against torch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import dequantize
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable
from mpq_compiler.formats.packing import pack_codes
from mpq_compiler.ir import ops
from tests.harness.integer_kernels import assert_same_bits, here

FORMS = (
    (2, 1, (23,), 1, None),
    (3, 3, (7, 5), 1, "float16"),
    (4, 1, (16, 16, 3), 3, None),
    (4, 9, (4,), 1, "float32"),
    (5, 1, (13, 10), 1, "float16"),
    (8, 1, (40,), 1, None),
    (8, 4, (3, 2), 1, None),
)
"""Bits, taps, channels of the segments, tables, the type of offsets."""


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_bits_of_torch_on_every_target(form):
    bits, taps, segments, classes, offset = form
    rows, columns = 37, taps * sum(segments)
    draw = torch.Generator().manual_seed(bits)
    low, high, kind = (0, 2**bits, torch.uint8) if bits < 8 else (-127, 128, torch.int8)
    codes = torch.randint(low, high, (rows, columns), generator=draw).to(kind)
    scale = (torch.rand(rows, len(segments), generator=draw) + 1e-3).half()
    lut = torch.randint(-127, 128, (classes, 2**bits), generator=draw).to(torch.int8) if bits < 8 else None
    row_class = torch.tensor([2, 0, 1], dtype=torch.uint8) if classes > 1 else None
    offsets = None if offset is None else torch.randn(rows, generator=draw).to(getattr(torch, offset))
    expected = ops.dequantize_weight(codes, scale, offsets, lut, row_class, codes.shape, segments).numpy()
    parts = [t.numpy() for t in (scale, offsets, lut, row_class) if t is not None]
    operands = [pack_codes(codes.numpy(), bits), *parts]
    problem = DequantizeTable(rows, columns, segments, bits, classes, offset)
    for name in here():
        isa = ISAS[name]
        library = tvm.compile(tvm.IRModule({"kernel": dequantize.build(problem, name, "kernel")}), target=isa.target())
        y = tvm.runtime.tensor(np.zeros((rows, columns), np.float32))
        library["kernel"](*map(tvm.runtime.tensor, operands), y)
        assert_same_bits(y.numpy(), expected, name)
