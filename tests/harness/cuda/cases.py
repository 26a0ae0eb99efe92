"""The problems on which plain CUDA kernels are held against the CPU's, and what they are given."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems import float_gemm
from mpq_compiler.backends.tvm.kernels.problems.argument import ROUNDED
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.backends.tvm.kernels.problems.float8 import DequantizeFloat8
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard
from mpq_compiler.backends.tvm.kernels.problems.matmul import Access, Matmul
from mpq_compiler.backends.tvm.kernels.problems.movement import Gather, TokenRow, concat, pad, permute, slice_, upsample
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, RmsNorm
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep, Result, Window
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import Gate, QuantMatmul
from mpq_compiler.backends.tvm.kernels.problems.quantize import DynamicQuantize, Quantize, TimeGroup
from mpq_compiler.backends.tvm.kernels.problems.signatures import SIGNATURES
from mpq_compiler.targets.numerics import BF16
from tests.harness.cuda.kernels import empty
from tests.harness.float_kernels import bfloat16, same_bits
from tests.harness.shapes import with_widths

CODES = Epilogue((Step("silu"), Step("quantize", value=8)))
ADDED = Epilogue((Step("add", operand=0), Step("mul", operand=1)), (Operand("full"), Operand("sample")))
BATCH = 2


@dataclass(frozen=True)
class Case:
    """A problem of a template. exact: to the bit; else sums of floats run in another order."""

    template: str
    problem: Any
    exact: bool = True


def _unary(op: str) -> Case:
    return Case("pointwise", PointwiseProgram(((("B", 70), "float32"),), (PointwiseStep(op, (Input(0),)),), ("B", 70)))


CASES = [
    *map(_unary, vmath.UNARY),
    Case("pointwise", PointwiseProgram(
        ((("B", 5, 6), "float32"), ((6,), "float16"), (("B", 1, 6), "float32")),
        (PointwiseStep("add", (Input(0), Input(1))), PointwiseStep("div", (Result(0), Input(2))),
         PointwiseStep("where", (Input(0), Result(1), 0.5)), PointwiseStep("quantize", (Result(2),), 6)),
        ("B", 5, 6), time_groups=2)),
    Case("pointwise", PointwiseProgram(
        (((70,), "float32"), (("B", 9, 70), "float32")),
        (PointwiseStep("rotate", (Input(1),)), PointwiseStep("add", (Result(0), Input(0)))), ("B", 9, 70),
        windows=(None, Window(("B", 9, 80), (0, 80, 1), 6)))),
    Case("pointwise", PointwiseProgram(
        ((("B", 5, 6), "float32"),), (PointwiseStep("rotate", (Input(0),)),), ("B", 5, 6))),
    Case("movement", concat((("B", 3, 5), ("B", 3, 4)), 2)),
    Case("movement", permute(("B", 3, 4, 5), (0, 3, 1, 2))),
    Case("movement", pad(("B", 3, 4), (0, 1, 2), (0, 0, 1), 0.5)),
    Case("movement", slice_(("B", 9, 4), (0, 1, 0), (0, 8, 4), (1, 2, 1), "uint8")),
    Case("movement", upsample(("B", 3, 4, 5), (2, 2))),
    Case("movement", Gather(7, 5, (3,))),
    Case("movement", TokenRow(7, 5, 3)),
    Case("movement", TokenRow(6, 9)),
    Case("quantize", Quantize((5, 7), 8, 2)),
    Case("quantize", Quantize((5, 7), 4, 1, (3, 4))),
    Case("quantize", Quantize((3, 8), 6, 3)),
    Case("quantize", DynamicQuantize(5, 70, 8)),
    Case("quantize", DynamicQuantize(5, 600, 4)),
    Case("quantize", TimeGroup(3)),
    Case("hadamard", Hadamard(3, 96, 32, CODES, time_groups=2)),
    Case("hadamard", Hadamard(2, 640, 64)),
    Case("hadamard", Hadamard(3, 256, 256)),
    Case("hadamard", Hadamard(2, 8192 + 768, 256, CODES)),  # more than shared memory holds at once
    Case("norms", GroupNorm(35, 24, 4, epilogue=CODES), exact=False),
    Case("norms", GroupNorm(35, 24, 4, epilogue=ADDED), exact=False),
    Case("norms", GroupNorm(9, 32, 4, affine=False, parts=(20, 12), raw=6, raw_groups=2, epilogue=CODES, time_groups=2),
         exact=False),
    Case("norms", GroupNorm(9, 32, 4, block=16, epilogue=CODES), exact=False),
    Case("norms", GroupNorm(9, 1280, 32, epilogue=CODES), exact=False),  # more units in a row than threads
    Case("norms", LayerNorm(7, 100, epilogue=ADDED), exact=False),
    Case("norms", LayerNorm(3, 2100, epilogue=ADDED), exact=False),  # more than a warp holds
    Case("norms", LayerNorm(7, 64, scale=False, shift=False, block=32, into=(7 * 80 + 3, 3, 80)), exact=False),
    Case("norms", RmsNorm(7, 100, epilogue=CODES), exact=False),
    Case("attention", Attention(40, 37, 2, 24), exact=False),
    Case("attention", Attention(5, 70, 2, 160, mask=("B", 1, 5, 70), epilogue=CODES), exact=False),
    Case("attention", Attention(3, 5, 1, 2500), exact=False),
    Case("float_gemm", Linear(70, 33, 65, epilogue=ADDED)),
    Case("float_gemm", Linear(70, 33, 65, packed=True)),
    Case("float_gemm", Linear(3, 40, 20), exact=False),
    Case("float_gemm", Conv2d(9, 8, 12, 20, stride=(2, 2), packed=True)),
    Case("float_gemm", Conv2d(9, 8, 12, 24, groups=3)),
    Case("float_gemm", Conv2d(9, 8, 12, 12, groups=12, bias=False)),
    Case("pack", Linear(70, 33, 65, packed=True)),
    Case("pack", Conv2d(9, 8, 12, 40, groups=2, packed=True)),
    Case("matmul", Matmul((3,), 5, 300, 7, Access((3, 5, 300), (1500, 300, 1)), Access((3, 300, 7), (2100, 7, 1)),
                          Access((3, 5, 7), (35, 7, 1)))),
    Case("matmul", Matmul((2, 3), 5, 20, 7, Access((5, 2, 3, 24), (72, 24, 144, 1), 4),
                          Access((3, 2, 7, 20), (140, 280, 1, 20), batched=False),
                          Access((5, 2, 3, 7), (21, 7, 42, 1)))),
    Case("dequantize", DequantizeTable(20, 36, (36,), 4, 2, "float16")),
    Case("dequantize", DequantizeTable(9, 90, (16, 14), 3)),
    Case("dequantize", DequantizeTable(5, 21, (21,), 8)),
    Case("dequantize", DequantizeTable(10, 15, (15,), 4, 3, widths=(2, 3, 4), code_bytes=75)),
    Case("float8", DequantizeFloat8(5, 30, 3)),
    Case("float8", DequantizeFloat8(7, 41, 5)),
]  # fmt: skip


_SCALED = QuantMatmul.linear((70,), 100, 70, has_bias=False, epilogue=Epilogue((Step("mul", value=0.3),)))
ON_TENSOR_CORES = [
    Case("gemm", _SCALED),
    Case("gemm", replace(_SCALED, outputs=128, gate=Gate("gelu"))),
    Case("gemm", QuantMatmul.linear((5,), 1600, 64, has_bias=False, epilogue=ADDED)),  # shared by several blocks
    Case("float_gemm", Linear(70, 33, 65, packed=True, numerics=BF16, epilogue=ADDED)),
    Case("fast_attention", FastAttention(49, 77, 2, 40, epilogue=ADDED)),
    Case("fast_attention", FastAttention(9, 7, 2, 11)),
]
"""Products and attentions of tensor cores with results in float32."""


def on_tensor_cores(problem: Any) -> bool:
    """Whether a product or an attention of floats is one in bfloat16."""
    return getattr(problem, "numerics", "") == BF16


def value(draw: np.random.Generator, case: Case, name: str, array: np.ndarray, groups: int = 1) -> np.ndarray:
    """Input of a kernel by the name of its argument; samples are of different time groups, of so many."""
    if name == "weight" and case.template == "float_gemm" and case.problem.packed:
        (plain,) = (a for a in float_gemm.arguments(replace(case.problem, packed=False)) if a.name == "weight")
        return float_gemm.pack_weight(case.problem, draw.standard_normal(plain.shape).astype(np.float32))
    if name == "x" and isinstance(case.problem, DynamicQuantize):
        return _rows(draw, array)
    if name == "tokens":
        return draw.integers(2, 6, array.shape).astype(array.dtype)
    if name == "index":
        return draw.integers(-1, 9, array.shape).astype(array.dtype)
    if name == "group":
        return np.resize(np.arange(groups)[::-1], array.shape).astype(array.dtype)
    if name == "timestep":
        return np.array([10, 700][: len(array)], array.dtype)
    if name == "boundaries":
        return np.array([10, 500], array.dtype)
    if name in ("qscale", "raw_scale"):
        return (draw.random(array.shape) * 0.02 + 0.01).astype(array.dtype)
    if name in ("qzero", "raw_zero"):
        return draw.integers(0, 16, array.shape).astype(array.dtype)
    if name == "row_class":
        widths = len(getattr(case.problem, "widths", ()))
        if widths:  # 2 bits of each row
            return (draw.integers(0, widths, (*array.shape, 4)) << np.arange(0, 8, 2)).sum(-1).astype(array.dtype)
        return draw.integers(0, 2, array.shape).astype(array.dtype)
    if array.dtype == ROUNDED:
        return bfloat16(draw.standard_normal(array.shape).astype(np.float32))
    if array.dtype.kind == "f":
        return draw.standard_normal(array.shape).astype(array.dtype)
    if array.dtype.itemsize == 1:
        return draw.integers(0, 256, array.shape).astype(np.uint8).view(array.dtype)
    return draw.integers(0, 100, array.shape).astype(array.dtype)


def _rows(draw: np.random.Generator, array: np.ndarray) -> np.ndarray:
    """Of each sample a row above zero, one below, one of zeros, one with NaN, one whose greatest value and zero point
    both round up, to 16 of 4 bits; the ends of each stand last.
    """
    x = draw.standard_normal(array.shape).astype(array.dtype)
    x[..., -2:] = [-5, 6]
    x[:, 0] = 1 + np.abs(x[:, 0])
    x[:, 1] = -1 - np.abs(x[:, 1])
    x[:, 2] = 0
    x[:, 3, ::3] = np.nan
    x[:, 4, -2:] = [-5.5, 9.5]
    return x


def inputs(case: Case) -> tuple[list[np.ndarray], int]:
    """Arrays for the arguments of a case; how many of them, the first, are inputs: the rest are results."""
    signature = SIGNATURES[case.template]
    arguments = signature.arguments(case.problem)
    count = len(arguments) - signature.outputs(case.problem)
    draw, arrays = np.random.default_rng(0), [empty(a, BATCH) for a in arguments]
    scales = [x for a, x in zip(arguments, arrays, strict=True) if a.name in ("qscale", "raw_scale")]
    groups = max(map(len, scales), default=1)
    for i, argument in enumerate(arguments[:count]):
        arrays[i] = value(draw, case, argument.name, arrays[i], groups)
    return arrays, count


def workspaces(case: Case) -> list[np.ndarray]:
    """Arrays for what the CUDA kernel of a case takes behind its arguments."""
    return [empty(a, BATCH) for a in cuda.TEMPLATES[case.template].workspaces(case.problem)]


def check(case: Case, expected: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> None:
    """AssertionError: these are not the same results of a case."""
    for want, got in zip(expected, found, strict=True):
        if case.exact:
            assert same_bits(got, want), str(case.problem)
        elif want.dtype == np.uint8:  # a sum that rounds otherwise moves a value across the border of two codes, rarely
            off = np.abs(got.astype(np.int64) - want)
            assert off.max() <= 1 and off.mean() < 0.01, str(case.problem)
        else:
            there = want.view(np.uint32) != 0xA5A5A5A5
            np.testing.assert_array_equal(got.view(np.uint32)[~there], want.view(np.uint32)[~there])
            scale = math.sqrt(float((want[there].astype(np.float64) ** 2).mean()))
            assert np.abs(got[there] - want[there]).max() <= 2e-5 * scale, str(case.problem)


# -------------------------------------------------------------------------------------------- integer products

Problems = Sequence[tuple[int, QuantMatmul]]
"""With batches."""
linear = QuantMatmul.linear
FORMATS: Problems = [
    (2, linear((10,), 64, 64)),
    (1, linear((200,), 128, 128, bits=4, classes=2, groups=2)),
    (1, linear((70,), 100, 70, bits=3)),
    (1, linear((9,), 48, 64, bits=4, has_offset=True)),
    (1, linear((70,), 200, 70, bits=2)),
    (2, linear((70,), 100, 128, bits=4, has_offset=True, groups=2, integers=True)),
    (1, linear((300,), 64, 128, bits=4, has_offset=True)),
    (1, with_widths(linear((9,), 60, 40), 2, 3, 4)),
    (1, with_widths(linear((9,), 60, 40), 4, 5)),
]
SEGMENTS: Problems = [
    (2, linear((10,), 96, 64, segments=(32,) * 3, bits=4, has_offset=True)),
    (2, linear((10,), 96, 64, segments=(40, 56), bits=4, groups=3, has_offset=True)),
    (1, linear((5,), 2560, 64, segments=(32,) * 80, has_offset=True)),  # more than a block has without asking
    (2, linear((5,), 128, 64, dynamic=True)),
    (2, linear((10,), 96, 64, segments=(32,) * 3, bits=4, has_offset=True, integers=True)),
    (2, linear((5,), 128, 64, dynamic=True, segments=(32,) * 4, bits=4)),
    (2, linear((5,), 128, 64, dynamic=True, segments=(64, 64), bits=4, has_offset=True)),
    (1, QuantMatmul(7, 6, 44, 46, (1, 2), (2, 2), (0, 0, 1, 1), bits=2, segments=(12, 32), has_offset=True)),
    (2, linear((3,), 40, 20, segments=(24, 16), bits=4, groups=2, has_offset=True)),
    (2, QuantMatmul(4, 4, 32, 20, (2, 1), bits=2, segments=(16, 16), groups=2, has_offset=True)),
]
IMAGE = (2, QuantMatmul(5, 4, 32, 24, (3, 3), padding=(1, 1, 1, 1), groups=2))
