"""The other CUDA kernels on the emulator, beside the CPU's for the same problems."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("tvm")
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import templates as cpu
from mpq_compiler.backends.tvm.kernels.cpu.isa import isa
from mpq_compiler.backends.tvm.kernels.cuda import float_products, wgmma
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems import float_gemm
from mpq_compiler.backends.tvm.kernels.problems.argument import ROUNDED, Argument
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.ir import ops
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.numerics import BF16
from mpq_compiler.targets.table import TARGETS
from tests.harness.cuda import kernels, recorder, silicon
from tests.harness.cuda.cases import ADDED, BATCH, CASES, CODES, Case, check, inputs, value, workspaces
from tests.harness.cuda.kernels import Library, empty
from tests.harness.float_kernels import bfloat16, error, quantized

pytestmark = pytest.mark.filterwarnings("error:NVIDIA's assembler complains")


@pytest.fixture(scope="module")
def results() -> list[tuple[list[np.ndarray], list[np.ndarray]]]:
    """Of each case what the CPU's kernel and the GPU's leave in the buffers."""
    kernels.needs()
    target, lanes = TARGETS["x86-64-avx2"], isa("x86-64-avx2")
    names = [f"case{i}" for i in range(len(CASES))]
    host = {n: cpu.TEMPLATES[c.template].build(c.problem, lanes, n) for n, c in zip(names, CASES, strict=True)}
    device = {n: cuda.TEMPLATES[c.template].build(c.problem, n) for n, c in zip(names, CASES, strict=True)}
    library = tvm.compile(tvm.IRModule(host), target=tvm.target.Target(dict(target.tvm)))
    calls, expected = [], []
    for name, case in zip(names, CASES, strict=True):
        arrays, count = inputs(case)
        calls.append((name, [*arrays, *workspaces(case)]))
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        library[name](*tensors)
        expected.append({i: tensor.numpy() for i, tensor in enumerate(tensors) if i >= count})
    found = Library(device).run(calls)
    return [([*want.values()], [got[i] for i in want]) for want, got in zip(expected, found, strict=True)]


@pytest.mark.parametrize("number", range(len(CASES)), ids=[f"{c.template}-{i}" for i, c in enumerate(CASES)])
def test_as_on_the_cpu(results, number):
    check(CASES[number], *results[number])


def test_heads_too_wide_for_shared_memory_are_refused():
    with pytest.raises(UserError, match="no CUDA kernel computes attention in float32 of heads with 4000 dimensions"):
        cuda.TEMPLATES["attention"].build(Attention(9, 9, 1, 4000), "attention")


# ---------------------------------------------------------------------------------------------------- bfloat16

BFLOAT16 = [
    replace(problem, packed=True, numerics=BF16)
    for problem in (
        Linear(70, 33, 65, epilogue=ADDED),
        Linear(1, 50, 7, bias=False),
        Linear(130, 100, 120, epilogue=CODES),  # the largest tile
        Linear(200, 64, 40),
        Linear(3, 1600, 70, epilogue=ADDED),  # shared by two blocks
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


INSTRUCTIONS = {"mma": False, "wgmma": True}
"""Whether a kernel is Hopper's."""


def _built(template: str, problem: Any, name: str, on_hopper: bool) -> Any:
    """A kernel of a template, in its form for Hopper where it has one and that is asked for."""
    own = cuda.TEMPLATES[template]
    if on_hopper and silicon.asked() and silicon.level() != nvidia.HOPPER:
        pytest.skip("the GPU is none of those that have wgmma")
    return (own.hopper(problem, name) if on_hopper else None) or own.build(problem, name)


@pytest.fixture(scope="module", params=INSTRUCTIONS)
def rounded(request) -> list[tuple[np.ndarray, np.ndarray]]:
    """Of each problem in bfloat16 its meaning, and what the kernels compute from weights that the GPU has packed."""
    kernels.needs()
    on_hopper, problems = INSTRUCTIONS[request.param], dict(enumerate(BFLOAT16))
    functions = {f"pack{i}": _built("pack", p, f"pack{i}", False) for i, p in problems.items()}
    functions |= {f"product{i}": _built("float_gemm", p, f"product{i}", on_hopper) for i, p in problems.items()}
    library, draw, givens, calls = Library(functions), np.random.default_rng(0), [], []
    for i, p in problems.items():
        weight, panel = _arguments("pack", p)
        drawn = [replace(weight, name="weight"), *(a for a in float_gemm.arguments(p)[:-1] if a.name != "weight")]
        case = Case("pack", p)
        givens.append({a.name: value(draw, case, a.name, empty(a, BATCH)) for a in drawn})
        calls.append((f"pack{i}", [givens[i]["weight"], empty(panel, 1)]))
    packed = [panel for _, panel in library.run(calls)]
    calls = [(f"product{i}", _given("float_gemm", p, givens[i] | {"weight": packed[i]})) for i, p in problems.items()]
    late, early, cut = (
        [_result("float_gemm", p, arrays) for p, arrays in zip(BFLOAT16, library.run(calls, **how), strict=True)]
        for how in ({}, {"early": True}, {"truncating": True})
    )
    for one, other, short in zip(late, early, cut, strict=True):
        np.testing.assert_array_equal(one.view(np.uint8), other.view(np.uint8))
        if one.dtype == np.float32:
            off = error(short, one)
            assert off <= recorder.SUMS and (off == 0) == silicon.asked()  # a GPU adds up as it does
    return [(_meaning(p, given), y) for p, given, y in zip(BFLOAT16, givens, late, strict=True)]


