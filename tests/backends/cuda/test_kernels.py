"""The other CUDA kernels on the emulator, beside the CPU's for the same problems."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tvm")
import tvm

from mpq_compiler import ops
from mpq_compiler.backends.tvm import templates
from mpq_compiler.backends.tvm.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels import float_gemm, vmath
from mpq_compiler.backends.tvm.kernels.attention import Attention
from mpq_compiler.backends.tvm.kernels.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.float8 import DequantizeFloat8
from mpq_compiler.backends.tvm.kernels.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.hadamard import Hadamard
from mpq_compiler.backends.tvm.kernels.matmul import Access, Matmul
from mpq_compiler.backends.tvm.kernels.movement import Gather, concat, pad, permute, slice_, upsample
from mpq_compiler.backends.tvm.kernels.norms import GroupNorm, LayerNorm, RmsNorm
from mpq_compiler.backends.tvm.kernels.pointwise import Input, PointwiseProgram, PointwiseStep, Result
from mpq_compiler.backends.tvm.kernels.quantize import DynamicQuantize, Quantize, TimeGroup
from mpq_compiler.backends.tvm.kernels.template import Argument
from mpq_compiler.numerics import BF16
from mpq_compiler.targets import TARGETS
from tests.cuda import kernels
from tests.cuda.kernels import Library, empty
from tests.float_kernels import error, quantized

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
        ((("B", 5, 6), "float32"),), (PointwiseStep("rotate", (Input(0),)),), ("B", 5, 6))),
    Case("movement", concat((("B", 3, 5), ("B", 3, 4)), 2)),
    Case("movement", permute(("B", 3, 4, 5), (0, 3, 1, 2))),
    Case("movement", pad(("B", 3, 4), (0, 1, 2), (0, 0, 1), 0.5)),
    Case("movement", slice_(("B", 9, 4), (0, 1, 0), (0, 8, 4), (1, 2, 1), "uint8")),
    Case("movement", upsample(("B", 3, 4, 5), (2, 2))),
    Case("movement", Gather(7, 5, (3,))),
    Case("quantize", Quantize((5, 7), 8, 2)),
    Case("quantize", Quantize((5, 7), 4, 1, (3, 4))),
    Case("quantize", DynamicQuantize(5, 70, 8)),
    Case("quantize", TimeGroup(3)),
    Case("hadamard", Hadamard(3, 96, 32, CODES)),
    Case("hadamard", Hadamard(3, 256, 256)),
    Case("norms", GroupNorm(35, 24, 4, epilogue=CODES), exact=False),
    Case("norms", GroupNorm(35, 24, 4, epilogue=ADDED), exact=False),
    Case("norms", GroupNorm(9, 32, 4, affine=False, parts=(20, 12), raw=8, epilogue=CODES), exact=False),
    Case("norms", GroupNorm(9, 32, 4, block=16, epilogue=CODES), exact=False),
    Case("norms", LayerNorm(7, 100, epilogue=ADDED), exact=False),
    Case("norms", LayerNorm(7, 64, scale=False, shift=False, block=32, into=(7 * 80 + 3, 3, 80)), exact=False),
    Case("norms", RmsNorm(7, 100, epilogue=CODES), exact=False),
    Case("attention", Attention(40, 37, 2, 24), exact=False),
    Case("attention", Attention(5, 70, 2, 160, mask=("B", 1, 5, 70), epilogue=CODES), exact=False),
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
    Case("dequantize", DequantizeTable(20, 36, (36,), 4, 2, "float16")),
    Case("float8", DequantizeFloat8(5, 30, 3)),
]  # fmt: skip


def _value(draw: np.random.Generator, case: Case, name: str, array: np.ndarray) -> np.ndarray:
    """Input of a kernel by the name of its argument."""
    if name == "weight" and case.template == "float_gemm" and case.problem.packed:
        (plain,) = (a for a in float_gemm.arguments(replace(case.problem, packed=False)) if a.name == "weight")
        return float_gemm.pack_weight(case.problem, draw.standard_normal(plain.shape).astype(np.float32))
    if name == "index":
        return draw.integers(-1, 9, array.shape).astype(array.dtype)
    if name == "group":
        return draw.integers(0, 1, array.shape).astype(array.dtype)
    if name == "timestep":
        return np.array([3, 700][: len(array)], array.dtype)
    if name == "boundaries":
        return np.array([10, 500], array.dtype)
    if name in ("qscale", "raw_scale"):
        return (draw.random(array.shape) * 0.02 + 0.01).astype(array.dtype)
    if name in ("qzero", "raw_zero"):
        return draw.integers(0, 16, array.shape).astype(array.dtype)
    if name == "row_class":
        return draw.integers(0, 2, array.shape).astype(array.dtype)
    if array.dtype.kind == "f":
        return draw.standard_normal(array.shape).astype(array.dtype)
    return draw.integers(0, 100, array.shape).astype(array.dtype)


@pytest.fixture(scope="module")
def results() -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Of each case what the CPU's kernel and the GPU's leave in the buffers."""
    kernels.needs()
    target, isa = TARGETS["x86-64-avx2"], templates.HOST
    names = [f"case{i}" for i in range(len(CASES))]
    host = {n: templates.TEMPLATES[c.template].build(c.problem, isa, n) for n, c in zip(names, CASES, strict=True)}
    device = {n: cuda.TEMPLATES[c.template].build(c.problem, n) for n, c in zip(names, CASES, strict=True)}
    library = tvm.compile(tvm.IRModule(host), target=tvm.target.Target(dict(target.tvm)))
    draw, calls, expected = np.random.default_rng(0), [], []
    for name, case in zip(names, CASES, strict=True):
        template = templates.TEMPLATES[case.template]
        arguments = template.arguments(case.problem, isa)
        count = len(arguments) - template.outputs(case.problem, isa)
        arrays = [empty(a, BATCH) for a in arguments]
        arrays[:count] = [_value(draw, case, a.name, x) for a, x in zip(arguments[:count], arrays, strict=False)]
        workspaces = [empty(a, BATCH) for a in cuda.TEMPLATES[case.template].workspaces(case.problem)]
        calls.append((name, [*arrays, *workspaces]))
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        library[name](*tensors)
        expected.append({i: tensor.numpy() for i, tensor in enumerate(tensors) if i >= count})
    found = Library(device).run(calls)
    return [([*want.values()], [got[i] for i in want]) for want, got in zip(expected, found, strict=True)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.template}-{i}" for i, c in enumerate(CASES)])
