"""Integer kernels of the targets with matrix engines, bit for bit against the definition.

Tiles of AMX are functions of C and, where the CPU has them, its own; those of SME are qemu's.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest

from mpq_compiler.backends.tvm.compile import peak
from mpq_compiler.backends.tvm.kernels.cpu import amx, sme
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import WeightLayout, tiles
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, Operand, Step
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from tests.harness import qemu
from tests.harness.emulated import TARGET, emulated
from tests.harness.integer_kernels import Kernels, assert_same_bits, needs
from tests.harness.shapes import FORMATS, make_case, reference, seed, with_format, with_widths

PADDED = {"kernel": (3, 3), "padding": (1, 1, 1, 1)}

LINEAR = [
    QuantMatmul.linear((32,), 64, 32),
    QuantMatmul.linear((16,), 128, 33, bits=4),
    QuantMatmul.linear((77,), 320, 80, bits=3, groups=3, has_offset=True),
    QuantMatmul.linear((5, 7), 112, 16, bits=2, classes=1),
    QuantMatmul.linear((600,), 640, 40, bits=4, classes=3, has_bias=False),
    QuantMatmul.linear((40,), 192, 48, segments=(64, 128), groups=2, has_offset=True),
    QuantMatmul.linear((40,), 120, 48, segments=(60, 60), bits=3),
    QuantMatmul.linear((1100,), 64, 72, groups=2, has_offset=True),
]
"""One and two tiles of rows, rows and outputs behind the last, several chunks; channels that are padded; segments."""

IMAGES = [
    QuantMatmul(8, 16, 64, 48, **PADDED),
    QuantMatmul(5, 32, 56, 24, **PADDED, groups=2, bits=4, has_offset=True),
    QuantMatmul(16, 32, 64, 32, (3, 3), (2, 2), (0, 1, 0, 1), bits=3),
    QuantMatmul(4, 4, 64, 48, **PADDED, bits=4, groups=3),
    QuantMatmul(8, 8, 128, 32, **PADDED, bits=2, segments=(64, 64)),
    QuantMatmul(7, 7, 60, 40, **PADDED, bits=4, has_offset=True),
    QuantMatmul(9, 14, 60, 40, (3, 3), (2, 2), (1, 1, 1, 1), bits=3, has_offset=True, groups=2),
    QuantMatmul(13, 14, 64, 24, (5, 3), (1, 2), (3, 0, 2, 3), has_offset=True),
    QuantMatmul(11, 10, 64, 24, stride=(2, 1)),
    QuantMatmul(61, 18, 192, 24, **PADDED, groups=2),
    QuantMatmul(37, 64, 128, 24, **PADDED, bits=4),
    QuantMatmul(20, 32, 1280, 16, **PADDED, groups=2, has_offset=True),
]
"""Tiles within lines and over several, samples of whole tiles and not, strides, taps that see nothing, bands."""

DYNAMIC = [
    QuantMatmul.linear((40,), 128, 48, dynamic=True),
    QuantMatmul.linear((33,), 64, 16, bits=4, dynamic=True, has_offset=True),
    QuantMatmul.linear((20,), 256, 33, bits=4, segments=(64,) * 4, dynamic=True),
]

GROUPED = [
    QuantMatmul.linear((40,), 320, 50, bits=4, segments=(64,) * 5, groups=3),
    QuantMatmul.linear((16,), 312, 33, segments=(128, 128, 56), has_offset=True),
    QuantMatmul(6, 8, 256, 40, **PADDED, bits=3, segments=(64,) * 4, groups=2, classes=3),
]
"""K-groups, whose sums are scaled one by one."""

QUANTIZED = Epilogue((Step("add", 0), Step("silu"), Step("quantize", value=8)), (Operand("full"),))


SME = "aarch64-sme2"
EMULATED = f"{TARGET}-emulated"


@pytest.fixture(params=[EMULATED, TARGET, SME])
def isa(request) -> Iterator[Isa]:
    """Each ISA with a matrix engine, so that its kernels run here; AMX on silicon too, where the CPU has it."""
    if request.param == EMULATED:
        with emulated() as found:
            yield found
    else:
        yield needs(request.param)


def compared(isa: Isa, problems: list[QuantMatmul], batches: tuple[int, ...] = (2,)) -> None:
    cases = [(i, make_case(p, batch, seed("tiles", p, batch))) for i, p in enumerate(problems) for batch in batches]
    for (_, case), got in zip(cases, Kernels(isa, problems).run(cases), strict=True):
        assert_same_bits(got, reference(case), (case.batch, case.problem))


@pytest.mark.parametrize("problems", [LINEAR, IMAGES, DYNAMIC, GROUPED], ids=["linear", "images", "dynamic", "grouped"])
@pytest.mark.invariant("compiler-1")
def test_tiles_compute_what_is_defined(isa, problems):
    for problem in problems:
        grouped = len(problem.segments) > 2
        assert bool(WeightLayout(problem, isa).isa.depth) == (isa.name == TARGET or not grouped)
    compared(isa, problems, (1, 3))


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.invariant("compiler-1")
def test_every_format(isa, name):
    problems = [QuantMatmul.linear((34,), 192, 40), QuantMatmul(6, 6, 64, 24, **PADDED)]
    compared(isa, [with_format(problem, name) for problem in problems])


def test_rows_of_several_widths(isa):
    compared(isa, [with_widths(QuantMatmul.linear((34,), 128, 40), 2, 3, 4)])


def test_every_micro_kernel(isa):
    problem = QuantMatmul.linear((64,), 128, 40, bits=4)
    found = tiles(problem, isa)
    assert found[0] == (2, 32) and {*found} == {(2, 32), (2, 16), (1, 32), (1, 16)}
    compared(isa, [replace(problem, tile=tile) for tile in found])


def test_an_epilogue_is_that_of_registers(isa):
    """What follows the sums is one source for both: here one kernel of each."""
    problem = QuantMatmul.linear((40,), 128, 48, bits=8, epilogue=QUANTIZED)
    case = make_case(problem, 2, seed("epilogue"))
    (got,) = Kernels(isa, [problem]).run([(0, case)])
    (wanted,) = Kernels(needs("x86-64-avx2"), [problem]).run([(0, case)])
    assert_same_bits(got, wanted)


FEW = [
    QuantMatmul.linear((), 640, 320),  # a row a sample
    QuantMatmul.linear((15,), 640, 320),
    QuantMatmul(16, 16, 320, 4, **PADDED),  # registers share lanes
]


@pytest.mark.parametrize(
    ("name", "others", "problem"),
    [
        *((TARGET, "x86-64-avx512vnni", problem) for problem in FEW),
        (TARGET, "x86-64-avx512vnni", QuantMatmul(16, 16, 36, 64, **PADDED)),  # 28 of 64 values would be padded
        *((SME, "aarch64-i8mm", problem) for problem in [*FEW, *GROUPED]),
        (SME, "aarch64-i8mm", QuantMatmul.linear((64,), 640, 20)),  # 12 of 32 channels would be padded
    ],
)
def test_registers_multiply_where_tiles_do_not_pay(name, others, problem):
    own, registers = WeightLayout(problem, ISAS[name]), WeightLayout(problem, ISAS[others])
    assert not own.isa.depth
    assert (own.tile, own.buffers()) == (registers.tile, registers.buffers())


@pytest.mark.parametrize(
    ("problem", "ring"),
    [
        (QuantMatmul(4, 4, 512, 512, **PADDED, bits=4), True),  # one tile of rows
        (QuantMatmul(8, 8, 256, 256, **PADDED, bits=2), True),  # two, and weights that no first cache holds
        (QuantMatmul.linear((64,), 640, 640, bits=4), False),
        (QuantMatmul(16, 16, 256, 256, **PADDED, bits=4), False),
        (QuantMatmul(4, 4, 512, 512, **PADDED), False),  # codes are used as they are
    ],
)
def test_few_rows_unpack_weights_between_their_products(problem, ring):
    assert bool(Schedule(problem, ISAS[TARGET]).ring) == ring
    assert not Schedule(problem, ISAS[SME]).ring


def test_no_other_target_has_tiles():
    problem = QuantMatmul.linear((64,), 640, 320)
    assert [name for name, isa in ISAS.items() if WeightLayout(problem, isa).isa.depth] == [TARGET, SME]


@pytest.mark.parametrize("name", [TARGET, SME])
def test_no_band_is_lower_than_a_tile(name):
    """Fewer rows than a tile has would have no kernel."""
    for height in range(1, 70):
        for width in (5, 8, 16, 20, 32):
            problem = QuantMatmul(height, width, 512, 64, **PADDED)
            if problem.rows >= 16:
                schedule = Schedule(problem, ISAS[name])
                assert schedule.least_rows >= schedule.tile.rows, problem


def test_the_peak_is_that_of_products(monkeypatch):
    """What is counted is what is emitted: 16 rows by 64 values by 16 channels for each product, by its emulation."""
    monkeypatch.setattr(peak, "ROUNDS", 3)
    with emulated() as isa:
        emit, seen = amx.emit, []
        monkeypatch.setattr(amx, "emit", lambda name, *operands: (seen.append(name), emit(name, *operands)))
        for parts in (1, 2):
            call, macs = peak.integer(isa, parts)
            call()
            assert macs == parts * 3 * 4 * 16 * 64 * 16
    assert seen.count("tdpbusd") == 2 * 4


OTHERS = """
import os, threading
from mpq_compiler.targets.table import TARGETS, require_runnable
from tests.harness.integer_kernels import ISAS, Kernels, assert_same_bits
from tests.harness.shapes import make_case, reference, seed
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

