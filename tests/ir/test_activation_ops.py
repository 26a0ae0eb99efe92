"""Dynamic quantizers and quantized attention against arithmetic written independently."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mpq_compiler.ir import ops
from tests.ir.test_ops import packed

rows = st.lists(st.floats(-(2.0**40), 2.0**40, width=32), min_size=1, max_size=9)


@settings(max_examples=300)
@given(rows, st.integers(2, 8))
@pytest.mark.invariant("vidit-q-1")
def test_codes_of_a_row_cover_its_range(values, bits):
    """Real zero is a code, at most 2^b codes, and every value lies within half a step (and its rounding) of its own."""
    x = torch.tensor([values], dtype=torch.float32)
    codes, scale, zero = ops.dynamic_quantize(x, bits)
    assert codes.dtype == zero.dtype == torch.uint8 and scale.dtype == torch.float32
    assert int(codes.max()) < 2**bits and int(zero) < 2**bits and float(scale) >= ops.SMALLEST_SCALE
    value = (codes.double() - zero.double()) * scale.double()
    assert float((value - x.double()).abs().max()) <= float(scale) * (1 + 1e-4)  # the ends: half for z, half for q
    assert torch.equal(ops.dynamic_fake_quantize(x, bits), (codes.float() - zero.float()) * scale)
    assert bool((codes[x == 0] == zero).all())


@pytest.mark.invariant("vidit-q-2")
def test_rows_have_ranges_of_their_own():
    x = torch.tensor([[0.0, 255.0], [-1.0, 0.0], [0.0, 0.0], [-3.0, 12.0]])
    codes, scale, zero = ops.dynamic_quantize(x, 8)
    assert scale.tolist() == [1.0, pytest.approx(1 / 255), ops.SMALLEST_SCALE, pytest.approx(15 / 255)]
    assert zero.tolist() == [0, 255, 0, 51]
    assert codes.tolist() == [[0, 255], [0, 255], [0, 0], [0, 255]]
    tall = ops.dynamic_quantize(x.reshape(2, 2, 2), 8)
    assert torch.equal(tall[0].reshape(4, 2), codes) and torch.equal(tall[1], scale) and torch.equal(tall[2], zero)


def test_gradients_of_a_dynamic_quantizer_pass_straight_through():
    x = torch.randn(3, 8, generator=torch.Generator().manual_seed(0), requires_grad=True)
    y = ops.dynamic_fake_quantize(x, 8)
    y.square().sum().backward()
    assert torch.equal(x.grad, 2 * y.detach())  # those at the ends of the range, which are rounded most, among them


@pytest.mark.parametrize("segments", [[21], [13, 8]])
@pytest.mark.invariant("vidit-q-3")
def test_a_layer_on_rows_with_tables_is_the_layer_row_by_row(segments):
    """Each row alone, as a sample with one time group of its tables."""
    p = packed(segments, 1)
    weight, count = [p[name] for name in ("codes", "scale", "offset", "lut", "row_class")], len(segments)
    bias = p["bias"], segments
    x = torch.randn(2, 3, 21, generator=torch.Generator().manual_seed(1))
    q, s, z = ops.dynamic_quantize(x, 8)
    y = ops.quant_linear(q, None, *weight, [s] * count, [z] * count, *bias)
    group = torch.zeros(1, dtype=torch.int64)
    for r in range(6):
        row = q.reshape(6, 21)[r : r + 1]
        tables = [s[r : r + 1]] * count, [z[r : r + 1]] * count
        assert torch.equal(ops.quant_linear(row, group, *weight, *tables, *bias)[0], y.reshape(6, -1)[r])


# --- attention ----------------------------------------------------------------------------------------------

HEADS, WIDTH = 2, 6


def operands(batch: int, queries: int, keys: int, seed: int = 0) -> tuple[list[Tensor], Tensor, list[Tensor]]:
    """Codes of q, k and v, the groups of the samples, and the tables of two groups for q, k, v and p."""
    draw = torch.Generator().manual_seed(seed)
    codes = [
        torch.randint(0, 256, (batch, length, HEADS * WIDTH), generator=draw, dtype=torch.uint8)
        for length in (queries, keys, keys)
    ]
    tables = []
    for top in (0.02, 0.02, 0.02):
        tables.append((torch.rand(2, generator=draw) * top + 0.01).to(torch.float16))
        tables.append(torch.randint(0, 256, (2,), generator=draw, dtype=torch.uint8))
    tables += [torch.tensor([1 / 255, 1 / 300], dtype=torch.float16), torch.zeros(2, dtype=torch.uint8)]
    return codes, torch.arange(batch) % 2, tables


def attention_numpy(codes, group, tables, heads, scale, mask, bits) -> tuple[np.ndarray, np.ndarray]:
    """The definition in integers and float64, and for each row whether its probabilities lie off the ties of codes."""
    q, k, v = (c.numpy().astype(np.int64) for c in codes)
    tables = [t.numpy().astype(np.float64)[group.numpy()][:, None, None, None] for t in tables]

    def split(x, zero):
        return x.reshape(*x.shape[:2], heads, -1).transpose(0, 2, 1, 3) - zero.astype(np.int64)

    query, key, value = (split(x, tables[2 * i + 1]) for i, x in enumerate((q, k, v)))
    logits = (query @ key.transpose(0, 1, 3, 2)) * (tables[0] * tables[2] * (scale or query.shape[-1] ** -0.5))
    logits = logits + (0 if mask is None else mask.numpy())
    e = np.exp(logits - logits.max(-1, keepdims=True))
    steps = e / e.sum(-1, keepdims=True) / tables[6]
    sure = (np.abs(steps - np.floor(steps) - 0.5) > 1e-3).all(-1)
    y = (np.clip(np.rint(steps), 0, 2**bits - 1).astype(np.int64) @ value) * (tables[6] * tables[4])
    return y.transpose(0, 2, 1, 3).reshape(q.shape), np.repeat(sure.transpose(0, 2, 1), query.shape[-1], -1)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("scale", [None, 0.25])
def test_quant_attention_equals_its_formula(bits, masked, scale):
    codes, group, tables = operands(3, 5, 7)
    mask = torch.randn(3, 1, 1, 7, generator=torch.Generator().manual_seed(1)) if masked else None
    y = ops.quant_attention(*codes, group, *tables, HEADS, scale, mask, bits).numpy()
    wanted, sure = attention_numpy(codes, group, tables, HEADS, scale, mask, bits)
    assert y.dtype == np.float32 and y.shape == wanted.shape and sure.mean() > 0.5
    assert np.abs(y - wanted)[sure].max() <= ops.OPS[ops.quant_attention].bound * np.abs(wanted).max()


def test_samples_of_a_batch_do_not_mix():
    codes, group, tables = operands(4, 5, 7)
    mask = torch.randn(1, HEADS, 5, 7, generator=torch.Generator().manual_seed(1))
    together = ops.quant_attention(*codes, group, *tables, HEADS, None, mask, 8)
    for b in range(4):
        one = slice(b, b + 1)
        alone = ops.quant_attention(*(c[one] for c in codes), group[one], *tables, HEADS, None, mask, 8)
        assert torch.equal(alone, together[one])


def test_simulated_attention_is_near_the_packed_one_and_learns():
    codes, group, tables = operands(2, 5, 7)
    tables[6] = torch.full((2,), 1 / 250, dtype=torch.float16)  # nothing is clipped: that learns nothing
    values = [
        ((c.float() - ops.per_sample(z.float(), group, c)) * ops.per_sample(s.float(), group, c)).requires_grad_()
        for c, s, z in zip(codes, tables[0:6:2], tables[1:6:2], strict=True)
    ]
    simulated = ops.fake_quantize_attention(*values, group, *tables[6:], HEADS, None, None, 8)
    exact = ops.quant_attention(*codes, group, *tables, HEADS, None, None, 8)
    assert float((simulated - exact).detach().abs().max()) <= 1e-2 * float(exact.abs().max())
    simulated.square().sum().backward()
    learned = [v.grad.clone() for v in values]
    for v in values:
        v.grad = None
    ops.attention(*values, HEADS).square().sum().backward()
    for got, v in zip(learned, values, strict=True):
        assert float(torch.cosine_similarity(got.flatten(), v.grad.flatten(), 0)) > 0.99
