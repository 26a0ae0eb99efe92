"""Attention in bfloat16 and in 8 bits on tiles against its own meaning: emulated, and those of CPUs that have them."""

from __future__ import annotations

import functools
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import pytest

from mpq_compiler.backends.tvm.kernels.cpu import tile_attention
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.targets import numerics
from mpq_compiler.targets.numerics import BF16, INT8
from mpq_compiler.targets.table import TARGETS, with_features
from tests.harness import qemu
from tests.harness.emulated import TARGET, emulated
from tests.harness.fast_attention import Call, functions, here, inputs_of, meaning, ready, result
from tests.harness.fast_attention import emulated as on_arm
from tests.harness.float_kernels import error, same_bits
from tests.harness.integer_kernels import needs

RESIDUAL = Epilogue((Step("add", operand=0),), (Operand("full"),))
PROBLEMS = {
    "one block of each": FastAttention(16, 32, 2, 32),
    "halves of tiles": FastAttention(20, 32 + 96, 1, 96),
    "several blocks of keys, the last smaller, an odd number of vectors": FastAttention(40, 224, 3, 64),
    "queries that are no whole vector, four vectors": FastAttention(61, 128, 1, 96, scale=0.3, epilogue=RESIDUAL),
    "several tiles of queries": FastAttention(150, 96, 2, 32),
    "a mask of queries and keys": FastAttention(20, 64, 2, 32, mask=("B", 2, 20, 64)),
    "a mask of keys": FastAttention(33, 64, 2, 32, mask=("B", 1, 1, 64)),
}


KINDS = (BF16, INT8)
TILES = ("emulated", "silicon")


@pytest.fixture(params=TILES)
def tiles(request: pytest.FixtureRequest) -> str:
    return request.param


@functools.cache
def _library(kind: str, tiles: str) -> Call:
    with emulated() if tiles == "emulated" else nullcontext(needs(TARGET)) as isa:
        for problem in _problems(kind):
            assert tile_attention.fits(problem, isa) and tile_attention.fits(ready(problem), isa)
        own = with_features(TARGETS[TARGET], numerics.features_of(kind, "x86_64"))
        return here(functions(_problems(kind), "amx"), isa.target() if tiles == "emulated" else dict(own.tvm))


def _problems(kind: str) -> list[FastAttention]:
    return [replace(problem, numerics=kind) for problem in PROBLEMS.values()]


def _run(name: str, inputs: list[np.ndarray], kind: str, tiles: str) -> np.ndarray:
    index = [*PROBLEMS].index(name)
    return result(_library(kind, tiles), index, _problems(kind)[index], inputs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", PROBLEMS)
def test_against_its_meaning(name: str, kind: str, tiles: str) -> None:
    problem = PROBLEMS[name]
    inputs = inputs_of(problem)
    assert error(_run(name, inputs, kind, tiles), meaning(problem, inputs, kind)) <= numerics.BOUNDS[kind]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("grows", (True, False))
def test_scores_that_grow_or_shrink_from_block_to_block(grows: bool, kind: str, tiles: str) -> None:
    """So that the maximum which weights are relative to moves many times, or is far above all that comes."""
    name = "several blocks of keys, the last smaller, an odd number of vectors"
    inputs = inputs_of(PROBLEMS[name])
    factors = np.geomspace(0.05, 20.0, PROBLEMS[name].keys, dtype=np.float32)
    inputs[1] = inputs[1] * (factors if grows else factors[::-1])[None, :, None]
    assert error(_run(name, inputs, kind, tiles), meaning(PROBLEMS[name], inputs, kind)) <= numerics.BOUNDS[kind]


def test_eight_bits_are_those_of_registers(tiles: str) -> None:
    """They are the same on all targets: here those of a CPU that multiplies signed codes."""
    if reason := qemu.missing():
        pytest.skip(reason)
    registers = on_arm(functions(_problems(INT8), "dotprod"), dict(TARGETS["aarch64-dotprod"].tvm))
    for i, (name, problem) in enumerate(zip(PROBLEMS, _problems(INT8), strict=True)):
        inputs = inputs_of(problem)
        assert same_bits(_run(name, inputs, INT8, tiles), result(registers, i, problem, inputs)), name


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("which", (0, 1, 2))
def test_nan_spoils_what_depends_on_it_only(which: int, kind: str, tiles: str) -> None:
    """NaN in query, key or value 5, dimension 0, of sample 0 and head 0."""
    name = "one block of each"
    inputs = inputs_of(PROBLEMS[name])
    whole = _run(name, inputs, kind, tiles)
    inputs[which] = inputs[which].copy()
    inputs[which][0, 5, 0] = np.nan
    y, spoiled = _run(name, inputs, kind, tiles), np.zeros(whole.shape, bool)
    spoiled[(0, 5, slice(32)) if which == 0 else (0, slice(None), slice(32) if which == 1 else 0)] = True
    assert (np.isnan(y) == spoiled).all()
    assert same_bits(y[~spoiled], whole[~spoiled])


@pytest.mark.parametrize("kind", KINDS)
def test_no_query_depends_on_those_beside_it(kind: str, tiles: str) -> None:
    """Not when its maximum moves, either, which in bfloat16 is done for those alone whose own did."""
    name = "several blocks of keys, the last smaller, an odd number of vectors"
    inputs = inputs_of(PROBLEMS[name])
    inputs[1] = inputs[1] * np.geomspace(0.05, 20.0, PROBLEMS[name].keys, dtype=np.float32)[None, :, None]
    whole = _run(name, inputs, kind, tiles)
    others = np.arange(PROBLEMS[name].queries) != 5
    for factor in (np.nan, 0.0, 10.0):
        query = inputs[0].copy()
        query[:, 5] *= np.float32(factor)
        y = _run(name, [query, *inputs[1:]], kind, tiles)
        assert same_bits(y[:, others], whole[:, others]) and not same_bits(y[:, 5], whole[:, 5])


@pytest.mark.parametrize("change", [{"keys": 77}, {"dim": 40}])
def test_registers_multiply_what_is_no_whole_tile(change: dict[str, int]) -> None:
    """Keys and values are made ready for those who read them: both kernels decide alike."""
    problem = replace(PROBLEMS["one block of each"], **change)
    assert not tile_attention.fits(problem, ISAS[TARGET]) and not tile_attention.fits(ready(problem), ISAS[TARGET])
    assert not tile_attention.fits(Ready(32, 2, 32, BF16), ISAS["x86-64-avx512vnni"])
