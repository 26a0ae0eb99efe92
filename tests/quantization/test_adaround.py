"""Learned rounding on every kind of table: one of two levels, never worse than the nearest, no single change better."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.quantization import adaround as quantization_adaround
from mpq_compiler.quantization.adaround import adaround
from mpq_compiler.quantization.fitting import Rounding
from tests.quantization.test_gptq import errors, gram, nearest, weight

FORMATS = ("int2", "int3", "int2+b", "int4", "km3t", "fp4", "fp4t", "nf4g8", "int8")


def levels(start: QuantizedWeight) -> Tensor:
    """f32 [O, K, levels], ascending."""
    if start.lut is None:
        every = [torch.full_like(start.codes, c) for c in range(-127, 128)]
    else:
        every = [torch.full_like(start.codes, c) for c in range(start.lut.shape[1])]
    return torch.stack([dataclasses.replace(start, codes=c).dequantize() for c in every], -1).sort(-1).values


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.invariant("fpq-8", "qdiffusion-8")
def test_no_row_is_worse_and_all_together_are_better(name):
    for seed in range(2):
        w, g = weight(seed=seed), gram(seed=seed + 10)
        start = nearest(name, w, g)
        before, after = errors(w, g, start, adaround(w, start, g, steps=150))
        assert (after <= before).all()
        assert after.sum() < 0.9 * before.sum()


@pytest.mark.parametrize("name, least", [("fp4", 0.985), ("int4", 0.99)])
@pytest.mark.invariant("qdiffusion-7")
def test_roundings_are_decided_when_learning_has_converged(name, least, monkeypatch):
    """Before the descent by single weights, which goes through those that are still between their two levels."""
    seen, pull = [], quantization_adaround._pull

    def watched(h, progress):
        seen[:] = [h.clone()]
        return pull(h, progress)

    monkeypatch.setattr(quantization_adaround, "_pull", watched)
    w, g = weight(), gram()
    adaround(w, nearest(name, w, g), g, steps=3000)
    assert float((2 * seen[0] - 1).abs().mean()) > least


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.invariant("fpq-8", "qdiffusion-6")
def test_each_weight_is_at_the_level_below_or_above_it(name):
    w, g = weight(), gram()
    start = nearest(name, w, g)
    found, table = adaround(w, start, g, steps=150), levels(start)
    inside = w.clamp(table[..., 0], table[..., -1])
    below = torch.where(table <= inside[..., None] + 1e-6, table, -torch.inf).amax(-1)
    above = torch.where(table >= inside[..., None] - 1e-6, table, torch.inf).amin(-1)
    value = found.dequantize()
    assert torch.isclose(value, below, atol=1e-6).logical_or(torch.isclose(value, above, atol=1e-6)).all()
    assert dataclasses.replace(found, codes=start.codes) == start and found.codes.dtype == start.codes.dtype
    changed = found.codes != start.codes
    assert 0.02 < changed.float().mean() < 0.6


@pytest.mark.parametrize("name", ["fp4", "int4"])
def test_no_single_weight_would_be_better_at_its_other_level(name):
    w, g = weight(6, 24), gram(24)
    start = nearest(name, w, g)
    found = adaround(w, start, g, steps=150)
    error, value, table = errors(w, g, found)[0], found.dequantize(), levels(start)
    for k in range(24):
        for pick in (-1, 1):
            other = value.clone()
            place = (table[:, k] - value[:, k, None]).abs().argmin(-1)
            other[:, k] = table[:, k].gather(-1, (place + pick).clamp(0, table.shape[-1] - 1)[:, None])[:, 0]
            neighbour = (other[:, k] - w[:, k]).sign() != (value[:, k] - w[:, k]).sign()
            assert (output_error(other - w, g) >= error * (1 - 1e-4))[neighbour].all()


@pytest.mark.parametrize("name", FORMATS)
def test_uncorrelated_inputs_leave_the_nearest_codes(name):
    w = weight()
    g = torch.diag(torch.linspace(0.1, 3, 40))
    start = nearest(name, w, g)
    assert torch.equal(adaround(w, start, g, steps=100).dequantize(), start.dequantize())


def test_two_runs_are_equal_and_rows_are_alone():
    w, g = weight(), gram()
    start = nearest("fp4", w, g)
    first = adaround(w, start, g, steps=80)
    assert torch.equal(adaround(w, start, g, steps=80).codes, first.codes)
    upper = dataclasses.replace(start, codes=start.codes[:9], scale=start.scale[:9])
    assert (adaround(w[:9], upper, g, steps=80).codes != first.codes[:9]).float().mean() < 0.01


def test_inputs_that_are_always_zero_rows_without_error_and_no_inputs_at_all():
    w, g = weight(columns=160), gram(160, samples=20)
    g[5], g[:, 5] = 0, 0
    w[3] = 0
    start = nearest("int4", w, g)
    found = adaround(w, start, g, steps=60)
    before, after = errors(w, g, start, found)
    assert torch.isfinite(found.dequantize()).all() and (after <= before).all() and after.sum() < before.sum()
    assert torch.equal(adaround(w, start, torch.zeros(160, 160), steps=20).codes, start.codes)


def test_a_base_leaves_its_branch_alone_and_what_has_no_table_keeps_its_codes():
    w, g = weight(), gram()
    fit = formats.get("int3+r2").fit(w, g)
    rounded = Rounding.LEARNED(fit, w, g)
    assert torch.equal(rounded.up, fit.up) and torch.equal(rounded.down, fit.down)
    assert output_error(rounded.dequantize() - w, g).sum() < output_error(fit.dequantize() - w, g).sum()
    branched = formats.get("int2+b").fit(w, g)
    merged = Rounding.LEARNED(branched, w, g)
    assert merged.signs is not None and int(merged.codes.max()) < 4
    for other, moments in ((formats.get("fp8").fit(w, g), g), (branched, g.diagonal()), (branched, None)):
        assert Rounding.LEARNED(other, w, moments) is other
