"""Integer GEMM kernels, bit for bit against the definition, on every CPU target.

The list of shapes (`harness/shapes.py`) is rows x outputs x reductions x formats, and each kernel runs on every number
of rows. On the two main x86 targets every stored width (8, 4, 3 and 2 bits) meets every pair of outputs and reduction.
Each width has two variants (bias, offset, row classes, time groups), which take turns as in a Latin square; the two
targets take them the other way round. The other targets take a part of one square.
"""

from __future__ import annotations

import functools
from dataclasses import replace

import numpy as np
import pytest
import tvm
from tvm import relax

from mpq_compiler.backends.tvm.kernels.cpu import gemm, prepare
from mpq_compiler.backends.tvm.kernels.cpu import weight_layout as quant_matmul
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, stored_arguments
from tests.harness.integer_kernels import AARCH64, X86, Kernels, assert_same_bits, needs
from tests.harness.shapes import (
    FORMATS,
    OUTPUTS,
    REDUCTIONS,
    ROWS,
    Case,
    concrete,
    make_case,
    quantize,
    random_problem,
    reference,
    seed,
)


def part(case: Case, samples: slice) -> Case:
    """Some samples of a case."""
    data = dict(case.data)
    for name in ("x", "group"):
        data[name] = data[name][samples]
    return Case(case.problem, len(data["group"]), data)


@functools.cache
def square(shift: int, step: int) -> list[tuple[QuantMatmul, Case, np.ndarray]]:
    """Every `step`-th problem of the square, with data for all rows of the list together and the results."""
    names, result = list(FORMATS), []
    for i, outputs in enumerate(OUTPUTS):
        for j, reduction in enumerate(REDUCTIONS):
            if (i + 3 * j) % step:
                continue
            name = names[(i + j + shift) % len(names)]
            problem = QuantMatmul.linear((), reduction, outputs, **FORMATS[name])
            case = make_case(problem, sum(ROWS), seed(name, outputs, reduction))
            result.append((problem, case, reference(case)))
    return result


@pytest.mark.parametrize(
    ("name", "shift", "step"),
    [
        *(("x86-64-avx512vnni", shift, 1) for shift in (0, 2, 4, 6)),
        *(("x86-64-avx2", shift, 1) for shift in (3, 5, 7, 1)),
        ("x86-64-avxvnni", 5, 4),
        ("x86-64-avx512", 7, 4),
        ("aarch64-neon", 1, 6),
        ("aarch64-dotprod", 6, 6),
        ("aarch64-i8mm", 3, 6),
        ("aarch64-sme2", 4, 6),
    ],
)
@pytest.mark.invariant("compiler-1")
def test_every_shape(name, shift, step):
    isa, table = needs(name), square(shift, step)
    kernels = Kernels(isa, [problem for problem, _, _ in table])
    rows = ROWS if name not in AARCH64 else ROWS[:-1]  # 1000 rows add nothing but time under emulation
    calls, wanted = [], []
    for index, (_, case, result) in enumerate(table):
        begin = 0
        for m in rows:
            samples = slice(begin, begin + m)
            calls.append((index, part(case, samples)))
            wanted.append(result[samples])
            begin += m
    for (index, case), got, want in zip(calls, kernels.run(calls), wanted, strict=True):
        assert_same_bits(got, want, (case.batch, table[index][0]))


RANDOM_PROBLEMS, CASES_EACH = 72, 7


@functools.cache
def random_cases() -> tuple[list[QuantMatmul], list[tuple[int, Case]], list[np.ndarray]]:
    """504 cases from one seed: 72 problems (linear and convolution, all formats) with data of 7 seeds each.

    The two main x86 targets take half of them each, the others a part.
    """
    problems, calls, wanted = [], [], []
    for index in range(RANDOM_PROBLEMS):
        draw = np.random.default_rng(seed("random", index))
        batch, problem = random_problem(draw)
        problems.append(problem)
        for repeat in range(CASES_EACH):
            zeros = ((0,), (255,), (0, 255), (), (), (), ())[repeat]
            case = make_case(problem, batch + repeat, seed("data", index, repeat), zeros)
            calls.append((index, case))
            wanted.append(reference(case))
    return problems, calls, wanted


