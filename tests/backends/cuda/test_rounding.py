"""Results stored in bfloat16: what a kernel else stores in float32, rounded, whatever the kernel."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.problems.pointwise import PointwiseProgram
from tests.harness.cuda import kernels
from tests.harness.cuda.cases import BATCH, CASES, ON_TENSOR_CORES, Case, on_tensor_cores, value
from tests.harness.cuda.kernels import Library, empty
from tests.harness.float_kernels import bfloat16

PLAIN = ("pointwise", "hadamard", "norms", "attention", "float_gemm")


def rounded(problem: Any) -> Any | None:
    """The problem with its result in bfloat16; None where it is none of float32."""
    if isinstance(problem, PointwiseProgram):
        return replace(problem, dtype="bfloat16") if problem.out_dtype == "float32" else None
    own = problem.epilogue or Epilogue()
    return None if own.bits is not None else replace(problem, epilogue=replace(own, rounded=True))


def pairs() -> list[tuple[str, Any, Any]]:
    """(template, a problem, the same with its result rounded)"""
    every = [case for case in CASES if case.template in PLAIN] + ON_TENSOR_CORES
    return [(c.template, c.problem, other) for c in every if (other := rounded(c.problem)) is not None]


@pytest.mark.parametrize("on_hopper", [False, True], ids=["any", "wgmma"])
def test_results_are_those_in_float32_rounded(on_hopper):
    kernels.needs()
    functions, calls, results = {}, [], []
    for i, (template, *problems) in enumerate(pairs()):
        own, draw = cuda.TEMPLATES[template], np.random.default_rng(i)
        if on_hopper and own.hopper(problems[0], "kernel") is None:
            continue
        arguments = own.arguments(problems[0])
        case = Case("float_gemm" if template == "float_gemm" and not on_tensor_cores(problems[0]) else "", problems[0])
        given = [value(draw, case, a.name, empty(a, BATCH)) for a in arguments[:-1]]
        for kind, problem in zip(("float", "rounded"), problems, strict=True):
            name = f"{kind}{i}"
            functions[name] = (own.hopper(problem, name) if on_hopper else None) or own.build(problem, name)
            made = [empty(a, BATCH) for a in (own.arguments(problem)[-1], *own.workspaces(problem))]
            calls.append((name, [*given, *made]))
        results.append(len(given))
    assert len(results) == (5 if on_hopper else len(pairs()))
    done = Library(functions).run(calls)
    for i, place in enumerate(results):
        expected, found = (arrays[place] for arrays in done[2 * i : 2 * i + 2])
        there = expected.view(np.uint32) != 0xA5A5A5A5  # what is written in another's buffer has gaps
        assert found.dtype == np.uint16 and there.any(), calls[2 * i][0]
        nan = np.isnan(expected[there])  # which of them the instruction chooses
        assert (((found[there] & 0x7FFF) > 0x7F80) == nan).all(), calls[2 * i][0]
        np.testing.assert_array_equal(found[there][~nan], bfloat16(expected)[there][~nan], str(calls[2 * i][0]))
        assert (found[~there] == 0xA5A5).all()
