"""Low-rank branches: the best of their rank for the layer's output, and together with the base."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats import low_rank
from mpq_compiler.formats.base import output_error
from mpq_compiler.formats.low_rank import truncated


def weight(rows: int = 24, columns: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    outliers = torch.randn(rows, 2, generator=generator) @ torch.randn(2, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) + 3 * outliers


def gram(columns: int = 40, samples: int = 200) -> Tensor:
    x = torch.randn(samples, columns, generator=torch.Generator().manual_seed(1)) * torch.linspace(0.1, 3, columns)
    return x.T @ x / samples


MOMENTS = {"none": None, "diagonal": gram().diagonal(), "whole": gram(), "few samples": gram(samples=9)}


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.invariant("svdquant-2", "olri-1")
def test_no_branch_of_that_rank_is_better(moments, rank):
    """The error that is left is that of the singular values behind the rank, of R G^(1/2) (Eckart and Young 1936)."""
    w = weight()
    up, down = truncated(w, moments, rank)
    assert up.shape == (24, rank) and down.shape == (rank, 40) and up.dtype == down.dtype == torch.float16
    left = float(output_error(up.float() @ down.float() - w, moments).sum())
    whole = torch.eye(40) if moments is None else torch.diag(moments) if moments.dim() == 1 else moments
    values, vectors = torch.linalg.eigh(whole.double())
    root = vectors * values.clamp_min(0).sqrt()
    singular = torch.linalg.svdvals(w.double() @ root)
    assert left == pytest.approx(float(singular[rank:].square().sum()), rel=1e-2, abs=1e-4 * float(singular[0]) ** 2)


@pytest.mark.invariant("svdquant-1", "olri-5")
def test_a_full_rank_is_the_weight():
    w = weight(12, 20)
    for rank in (12, 100):
        up, down = truncated(w, gram(20), rank)
        assert up.shape[1] == 12
        assert float((up.float() @ down.float() - w).abs().max()) < 4e-3 * float(w.abs().max())


@pytest.mark.parametrize("base", ["int2", "int4", "int2+b", "km3t", "nf4g8", "int8"])
@pytest.mark.invariant("olri-1")
def test_base_and_branch_are_better_than_the_base_alone(base):
    w = weight()
    for moments in MOMENTS.values():
        alone = formats.get(base).fit(w, moments)
        both = formats.get(f"{base}+r3").fit(w, moments)
        error, least = (float(output_error(q.dequantize() - w, moments).sum()) for q in (both, alone))
        assert error < 0.8 * least


@pytest.mark.invariant("olri-1")
def test_more_rank_is_nearer_and_costs_its_factors():
    w, g = weight(), gram()
    errors = [float(output_error(formats.get(f"int3+r{r}").fit(w, g).dequantize() - w, g).sum()) for r in (1, 2, 6)]
    assert errors == sorted(errors, reverse=True)
    plain = formats.get("int3").stored_bytes(24, 5, 8)
    assert formats.get("int3+r2").stored_bytes(24, 5, 8) == plain + 2 * 2 * (24 + 40)
    assert formats.get("int3+r99").stored_bytes(24, 5, 8) == plain + 2 * 24 * (24 + 40)  # no rank beyond the rows


@pytest.mark.parametrize("moments", MOMENTS.values(), ids=MOMENTS)
@pytest.mark.invariant("svdquant-3")
def test_more_turns_never_end_worse(moments, monkeypatch):
    errors = []
    for rounds in range(1, 6):
        monkeypatch.setattr(low_rank, "ROUNDS", rounds)
        fit = formats.get("int2+r2").fit(weight(), moments)
        errors.append(float(output_error(fit.dequantize() - weight(), moments).sum()))
    assert errors == sorted(errors, reverse=True) and errors[-1] < errors[0]


@pytest.mark.invariant("olri-2")
def test_the_output_is_served_at_the_cost_of_the_weight():
    w, g = weight(), gram()
    errors = {}
    for name, moments in (("output", g), ("weight", None)):
        up, down = truncated(w, moments, 3)
        rest = up.float() @ down.float() - w
        errors[name] = [float(output_error(rest, of).sum()) for of in (g, None)]
    assert errors["output"][0] < errors["weight"][0] and errors["output"][1] > errors["weight"][1]


@pytest.mark.invariant("olri-4")
def test_factors_have_no_scale_of_their_own():
    fit = formats.get("int4+r3").fit(weight(), gram())
    other = dataclasses.replace(fit, up=2 * fit.up, down=fit.down / 2)
    assert torch.equal(other.branch, fit.branch)
    norms = [float(factor.float().square().mean().sqrt()) for factor in (fit.up, fit.down)]
    assert 0.5 < norms[0] / norms[1] < 2  # both use the range of halves alike


def test_the_same_weight_gives_the_same_branch():
    first, again = (formats.get("int3+r3").fit(weight(), gram()) for _ in range(2))
    assert torch.equal(first.up, again.up) and torch.equal(first.down, again.down)
    assert torch.equal(first.codes, again.codes)


def test_tiny_and_large_weights_fit_halves():
    for factor in (0.0, 1e-7, 1e4):
        fit = formats.get("int4+r2").fit(weight() * factor, gram())
        assert torch.isfinite(fit.dequantize()).all()
