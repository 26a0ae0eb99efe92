"""FP4, NF4 and FP8: the numbers of their codes, symmetry, scaling, the scale search."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from mpq_compiler import formats, ops
from mpq_compiler.formats.floating import E2M1, LARGEST, NF4, float8_codes

FLOAT8 = ("fp8", "fp8e5")
KINDS = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}


def weight(rows: int = 20, columns: int = 50, power: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(rows, columns, generator=generator) ** power * torch.rand(rows, 1, generator=generator).add(0.1)


def test_fp4_is_twice_e2m1():
    values = []
    for code in range(16):
        sign, e, m = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        values.append(sign * (m / 2 if e == 0 else (1 + m / 2) * 2.0 ** (e - 1)))
    assert tuple(2 * v for v in values) == E2M1


def test_nf4_is_sixteen_rising_levels_with_zero_and_both_ends():
    assert list(NF4) == sorted(NF4) and NF4[7] == 0 and (NF4[0], NF4[15]) == (-127, 127)
    normal = torch.distributions.Normal(0.0, 1.0)
    upper = normal.icdf(torch.linspace(0.5, 0.9677083, 9)[1:])
    assert (torch.tensor(NF4[8:]) / 127 - upper / upper[-1]).abs().max() < 0.005


@pytest.mark.parametrize("name", ["fp4", "nf4", "fp4g16", *FLOAT8])
def test_powers_of_two_pass_through(name):
    w = weight()
    first, larger = (formats.get(name).fit(w * factor) for factor in (1, 8))
    assert torch.equal(larger.codes, first.codes)
    assert torch.equal(larger.dequantize(), 8 * first.dequantize())


@pytest.mark.parametrize("name", ["fp4", "fp4g16", "int8", *FLOAT8])
def test_the_sign_passes_through(name):
    w = weight()
    assert torch.equal(formats.get(name).fit(-w).dequantize(), -formats.get(name).fit(w).dequantize())


@pytest.mark.parametrize("exponent", [4, 5])
def test_fp8_codes_are_those_that_torch_rounds_to(exponent):
    w = weight(power=5)
    scale = (w.abs().amax(1) / LARGEST[exponent] * 1.3).half()
    codes = float8_codes(w, scale, exponent)
    value = ops.dequantize_float8(codes, scale, w.shape, exponent)
    expected = (w / scale.float()[:, None]).to(KINDS[exponent]).float() * scale.float()[:, None]
    assert torch.equal(value, expected)
    largest = {4: 0x7E, 5: 0x7B}[exponent]
    beyond = float8_codes(w * 1e6, scale, exponent) & 0x7F
    assert int(beyond.max()) == largest  # neither infinity nor NaN


@pytest.mark.parametrize("name", FLOAT8)
def test_the_scale_search_is_never_worse_than_the_whole_range(name):
    found, w = formats.get(name), weight()
    x = torch.randn(200, 50, generator=torch.Generator().manual_seed(1)) + 1
    gram = x.T @ x / 200
    for moments, of in ((None, lambda e: e.square().sum(1)), (gram, lambda e: (e @ gram * e).sum(1))):
        fit, start = found.fit(w, moments), found.start(w)
        assert (of(fit.dequantize() - w) <= of(start.dequantize() - w)).all()
        assert fit.scale.dtype == torch.float16 and (fit.scale > 0).all() and fit.scale.shape == (20,)


@pytest.mark.parametrize("name", FLOAT8)
@pytest.mark.parametrize("factor", [0.0, 1e-9, 1e-4, 1e4])
def test_small_large_and_empty_rows(name, factor):
    w = weight() * factor
    value = formats.get(name).fit(w).dequantize()
    assert torch.isfinite(value).all()
    if factor >= 1e-4:
        assert float((value - w).norm() / w.norm()) < 0.05


def test_what_floats_are_for():
    """Rows with outliers: FP8 is nearer than INT8, FP4 than INT4 with one scale; on uniform rows it is not."""
    tails, flat = weight(power=7), torch.rand(20, 50, generator=torch.Generator().manual_seed(0)) * 2 - 1

    def error(name: str, w: Tensor) -> float:
        return float((formats.get(name).fit(w).dequantize() - w).norm())

    assert error("fp8", tails) < error("int8", tails) and error("fp8", flat) > error("int8", flat)
    assert error("fp4", tails) < error("int4", tails) and error("fp4", flat) > error("int4", flat)


def test_bytes_are_those_of_the_stored_form():
    for name in FLOAT8:
        fit = formats.get(name).fit(weight(7, 45).reshape(7, 3, 3, 5))
        assert fit.codes.nbytes + fit.scale.nbytes == formats.get(name).stored_bytes(7, 3, 3, 5)


def test_gradients_pass_straight_through():
    w = weight().requires_grad_()
    start = formats.get("fp8").start(w.detach())
    level = ops.fake_quantize_float8(w, start.scale, start.exponent)
    assert torch.equal(level.detach(), start.dequantize())
    level.sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))
