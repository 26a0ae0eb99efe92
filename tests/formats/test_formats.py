"""Weight and activation formats: levels, codes, bytes, stored types."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats import activation, contract
from mpq_compiler.formats.base import (
    F16_MAX,
    F16_TINY,
    QuantizedWeight,
    departures,
    output_error,
    stored_scale,
    stored_type,
)
from mpq_compiler.formats.contract import nearest_codes
from mpq_compiler.formats.packing import pack_codes, pack_rows, unpack_codes, unpack_rows
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.ir import ops
from mpq_compiler.support.errors import UserError

NAMES = [name for name, found in formats.FORMATS.items() if found.integer]
"""Those of the weight contract; FP8 is tested in test_floating.py."""
SPELLED = [*NAMES, "int4g8", "nf4g16", "int3+r4", "int2+b+r2", "km3t+r2"]


def weight(rows: int = 35, columns: int = 29, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.05)


def test_unknown_formats_name_the_nearest():
    with pytest.raises(UserError, match="unknown weight format 'int5'"):
        formats.get("int5")
    with pytest.raises(UserError, match=r"did you mean 'int2\+b'"):
        formats.get("int2+bb")


def table_of(name: str, w: torch.Tensor, start: bool = False) -> QuantizedWeight:
    """The fitted table of a format; of a low-rank one, that of its base."""
    found = formats.get(name)
    fit = found.start(w) if start else found.fit(w)
    return getattr(fit, "base", fit).merged()


@pytest.mark.parametrize("start", [False, True], ids=["fit", "start"])
@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.invariant("lsq-5")
def test_stored_types(name, start):
    found = formats.get(name)
    fit, bits, groups = table_of(name, weight(), start), found.index_bits, len(found.segments(29))
    assert fit.scale.dtype == torch.float16 and fit.scale.shape == (35, groups) and (fit.scale > 0).all()
    assert (fit.segments is not None) == (groups > 1) and (groups == 1 or sum(fit.segments) == 29)
    assert (fit.offset is not None) == found.has_offset
    if start and isinstance(getattr(found, "base", found), ResidualFormat):
        bits -= 1  # from the base alone
    if fit.offset is not None:
        assert fit.offset.dtype == torch.float16 and fit.offset.shape == (35,)
    if bits == 8:
        assert fit.lut is None and fit.codes.dtype == torch.int8 and int(fit.codes.min()) >= -contract.LUT_MAX
    else:
        assert fit.lut.dtype == torch.int8 and fit.lut.shape == (found.classes(35), 2**bits)
        assert int(fit.lut[fit.lut != contract.NO_LEVEL].min()) >= -contract.LUT_MAX
        assert (fit.row_class is not None) == (len(fit.lut) > 1)
        assert fit.codes.dtype == torch.uint8 and int(fit.codes.max()) < 2**bits


@pytest.mark.parametrize("name", [*NAMES, "int4g8", "nf4g16"])
def test_codes_are_those_of_the_nearest_levels(name):
    w = weight()
    fit = table_of(name, w)
    table = torch.arange(-127, 128).float()[None] if fit.lut is None else fit.lut.float()
    table = table.masked_fill(table == contract.NO_LEVEL, torch.inf)
    if fit.row_class is not None:
        table = table[contract.row_classes(fit.row_class, len(w))]
    columns = [j for j, size in enumerate(fit.segments or w.shape[1:]) for _ in range(size)]
    offset = 0 if fit.offset is None else fit.offset.float()[:, None, None]
    levels = fit.scale.float()[:, columns, None] * table[:, None, :] + offset
    nearest = (w[:, :, None] - levels).abs().amin(-1)
    assert torch.allclose((w - fit.dequantize()).abs(), nearest, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", SPELLED)
def test_the_fit_is_better_than_the_start_on_what_it_minimizes(name):
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(300, 29, generator=generator) * torch.linspace(0.1, 3, 29)
    x = x + torch.randn(300, 1, generator=generator)
    w, gram = weight(), x.T @ x / 300
    for moments in (None, gram.diagonal(), gram):
        found, start = formats.get(name).fit(w, moments), formats.get(name).start(w)
        error, least = (float(output_error(q.dequantize() - w, moments).sum()) for q in (found, start))
        assert error < least * (1 if formats.get(name).bits < 8 else 1 + 1e-6)


@pytest.mark.parametrize("name", SPELLED)
def test_the_weight_of_a_convolution_is_fitted_as_its_rows(name):
    w = weight(20, 36)
    rows, image = formats.get(name).fit(w), formats.get(name).fit(w.reshape(20, 3, 3, 4))
    assert image.codes.shape == (20, 36)
    if formats.get(name).segments(36) == (36,):
        assert torch.equal(rows.dequantize(), image.dequantize())


@pytest.mark.parametrize("name", SPELLED)
def test_a_fit_in_parts_is_the_same(name, monkeypatch):
    """A large weight is fitted some rows at a time: codes and what they refer to are those of all rows at once."""
    torch.manual_seed(7)
    weight, gram = torch.randn(48, 96) * torch.rand(48, 1), torch.rand(96) + 0.1
    whole = formats.get(name).fit(weight, gram)
    monkeypatch.setattr(contract, "TOGETHER", 5 * 96)
    parts = formats.get(name).fit(weight, gram)
    assert torch.equal(parts.codes, whole.codes)
    assert torch.equal(parts.dequantize(), whole.dequantize())
    for fit in (whole, parts):
        assert torch.equal(torch.cat([*departures(fit, weight)]), whole.dequantize() - weight)


def test_ties_go_to_the_lower_level():
    table = torch.tensor([[-2, -1, 0, 1]], dtype=torch.int8)
    w = torch.tensor([[-1.5, -0.5, 0.5, 7.0, -7.0]])
    assert nearest_codes(w, torch.ones(1, 1), None, table, None).tolist() == [[0, 1, 2, 3, 0]]
    assert nearest_codes(w, torch.ones(1, 1), None, None, None).tolist() == [[-2, 0, 0, 7, -7]]


@pytest.mark.parametrize("entries", (2, 5, 16, 127))
def test_codes_are_those_that_a_search_of_the_middles_finds(entries):
    """At every middle, next to it on both sides, beyond all levels, and at numbers that double to infinity."""
    generator = torch.Generator().manual_seed(entries)
    far = torch.tensor([3e38, torch.inf, 1e-40, 0.0, 127.5])
    for _ in range(20):
        table = torch.randint(-127, 128, (1, entries), generator=generator).to(torch.int8)
        (levels,), (order,) = contract.rising(table)
        middles = (levels[1:] + levels[:-1]) / 2
        beside = [torch.nextafter(middles, torch.tensor(side)) for side in (1e9, -1e9)]
        values = torch.cat([middles, *beside, far, -far, torch.randn(500, generator=generator) * 60])
        found = nearest_codes(values[:, None], torch.ones(len(values), 1), None, table, None)[:, 0]
        assert torch.equal(found.long(), order[torch.bucketize(values, middles)])


def test_row_classes_choose_the_table():
    tables = torch.tensor([[-2, -1, 0, 1], [-100, -3, 3, 100]], dtype=torch.int8)
    classes = torch.tensor([1, 0, 1], dtype=torch.uint8)
    w = weight(35, 7) * 4
    codes = nearest_codes(w, torch.ones(35, 1), None, tables, classes)
    value = contract.entries(codes, tables, classes)
    for row in range(35):
        table = tables[classes[row // 16].long()].float()
        assert torch.allclose((w[row] - value[row]).abs(), (w[row, :, None] - table).abs().amin(-1))


@pytest.mark.parametrize("name", SPELLED)
@pytest.mark.parametrize("shape", [(1, 1), (3, 27), (16, 63), (65, 100), (20, 3, 3, 10)])
@pytest.mark.invariant("qua2sedimo-1")
def test_bytes_are_those_of_the_packed_form(name, shape):
    fmt = formats.get(name)
    found = fmt.fit(weight(shape[0], math.prod(shape[1:])).reshape(shape))
    fit = getattr(found, "base", found).merged()
    codes, classes = fit.codes.numpy(), fit.row_class
    if fmt.index_bits != fmt.bits:  # of rows of several widths
        packed, least = pack_rows(codes, classes.numpy(), fmt.bits - 1), fmt.bits - 1
        again = unpack_rows(packed, codes.shape, classes.numpy(), least)
        classes = torch.from_numpy(pack_codes(classes.numpy(), 2))
    else:
        packed = pack_codes(codes, fmt.bits)
        again = unpack_codes(packed, codes.shape, fmt.bits)
    factors = (getattr(found, "up", None), getattr(found, "down", None))
    parts = (fit.scale, fit.offset, fit.lut, classes, *factors)
    assert packed.nbytes + sum(t.nbytes for t in parts if t is not None) == fmt.stored_bytes(*shape)
    np.testing.assert_array_equal(again, codes)


def test_three_bit_codes_take_three_bits():
    for rows, columns in ((1, 1), (7, 9), (48, 432)):
        plain = formats.get("int3").stored_bytes(rows, columns)
        assert plain == -(-3 * rows * columns // 8) + 4 * rows + 8


@pytest.mark.parametrize("names", [("int2", "int3", "int4", "int8"), ("int2", "int2+b", "int3+b"), ("int3", "int3+b")])
def test_more_bits_are_nearer(names):
    w = weight(64, 288)
    errors = [float((formats.get(n).fit(w).dequantize() - w).square().sum()) for n in names]
    assert errors == sorted(errors, reverse=True)


def test_least_output_error_is_not_least_weight_error():
    """With moments the fit minimizes e^T G e, and does better there than the fit without."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(500, 29, generator=generator) * torch.linspace(0.1, 3, 29)
    w, gram = weight(), x.T @ x / 500
    for name in ("int2", "int3"):
        plain, by_output = (formats.get(name).fit(w, g).dequantize() - w for g in (None, gram))
        assert float(((by_output @ gram) * by_output).sum()) < float(((plain @ gram) * plain).sum())


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("factor", [1e-12, 1e-6, 1e4])
def test_tiny_and_large_weights(name, factor):
    fit = formats.get(name).fit(weight() * factor).merged()
    assert torch.isfinite(fit.dequantize()).all()
    assert float(fit.scale.min()) >= F16_TINY and float(fit.scale.max()) <= F16_MAX


