"""Integer products on the tensor cores of the emulator, to the bit."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from mpq_compiler.backends.tvm.kernels.cuda import weights, wgmma
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel as gemm
from mpq_compiler.backends.tvm.kernels.cuda.gemm import tiles
from mpq_compiler.backends.tvm.kernels.problems import quant_matmul
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import Gate, QuantMatmul
from mpq_compiler.backends.tvm.toolchain import machine_code
from mpq_compiler.targets import nvidia
from mpq_compiler.targets import table as targets
from tests.harness.cuda import kernels, silicon
from tests.harness.cuda.cases import FORMATS, IMAGE, SEGMENTS, Problems
from tests.harness.cuda.kernels import Library, disassembled, empty
from tests.harness.cuda.mutants import mutated
from tests.harness.float_kernels import bfloat16
from tests.harness.shapes import (
    CONVOLUTIONS,
    Case,
    make_case,
    of_products,
    quantize,
    random_problem,
    reference,
    seed,
    stored_together,
    with_widths,
)

pytestmark = pytest.mark.filterwarnings("error:NVIDIA's assembler complains")
linear = QuantMatmul.linear
Build = Callable[[QuantMatmul, str], Any]

SPLIT: Problems = [
    (2, linear((10,), 1612, 64, bits=4, groups=2, has_offset=True)),
    (2, linear((64,), 1612, 64, bits=4, groups=3)),  # a tile of one sample
    (3, linear((1,), 2048, 70, dynamic=True)),
    (1, linear((5,), 1600, 64, bits=4, integers=True)),
    (1, QuantMatmul(5, 6, 180, 64, (3, 3), padding=(1, 1, 1, 1), bits=2, has_offset=True)),
    (2, QuantMatmul(3, 4, 192, 64, (3, 3), padding=(1, 1, 1, 1), bits=4, groups=2)),  # begins within a tap
]
IMAGES: Problems = [
    IMAGE,
    *(CONVOLUTIONS[n] for n in ("3x3", "3x3-stride-2", "3x3-one-channel", "5x3-of-3x2", "patches", "1x1-strided")),
    (2, QuantMatmul(12, 12, 64, 128, (3, 3), padding=(1, 1, 1, 1), groups=2)),
    (2, QuantMatmul(9, 7, 128, 64, (3, 2), (2, 1), (1, 0, 1, 1), groups=2)),  # whole steps, several of a tap
    (1, QuantMatmul(8, 6, 64, 64, (2, 2), (2, 2))),
]
RANDOM: Problems = [random_problem(np.random.default_rng(i)) for i in range(8)]


@pytest.fixture(autouse=True)
def _emulated():
    kernels.needs()


def run(problems: Problems, build: Build = gemm.build) -> list[tuple[Case, list[np.ndarray]]]:
    """The cases of some problems with what their kernels write, whenever copies happen."""
    if build is wgmma.build and silicon.asked() and silicon.level() != nvidia.HOPPER:
        pytest.skip("the GPU is none of those that have wgmma")
    functions = {f"kernel{i}": build(p, f"kernel{i}") for i, (_, p) in enumerate(problems)}
    functions |= {f"prepare{i}": weights.build(p, f"prepare{i}") for i, (_, p) in enumerate(problems)}
    library = Library(functions)
    cases = [make_case(p, batch, seed(i, batch)) for i, (batch, p) in enumerate(problems)]
    datas, first, second, found = [stored_together(case) for case in cases], [], [], []
    for i, (case, data) in enumerate(zip(cases, datas, strict=True)):
        inputs, made = weights.arguments(case.problem)
        first.append((f"prepare{i}", [*(data[a.name] for a in inputs), *(empty(a, case.batch) for a in made)]))
    for i, (case, data, results) in enumerate(zip(cases, datas, library.run(first), strict=True)):
        inputs, made = weights.arguments(case.problem)
        data |= {a.name: value for a, value in zip(made, results[len(inputs) :], strict=True)}
        arguments = gemm.parameters(case.problem)
        second.append((f"kernel{i}", [data[a.name] if a.name in data else empty(a, case.batch) for a in arguments]))
    late, early = library.run(second), library.run(second, early=True)
    for case, results, others in zip(cases, late, early, strict=True):
        for result, other in zip(results, others, strict=True):
            np.testing.assert_array_equal(result.view(np.uint8), other.view(np.uint8), str(case.problem))
        count = len(gemm.arguments(case.problem))
        found.append((case, results[count - quant_matmul.outputs(case.problem) : count]))
    return found


@pytest.mark.parametrize(
    "problems",
    [FORMATS, SEGMENTS, SPLIT, IMAGES, RANDOM],
    ids=["formats", "segments", "split", "images", "random"],
)
@pytest.mark.parametrize("build", [gemm.build, wgmma.build], ids=["mma", "wgmma"])
def test_the_bits_of_the_definition(problems, build):
    assert all((tiles.most_splits(p) > 1) == (problems is SPLIT) for _, p in problems)
    for case, (out,) in run(problems, build):
        np.testing.assert_array_equal(out.view(np.uint32), reference(case).view(np.uint32), str(case.problem))


def test_machine_code_of_hopper(tmp_path):
    """Products are of four warps together, and nothing but them holds their sums."""
    problems = {f"k{bits}": linear((256,), 640, 640, bits=bits, has_offset=True) for bits in (8, 3)}
    functions = {name: wgmma.build(problem, name) for name, problem in problems.items()}
    _, listed = disassembled(functions, targets.resolve("cuda-sm90"), tmp_path)
    assert " IMMA." not in listed
    rows = [wgmma.tile(problem).rows for problem in problems.values()]
    assert Counter(re.findall(r"IGMMA\.[\w.]+", listed)) == Counter(f"IGMMA.64x{n}x32.S8.U8" for n in 2 * rows)


@pytest.mark.parametrize("build", [gemm.build, wgmma.build], ids=["mma", "wgmma"])
def test_epilogues(build):
    steps = (Step("add", operand=0), Step("mul", operand=1), Step("add", operand=2), Step("quantize", value=8))
    operands = tuple(map(Operand, ("full", "sample", "channel")))
    plain = linear((20,), 64, 48, bits=4, groups=2, epilogue=Epilogue(steps, operands))
    kept = replace(plain, epilogue=Epilogue(steps, operands, keeps=True))
    into = replace(linear((20,), 64, 48, bits=4), into=(20 * 64 + 3, 5, 64))
    found = run([(3, plain), (3, kept), (3, into)], build)
    for case, outputs in found[:2]:
        d = case.data
        y = reference(case) + d["operand0"]
        y = y * d["operand1"][:, None] + d["operand2"]
        codes = quantize(y, d["qscale"], d["qzero"], d["group"], 8)
        np.testing.assert_array_equal(outputs[0], codes)
        if case.problem.epilogue.keeps:
            np.testing.assert_array_equal(outputs[1], y)
    case, (out,) = found[2]
    rows = out[:, 5:].reshape(3, -1)[:, : 20 * 64 - 2]
    for row in range(20):
        np.testing.assert_array_equal(rows[:, row * 64 : row * 64 + 48], reference(case)[:, row])
    untouched = np.ones(out.shape[1], bool)
    for row in range(20):
        untouched[5 + row * 64 : 5 + row * 64 + 48] = False
    assert (out.view(np.uint32)[:, untouched] == 0xA5A5A5A5).all()


@pytest.mark.parametrize("build", [gemm.build, wgmma.build], ids=["mma", "wgmma"])
def test_gates(build):
    """What a gate joins is what the epilogue goes on with, in each format and with segments and scales of rows."""
    codes = Epilogue((Step("add", operand=0), Step("quantize", value=8)), (Operand("channel"),))
    problems = [
        (2, linear((70,), 64, 128, bits=4, classes=2, groups=2, epilogue=codes, gate=Gate("relu"))),
        (1, linear((130,), 64, 256, has_offset=True, gate=Gate("neg", first=True))),
        (2, linear((5,), 96, 64, segments=(64, 32), bits=3, gate=Gate("relu"))),
        (2, linear((5,), 128, 128, dynamic=True, bits=2, gate=Gate("relu", first=True))),
        (1, with_widths(linear((9,), 60, 64, gate=Gate("relu")), 2, 3, 4)),
    ]
    for case, (out,) in run([(b, p) for b, p in problems if build is gemm.build or len(p.segments) == 1], build):
        gate = case.problem.gate
        kept, through = np.split(reference(case), 2, -1)[:: -1 if gate.first else 1]
        expected = kept * (-through if gate.op == "neg" else np.where(through > 0, through, np.float32(0)))
        if case.problem.epilogue is not None:
            d = case.data
            expected = quantize(expected + d["operand0"], d["qscale"], d["qzero"], d["group"], 8)
        np.testing.assert_array_equal(out, expected, str(case.problem))


@pytest.mark.parametrize("build", [gemm.build, wgmma.build], ids=["mma", "wgmma"])
def test_siblings(build):
    """Products in one launch have the bits that each has by itself, in each format, and with epilogues of their own."""
    scaled = Epilogue((Step("mul", value=0.5),), rounded=True)
    problems = [
        (2, linear((10,), 96, 192, bits=4, classes=2, groups=2, has_offset=True, siblings=(None, scaled))),
        (1, linear((130,), 64, 256, has_bias=False, epilogue=scaled, siblings=(Epilogue((Step("relu"),)),))),
        (2, linear((1,), 2048, 128, dynamic=True, has_offset=True, siblings=(None,))),  # blocks share the k axis
        (1, linear((5,), 1600, 128, bits=4, integers=True, siblings=(None,))),
        (2, linear((5,), 96, 192, segments=(64, 32), bits=3, siblings=(None, None))),
        (1, linear((5,), 128, 128, segments=(32,) * 4, dynamic=True, bits=2, siblings=(None,))),
        (1, replace(with_widths(linear((9,), 60, 64), 2, 3, 4), outputs=128, siblings=(None,))),
        (2, QuantMatmul(6, 5, 64, 512, (3, 3), padding=(1, 1, 1, 1), groups=2, siblings=(None,) * 7)),
    ]
    for case, outputs in run(problems, build):
        alone = of_products(case)
        assert len(outputs) == len(alone) > 1
        for epilogue, product, out in zip(case.problem.epilogues, alone, outputs, strict=True):
            expected = reference(product)
            for step in epilogue.steps:
                expected = expected * np.float32(0.5) if step.op == "mul" else np.maximum(expected, np.float32(0))
            expected = bfloat16(expected) if epilogue.rounded else expected.view(np.uint32)
            np.testing.assert_array_equal(out.view(expected.dtype), expected, str(case.problem))


def test_siblings_are_whole_blocks_without_operands():
    with pytest.raises(ValueError, match="96 outputs are no 64 of each of 2 products"):
        linear((5,), 64, 96, siblings=(None,))
    with pytest.raises(ValueError, match="epilogues without operands"):
        linear((5,), 64, 128, siblings=(Epilogue((Step("quantize", value=8),)),))


def test_a_gate_joins_whole_blocks():
    with pytest.raises(ValueError, match="96 outputs are no pairs of 32"):
        linear((5,), 64, 96, gate=Gate("gelu"))


@pytest.mark.parametrize(
    ("mistake", "says"),
    [
        ("T.evaluate(T.ptx.wgmma.wait_group.sync.aligned(0))", "C7517"),
        ("T.evaluate(T.ptx.wgmma.fence.sync.aligned())", "C7519"),
    ],
)
def test_what_the_assembler_mends_is_said(mistake, says):
    """Products that are not waited for, or have no fence before them: its code is right, and slow."""
    problem, target = linear((256,), 640, 640), targets.resolve("cuda-sm90")
    _, device = machine_code.compiled({"k": mutated(wgmma, mistake, "pass").build(problem, "k")}, target)
    with pytest.warns(UserWarning, match=f"NVIDIA's assembler complains of a kernel: .*{says}"):
        machine_code.fatbin(device.source, target.levels)


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("segments", [(32, 32), (96, 96), (32, 64), (64, 32), (34, 2), (96, 32, 32)], ids=str)
def test_segments_end_anywhere_in_a_step(segments, kernel):
    """Products of `wgmma` are never one behind the other, whichever half of a step segments end in."""
    target = targets.resolve("cuda-sm90")
    problem = QuantMatmul(6, 5, sum(segments), 48, (kernel, kernel), segments=segments)
    _, device = machine_code.compiled({"k": wgmma.build(problem, "k")}, target)
    machine_code.fatbin(device.source, target.levels)  # its assembler's complaints are errors here


@pytest.mark.parametrize("level", [100, 110, 120, 121])
def test_machine_code_of_later_gpus(level, tmp_path):
    """The instructions of sm_80 are theirs as well; no register is spilled."""
    problems = {"k8": linear((256,), 640, 640), "k4": linear((256,), 640, 640, bits=4, integers=True)}
    functions = {name: gemm.build(problem, name) for name, problem in problems.items()}
    _, listed = disassembled(functions, targets.resolve(f"cuda-sm{level}"), tmp_path)
    assert f"sm_{level}" in listed
    assert listed.count(" IMMA.16832.U8.S8") >= len(problems) * 64, sorted(set(re.findall(r"I?MMA[\w.]*", listed)))