def _given(template: str, problem: Any, data: dict[str, np.ndarray]) -> list[np.ndarray]:
    """What a kernel is called with: its inputs, its output and its workspaces."""
    *inputs, y = _arguments(template, problem)
    made = (y, *cuda.TEMPLATES[template].workspaces(problem))
    given = [bfloat16(data[a.name]) if a.dtype == ROUNDED != data[a.name].dtype else data[a.name] for a in inputs]
    return [*given, *(empty(a, BATCH) for a in made)]


def _result(template: str, problem: Any, arrays: list[np.ndarray]) -> np.ndarray:
    """What a kernel that was called with `_given` has written."""
    return arrays[len(_arguments(template, problem)) - 1]


@pytest.mark.parametrize("number", range(len(BFLOAT16)))
def test_bfloat16_against_its_meaning(rounded, number):
    """What is rounded is rounded alike, so that the bound is that of float32."""
    expected, found = rounded[number]
    if found.dtype == np.uint8:
        off = np.abs(found.astype(np.int64) - expected)
        assert off.max() <= 1 and off.mean() < 0.01
    else:
        assert error(found, expected) <= 2e-6


def test_machine_code_of_hopper(tmp_path):
    """Products are of four warps together, in registers alone, whether weights are floats or decoded."""
    product = Linear(256, 640, 640, packed=True, numerics=BF16)
    problems = {"float_gemm": product, "weight_only": _weight_only(product, 4)}
    functions = {template: _built(template, problem, template, True) for template, problem in problems.items()}
    _, listed = kernels.disassembled(functions, TARGETS["cuda-sm90"], tmp_path)
    assert " HMMA." not in listed
    rows = wgmma.tile(float_products.in_bytes(product)).rows
    assert Counter(re.findall(r"HGMMA\.[\w.]+", listed)) == {f"HGMMA.64x{rows}x16.F32.BF16": 4}


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
    _weight_only(Linear(3, 1600, 70), 4, groups=5),
    _weight_only(Linear(70, 100, 72), 4, classes=2, integers=True, offset="float16"),
    _weight_only(Conv2d(9, 8, 64, 40), 4, integers=True),
]


@pytest.mark.parametrize("on_hopper", INSTRUCTIONS.values(), ids=INSTRUCTIONS)
def test_no_bit_depends_on_where_a_weight_is_decoded(on_hopper):
    kernels.needs()
    functions, draw, first, datas = {}, np.random.default_rng(0), [], []
    for i, problem in enumerate(WEIGHT_ONLY):
        templates_ = {"dequantize": problem.table, "pack": problem.product, "float_gemm": problem.product}
        templates_ |= {"pack_codes": problem, "weight_only": problem}
        functions |= {f"{t}{i}": _built(t, p, f"{t}{i}", on_hopper) for t, p in templates_.items()}
        names = {a.name: a for a in (*_arguments("weight_only", problem), *_arguments("dequantize", problem.table))}
        case = Case("weight_only", problem)
        data = {name: value(draw, case, name, empty(a, BATCH)) for name, a in names.items() if name != "weight"}
        data["codes"] = draw.integers(0, 256, names["codes"].shape).astype(np.uint8)
        if "tables" in data:
            data["tables"] = draw.integers(-128, 128, names["tables"].shape).astype(np.int8)
            if problem.table.integers:
                data["tables"] = np.minimum(data["tables"][:, :1], 112) + np.arange(16, dtype=np.int8)
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
    panels, calls, subjects = [arrays[-1] for arrays in library.run(packs)], [], []
    for i, (problem, data) in enumerate(zip(WEIGHT_ONLY, datas, strict=True)):
        for template, subject, weight in (
            ("float_gemm", problem.product, panels[i]),
            ("weight_only", problem, made[2 * i + 1]),
        ):
            calls.append((f"{template}{i}", _given(template, subject, data | {"weight": weight})))
            subjects.append((template, subject))
    results = [_result(*subject, arrays) for subject, arrays in zip(subjects, library.run(calls), strict=True)]
    for expected, found, problem in zip(results[::2], results[1::2], WEIGHT_ONLY, strict=True):
        assert np.isfinite(expected).all()
        np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8), str(problem))


def _arguments(template: str, problem: Any) -> list[Argument]:
    """Of a CUDA kernel."""
    return cuda.TEMPLATES[template].arguments(problem)