def test_stored_scalars():
    assert stored_scale(torch.tensor([0.0, 1e-12, 1e9])).tolist() == [F16_TINY, F16_TINY, F16_MAX]
    assert stored_type(torch.tensor([1.0, 7e4])).dtype == torch.float32
    assert stored_type(torch.tensor([1.0, 6e4])).dtype == torch.float16


# --- activations --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.parametrize("low, high", [(-1.0, 3.0), (0.5, 2.0), (-4.0, -1.0), (0.0, 0.0), (-1e-9, 1e-9), (-3e4, 6e4)])
@pytest.mark.invariant("qdiffusion-10")
def test_zero_is_a_code_and_both_ends_are_reached(bits, low, high):
    scale, zero = activation.parameters(torch.tensor(low), torch.tensor(high), bits)
    assert scale.dtype == torch.float16 and zero.dtype == torch.uint8 and 0 <= int(zero) < 2**bits
    x = torch.tensor([[low, 0.0, high]])
    group = torch.zeros(1, dtype=torch.long)
    y = ops.fake_quantize(x, scale[None], zero[None], group, bits)
    assert float(y[0, 1]) == 0.0
    assert float((x - y).abs().max()) <= 1.01 * float(scale)


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_the_fit_is_never_worse_than_the_whole_range(bits):
    generator = torch.Generator().manual_seed(bits)
    for spread in (1.0, 5.0):
        values = torch.randn(4000, generator=generator) ** 3 * spread
        low, high = values.min(), values.max()
        _, _, least = activation.fit(values, low, high, bits)
        whole = activation.error(values, *activation.parameters(low, high, bits), bits)
        assert float(least) <= float(whole)
        assert float(activation.least_error(values, low, high, bits)) >= float(least) * (1 - 1e-6)
    assert bits > 4 or float(least) < float(whole)  # with heavy tails and few levels a clipped range is better


