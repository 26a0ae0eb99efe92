"""Rows of several widths: which rows have more bits, bits on average, the stored stream, rounding within a width."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.formats.contract import nearest_codes
from mpq_compiler.formats.packing import pack_codes, pack_rows, packed_bytes, unpack_rows
from mpq_compiler.formats.row_classes import LOST, kurtosis
from mpq_compiler.formats.uniform import UniformFormat
from mpq_compiler.ir import costs, stored_tensors, verifier, views
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program, TensorStore
from mpq_compiler.quantization.adaround import adaround
from mpq_compiler.quantization.gptq import gptq
from mpq_compiler.training import student, variables
from tests.harness import programs

NAMES = ("int2m", "int3m", "int4m")
RESIDUALS = ("int2m+b", "int3m+b")
HEAVY = torch.tensor([0, 1, 2, 9, 17, 18, 40, 41, 42, 43, 44, 63, 70, 99])
"""Rows of `weight` with outliers."""


def weight(rows: int = 100, columns: int = 48, seed: int = 0) -> Tensor:
    """Rows nearly uniform, some with outliers."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.rand(100, columns, generator=generator) - 0.5
    w[HEAVY] = torch.randn(len(HEAVY), columns, generator=generator) ** 3
    return w[:rows]


def gram(columns: int = 48, samples: int = 200) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(samples, columns, generator=generator) * torch.linspace(0.2, 2, columns)
    x = x + torch.randn(samples, 1, generator=generator)
    return x.T @ x / samples


def widths(found: QuantizedWeight) -> Tensor:
    """The bits of each row."""
    assert found.lut is not None
    return torch.tensor(contract.class_bits(found.lut))[contract.row_classes(found.row_class, len(found.codes))]


def error(found: QuantizedWeight, w: Tensor, moments: Tensor | None) -> float:
    return float(output_error(found.dequantize() - w, moments).sum())


@pytest.mark.invariant("mpq-dm-5")
def test_kurtosis_is_that_of_pearson():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(3, 100_000, generator=generator)
    assert kurtosis(rows).sub(3).abs().max() < 0.1
    assert kurtosis(torch.rand(1, 100_000, generator=generator)).sub(1.8).abs() < 0.05
    torch.testing.assert_close(kurtosis(rows * 0.3 + 2), kurtosis(rows), rtol=1e-3, atol=0)
    assert kurtosis(torch.zeros(2, 9)).tolist() == [0, 0] and kurtosis(torch.ones(2, 1)).isfinite().all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.invariant("mpq-dm-6")
def test_outliers_get_a_bit_that_others_pay_for(name):
    """As many rows have a bit more as have one less, and the mean is exact."""
    w, n = weight(), formats.get(name).bits
    found = formats.get(name).fit(w)
    assert contract.class_bits(found.lut) == (n - 1, n, n + 1) and found.row_class is not None
    counts = [int(found.row_class.eq(c).sum()) for c in range(3)]
    assert counts[0] == counts[2] > 5 and widths(found).sum() == n * len(w)
    heavy = torch.zeros(len(w), dtype=torch.bool)
    heavy[HEAVY] = True
    assert heavy[found.row_class == 2].all() and not heavy[found.row_class == 0].any()


@pytest.mark.parametrize("name", NAMES + RESIDUALS)
@pytest.mark.parametrize("rows", [1, 2, 3, 16, 47, 100])
@pytest.mark.invariant("mpq-dm-6")
def test_the_mean_is_exact_for_any_number_of_rows(name, rows):
    for moments in (None, gram()):
        found = formats.get(name).fit(weight(rows), moments)
        assert found.row_class is not None and len(found.row_class) == rows
        assert widths(found).sum() == formats.get(name).bits * rows


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.invariant("mpq-dm-7")
def test_never_worse_than_rows_of_one_width(name):
    """A row with the bits of the name has the codes of the plain format, and no share of rows errs less."""
    plain = formats.get(name.removesuffix("m"))
    for w in (weight(), weight(64, seed=1), torch.randn(64, 48, generator=torch.Generator().manual_seed(2))):
        for moments in (None, gram().diagonal(), gram()):
            found, alone = formats.get(name).fit(w, moments), plain.fit(w, moments)
            assert error(found, w, moments) <= error(alone, w, moments)
            same = widths(found) == plain.bits
            assert torch.equal(found.codes[same], alone.codes[same])
            assert torch.equal(found.scale[same], alone.scale[same])
    w = weight()
    assert error(formats.get(name).fit(w), w, None) < 0.8 * error(plain.fit(w), w, None)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.invariant("mpq-dm-7")