def test_as_on_the_cpu(results, number):
    case, (expected, found) = CASES[number], results[number]
    for want, got in zip(expected, found, strict=True):
        if case.exact or want.dtype != np.float32:
            off = np.abs(got.astype(np.float64) - want) if want.dtype == np.uint8 and not case.exact else None
            if off is not None:  # a sum that rounds otherwise moves a value across the border of two codes, rarely
                assert off.max() <= 1 and off.mean() < 0.01
            else:
                np.testing.assert_array_equal(got.view(np.uint8), want.view(np.uint8), str(case.problem))
            continue
        there = want.view(np.uint32) != 0xA5A5A5A5
        np.testing.assert_array_equal(got.view(np.uint32)[~there], want.view(np.uint32)[~there])
        scale = math.sqrt(float((want[there].astype(np.float64) ** 2).mean()))
        assert np.abs(got[there] - want[there]).max() <= 2e-5 * scale, str(case.problem)


# ---------------------------------------------------------------------------------------------------- bfloat16

BFLOAT16 = [
    replace(problem, packed=True, numerics=BF16)
    for problem in (
        Linear(70, 33, 65, epilogue=ADDED),
        Linear(1, 50, 7, bias=False),
        Linear(130, 100, 120, epilogue=CODES),  # the largest tile
        Linear(200, 64, 40),
        Conv2d(9, 8, 12, 20, stride=(2, 1), epilogue=ADDED),
        Conv2d(12, 11, 20, 128, epilogue=CODES),
        Conv2d(7, 9, 3, 66, (5, 2), padding=(2, 1, 0, 1), bias=False),
        Conv2d(8, 12, 6, 10, (2, 4), stride=(2, 4), padding=(0, 0, 0, 0)),
        Conv2d(9, 7, 21, 30, (1, 1), stride=(2, 2), padding=(0, 0, 0, 0)),
    )
]


def _meaning(problem: Linear | Conv2d, given: dict[str, np.ndarray]) -> np.ndarray:
    """`ops.linear` or `ops.conv2d` in bfloat16, and the epilogue."""
    t = {name: torch.from_numpy(value) for name, value in given.items()}
    operands = (t["x"], t["weight"], t.get("bias"))
    if isinstance(problem, Linear):
        y = ops.linear(*operands, numerics=BF16)
    else:
        y = ops.conv2d(*operands, problem.stride, problem.padding, numerics=BF16)
    if problem.epilogue == ADDED:
        y = (y + t["operand0"]) * t["operand1"].reshape(BATCH, *[1] * (y.ndim - 2), -1)
    if problem.epilogue != CODES:
        return y.numpy()
    return quantized(F.silu(y).numpy(), given["qscale"], given["qzero"], given["group"], 8)


