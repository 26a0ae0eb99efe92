"""Learned tables: K-means in one dimension, per tensor and per tile of 16 rows."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats import codebook, contract
from mpq_compiler.formats.base import output_error
from mpq_compiler.formats.codebook import MOST_CLASSES, CodebookFormat, _kmeans
from mpq_compiler.quantization import fitting

CODEBOOKS = ("km3", "km4", "km3t", "km4t")


def weight(rows: int = 40, columns: int = 60, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) ** 3 * torch.rand(rows, 1, generator=generator).add(0.1)


def error(name: str, w: Tensor, gram: Tensor | None = None) -> float:
    return float(output_error(formats.get(name).fit(w, gram).dequantize() - w, gram).sum())


def test_k_means_ends_where_every_centre_is_the_mean_of_its_values():
    generator = torch.Generator().manual_seed(0)
    values, weights = torch.randn(3, 500, generator=generator), torch.rand(3, 500, generator=generator)
    centres = _kmeans(values, weights, 8)
    assert (centres.diff(dim=1) > 0).all()
    for x, w, c in zip(values, weights, centres, strict=True):
        member = (x[:, None] - c).abs().argmin(1)
        for k in range(8):
            mean = (w * x)[member == k].sum() / w[member == k].sum()
            assert abs(float(mean - c[k])) < 0.03


def test_k_means_is_near_the_best_partition():
    """Against dynamic programming over all partitions of the sorted values into intervals."""
    x = torch.randn(60, generator=torch.Generator().manual_seed(1)).double().sort().values
    best = torch.full((6, 61), torch.inf, dtype=torch.float64)
    best[0, 0] = 0
    spread = {(a, b): float(x[a:b].var(correction=0) * (b - a)) for a in range(60) for b in range(a + 1, 61)}
    for k in range(1, 6):
        for b in range(1, 61):
            best[k, b] = min(best[k - 1, a] + spread[a, b] for a in range(b))
    centres = _kmeans(x.float()[None], torch.ones(1, 60), 5)[0]
    found = (x[:, None] - centres).square().amin(1).sum()
    assert float(found) <= 1.1 * float(best[5, 60])


@pytest.mark.parametrize("name", CODEBOOKS)
@pytest.mark.invariant("qua2sedimo-2")
def test_as_many_levels_as_values_reproduce_the_weight(name):
    generator = torch.Generator().manual_seed(2)
    values = torch.tensor([-127.0, -61, -20, 0, 13, 40, 80, 127])
    scale = (torch.rand(40, 1, generator=generator) + 0.1).half().float()
    w = values[torch.randint(0, 8, (40, 60), generator=generator)] * scale
    assert float((formats.get(name).fit(w).dequantize() - w).abs().max()) <= 0.02 * float(w.abs().max())


@pytest.mark.invariant("qua2sedimo-2")
def test_more_levels_and_more_tables_are_nearer():
    w = weight(64, 200)
    assert error("km4", w) < 0.5 * error("km3", w)
    assert error("km3t", w) < error("km3", w) and error("km4t", w) < error("km4", w)
    assert error("km3", w) < 0.8 * error("int3", w)  # heavy tails: levels where the values are


@pytest.mark.invariant("qua2sedimo-1")
def test_one_table_costs_its_codes_and_a_scale_a_row():
    true_bits = 8 * formats.get("km4").stored_bytes(320, 1152) / (320 * 1152)
    assert true_bits == pytest.approx(4 + 16 / 1152 + 16 * 8 / (320 * 1152))


@pytest.mark.parametrize("name", ["km3", "km3t"])
def test_columns_that_carry_nothing_are_not_served(name):
    w, gram = weight(), torch.ones(60)
    gram[30:] = 0
    spoilt = torch.cat([w[:, :30], torch.rand(40, 30, generator=torch.Generator().manual_seed(5)) * 9], 1)
    assert error(name, spoilt, gram) <= 1.02 * error(name, w, gram)


@pytest.mark.invariant("qua2sedimo-2")
def test_a_table_and_a_class_for_every_sixteen_rows():
    w = weight(40)
    fit = formats.get("km3t").fit(w)
    assert fit.lut.shape == (3, 8) and fit.row_class.tolist() == [0, 1, 2]
    alone = formats.get("km3t").fit(w[16:32])
    assert alone.row_class is None  # one tile, one table
    assert alone.lut.shape == (1, 8)
    shared = formats.get("km3").fit(w)
    errors = [(f.dequantize() - w).square().reshape(-1, 60) for f in (fit, shared)]
    for tile in (slice(0, 16), slice(16, 32), slice(32, 40)):
        assert errors[0][tile].sum() <= errors[1][tile].sum()  # the table of all rows is one of the starts


def test_no_more_classes_than_a_byte_numbers():
    found = formats.get("km3t")
    assert isinstance(found, CodebookFormat)
    rows = 16 * 300 - 5
    fit = found.fit(weight(rows, 3))
    assert len(fit.lut) == found.classes(rows) == 150 <= MOST_CLASSES
    assert fit.row_class.dtype == torch.uint8 and int(fit.row_class.max()) == 149 and len(fit.row_class) == 300
    assert fit.row_class.tolist() == [t // 2 for t in range(300)]


@pytest.mark.parametrize("name", CODEBOOKS)
def test_the_same_weight_gives_the_same_table_at_any_power_of_two(name):
    w = weight()
    first, again, larger = (formats.get(name).fit(w * factor) for factor in (1, 1, 4))
    for part in ("codes", "lut", "scale"):
        assert torch.equal(getattr(first, part), getattr(again, part))
    assert torch.equal(larger.codes, first.codes) and torch.equal(larger.lut, first.lut)
    assert torch.equal(larger.scale.float(), 4 * first.scale.float())


@pytest.mark.parametrize("name", CODEBOOKS)
def test_rows_of_zeros_and_one_single_value(name):
    w = weight(20, 9)
    w[3], w[7:] = 0, 0.5
    fit = formats.get(name).fit(w)
    assert torch.isfinite(fit.dequantize()).all() and (fit.scale > 0).all()
    assert float(fit.dequantize()[3].abs().max()) < 1e-4
    assert int(fit.lut.to(torch.int16).abs().max()) <= contract.LUT_MAX


@pytest.mark.parametrize("name", ["km2", "km4", "km4t", "int2", "int4", "fp4", "fp8", "int2+b"])
def test_a_layer_that_always_reads_the_same(name):
    """About its mean nothing is left of its input but rounding, of either sign: the mean itself is served."""
    generator = torch.Generator().manual_seed(0)
    w, x = torch.randn(40, 24, generator=generator), torch.randn(24, generator=generator)
    rows = x.repeat(640, 1) * (1 + 1e-7 * torch.randn(640, 24, generator=generator))
    gram = fitting._about(rows.T @ rows / 640, rows.mean(0))
    found = formats.get(name).fit(w, gram).dequantize()
    bad = torch.full_like(gram, 1e-9).fill_diagonal_(-1e-7)  # as it was
    assert torch.isfinite(found).all() and torch.isfinite(formats.get(name).fit(w, bad).dequantize()).all()
    assert float(((found - w) @ x).square().mean()) < 0.2 * float((w @ x).square().mean())


def test_some_values_of_a_large_weight_stand_for_all(monkeypatch):
    w = torch.randn(96, 256, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.2, 2, 256)
    chosen = formats.get("km2")
    whole = chosen.fit(w)
    monkeypatch.setattr(codebook, "SAMPLED", 1009)
    some = chosen.fit(w)
    before, after = (float((fit.dequantize() - w).square().sum()) for fit in (whole, some))
    assert not torch.equal(whole.lut, some.lut) and after < 1.02 * before