def test_no_share_of_tenths_by_kurtosis_gains_more(name):
    """Which is how the paper chooses rows; what is lost counts `LOST` times."""
    w, n = weight(seed=3), formats.get(name).bits
    fits = [UniformFormat("", bits).fit(w, gram()) for bits in (n - 1, n, n + 1)]
    less, same, more = (output_error(f.dequantize() - w, gram()) for f in fits)

    def gain(more_rows: Tensor, less_rows: Tensor) -> float:
        return float((same - more)[more_rows].sum() - LOST * (less - same)[less_rows].sum())

    order = kurtosis(w).argsort(descending=True)
    counts = [share * len(w) // 10 for share in range(6)]
    tenths = [gain(order[:count], order[len(w) - count :]) for count in counts]
    found = formats.get(name).fit(w, gram())
    assert found.row_class is not None
    assert gain(found.row_class == 2, found.row_class == 0) >= max(tenths) * (1 - 1e-6)
    assert max(tenths) > 0


@pytest.mark.parametrize("name", NAMES + RESIDUALS)
@pytest.mark.parametrize("rounding", ["nearest", "gptq", "learned"])
@pytest.mark.invariant("mpq-dm-4", "mpq-dm-8")
def test_rows_have_the_codes_of_their_own_width(name, rounding):
    """What fills up a table is no level, however far a value is beyond the last one."""
    w, moments = weight(), gram()
    w[:, 5] *= 30
    found = formats.get(name).fit(w, moments)
    if rounding != "nearest":
        start = found
        found = gptq(w, start, moments) if rounding == "gptq" else adaround(w, start, moments, steps=60)
        assert (output_error(found.dequantize() - w, moments) <= output_error(start.dequantize() - w, moments)).all()
        assert (found.codes != start.codes).any()
    assert (found.codes.amax(1) < 2 ** widths(found)).all()
    assert all(len(row.unique()) <= 2**b for row, b in zip(found.dequantize(), widths(found).tolist(), strict=True))
    far = nearest_codes(w * 1e6, found.scale, found.offset, found.lut, found.row_class)
    assert (far.amax(1) == 2 ** widths(found) - 1).all() and (far.amin(1) == 0).all()


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.invariant("fz-rmq-1", "mpq-dm-7")
def test_residual_orders_never_err_more_than_a_base_in_all_rows(name):
    """Each row is no worse than uniform levels of its base; with a branch than without, as the trade of bits has it."""
    plain = formats.get(name.removesuffix("m+b"))
    for w in (weight(), weight(64, seed=1), torch.randn(64, 48, generator=torch.Generator().manual_seed(2))):
        for moments in (None, gram().diagonal(), gram()):
            found, alone = formats.get(name).fit(w, moments), plain.fit(w, moments)
            own, base = (output_error(fit.dequantize() - w, moments) for fit in (found, alone))
            at_least = widths(found) >= plain.bits
            assert (own[at_least] <= base[at_least] * (1 + 1e-5)).all() and own.sum() <= base.sum()
    w = weight()
    assert error(formats.get(name).fit(w), w, None) < 0.8 * error(plain.fit(w), w, None)


@pytest.mark.parametrize("name", RESIDUALS)
@pytest.mark.parametrize("start", [False, True])
@pytest.mark.invariant("fz-rmq-5", "fz-rmq-7")
def test_a_table_with_a_branch_is_the_base_beside_itself(name, start):
    """Levels of rows with a branch are those of the base and the same ones twice alpha above: two combs."""
    found = formats.get(name).start(weight()) if start else formats.get(name).fit(weight(), gram())
    bits = contract.class_bits(found.lut)
    assert bits == (formats.get(name).bits - 1, formats.get(name).bits, formats.get(name).bits + 1)
    less, base, both = (table[: 2**b].int() for table, b in zip(found.lut, bits, strict=True))
    assert len(base.diff().unique()) == len(less.diff().unique()) == 1 and torch.isin(less, base).all()
    twice_alpha = int(both.max() - base.max())
    assert twice_alpha > 0 and torch.equal(both, torch.cat([base, base + twice_alpha]).sort().values)
    assert start or (widths(found) == bits[2]).any()


@pytest.mark.parametrize("name", NAMES)
def test_training_ends_where_the_levels_of_a_row_end(name):
    w = weight()
    found = formats.get(name).fit(w)
    low, high = variables.ends(found.tables, len(w))
    half = 2.0 ** (widths(found) - 1)
    assert torch.equal(low[:, 0], -half - 0.5) and torch.equal(high[:, 0], half - 0.5)
    assert student._mean_step(found.lut) == 1
    assert found.offset is not None
    rows, scale, offset = (t.float().requires_grad_() for t in (w * 1.5, found.scale, found.offset))
    level = student._Levels.apply(rows, scale, offset, found.lut, found.row_class, None)
    torch.testing.assert_close(level.detach(), dataclasses.replace(found, codes=_codes(rows, found)).dequantize())
    gradients = torch.autograd.grad(level.square().sum(), (rows, scale, offset))
    assert all(g.isfinite().all() and (g != 0).any() for g in gradients)


def _codes(rows: Tensor, found: QuantizedWeight) -> Tensor:
    return nearest_codes(rows.detach(), found.scale, found.offset, found.lut, found.row_class)


# --- the stored stream ---------------------------------------------------------------------------------------


@given(
    bits=st.sampled_from((1, 2, 3)),
    rows=st.integers(1, 40),
    columns=st.integers(1, 37),
    seed=st.integers(0, 2**32 - 1),
)
def test_rows_take_their_own_bits(bits, rows, columns, seed):
    """Base bits as ever, then those that some rows have more, to the bit."""
    draw = np.random.default_rng(seed)
    classes = draw.integers(0, 3, rows).astype(np.uint8)
    codes = draw.integers(0, 2 ** (bits + classes)[:, None], (rows, columns)).astype(np.uint8)
    packed = pack_rows(codes, classes, bits)
    assert packed.size == packed_bytes(int((bits + classes.astype(int)).sum()) * columns, 1)
    np.testing.assert_array_equal(unpack_rows(packed, codes.shape, classes, bits), codes)
    base = pack_codes(codes & 2**bits - 1, bits)
    whole = bits * codes.size // 8
    assert np.array_equal(packed[:whole], base[:whole])
    stream = np.unpackbits(packed, bitorder="little")[bits * codes.size :]
    first = (codes[classes >= 1] >> bits & 1).reshape(-1)
    assert np.array_equal(stream[: first.size], first)
    second = (codes[classes == 2] >> bits + 1).reshape(-1)
    assert np.array_equal(stream[first.size :][: second.size], second) and not stream[first.size + second.size :].any()


def test_wrong_rows_are_refused():
    with pytest.raises(ValueError, match="take 2 bytes, not 3"):
        unpack_rows(np.zeros(3, np.uint8), (2, 5), np.array([0, 1], np.uint8), 1)
    with pytest.raises(ValueError, match="code 2 of row 1 does not fit 1 bits"):
        pack_rows(np.full((2, 2), 2, np.uint8), np.array([1, 0], np.uint8), 1)


# --- programs -------------------------------------------------------------------------------------------------

MODEL = "dit"


@pytest.fixture(scope="module", params=["int2m", "int3m", "int2m+b"])
def steps(request) -> tuple[programs.Step, ...]:
    return programs.steps(MODEL, f"{programs.FRONT},bit-allocation{{uniform={request.param}}},{programs.BACK}")


def after(steps: tuple[programs.Step, ...], name: str) -> Program:
    return next(s.after for s in steps if s.step.name() == name)


@pytest.mark.invariant("mpq-dm-8", "fz-rmq-9", "compiler-7")
def test_simulated_and_packed_programs_agree_and_every_byte_is_counted(steps):
    simulated, packed = after(steps, "round-weights"), after(steps, "fuse-epilogues")
    x = programs.inputs(MODEL, 2)
    assert torch.equal(run_exact(simulated, x), run(packed, x))
    stored = stored_tensors.stored(packed)
    assert sum(each.array.nbytes for each in stored.values()) == costs.stored_bytes(after(steps, "bit-allocation"))
    mixed = {name: each for name, each in stored.items() if each.row_class is not None}
    classes = [packed.tensors[each.row_class] for each in mixed.values()]
    assert len(mixed) == len(packed.weights) and sum(len(c.unique()) == 3 for c in classes) > 2
    arrays = {name: each.array for name, each in stored.items()}
    for name, each in stored.items():
        again = stored_tensors.restored(each.entry(name), arrays)
        assert torch.equal(again.to(packed.tensors[name].dtype), packed.tensors[name])


@pytest.mark.invariant("mpq-dm-4", "mpq-dm-8")
def test_training_keeps_codes_within_their_width(steps):
    """A latent weight far beyond every level has the last one of its own row."""
    program = after(steps, "round-weights")
    trained = student.variables(program, latent=True)
    thetas = {name: torch.zeros_like(v.start) for name, v in trained.items()}
    x = programs.inputs(MODEL, 2)
    with torch.no_grad():
        assert torch.equal(student.Student(program, student.values(program, trained, thetas)).run(x), run(program, x))
    for weight in variables.settled(program):
        thetas[weight.codes] = torch.full_like(thetas[weight.codes], 100.0)
    moved = student.applied(program, trained, thetas)
    verifier.verify(moved)
    for weight in variables.settled(moved):
        codes = moved.tensors[weight.codes]
        bits = torch.tensor(contract.class_bits(moved.tensors[weight.tables.lut]))
        bits = bits[contract.row_classes(moved.tensors[weight.tables.row_class], len(codes))]
        assert (codes == 2 ** bits[:, None] - 1).all()


@pytest.mark.parametrize(
    ("part", "rule"),
    [
        ("codes", "codes"),
        ("hole", "table-range"),
        ("three", "table-range"),
        ("gap", "row-classes"),
        ("end", "row-classes"),
    ],
)
def test_what_no_level_stands_for_is_rejected(steps, part, rule):
    packed = after(steps, "fuse-epilogues")
    found = views.levels_of(views.flatten(packed))
    wide = next(levels for levels in found if packed.tensors[levels.tables.row_class].eq(0).any())
    codes, lut = packed.tensors[wide.codes].clone(), packed.tensors[wide.tables.lut].clone()
    row = int(packed.tensors[wide.tables.row_class].eq(0).nonzero()[0])
    if part == "codes":
        codes[row, 0] = 2 ** contract.class_bits(lut)[0]
    elif part == "hole":
        lut[1, 1], lut[1, -1] = contract.NO_LEVEL, 3
    elif part == "three":
        lut[1, 3:] = contract.NO_LEVEL
    elif part == "gap":
        lut[2, -2:] = lut[2, -2:].flip(0)
    else:
        lut[0, 0] = -100
    spoiled = packed.fork(tensors=TensorStore({**packed.tensors, wide.codes: codes, wide.tables.lut: lut}))
    assert not verifier.check(packed)
    assert rule in {violation.rule for violation in verifier.check(spoiled)}
