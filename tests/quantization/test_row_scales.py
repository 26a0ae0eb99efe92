"""Scales of rows behind GPTQ: none leaves less of a row's output, of several the best is found, no byte is added."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight
from mpq_compiler.passes.round_weights import RoundWeights
from mpq_compiler.quantization import fitting
from mpq_compiler.quantization.fitting import Layer, Rounding, fit_formats, fit_rows
from mpq_compiler.support.errors import UserError

SEARCHED = ("int2", "int4", "int2+b", "km2", "km3t", "nf4")
LEFT = ("int8", "ec2", "int3g64", "fp8")


@pytest.fixture
def layer() -> tuple[torch.Tensor, torch.Tensor]:
    """A weight [O, K], and second moments of inputs that go together."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(400, 24, generator=generator) @ torch.randn(24, 128, generator=generator)
    x = x + 0.3 * torch.randn(400, 128, generator=generator)
    return torch.randn(40, 128, generator=generator), x.T @ x / 400


def errors(fit, rows, gram):
    wrong = (fit.dequantize() - rows).double()
    return ((wrong @ gram.double()) * wrong).sum(1)


def loudness(fit, rows, gram):
    """What is left of each row's output, in its own direction."""
    along = rows.double() @ gram.double()
    return (fit.dequantize().double() * along).sum(1) / (rows * along).sum(1)


@pytest.mark.parametrize("way", [Rounding.GPTQ_GAINS, Rounding.GPTQ_SCALES])
@pytest.mark.parametrize("name", SEARCHED)
def test_rows_are_as_loud_as_they_were(name, way, layer):
    """With codes of GPTQ by itself and with a branch's; nothing of a row without output is made louder."""
    rows, gram = layer
    rows[3] = 0
    least, fit = (fit_rows(rows, name, gram, of) for of in (Rounding.GPTQ, way))
    other = torch.arange(len(rows)) != 3
    assert (loudness(least, rows, gram)[other] - 1).abs().max() > 5e-3
    torch.testing.assert_close(loudness(fit, rows, gram)[other], torch.ones(39).double(), atol=2e-3, rtol=0)
    assert torch.isfinite(fit.dequantize()).all()


def test_a_row_that_codes_hardly_describe_is_made_little_louder(layer):
    rows, gram = layer
    fit = fit_rows(rows, "int2", gram, Rounding.GPTQ)
    found = fitting._as_loud(fit, 10 * rows, 10 * rows @ gram)
    torch.testing.assert_close(found.scale.float(), fitting.LOUDER * fit.scale.float(), rtol=1e-3, atol=0)


@pytest.mark.parametrize("name", SEARCHED)
@pytest.mark.invariant("compiler-9")
def test_no_row_is_worse_for_a_search_and_most_are_better(name, layer):
    rows, gram = layer
    plain, searched = (fit_rows(rows, name, gram, way) for way in (Rounding.GPTQ_GAINS, Rounding.GPTQ_SCALES))
    before, after = errors(plain, rows, gram), errors(searched, rows, gram)
    assert (after <= before * (1 + 1e-5)).all() and (after < 0.99 * before).float().mean() > 0.5
    assert isinstance(plain, QuantizedWeight) and isinstance(searched, QuantizedWeight)
    for part in ("codes", "scale", "offset", "lut", "signs", "alpha", "row_class"):
        a, b = getattr(plain, part), getattr(searched, part)
        assert (a is None) == (b is None) and (a is None or (a.shape, a.dtype) == (b.shape, b.dtype))
    assert (plain.codes != searched.codes).any(1).float().mean() > 0.5


@pytest.mark.parametrize("name", ["int2", "int2m", "int2m+b"])
def test_the_middle_of_the_levels_of_a_row_stays(name, layer):
    """That of the levels which its own table has."""
    rows, gram = layer
    rows[::3] = rows[::3] ** 3
    fit = fit_rows(rows, name, gram)
    scaled = fitting._scaled(fit, rows, 0.7)
    assert fit.row_class is None or len(fit.row_class.unique()) == 3

    def middles(one: QuantizedWeight) -> torch.Tensor:
        far = torch.full_like(rows, 1e6)
        extremes = (contract.quantize(far * sign, one.tables) for sign in (1, -1))
        ends = [contract.dequantize(codes, one.tables)[:, 0] for codes in extremes]
        return (ends[0] + ends[1]) / 2

    torch.testing.assert_close(middles(scaled), middles(fit), rtol=0, atol=5e-3)
    assert not torch.equal(scaled.offset, fit.offset)


@pytest.mark.parametrize("name", LEFT)
def test_formats_without_a_scale_for_each_row_stay(name, layer):
    rows, gram = layer
    plain, searched = (fit_rows(rows, name, gram, way) for way in (Rounding.GPTQ, Rounding.GPTQ_SCALES))
    assert torch.equal(plain.dequantize(), searched.dequantize())


def test_formats_together_are_each_by_itself(layer):
    rows, gram = layer
    found = fit_formats(rows, [*SEARCHED, *LEFT], gram, Rounding.GPTQ_SCALES)
    for name, fit in found.items():
        assert torch.equal(fit.dequantize(), fit_rows(rows, name, gram, Rounding.GPTQ_SCALES).dequantize())


def test_few_walks_at_a_time_choose_the_same(layer, monkeypatch):
    rows, gram = layer
    wanted = fit_rows(rows, "int3", gram, Rounding.GPTQ_SCALES)
    monkeypatch.setattr(fitting, "TOGETHER", rows.numel())
    assert torch.equal(fit_rows(rows, "int3", gram, Rounding.GPTQ_SCALES).dequantize(), wanted.dequantize())


def test_large_weights_are_not_searched_and_neither_are_rows_that_stand_for_theirs(layer, monkeypatch):
    rows, gram = layer
    whole, some = Layer(rows, gram, None), torch.arange(0, len(rows), 3)
    small = whole.fit("int2", Rounding.GPTQ_SCALES)
    monkeypatch.setattr(fitting, "SEARCHED", rows.numel() - 1)
    plain, searched = (whole.fit("int2", way) for way in (Rounding.GPTQ_GAINS, Rounding.GPTQ_SCALES))
    assert torch.equal(plain.dequantize(), searched.dequantize())
    assert not torch.equal(plain.dequantize(), small.dequantize())
    (picked,) = whole.fit_formats(["int2"], Rounding.GPTQ_SCALES, some).values()
    assert torch.equal(picked.dequantize(), plain.dequantize()[some])


def test_scales_are_those_of_gptq_in_order():
    assert RoundWeights(method="gptq", scales=True).requests().rounding == Rounding.GPTQ_SCALES
    for options in ({}, {"method": "learned"}, {"method": "gptq", "order": False}):
        with pytest.raises(UserError, match="add method=gptq"):
            RoundWeights(scales=True, **options)