@pytest.mark.parametrize("shape", [(600,), (3, 200)])
def test_the_search_of_ranges_takes_one_after_the_other(shape, monkeypatch):
    """Both ends, then each; the first of the least errors, however many candidates are computed at once."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(3)).exp() - 0.5
    low, high = ends = values.amin(-1), values.amax(-1)
    scale, zero = activation.parameters(low, high, 4)
    least = activation.error(values, scale, zero, 4)
    for both in ((True, True), (True, False), (False, True)):
        start = ends
        for shrink in activation.SHRINK[1:]:
            lo, hi = (end * shrink if shrunken else end for end, shrunken in zip(start, both, strict=True))
            s, z = activation.parameters(lo, hi, 4)
            better = (e := activation.error(values, s, z, 4)) < least
            new, old = (s, z, e, lo, hi), (scale, zero, least, *ends)
            scale, zero, least, *ends = (torch.where(better, n, o) for n, o in zip(new, old, strict=True))
    for at_once in (1, 1 << 16):
        monkeypatch.setattr(activation, "AT_ONCE", at_once)
        found = activation.fit(values, low, high, 4)
        assert all(torch.equal(f, e) for f, e in zip(found, (scale, zero, least), strict=True))


@pytest.mark.parametrize("bits", [6, 8])
def test_the_error_is_that_of_the_quantizer(bits):
    """Below 8 bits what is missing along the values themselves counts more."""
    values = torch.randn(1, 300, generator=torch.Generator().manual_seed(0))
    scale, zero = activation.parameters(values.min(), values.max() / 2, bits)
    y = ops.fake_quantize(values, scale[None], zero[None], torch.zeros(1).long(), bits)
    squared, missing = float((values - y).square().sum()), 1 - float((values * y).sum() / values.square().sum())
    coherent = activation.COHERENT * missing**2 * float(values.square().sum()) if bits < 8 else 0
    assert missing > 0.01 and float(activation.error(values[0], scale, zero, bits)) == pytest.approx(
        squared + coherent, rel=1e-3
    )


def test_ranges_leave_a_tensor_as_loud_as_it_was(monkeypatch):
    """Those of least squared error alone take half as much again off it, in 4 bits."""
    values = torch.randn(20000, generator=torch.Generator().manual_seed(1))

    def missing() -> float:
        scale, zero, _ = activation.fit(values, values.min(), values.max(), 4)
        y = ops.fake_quantize(values[None], scale[None], zero[None], torch.zeros(1).long(), 4)
        return 1 - float((values * y).sum() / values.square().sum())

    loud = missing()
    monkeypatch.setattr(activation, "COHERENT", 0.0)
    assert 0 < 1.5 * loud < missing()
