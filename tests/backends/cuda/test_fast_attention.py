"""Attention in bfloat16 on the tensor cores of the emulator, against its meaning."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.kernels.cuda import fast_attention, rounding, wgmma_attention
from mpq_compiler.backends.tvm.kernels.cuda.fast_attention import arguments
from mpq_compiler.backends.tvm.kernels.problems import rounding as rounding_problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, query_factor
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import numerics
from mpq_compiler.targets.numerics import BF16, INT8
from mpq_compiler.targets.table import TARGETS
from tests.harness.cuda import kernels, recorder
from tests.harness.cuda.kernels import Library, disassembled, empty
from tests.harness.fast_attention import BATCH, inputs_of, meaning, roundings
from tests.harness.float_kernels import error, quantized, quantizer_inputs, same_bits

pytestmark = pytest.mark.filterwarnings("error:NVIDIA's assembler complains")
RESIDUAL = Epilogue((Step("add", operand=0),), (Operand("full"),))
CODES = replace(RESIDUAL, steps=(*RESIDUAL.steps, Step("quantize", value=6)))
PROBLEMS = {
    "49 tokens, D 24": FastAttention(49, 49, 4, 24),
    "two fragments, cross, D 40": FastAttention(150, 77, 2, 40, epilogue=RESIDUAL),
    "two fragments, whole steps": FastAttention(130, 64, 1, 64),
    "more than two key blocks, D 33": FastAttention(50, 131, 3, 33, scale=0.3),
    "few tokens, D 11": FastAttention(7, 3, 2, 11),
    "one key": FastAttention(3, 1, 2, 5),
    "one query": FastAttention(1, 40, 2, 16),
    "mask": FastAttention(20, 70, 3, 9, mask=("B", 3, 20, 70)),
    "mask of keys, two fragments": FastAttention(130, 90, 2, 16, mask=(1, 1, 1, 90)),
    "five steps, D 64": FastAttention(70, 300, 1, 64),
    "three steps of whole matrices, D 72": FastAttention(70, 136, 2, 72),
    "32 keys, D 160": FastAttention(20, 70, 1, 160),
    "two parts, D 300": FastAttention(9, 20, 1, 300),
    "four parts, D 512": FastAttention(33, 40, 1, 512),
}
Build = Callable[[FastAttention, str], Any]
SPOILED = "49 tokens, D 24"
QUANTIZING = "two fragments, cross, D 40"


def spoil(which: int) -> list[np.ndarray]:
    """NaN in query, key or value 5, dimension 0, of sample 0 and head 0."""
    inputs = inputs_of(PROBLEMS[SPOILED])
    inputs[which][0, 5, 0] = np.nan
    return inputs


def run(
    problems: dict[str, FastAttention], inputs: dict[str, list[np.ndarray]], build: Build = fast_attention.build
) -> dict[str, list[np.ndarray]]:
    """Of each its queries, keys and values rounded, and its result, whenever copies happen."""
    names = {name: f"kernel{i}" for i, name in enumerate(problems)}
    every = [(f"{names[name]}_{x}", each) for name in problems for x, each in roundings(problems[name]).items()]
    functions = {n: rounding.build(each, n) for n, each in every} | {n: build(problems[o], n) for o, n in names.items()}
    library = Library(functions)
    given = [x for name in problems for x in inputs[name][:3]]
    given = [x.reshape(BATCH, each.rows, each.width) for x, (_, each) in zip(given, every, strict=True)]
    to = [empty(rounding_problems.arguments(each)[1], BATCH) for _, each in every]
    done = library.run([(n, [x, y]) for (n, _), x, y in zip(every, given, to, strict=True)])
    words = [[y for _, y in done[3 * i : 3 * i + 3]] for i in range(len(problems))]
    second = []
    for made, (name, problem) in zip(words, problems.items(), strict=True):
        rows = [y.reshape(BATCH, -1, problem.heads * y.shape[-1]) for y in made]
        second.append((names[name], [*rows, *inputs[name][3:], empty(arguments(problem)[-1], BATCH)]))
    late, early, cut = library.run(second), library.run(second, early=True), library.run(second, truncating=True)
    for a, b, (name, problem), short in zip(late, early, problems.items(), cut, strict=True):
        np.testing.assert_array_equal(a[-1].view(np.uint8), b[-1].view(np.uint8))
        if a[-1].dtype == np.float32 and np.isfinite(a[-1]).all():
            assert error(short[-1], a[-1]) <= recorder.UNIT, name
            assert error(short[-1], meaning(problem, inputs[name], BF16)) <= numerics.BOUNDS[BF16], name
    return {name: [*made, result[-1]] for name, made, result in zip(problems, words, late, strict=True)}


@pytest.fixture(scope="module")
def results() -> dict[str, list[np.ndarray]]:
    """Of each problem, and of one with NaN in its inputs (`spoil`)."""
    kernels.needs()
    problems, inputs = dict(PROBLEMS), {name: inputs_of(problem) for name, problem in PROBLEMS.items()}
    for which in range(3):
        problems[f"NaN {which}"], inputs[f"NaN {which}"] = PROBLEMS[SPOILED], spoil(which)
    return run(problems, inputs)


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_its_meaning(results, name):
    problem = PROBLEMS[name]
    expected = meaning(problem, inputs_of(problem), BF16)
    assert error(results[name][-1], expected) <= numerics.BOUNDS[BF16]


@pytest.fixture(scope="module")
def together() -> dict[str, list[np.ndarray]]:
    """The results of four warps together, of the problems that they have room for, and of one with NaN in values."""
    kernels.needs()
    problems = {name: problem for name, problem in PROBLEMS.items() if wgmma_attention.tile(problem)}
    inputs = {name: inputs_of(problem) for name, problem in problems.items()}
    problems["NaN 2"], inputs["NaN 2"] = PROBLEMS[SPOILED], spoil(2)
    return run(problems, inputs, wgmma_attention.build)


def test_four_warps_together(results, together):
    """The meaning, and NaN where a warp alone has it."""
    assert len(together) >= 8
    for name, found in together.items():
        if name in PROBLEMS:
            expected = meaning(PROBLEMS[name], inputs_of(PROBLEMS[name]), BF16)
            assert error(found[-1], expected) <= numerics.BOUNDS[BF16], name
        assert (np.isnan(found[-1]) == np.isnan(results[name][-1])).all(), name


@pytest.mark.parametrize("name", PROBLEMS)
def test_what_is_rounded(results, name):
    """To the nearest, queries by way of their factor; a zero behind each head of an odd dimension."""
    p = PROBLEMS[name]
    q, *others = (torch.from_numpy(x) for x in inputs_of(p)[:3])
    factor = np.float32(query_factor(p.scale, p.dim))
    for found, x in zip(results[name], (q * factor, *others), strict=False):
        heads = torch.nn.functional.pad(x.reshape(-1, p.dim), (0, p.dim % 2)).bfloat16()
        np.testing.assert_array_equal(found.reshape(heads.shape), heads.view(torch.int16).numpy().view(np.uint16))


def test_quantizes_its_own_result(results):
    y, problem = results[QUANTIZING][-1], replace(PROBLEMS[QUANTIZING], epilogue=CODES, time_groups=2)
    tables = quantizer_inputs(y, 2, 6)
    (found,) = run({"codes": problem}, {"codes": [*inputs_of(PROBLEMS[QUANTIZING]), *tables]}).values()
    assert (found[-1] == quantized(y, *tables, 6)).all()


@pytest.mark.parametrize("which", (0, 1, 2))
def test_nan_spoils_what_depends_on_it_only(results, which):
    y, spoiled = results[f"NaN {which}"][-1], np.zeros((BATCH, 49, 96), bool)
    spoiled[(0, 5, slice(24)) if which == 0 else (0, slice(None), slice(24) if which == 1 else 0)] = True
    assert (np.isnan(y) == spoiled).all()
    assert same_bits(y[~spoiled], results[SPOILED][-1][~spoiled])


@pytest.mark.parametrize(
    ("problem", "says"),
    [(FastAttention(9, 9, 1, 16, numerics=INT8), "attention in int8"), (FastAttention(9, 9, 1, 1024), "1024 dimen")],
)
def test_what_no_kernel_computes(problem, says):
    with pytest.raises(UserError, match=f"no CUDA kernel computes .*{says}"):
        fast_attention.build(problem, "attention")


def test_machine_code_of_hopper(tmp_path):
    """Products are of four warps together, none waits for another, and what a thread holds is in registers."""
    problems = {f"d{dim}": FastAttention(4096, 4096, 8, dim) for dim in (40, 64, 72, 128)}
    functions = {name: wgmma_attention.build(problem, name) for name, problem in problems.items()}
    _, listed = disassembled(functions, TARGETS["cuda-sm90"], tmp_path)
    products = 0
    for problem in problems.values():
        own = wgmma_attention.tile(problem)
        assert own is not None
        products += 2 * own.steps + 2 * own.keys // 16  # of a step and of the first or the last
    assert listed.count("HGMMA.64x") == products and " HMMA." not in listed


def test_machine_code_for_all_architectures(tmp_path):
    """All products of a step are tensor cores', and what a thread holds is in registers."""
    target = TARGETS["cuda"]
    problems = {f"d{dim}": FastAttention(4096, 4096, 8, dim) for dim in (40, 64, 80, 128)}
    functions = {name: fast_attention.build(problem, name) for name, problem in problems.items()}
    used, listed = disassembled(functions, target, tmp_path)
    assert len(re.findall(r"REG:", used)) == len(problems) * len(target.levels)
    products = 0
    for problem in problems.values():
        own = fast_attention.tile(problem)
        products += own.fragments * own.keys // 8 * own.steps + own.fragments * own.keys // 16 * -(-own.columns // 8)
    assert listed.count("HMMA.16816.F32.BF16") == products * len(target.levels)