@pytest.mark.parametrize(
    ("name", "begin", "step"),
    [
        ("x86-64-avx512vnni", 0, 2),
        ("x86-64-avx2", 1, 2),
        ("x86-64-avxvnni", 3, 8),
        ("x86-64-avx512", 7, 8),
        ("aarch64-neon", 1, 9),
        ("aarch64-dotprod", 5, 9),
        ("aarch64-i8mm", 2, 9),
        ("aarch64-sme2", 6, 9),
    ],
)
@pytest.mark.invariant("compiler-1")
def test_random_cases(name, begin, step):
    isa = needs(name)
    problems, calls, wanted = random_cases()
    chosen = list(range(begin, RANDOM_PROBLEMS, step))
    kernels = Kernels(isa, [problems[i] for i in chosen])
    picked = [(chosen.index(i), case) for i, case in calls if i in chosen]
    results = [want for (i, _), want in zip(calls, wanted, strict=True) if i in chosen]
    for (_, case), got, want in zip(picked, kernels.run(picked), results, strict=True):
        assert_same_bits(got, want, (case.batch, case.problem))


EPILOGUES = {
    "residual": Epilogue((Step("add", 0),), (Operand("full"),)),
    "scale-shift-quantize": Epilogue(
        (Step("mul", 0), Step("add", 1), Step("quantize", value=8)), (Operand("sample"), Operand("channel"))
    ),
    "relu-residual-quantize": Epilogue(
        (Step("mul", value=0.25), Step("relu"), Step("add", 0), Step("mul", 1), Step("quantize", value=6)),
        (Operand("full"), Operand("scalar")),
    ),
}


def after(epilogue: Epilogue, y: np.ndarray, case: Case) -> np.ndarray:
    """The epilogue in numpy, step by step in float32."""
    batch = case.batch
    for step in epilogue.steps:
        if step.op == "quantize":
            assert step.value is not None
            return quantize(y, case.data["qscale"], case.data["qzero"], case.data["group"], int(step.value))
        if step.op == "relu":
            y = np.maximum(y, np.float32(0))
            continue
        if step.operand is None:
            right = np.float32(step.value)
        else:
            right = case.data[f"operand{step.operand}"]
            if epilogue.operands[step.operand].kind == "sample":
                right = right.reshape(batch, *[1] * (y.ndim - 2), -1)
        y = y * right if step.op == "mul" else y + right
    return y


def epilogue_problems() -> list[QuantMatmul]:
    shapes = [
        QuantMatmul.linear((7,), 36, 65, bits=4, groups=3),
        QuantMatmul(5, 6, 16, 48, (3, 3), padding=(1, 1, 1, 1), bits=8, groups=2),
        QuantMatmul.linear((), 64, 30, bits=3, groups=4, has_offset=True, segments=(24, 40)),
    ]
    pairs = [(0, "residual"), (0, "scale-shift-quantize"), (1, "relu-residual-quantize")]
    pairs += [(1, "scale-shift-quantize"), (2, "residual"), (2, "relu-residual-quantize")]
    return [replace(shapes[i], epilogue=EPILOGUES[name]) for i, name in pairs]


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_epilogues(name):
    isa, problems = needs(name), epilogue_problems()
    calls = [
        (i, make_case(problem, batch, seed("epilogue", i, batch)))
        for i, problem in enumerate(problems)
        for batch in (1, 9)
    ]
    for (_, case), got in zip(calls, Kernels(isa, problems).run(calls), strict=True):
        epilogue = case.problem.epilogue
        assert epilogue is not None
        assert_same_bits(got, after(epilogue, reference(case), case), (case.batch, case.problem))


DYNAMIC = (
    QuantMatmul.linear((), 64, 48, bits=8),
    QuantMatmul.linear((), 1, 1, bits=4),
    QuantMatmul.linear((7,), 65, 33, bits=4, has_offset=True),
    QuantMatmul.linear((3, 5), 36, 65, bits=3, classes=2, has_bias=False),
    QuantMatmul.linear((70,), 432, 320, bits=2, has_offset=True),
    QuantMatmul.linear((5,), 200, 40, bits=4, segments=(64, 64, 72), has_offset=True),
    QuantMatmul.linear((600,), 36, 16, bits=8),
    QuantMatmul.linear((6,), 40, 20, bits=4, groups=3, epilogue=EPILOGUES["scale-shift-quantize"]),
    QuantMatmul.linear((6,), 40, 20, bits=8, epilogue=EPILOGUES["residual"]),
)
"""Rows with scales and zero points of their own."""


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_dynamic_rows(name):
    isa, problems = needs(name), [replace(problem, dynamic=True) for problem in DYNAMIC]
    calls = [
        (i, make_case(problem, batch, seed("dynamic", i, batch), zeros))
        for i, problem in enumerate(problems)
        for batch, zeros in ((1, ()), (3, (0, 255, 128)))
    ]
    for (_, case), got in zip(calls, Kernels(isa, problems).run(calls), strict=True):
        y = reference(case)
        wanted = y if case.problem.epilogue is None else after(case.problem.epilogue, y, case)
        assert_same_bits(got, wanted, (case.batch, case.problem))


