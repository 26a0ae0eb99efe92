"""Kernels with arguments in half precision: what they make of these values in float32, rounded where it is stored."""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm import lowering
from mpq_compiler.backends.tvm.compile import signatures
from mpq_compiler.backends.tvm.emit.walk import SelectKernels
from mpq_compiler.backends.tvm.kernels.cuda import half, norms, rows, threads
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems.argument import HALF, Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Linear
from mpq_compiler.backends.tvm.kernels.problems.movement import Gather, TokenRow
from mpq_compiler.backends.tvm.kernels.problems.norms import LayerNorm
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, PointwiseStep
from mpq_compiler.backends.tvm.kernels.problems.rounding import Rounding
from mpq_compiler.backends.tvm.plan.calls import Lowered
from mpq_compiler.backends.tvm.plan.halves import ARGUMENTS
from mpq_compiler.ir.findings import STORED_HALVES
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import BF16
from tests.harness import packed
from tests.harness.cuda import emulator, kernels
from tests.harness.cuda.cases import ADDED, BATCH, CASES, ON_TENSOR_CORES, Case, on_tensor_cores, value
from tests.harness.cuda.kernels import Library, empty
from tests.harness.cuda.mutants import with_mutated

PRODUCT = Linear(70, 33, 65, packed=True, numerics=BF16, epilogue=ADDED)
MIXED = ("movement", "pointwise")
"""Templates of which results alone are tried in half precision, too."""
TARGET = targets.resolve("cuda-sm90")
LARGEST = np.float32(65504)
EVERY = [
    *(c for c in CASES if c.template in ARGUMENTS and not isinstance(c.problem, Gather | TokenRow)),
    *ON_TENSOR_CORES,
    Case("weight_only", WeightOnly(PRODUCT, DequantizeTable(65, 33, (33,), 4))),
    Case("rounding", Rounding(7, 24, 24, 0.3)),
    Case("rounding", Rounding(7, 11, 12)),
]


def of_halves(case: Case) -> tuple[str, ...]:
    """The arguments of a case in float32 that may be in half precision."""
    known = ARGUMENTS[case.template]
    return tuple(
        a.name
        for a in cuda.TEMPLATES[case.template].arguments(case.problem)
        if a.dtype == "float32" and re.fullmatch(known, a.name)
    )


def nearest(x: np.ndarray) -> np.ndarray:
    """Values in half precision, the largest where they are beyond it."""
    return np.clip(x, -LARGEST, LARGEST).astype(np.float16)


def built(case: Case, name: str, on_hopper: bool) -> Any | None:
    """The kernel of a case; None where Hopper has no other."""
    own = cuda.TEMPLATES[case.template]
    return own.hopper(case.problem, name) if on_hopper else own.build(case.problem, name)


@pytest.mark.parametrize("on_hopper", [False, True], ids=["any", "wgmma"])
def test_results_are_those_of_the_same_values_in_float32(on_hopper):
    kernels.needs()
    functions, calls, cases = {}, [], []
    for i, case in enumerate(EVERY):
        own, names = cuda.TEMPLATES[case.template], of_halves(case)
        if not names or (on_hopper and built(case, "kernel", True) is None):
            continue
        arguments = own.arguments(case.problem)
        given = drawn(case, names, np.random.default_rng(i))
        for number, chosen in enumerate([(), names, *([names[-1:]] if case.template in MIXED else [])]):
            name = f"kernel{i}_{number}"
            with half.arguments(chosen):
                functions[name] = built(case, name, on_hopper)
                made = half.stored([*arguments[len(given) :], *own.workspaces(case.problem)])
            wide = {*names} - {*chosen}
            arrays = [x.astype(np.float32) if a.name in wide else x for a, x in zip(arguments, given, strict=False)]
            calls.append((name, [*arrays, *(empty(a, BATCH) for a in made)]))
            cases.append((case, chosen, arguments[len(given) :]))
    templates = {"gemm", "weight_only", "float_gemm", "fast_attention"} if on_hopper else {*ARGUMENTS}
    assert {case.template for case, *_ in cases} == templates
    expected: list[np.ndarray] = []
    for (case, chosen, results), arrays in zip(cases, Library(functions).run(calls), strict=True):
        count = len(arrays) - len(results) - len(cuda.TEMPLATES[case.template].workspaces(case.problem))
        found = arrays[count : count + len(results)]
        expected = expected if chosen else found
        for argument, want, got in zip(results, expected, found, strict=True):
            check(case, argument, chosen, want, got)


def drawn(case: Case, names: tuple[str, ...], draw: np.random.Generator) -> list[np.ndarray]:
    """Inputs of a case, of which some are in half precision."""
    own = cuda.TEMPLATES[case.template]
    arguments = own.arguments(case.problem)
    named = Case("" if on_tensor_cores(case.problem) else case.template, case.problem)
    inputs = arguments[: len(arguments) - own.outputs(case.problem)]
    given = [value(draw, named, a.name, empty(a, BATCH)) for a in inputs]
    return [nearest(x * 3) if a.name in names else x for a, x in zip(inputs, given, strict=True)]


