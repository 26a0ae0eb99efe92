"""Weights whose rows have several widths: kernels and artifacts against the reference, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import tvm

from mpq_compiler import formats
from mpq_compiler.backends.tvm.kernels.cpu import dequantize
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.formats import contract
from mpq_compiler.formats.packing import pack_codes, pack_rows
from mpq_compiler.ir import costs, stored_tensors
from tests.backends.tvm import test_emit as emitted
from tests.harness import packed
from tests.harness.integer_kernels import AARCH64, X86, Kernels, assert_same_bits, needs
from tests.harness.shapes import make_case, reference, with_widths

PROBLEMS = (
    with_widths(QuantMatmul.linear((5,), 20, 53, has_offset=True), 1, 2, 3),
    with_widths(QuantMatmul(6, 7, 9, 70, (3, 3), padding=(1, 1, 1, 1), segments=(4, 5), has_offset=True), 2, 3, 4),
    with_widths(QuantMatmul.linear((), 33, 100, groups=3, has_offset=True), 3, 4, 5),
    with_widths(QuantMatmul(5, 4, 11, 40, (3, 3), (2, 2), has_offset=True, has_bias=False), 3, 4, 5),
)
"""In memory indices of 3 and 4 bits, and int8 values."""


@pytest.mark.parametrize("target", [*X86, *AARCH64])
@pytest.mark.invariant("fz-rmq-9", "compiler-1")
def test_kernels_have_the_bits_of_the_definition(target):
    kernels = Kernels(needs(target), PROBLEMS)
    cases = [(i, make_case(problem, 2, i)) for i, problem in enumerate(PROBLEMS)]
    for (i, case), result in zip(cases, kernels.run(cases), strict=True):
        assert_same_bits(result, reference(case), PROBLEMS[i])


@pytest.mark.parametrize("name", ["int2m", "int3m", "int4m", "int2m+b", "int3m+b"])
def test_what_float_layers_read_has_the_bits_of_torch(name):
    w = torch.randn(70, 36, generator=torch.Generator().manual_seed(0))
    w[16:32] = w[16:32] ** 5
    fit = formats.get(name).fit(w)
    assert fit.lut is not None and fit.row_class is not None and len(fit.row_class.unique()) == 3
    widths, classes = contract.class_bits(fit.lut), fit.row_class.numpy()
    codes = pack_rows(fit.codes.numpy(), classes, widths[0])
    assert codes.nbytes == formats.get(name).bits * 70 * 36 // 8
    problem = DequantizeTable(70, 36, (4,), max(widths), 3, "float16", widths, codes.nbytes)
    target = "x86-64-avx2"
    built = dequantize.build(problem, target, "kernel")
    library = tvm.compile(tvm.IRModule({"kernel": built}), target=needs(target).target())
    y = tvm.runtime.tensor(np.zeros((70, 36), np.float32))
    parts = [*(t.numpy() for t in (fit.scale, fit.offset, fit.lut)), pack_codes(classes, 2)]
    library["kernel"](*map(tvm.runtime.tensor, [codes, *parts]), y)
    assert_same_bits(y.numpy(), fit.dequantize().numpy(), name)


@pytest.mark.parametrize("name", ["int3m", "int2m+b"])
def test_every_node_of_a_program_computes_what_the_reference_does(name):
    emitted.test_every_node_computes_what_the_reference_does("unet2d", name, "x86-64-avx2")


@pytest.mark.parametrize("name", ["int3m", "int2m+b"])
def test_artifact_is_as_good_as_the_packed_program(name):
    """Which has rows of every width, and takes the bytes that were planned."""
    emitted.test_artifact_is_as_good_as_the_packed_program("unet2d-class", name, "x86-64-avx2")
    case = packed.program("unet2d-class", name)
    classes = [t for name, t in case.program.tensors.items() if name.endswith(":row_class")]
    assert sum(len(each.unique()) == 3 for each in classes) > 2
    stored = stored_tensors.stored(case.program).values()
    assert sum(tensor.array.nbytes for tensor in stored) == costs.stored_bytes(case.planned)