@pytest.fixture(scope="module")
def rounded() -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each problem in bfloat16 its meaning, and what the kernels compute from weights that the GPU has packed."""
    kernels.needs()
    pack, product = cuda.TEMPLATES["pack"], cuda.TEMPLATES["float_gemm"]
    problems = dict(enumerate(BFLOAT16))
    functions = {f"pack{i}": pack.build(p, f"pack{i}") for i, p in problems.items()}
    functions |= {f"product{i}": product.build(p, f"product{i}") for i, p in problems.items()}
    library, draw, givens, calls = Library(functions), np.random.default_rng(0), [], []
    for i, p in problems.items():
        weight, panel = pack.arguments(p)
        drawn = [replace(weight, name="weight"), *(a for a in float_gemm.arguments(p)[:-1] if a.name != "weight")]
        case = Case("pack", p)
        givens.append({a.name: _value(draw, case, a.name, empty(a, BATCH)) for a in drawn})
        calls.append((f"pack{i}", [givens[i]["weight"], empty(panel, 1)]))
    packed = [panel for _, panel in library.run(calls)]
    calls = []
    for i, p in problems.items():
        *arguments, y = product.arguments(p)
        found = givens[i] | {"weight": packed[i]}
        calls.append((f"product{i}", [*(found[a.name] for a in arguments), empty(y, BATCH)]))
    late, early = ([arrays[-1] for arrays in library.run(calls, early)] for early in (False, True))
    for one, other in zip(late, early, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
    return [(_meaning(p, given), y) for p, given, y in zip(BFLOAT16, givens, late, strict=True)]


@pytest.mark.parametrize("number", range(len(BFLOAT16)))
def test_bfloat16_against_its_meaning(rounded, number):
    """What is rounded is rounded alike, so that the bound is that of float32."""
    expected, found = rounded[number]
    if found.dtype == np.uint8:
        off = np.abs(found.astype(np.int64) - expected)
        assert off.max() <= 1 and off.mean() < 0.01
    else:
        assert error(found, expected) <= 2e-6


def _weight_only(product: Linear | Conv2d, bits: int, groups: int = 1, **options: Any) -> WeightOnly:
    """With the table of its weight."""
    if isinstance(product, Linear):
        channels, columns = product.inputs, product.inputs
    else:
        channels, columns = product.channels, math.prod(product.kernel) * product.channels
    first = -(-channels // groups // 8) * 8 if groups > 1 else channels
    sizes = tuple(min(first, channels - first * j) for j in range(groups))
    table = DequantizeTable(product.outputs, columns, sizes, bits, **options)
    return WeightOnly(replace(product, packed=True, numerics=BF16), table)


WEIGHT_ONLY = [
    _weight_only(Linear(70, 33, 65, epilogue=ADDED), 4, classes=2),
    _weight_only(Linear(9, 100, 72, bias=False), 4, groups=4, offset="float16"),
    _weight_only(Linear(130, 64, 120), 8),
    _weight_only(Conv2d(9, 8, 12, 20, stride=(2, 1)), 2, classes=2),
    _weight_only(Conv2d(7, 9, 40, 66, (3, 2), padding=(2, 1, 0, 1)), 3, groups=2, offset="float32"),
    _weight_only(Conv2d(12, 11, 20, 128, epilogue=CODES), 2, offset="float16"),
]


def test_no_bit_depends_on_where_a_weight_is_decoded():
    kernels.needs()
    functions, draw, first, datas = {}, np.random.default_rng(0), [], []
    for i, problem in enumerate(WEIGHT_ONLY):
        templates_ = {"dequantize": problem.table, "pack": problem.product, "float_gemm": problem.product}
        templates_ |= {"pack_codes": problem, "weight_only": problem}
        functions |= {f"{t}{i}": cuda.TEMPLATES[t].build(p, f"{t}{i}") for t, p in templates_.items()}
        names = {a.name: a for a in (*_arguments("weight_only", problem), *_arguments("dequantize", problem.table))}
        case = Case("weight_only", problem)
        data = {name: _value(draw, case, name, empty(a, BATCH)) for name, a in names.items() if name != "weight"}
        data["codes"] = draw.integers(0, 256, names["codes"].shape).astype(np.uint8)
        if "tables" in data:
            data["tables"] = draw.integers(-128, 128, names["tables"].shape).astype(np.int8)
        datas.append(data)
        floats = empty(_arguments("dequantize", problem.table)[-1], 1)
        first.append(
            (f"dequantize{i}", [*(data[a.name] for a in _arguments("dequantize", problem.table)[:-1]), floats])
        )
        first.append((f"pack_codes{i}", [data["codes"], empty(_arguments("pack_codes", problem)[-1], 1)]))
    library = Library(functions)
    made = [arrays[-1] for arrays in library.run(first)]
    packs = []
    for i, problem in enumerate(WEIGHT_ONLY):
        weight, panel = _arguments("pack", problem.product)
        packs.append((f"pack{i}", [made[2 * i].reshape(weight.shape), empty(panel, 1)]))
    panels, calls = [arrays[-1] for arrays in library.run(packs)], []
    for i, (problem, data) in enumerate(zip(WEIGHT_ONLY, datas, strict=True)):
        for template, subject, weight in (
            ("float_gemm", problem.product, panels[i]),
            ("weight_only", problem, made[2 * i + 1]),
        ):
            *inputs, y = _arguments(template, subject)
            calls.append((f"{template}{i}", [*((data | {"weight": weight})[a.name] for a in inputs), empty(y, BATCH)]))
    results = [arrays[-1] for arrays in library.run(calls)]
    for expected, found, problem in zip(results[::2], results[1::2], WEIGHT_ONLY, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8), str(problem))


def _arguments(template: str, problem: Any) -> list[Argument]:
    """Of a CUDA kernel."""
    own = cuda.TEMPLATES[template].arguments
    return own(problem) if own else templates.TEMPLATES[template].arguments(problem, templates.HOST)