@pytest.mark.parametrize("name", X86)
def test_samples_of_different_time_groups_do_not_mix(name):
    problem = QuantMatmul.linear((3,), 40, 33, bits=4, groups=3, has_offset=True)
    kernels = Kernels(needs(name), [problem])
    case = make_case(problem, 7, seed("groups"))
    case.data["group"] = np.array([0, 1, 2, 2, 1, 0, 1])
    (together,) = kernels.run([(0, case)])
    alone = kernels.run([(0, part(case, slice(i, i + 1))) for i in range(7)])
    assert_same_bits(together, np.concatenate(alone))
    changed = Case(problem, 7, {**case.data, "x": case.data["x"].copy()})
    changed.data["x"][case.data["group"] != 1] ^= 0x5A
    (other,) = kernels.run([(0, changed)])
    same = case.data["group"] == 1
    assert_same_bits(other[same], together[same])
    assert (other[~same] != together[~same]).any()


def test_empty_batch():
    problem = QuantMatmul.linear((3,), 40, 33)
    case = make_case(problem, 1, 0)
    (out,) = Kernels(needs("x86-64-avx2"), [problem]).run([(0, part(case, slice(0, 0)))])
    assert out.shape == (0, 3, 33)


def test_called_from_relax():
    """The kernel and its preparation as `call_tir` of a Relax function with static shapes."""
    isa, batch = needs("x86-64-avx2"), 2
    problem = QuantMatmul.linear((7,), 36, 65, bits=4, groups=3)
    kernel, made = gemm.arguments(problem, isa), prepare.outputs(problem, isa)

    def of(argument):
        return relax.TensorType(concrete(argument.shape, batch), argument.dtype)

    inputs = {a.name: a for a in [*kernel[:-1], *stored_arguments(problem)] if a not in made}
    values = {name: relax.Var(name, of(a)) for name, a in inputs.items()}
    builder = relax.BlockBuilder()
    with builder.function("main", list(values.values())):
        first = builder.add_func(prepare.build(problem, isa, "prepare"), "prepare")
        second = builder.add_func(gemm.build(problem, isa, "kernel"), "kernel")
        stored = [values[a.name] for a in stored_arguments(problem)]
        ready = builder.emit(relax.call_tir(first, stored, [of(a) for a in made]))
        values |= {a.name: builder.emit(relax.TupleGetItem(ready, i)) for i, a in enumerate(made)}
        arguments = [values[a.name] for a in kernel[:-1]]
        builder.emit_func_output(builder.emit(relax.call_tir(second, arguments, of(kernel[-1]))))
    compiled = tvm.compile(builder.get(), target=tvm.target.Target(isa.target()))
    case = make_case(problem, batch, 0)
    tensors = [tvm.runtime.tensor(np.ascontiguousarray(case.stored()[name])) for name in inputs]
    out = relax.VirtualMachine(compiled, tvm.cpu())["main"](*tensors)
    assert_same_bits(out.numpy(), reference(case))


def test_problems_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match="5 bits have no kernel"):
        QuantMatmul.linear((), 8, 8, bits=5)
    with pytest.raises(ValueError, match="do not partition"):
        QuantMatmul.linear((), 8, 8, segments=(3, 4))
    with pytest.raises(ValueError, match="cannot have scales of their own"):
        QuantMatmul(4, 4, 8, 8, kernel=(3, 3), dynamic=True)
    with pytest.raises(ValueError, match="nothing to compute"):
        QuantMatmul(2, 2, 8, 8, kernel=(3, 3))


