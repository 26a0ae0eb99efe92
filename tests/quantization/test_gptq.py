"""GPTQ against a plain form of it, and what holds for any table: nearest on uncorrelated inputs, never worse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.quantization.gptq import gptq, gptq_of_formats, roots

FORMATS = ("int2", "int3", "int2+b", "int4", "km3t", "fp4", "nf4g8", "int8")


def weight(rows: int = 33, columns: int = 40, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)


def gram(columns: int = 40, samples: int = 300, seed: int = 1) -> Tensor:
    """Of inputs that have much in common, no two with one second moment."""
    generator = torch.Generator().manual_seed(seed)
    mixed = torch.randn(columns, columns, generator=generator) / columns**0.5
    x = torch.randn(samples, columns, generator=generator) @ mixed * torch.linspace(0.1, 2, columns)
    x = x + torch.randn(samples, 1, generator=generator)
    return x.T @ x / samples


def nearest(name: str, w: Tensor, g: Tensor | None) -> QuantizedWeight:
    return formats.get(name).fit(w, g).merged()


def errors(w: Tensor, g: Tensor, *found: QuantizedWeight) -> list[Tensor]:
    return [output_error(q.dequantize() - w, g) for q in found]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
def test_uncorrelated_inputs_leave_the_nearest_codes(name, order):
    w = weight()
    for g in (torch.eye(40), torch.diag(torch.linspace(0.1, 3, 40))):
        start = nearest(name, w, g)
        found = gptq(w, start, g, order)
        assert torch.equal(found.codes, start.codes) and found.codes.dtype == start.codes.dtype


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.invariant("compiler-9")
def test_no_row_is_worse_and_all_together_are_better(name, order):
    for seed in range(3):
        w, g = weight(seed=seed), gram(seed=seed + 10)
        start = nearest(name, w, g)
        before, after = errors(w, g, start, gptq(w, start, g, order))
        assert (after <= before).all()
        assert after.sum() < 0.95 * before.sum()


@pytest.mark.parametrize("name", FORMATS)
def test_scales_and_tables_stay_and_codes_are_those_of_the_table(name):
    w, g = weight(), gram()
    start = nearest(name, w, g)
    found = gptq(w, start, g)
    assert dataclasses.replace(found, codes=start.codes) == start
    assert int(found.codes.max()) < (128 if start.lut is None else start.lut.shape[1])
    assert int(found.codes.to(torch.int16).min()) >= (-127 if start.lut is None else 0)


def least_first(g: Tensor, damping: float = 0.01) -> list[int]:
    """The order of the least error: from the end, each is the input that those behind it leave least of unexplained."""
    hessian = g.double() + torch.eye(len(g)) * damping * g.double().diagonal().mean()
    order: list[int] = []
    while len(order) < len(g):
        rest = [column for column in range(len(g)) if column not in order]
        across = hessian[rest][:, order]
        explained = (across @ torch.linalg.inv(hessian[order][:, order]) * across).sum(1) if order else 0
        order.insert(0, rest[int((hessian.diagonal()[rest] - explained).argmin())])
    return order


def plain(w: Tensor, start: QuantizedWeight, g: Tensor, order: list[int], damping: float = 0.01) -> Tensor:
    """The levels that optimal brain quantization in a given order chooses, inverting what is left each time."""
    hessian = g.double() + torch.eye(len(g)) * damping * g.double().diagonal().mean()
    left, result, rest = w.double().clone(), torch.zeros_like(w), list(order)
    table = torch.arange(-127, 128) if start.lut is None else start.lut[0]
    for column in order:
        scale = start.scale.double()[:, :1]
        offset = 0.0 if start.offset is None else start.offset.double()[:, None]
        levels = scale * table.double() + offset
        level = levels.gather(1, (left[:, column, None] - levels).abs().argmin(1, keepdim=True))[:, 0]
        result[:, column] = level.float()
        inverse = torch.linalg.inv(hessian[rest][:, rest])[rest.index(column)]
        error = (left[:, column] - level) / inverse[rest.index(column)]
        left[:, rest] -= error[:, None] * inverse
        rest.remove(column)
    return result


@pytest.mark.parametrize("name", ["int3", "nf4", "int8"])
@pytest.mark.parametrize("ordered", [False, True])
def test_it_is_the_plain_algorithm(name, ordered):
    w, g = weight(12, 24), gram(24)
    start = nearest(name, w, g)
    order = least_first(g) if ordered else list(range(24))
    expected = plain(w, start, g, order)
    better = output_error(expected - w, g) < output_error(start.dequantize() - w, g)
    found = gptq(w, start, g, ordered).dequantize()
    assert better.sum() > 2
    assert torch.allclose(found[better], expected[better], atol=1e-6)
    assert torch.equal(found[~better], start.dequantize()[~better])


def test_in_its_own_order_the_inputs_may_stand_in_any():
    w, g = weight(), gram()
    order = torch.randperm(40, generator=torch.Generator().manual_seed(3))
    for name in ("int3", "nf4"):
        start = nearest(name, w, g)
        shuffled = dataclasses.replace(start, codes=start.codes[:, order])
        expected = gptq(w, start, g).codes[:, order]
        assert torch.equal(gptq(w[:, order], shuffled, g[order][:, order]).codes, expected)


def test_inputs_that_are_always_zero_and_fewer_samples_than_inputs():
    w, g = weight(columns=160), gram(160, samples=20)
    g[5], g[:, 5] = 0, 0
    start = nearest("int4", w, g)
    found = gptq(w, start, g)
    before, after = errors(w, g, start, found)
    assert torch.isfinite(found.dequantize()).all() and (after <= before).all() and after.sum() < before.sum()
    nothing = gptq(w, start, torch.zeros(160, 160))
    assert torch.equal(nothing.codes, start.codes)


def test_inputs_that_hardly_vary():
    """Moments about the mean of constant inputs are what rounding left of them: no gram, strictly."""
    w, constant = weight(), torch.linspace(-30, 30, 40)
    x = constant + torch.randn(64, 40, generator=torch.Generator().manual_seed(0)) * 1e-4
    mean = x.mean(0)
    left = x.T @ x / len(x) - torch.outer(mean, mean)
    assert torch.linalg.eigvalsh(left.double())[0] < -0.02 * left.diagonal().mean().abs()
    start = nearest("int4", w, None)
    before, after = errors(w, left, start, gptq(w, start, left))
    assert torch.isfinite(after).all() and (after <= before).all()


@pytest.mark.parametrize("name", ("int3", "int2+b", "int8"))
def test_blocks_are_layers_of_their_own(name):
    """Codes on second moments in blocks are those on the whole matrix that has zeros elsewhere."""
    w, blocks = weight(), torch.stack([gram(20, seed=seed) for seed in (1, 2)])
    blocks /= blocks.diagonal(dim1=1, dim2=2).mean(1)[:, None, None]  # alike damping
    start = nearest(name, w, None)
    parts, whole = gptq(w, start, blocks), gptq(w, start, torch.block_diag(*blocks))
    assert not torch.equal(parts.codes, start.codes)
    assert (parts.codes != whole.codes).float().mean() < 0.01
    before, after = errors(w, torch.block_diag(*blocks), start, parts)
    assert (after <= before).all()
    torch.testing.assert_close(output_error(parts.dequantize() - w, blocks), after)


@pytest.mark.parametrize("order", [False, True])
def test_formats_in_one_walk_have_the_codes_of_their_own(order):
    """Those without tables among them, and tables of other lengths."""
    w, g = weight(rows=17), gram()
    starts = [nearest(name, w, g) for name in ("int8", *FORMATS, "int8")]
    alone = [gptq(w, start, g, order) for start in starts]
    together = gptq_of_formats(w, starts, g, order)
    for one, other in zip(alone, together, strict=True):
        assert one.codes.dtype == other.codes.dtype
        apart = (one.codes != other.codes).float().mean()  # products of other sizes may differ in the last bit
        assert apart < 0.005
        before, after = errors(w, g, one, other)
        assert torch.allclose(before.sum(), after.sum(), rtol=1e-3)


@pytest.mark.parametrize("columns", [5, 130, 201])
def test_the_order_is_that_of_the_least_error(columns):
    g = gram(columns, samples=3 * columns)
    (own, root), (_, by_size) = (*roots(g, True, 0.01), *roots(g, False, 0.01))
    assert own.tolist() == least_first(g)
    descending = g.diagonal().argsort(descending=True)
    ((_, other),) = roots(g[descending][:, descending], False, 0.01)
    costs = [x.diagonal().square().sum() for x in (root, other, by_size)]
    assert costs[0] <= 1.000001 * costs[1] and costs[0] < costs[2]


@pytest.mark.parametrize("order", [False, True])
@pytest.mark.parametrize("columns", [1, 7, 128, 301])
def test_the_root_is_that_of_the_damped_moments(columns, order):
    """Upper, with a positive diagonal, and its square is the damped moments in the order of the columns."""
    x = torch.randn(2 * columns + 3, columns, generator=torch.Generator().manual_seed(0))
    g = x.T @ x / len(x)
    ((own, root),) = roots(g, order, 0.01)
    damped = g.double() + 0.01 * g.double().diagonal().mean() * torch.eye(columns)
    assert torch.equal(root, root.triu())
    assert (root.diagonal() > 0).all()
    assert sorted(own.tolist()) == list(range(columns))
    torch.testing.assert_close(root @ root.T, damped[own][:, own], atol=1e-6, rtol=0)