case = make_case(QuantMatmul.linear((32,), 64, 32), 1, seed("others"))
asked, right = threading.Event(), []

def run(wait=None):
    wait and asked.wait()
    assert_same_bits(kernels.run([(0, case)])[0], reference(case))
    right.append(True)

early = threading.Thread(target=run, args=(True,))
early.start()
require_runnable(TARGETS["x86-64-amx"])
kernels = Kernels(ISAS["x86-64-amx"], [case.problem])
asked.set()
early.join()
late = threading.Thread(target=run)
late.start()
late.join()
child = os.fork()
if not child:
    run()
    os._exit(7)
print(len(right), os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


def test_threads_and_children_have_the_permission_of_the_process():
    """A thread that was there before the system was asked, one that was not, and a child."""
    needs(TARGET)
    done = subprocess.run([sys.executable, "-c", OTHERS], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["2", "7"]


def test_a_faulty_instruction_is_noticed(monkeypatch):
    """The comparison is one that can fail: without its first step a sum is another."""
    with emulated() as isa:
        emit, seen = amx.emit, []

        def faulty(name, *operands):
            seen.append(name)
            if name != "tdpbusd" or seen.count(name) > 1:
                emit(name, *operands)

        monkeypatch.setattr(amx, "emit", faulty)
        problem = QuantMatmul.linear((32,), 64, 32)
        case = make_case(problem, 1, seed("fault"))
        (got,) = Kernels(isa, [problem]).run([(0, case)])
        assert {"ldtilecfg", "tilezero", "tileloadd64", "tdpbusd", "tilestored64", "tilerelease"} == {*seen}
        wrong = np.argwhere(got != reference(case))
        assert len(wrong) and wrong[:, -2].max() < 16 and wrong[:, -1].max() < 16  # one tile of sums


def test_a_faulty_outer_product_is_noticed(monkeypatch):
    """As above: without the products of the second tile its sums alone are others."""
    dot = sme.dot
    monkeypatch.setattr(sme, "dot", lambda t, left, right: t == 1 or dot(t, left, right))
    problem = QuantMatmul.linear((32,), 64, 32)
    case = make_case(problem, 1, seed("fault"))
    (got,) = Kernels(needs(SME), [problem]).run([(0, case)])
    wrong = np.argwhere(got != reference(case))
    assert len(wrong) and wrong[:, -2].max() < 16 and wrong[:, -1].min() >= 16


def test_a_thread_asks_for_longer_vectors(monkeypatch):
    """Linux starts threads with short ones, at which weights would lie wrong."""
    problem = QuantMatmul.linear((32,), 64, 32)
    case, isa = make_case(problem, 1, seed("length")), needs(SME)
    monkeypatch.setitem(qemu._CPUS, "+sme2", qemu.SHORT)
    (got,) = Kernels(isa, [problem]).run([(0, case)])
    assert_same_bits(got, reference(case))
    monkeypatch.setattr(sme, "require_length", lambda: None)
    (got,) = Kernels(isa, [problem]).run([(0, case)])
    assert (got != reference(case)).any()