FEW_OUTPUTS = [
    QuantMatmul(9, 6, 128, 4, (3, 3), padding=(1, 1, 1, 1)),
    QuantMatmul(9, 6, 48, 3, (3, 3), padding=(1, 1, 1, 1), bits=3, groups=2, has_offset=True),
    QuantMatmul.linear((19,), 64, 8, bits=4, segments=(24, 40), classes=1),
    QuantMatmul.linear((40,), 300, 7, bits=2, has_offset=True, has_bias=False),
    QuantMatmul.linear((21,), 96, 1, dynamic=True),
    QuantMatmul.linear((5,), 1024, 2, bits=4),
]
"""Several lanes of a register are one output's, where the ISA has lanes to spare."""


@pytest.mark.parametrize("name", X86)
def test_few_outputs(name):
    isa = needs(name)
    widths = {quant_matmul.WeightLayout(p, isa).isa.split for p in FEW_OUTPUTS}
    assert widths == ({2, 4} if isa.lanes == 16 else {1, 2})
    kernels = Kernels(isa, FEW_OUTPUTS)
    cases = [make_case(problem, 2, seed("few", i)) for i, problem in enumerate(FEW_OUTPUTS)]
    for case, got in zip(cases, kernels.run(list(enumerate(cases))), strict=True):
        assert_same_bits(got, reference(case), case.problem)


def groups_of(channels: int, size: int) -> tuple[int, ...]:
    whole, rest = divmod(channels, size)
    return (size,) * whole + ((rest,) if rest else ())


K_GROUPS = [
    *(QuantMatmul.linear((7,), 1130, 50, bits=b, segments=groups_of(1130, 64), groups=3) for b in (8, 4, 3, 2)),
    *(
        QuantMatmul(
            *(6, 5, 101, 40),
            kernel=(3, 3),
            padding=(1, 1, 0, 1),
            stride=(1, 2),
            bits=bits,
            groups=2,
            segments=groups_of(101, 32),
            classes=3 if bits < 8 else 1,
        )
        for bits in (8, 4, 3)
    ),
    QuantMatmul.linear((9,), 200, 33, bits=4, segments=groups_of(200, 64), groups=2, has_offset=True),
    QuantMatmul.linear((9,), 256, 33, bits=4, segments=groups_of(256, 64), has_bias=False),
    QuantMatmul.linear((9,), 130, 33, bits=4, segments=groups_of(130, 64), dynamic=True),
    QuantMatmul.linear((9,), 20, 33, bits=4, segments=(5, 5, 5, 2, 3), groups=2),
]
"""Up to 18 segments, with and without a shorter last one, offsets, bias, row classes; runs of unequal ones."""


@pytest.mark.parametrize("name", [*X86, *AARCH64])
def test_k_groups(name):
    kernels = Kernels(needs(name), K_GROUPS)
    cases = [make_case(problem, 3, seed("groups", i)) for i, problem in enumerate(K_GROUPS)]
    for case, got in zip(cases, kernels.run(list(enumerate(cases))), strict=True):
        assert_same_bits(got, reference(case), case.problem)


ROWS_IN_PAIRS = [
    QuantMatmul(6, 16, 40, 24, (3, 3), padding=(1, 1, 1, 1), bits=4, has_offset=True),
    QuantMatmul(9, 12, 24, 36, (3, 3), padding=(1, 1, 1, 1), groups=2),
    QuantMatmul(9, 7, 16, 20, (3, 3), padding=(1, 1, 1, 1), bits=4),
    QuantMatmul(13, 20, 33, 30, (3, 3), (2, 2), (1, 1, 1, 1), bits=3, has_offset=True),
    QuantMatmul.linear((77,), 96, 50, bits=4, segments=(32, 64), has_offset=True),
    QuantMatmul.linear((7,), 64, 24, bits=3),
    QuantMatmul.linear((600,), 640, 12, bits=2),
]
"""Tiles of one line of an image or of several, an odd width, a stride; odd rows, few of them, several chunks."""


def test_rows_in_pairs():
    kernels = Kernels(needs("aarch64-i8mm"), ROWS_IN_PAIRS)
    calls = [(i, make_case(p, batch, seed("pairs", i))) for i, p in enumerate(ROWS_IN_PAIRS) for batch in (1, 2)]
    for (_, case), got in zip(calls, kernels.run(calls), strict=True):
        assert_same_bits(got, reference(case), (case.batch, case.problem))