def check(case: Case, argument: Argument, names: tuple[str, ...], expected: np.ndarray, found: np.ndarray) -> None:
    if argument.name not in names:
        np.testing.assert_array_equal(found, expected, str(case.problem))
        return
    there = expected.view(np.uint32) != 0xA5A5A5A5  # what is written in another's buffer has gaps
    assert found.dtype == np.dtype(HALF) and there.any(), str(case.problem)
    np.testing.assert_array_equal(found[there], nearest(expected[there]), str(case.problem))
    assert (found.view(np.uint16)[~there] == 0xA5A5).all(), str(case.problem)


def test_what_is_beyond_half_precision_is_the_largest_and_nan_stays():
    kernels.needs()
    shape = (BATCH, 2, 4)
    steps = (PointwiseStep("mul", (Input(0), 1e5)),)
    problem = PointwiseProgram(((("B", *shape[1:]), "float32"),), steps, ("B", *shape[1:]))
    with half.arguments(("y",)):
        library = Library({"kernel": cuda.TEMPLATES["pointwise"].build(problem, "kernel")})
    x = np.array([1, -1, np.nan, np.inf, -np.inf, 0.65504, 0.1, -1e-13] * BATCH, np.float32).reshape(shape)
    ((_, y),) = library.run([("kernel", [x, np.full(shape, 7, np.float16)])])
    np.testing.assert_array_equal(y, nearest(x * np.float32(1e5)))
    np.testing.assert_array_equal(y.reshape(-1)[:5], [65504, -65504, np.nan, 65504, -65504])


def plan(name: str, stored: bool) -> Lowered:
    """The plan of a small model for Hopper, which may store halves or not."""
    program = packed.program(name, "int4").program.fork()
    program.facts[STORED_HALVES] = stored
    return lowering.run([SelectKernels(program, (1,)), *lowering.of_target(TARGET)])


@pytest.mark.parametrize("name", [packed.BUNDLED, "sd15", "pixart"])
def test_what_has_rows_is_in_halves_but_for_what_needs_more(name):
    """A value stays in float32 for a kernel that has it in that alone, or because it is the output."""
    whole, stored = plan(name, False), plan(name, True)
    assert signatures.check(stored, TARGET) == []
    (before,), (after,) = whole.functions, stored.functions
    assert [call.node for call in before.own] == [call.node for call in after.own]
    assert all(not call.kernel.halves for call in before.own) and any(call.kernel.halves for call in after.own)
    assert after.output.dtype == after.values[after.output.name].dtype == "float32"
    for made in before.made:
        same = after.values[made.name].dtype == made.dtype
        if made.dtype != "float32" or not made.batched or len(made.inner) < 2:
            assert same, made
        elif same:
            used = [(c, a) for c in after.own for a, n in (*c.operands, *c.results) if made.name in (n, c.into)]
            others = [a for c, a in used if not re.fullmatch(ARGUMENTS.get(c.kernel.template, ""), a)]
            assert others or made.name == after.output.name, made
        else:
            assert after.values[made.name].dtype == HALF


ROW = Case("norms", LayerNorm(7, 100, epilogue=ADDED), exact=False)
MUTANTS = {
    "pairs turned as they are stored": (half, "(word[0], high, low)", "(word[0], low, high)"),
    "bfloat16 is stored": (half, "cvt.rn.satfinite.f16x2.f32", "cvt.rn.bf16x2.f32"),
    "pairs turned as they are read": (
        half,
        "(word & T.uint32(0xFFFF), word >> T.uint32(16))",
        "(word >> T.uint32(16), word & T.uint32(0xFFFF))",
    ),
    "the first of a pair twice": (half, "word >> T.uint32(16))", "word & T.uint32(0xFFFF))"),
    "words of the place of values": (threads, "T.bind(at // 2), count // 2)", "T.bind(at), count // 2)"),
    "the first word alone": (threads, "for word in words for", "for word in [words[0]] * len(words) for"),
    "words stored at the place of values": (threads, '"uint32", 2), words, at // 2)', '"uint32", 2), words, at)'),
    "the same pair stored": (threads, "*values[e : e + 2])", "*values[:2])"),
}


def test_mistakes_are_seen():
    """By the kernel of a norm with an epilogue, which reads and stores pairs."""
    emulator.needs()
    names = of_halves(ROW)
    own = cuda.TEMPLATES["norms"]
    arguments, given = own.arguments(ROW.problem), drawn(ROW, names, np.random.default_rng(0))
    functions, calls = {}, []
    for number, (module, before, after) in enumerate([(half, "", ""), *MUTANTS.values()]):
        users = (threads, rows, norms) if module is half else (rows, norms)
        changed = with_mutated(module, before, after, users) if before else {}
        halves = changed.get(half.__name__, half)
        with halves.arguments(names):
            functions[f"kernel{number}"] = changed.get(norms.__name__, norms).build(ROW.problem, f"kernel{number}")
        with half.arguments(names):
            made = [empty(a, BATCH) for a in half.stored(arguments[len(given) :])]
        calls.append((f"kernel{number}", [*given, *made]))
    right, *wrong = (found and found[-1] for found in Library(functions).tried(calls))
    assert right is not None and np.isfinite(right).all()
    for name, found in zip(MUTANTS, wrong, strict=True):
        assert found is None or not np.array_equal(found, right), name
