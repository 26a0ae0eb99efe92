"""Attention in bfloat16 on emulated tiles against its own meaning."""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import tvm

from mpq_compiler.backends.tvm.kernels.cpu import fast_attention, tile_attention
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS
from mpq_compiler.backends.tvm.kernels.problems import attention
from mpq_compiler.backends.tvm.kernels.problems import fast_attention as problems
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.targets import numerics
from mpq_compiler.targets.numerics import BF16
from tests.harness.emulated import TARGET, emulated
from tests.harness.fast_attention import BATCH, inputs_of, meaning, ready
from tests.harness.float_kernels import error, same_bits, shape_of

RESIDUAL = Epilogue((Step("add", operand=0),), (Operand("full"),))
PROBLEMS = {
    "one block of each": FastAttention(16, 32, 2, 32),
    "blocks of 96 keys and fewer, an odd number of vectors": FastAttention(40, 224, 3, 64),
    "queries that are no whole vector, four vectors": FastAttention(61, 128, 1, 96, scale=0.3, epilogue=RESIDUAL),
    "several tiles of queries": FastAttention(150, 96, 2, 32),
    "a mask of queries and keys": FastAttention(20, 64, 2, 32, mask=("B", 2, 20, 64)),
    "a mask of keys": FastAttention(33, 64, 2, 32, mask=("B", 1, 1, 64)),
}


@functools.cache
def _library() -> tvm.runtime.Executable:
    functions = {}
    with emulated() as isa:
        for i, problem in enumerate(PROBLEMS.values()):
            assert tile_attention.fits(problem, isa) and tile_attention.fits(ready(problem), isa)
            functions[f"attention_{i}"] = fast_attention.build(problem, "amx", f"attention_{i}")
            functions[f"ready_{i}"] = fast_attention.build(ready(problem), "amx", f"ready_{i}")
        return tvm.compile(tvm.IRModule(functions), target=isa.target())


def _run(name: str, inputs: list[np.ndarray]) -> np.ndarray:
    index, problem = [*PROBLEMS].index(name), PROBLEMS[name]
    *arguments, result = problems.arguments(problem)
    arrays = {a.name: np.full(shape_of(a, BATCH), 77, a.dtype) for a in (*arguments, result)}
    arrays |= dict(zip((a.name for a in attention.arguments(problem)), inputs, strict=False))
    tensors = {key: tvm.runtime.tensor(value) for key, value in arrays.items()}
    of_ready = problems.arguments(ready(problem))
    for function, of in ((f"ready_{index}", of_ready), (f"attention_{index}", [*arguments, result])):
        _library()[function](*(tensors[a.name] for a in of))
    return tensors[result.name].numpy()


@pytest.mark.parametrize("name", PROBLEMS)
def test_against_its_meaning(name: str) -> None:
    problem = PROBLEMS[name]
    inputs = inputs_of(problem)
    assert error(_run(name, inputs), meaning(problem, inputs, BF16)) <= numerics.BOUNDS[BF16]


@pytest.mark.parametrize("which", (0, 1, 2))
def test_nan_spoils_what_depends_on_it_only(which: int) -> None:
    """NaN in query, key or value 5, dimension 0, of sample 0 and head 0."""
    name = "one block of each"
    inputs = inputs_of(PROBLEMS[name])
    whole = _run(name, inputs)
    inputs[which] = inputs[which].copy()
    inputs[which][0, 5, 0] = np.nan
    y, spoiled = _run(name, inputs), np.zeros(whole.shape, bool)
    spoiled[(0, 5, slice(32)) if which == 0 else (0, slice(None), slice(32) if which == 1 else 0)] = True
    assert (np.isnan(y) == spoiled).all()
    assert same_bits(y[~spoiled], whole[~spoiled])


@pytest.mark.parametrize("change", [{"keys": 77}, {"dim": 40}])
def test_registers_multiply_what_is_no_whole_tile(change: dict[str, int]) -> None:
    """Keys and values are made ready for those who read them: both kernels decide alike."""
    problem = replace(PROBLEMS["one block of each"], **change)
    assert not tile_attention.fits(problem, ISAS[TARGET]) and not tile_attention.fits(ready(problem), ISAS[TARGET])
    assert not tile_attention.fits(Ready(32, 2, 32, BF16), ISAS["x86-64-avx512vnni"])
