"""K-group scales: which columns share one, ragged groups, the search over groups that depend on each other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats import contract
from mpq_compiler.formats.base import output_error
from mpq_compiler.formats.fixed_table import TableFormat


def weight(rows: int = 12, columns: int = 70, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.linspace(0.1, 3, columns)


def gram(columns: int = 70) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(300, columns, generator=generator) + 0.7 * torch.randn(300, 1, generator=generator)
    return x.T @ x / 300


def test_the_last_group_may_be_shorter():
    found = formats.get("int4g64")
    assert found.segments(70) == (64, 6) and found.segments(64) == (64,) and found.segments(3) == (3,)
    fit = found.fit(weight())
    assert fit.scale.shape == (12, 2) and fit.segments == (64, 6)
    assert formats.get("int4g64").fit(weight(columns=64)).segments is None  # one group, as any other row


def test_a_group_is_the_same_channels_at_every_tap():
    """Channels 8 to 15 ten times as large: they alone get the larger scale, at all nine taps."""
    w = torch.randn(5, 3, 3, 16, generator=torch.Generator().manual_seed(0))
    w[..., 8:] *= 10
    fit = formats.get("int4g8").fit(w)
    assert fit.scale.shape == (5, 2) and (fit.scale[:, 1] > 5 * fit.scale[:, 0]).all()
    by_channel = fit.dequantize().reshape(5, 3, 3, 16) - w
    assert float(by_channel[..., :8].abs().max()) < float(by_channel[..., 8:].abs().max()) / 4


def test_columns_find_their_scale():
    scale = torch.tensor([[1.0, 2.0, 3.0]])
    assert contract.column_scale(scale, (2, 1, 2), 10)[0].tolist() == [1, 1, 2, 3, 3] * 2
    assert contract.column_scale(scale, None, 10).shape == (1, 1)


@pytest.mark.parametrize("base", ["int2", "int3", "int4", "fp4", "nf4"])
def test_smaller_groups_are_nearer(base):
    w = weight()
    errors = [
        float((formats.get(f"{base}g{size}").fit(w).dequantize() - w).square().sum()) for size in (70, 35, 10)
    ]  # fmt: skip
    assert errors == sorted(errors, reverse=True) and errors[2] < 0.8 * errors[0]


def test_groups_are_chosen_with_what_the_others_leave():
    """On correlated inputs the search over the whole row's output is better than each group by itself."""
    w, g = weight(), gram()
    for name in ("int2g8", "int3g8", "nf4g8"):
        found = formats.get(name)
        together = output_error(found.fit(w, g).dequantize() - w, g)
        alone = output_error(found.fit(w, g.diagonal()).dequantize() - w, g)
        assert (together <= output_error(found.start(w).dequantize() - w, g) * (1 + 1e-4)).all()
        assert together.sum() < 0.9 * alone.sum()


def test_one_group_is_a_row_of_the_plain_search():
    """With a single group nothing is left by others: every shrunken range is tried, the best is taken."""
    w, g = weight(), gram()
    found = formats.get("nf4")
    assert isinstance(found, TableFormat)
    best = output_error(found.fit(w, g).dequantize() - w, g)
    widest = w.abs().amax(1, keepdim=True) / 127
    for shrink in (1.0, 0.9, 0.7, 0.5):
        tried = found.quantize(w, (widest.half().float() * shrink).half(), (70,))
        assert (best <= output_error(tried.dequantize() - w, g) * (1 + 1e-4)).all()


def test_two_bits_spend_their_levels_on_both_signs():
    assert formats.TABLES["int2"] == (-3, -1, 1, 3)
    w = weight(columns=64)
    assert float((formats.get("int2g64").fit(w).dequantize() == 0).sum()) == 0
