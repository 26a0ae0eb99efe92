"""The reference meaning of the mpq:: operators, and shapes without arithmetic."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler.ir import ops
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.ops import floating
from mpq_compiler.ir.ops.shapes import SHAPES
from tests.harness import programs

floats = st.floats(width=32, allow_nan=False, allow_infinity=False, min_value=-(2.0**60), max_value=2.0**60)


def nearest_f32(value: Fraction) -> float:
    """The f32 nearest to an exact value, ties to even, by comparing neighbours."""
    guess = np.float32(float(value))
    candidates = [np.nextafter(guess, np.float32(-np.inf)), guess, np.nextafter(guess, np.float32(np.inf))]
    gaps = [abs(Fraction(float(c)) - value) for c in candidates]
    best = [c for c, gap in zip(candidates, gaps, strict=True) if gap == min(gaps)]
    return float(next((c for c in best if not c.view(np.uint32) & 1), best[0]))


@settings(max_examples=400)
@given(floats, floats, floats)
def test_fma_rounds_once(a, b, c):
    got = float(ops.fma(*(torch.tensor(v, dtype=torch.float32) for v in (a, b, c))))
    assert got == nearest_f32(Fraction(a) * Fraction(b) + Fraction(c))


def test_fma_where_double_rounding_goes_wrong():
    """The product lies just beside a tie of f32 by less than f64 sees: rounding f64 again would take the tie."""
    a, b, c = 1 + 2.0**-23, 2.0**-24, -(2.0**-80)
    values = [torch.tensor(v, dtype=torch.float32) for v in (a * 1.0, b, 1.0)]
    assert float(ops.fma(*values)) == nearest_f32(Fraction(float(values[0])) * Fraction(b) + 1)
    tie = [torch.tensor(v, dtype=torch.float32) for v in (1.0, 1 + 2.0**-24, c)]
    assert float(ops.fma(*tie)) == nearest_f32(Fraction(float(tie[1])) + Fraction(c))


def test_quantize_rounds_ties_to_even_and_clamps():
    x = torch.tensor([[-9.0, -0.5, 0.5, 1.5, 2.5, 300.0]])
    scale, zero, group = torch.ones(1, dtype=torch.float16), torch.tensor([3], dtype=torch.uint8), torch.zeros(1).long()
    assert ops.quantize(x, scale, zero, group, 8).tolist() == [[0, 3, 3, 5, 5, 255]]
    assert ops.quantize(x, scale, zero, group, 4).tolist() == [[0, 3, 3, 5, 5, 15]]


@pytest.mark.parametrize("zero", [0, 255])
def test_extreme_zero_points(zero):
    x = torch.linspace(-300, 300, 601)[None]
    scale, z = torch.ones(1, dtype=torch.float16), torch.tensor([zero], dtype=torch.uint8)
    codes = ops.quantize(x, scale, z, torch.zeros(1).long(), 8)
    assert torch.equal(codes.double() - zero, torch.round(x.double()).clamp(-zero, 255 - zero))


def test_fake_quantize_is_the_value_of_the_codes():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0))
    scale = torch.tensor([0.02, 0.3], dtype=torch.float16)
    zero, group = torch.tensor([120, 9], dtype=torch.uint8), torch.tensor([1, 0, 1])
    codes = ops.quantize(x, scale, zero, group, 4 + 4)
    rows = group.repeat_interleave(2)
    value = (codes.float() - zero.float()[rows, None]) * scale.float()[rows, None]
    assert torch.equal(ops.fake_quantize(x, scale, zero, group, 8), value)


def test_gradients_pass_straight_through():
    x = torch.tensor([[0.4, 100.0]], requires_grad=True)
    scale = torch.tensor([0.25], requires_grad=True)
    y = ops.fake_quantize(x, scale, torch.tensor([0], dtype=torch.uint8), torch.zeros(1).long(), 4)
    y.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0]]  # clipped values learn nothing
    assert scale.grad.item() == pytest.approx(round(0.4 / 0.25) - 0.4 / 0.25 + 15)  # Esser 2020, equation 3
    w = torch.randn(3, 8, requires_grad=True)
    parts = torch.full((3, 1), 0.5, dtype=torch.float16), None, torch.arange(-4, 4, dtype=torch.int8)[None], None
    ops.fake_quantize_weight(w, *parts).sum().backward()
    assert torch.equal(w.grad, torch.ones_like(w))


def packed(segments: list[int], classes: int, outputs: int = 37, seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    channels = sum(segments)
    table = torch.randint(-127, 128, (classes, 16), generator=generator, dtype=torch.int8)
    return {
        "x": torch.randint(0, 256, (4, 3, channels), generator=generator, dtype=torch.uint8),
        "group": torch.tensor([1, 0]),
        "codes": torch.randint(0, 16, (outputs, channels), generator=generator, dtype=torch.uint8),
        "scale": torch.rand(outputs, len(segments), generator=generator).to(torch.float16),
        "offset": torch.randn(outputs, generator=generator).to(torch.float16),
        "lut": table,
        "row_class": torch.arange(-(-outputs // 16)).remainder(classes).to(torch.uint8),
        "act_scale": [torch.rand(2, generator=generator).to(torch.float16) for _ in segments],
        "act_zero": [torch.randint(0, 256, (2,), generator=generator, dtype=torch.uint8) for _ in segments],
        "bias": torch.randn(outputs, generator=generator).to(torch.float16),
        "segments": segments,
    }


@pytest.mark.parametrize("segments", [[21], [13, 8]])
@pytest.mark.parametrize("classes", [1, 2])
@pytest.mark.invariant("qdiffusion-4")
def test_quant_linear_equals_its_formula(segments, classes):
    p = packed(segments, classes)
    rows = p["row_class"].long().repeat_interleave(16)[:37]
    weight = p["lut"][rows[:, None], p["codes"].long()].double()
    group = p["group"].repeat_interleave(2)
    expected = p["bias"].double().expand(4, 3, 37).clone()
    start = 0
    for j, width in enumerate(segments):
        part = slice(start, start := start + width)
        q = p["x"][..., part].double() - p["act_zero"][j].double()[group][:, None, None]
        level = p["scale"][:, j, None].double() * weight[:, part] + p["offset"].double()[:, None]
        expected += p["act_scale"][j].double()[group][:, None, None] * (q @ level.T)
    got = ops.quant_linear(**p)
    assert float((got - expected).abs().max()) <= 1e-6 * float(expected.abs().max())


@pytest.mark.parametrize("precision", ("highest", "medium"))
@pytest.mark.parametrize("entries", (16, None), ids=("int4", "int8"))
def test_sums_are_exact_however_long_they_are(entries, precision):
    """The largest codes of both sides all along a row: in f32 their sum would lose its last bits, as bf16 all of it."""
    before, generator = torch.get_float32_matmul_precision(), torch.Generator().manual_seed(0)
    x = torch.randint(250, 256, (2, 40_001), generator=generator).to(torch.uint8)
    lut = None if entries is None else torch.arange(-8, 8, dtype=torch.int8)[None]
    codes = torch.randint(12 if entries else 120, 16 if entries else 128, (3, 40_001), generator=generator)
    codes = codes.to(torch.uint8 if entries else torch.int8)
    one, zero = torch.ones(1), torch.zeros(1, dtype=torch.uint8)
    expected = x.long() @ (codes.long() - (8 if entries else 0)).T
    torch.set_float32_matmul_precision(precision)
    try:
        got = ops.quant_linear(
            x, torch.zeros(2, dtype=torch.long), codes, torch.ones(3, 1), None, lut, None, [one], [zero], None, [40_001]
        )
        image, kernel = x[:, :16_002].reshape(2, 1, 3, -1), codes[:, :16_002]
        small = ops.quant_conv2d(
            image, torch.zeros(2, dtype=torch.long), kernel, torch.ones(3, 1), None, lut, None, [one], [zero], None,
            [5334], [1, 3], [1, 1], [0, 0, 0, 0],
        )  # fmt: skip
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(got, expected.to(torch.float32))
    convolved = image.reshape(2, -1).long() @ (kernel.long() - (8 if entries else 0)).T
    assert torch.equal(small.reshape(2, 3), convolved.to(torch.float32))


@pytest.mark.parametrize("stride, padding", [((1, 1), (1, 1, 1, 1)), ((2, 2), (0, 1, 0, 1)), ((2, 1), (2, 0, 0, 3))])
@pytest.mark.parametrize("segments", [[5], [2, 3]])
@pytest.mark.invariant("compiler-6")
def test_quant_conv2d_is_quant_linear_on_patches(stride, padding, segments):
    """The same integers and the same epilogue; padded pixels hold the zero point of their segment and group."""
    p = packed(segments, 1)
    x = torch.randint(0, 256, (2, 7, 6, 5), generator=torch.Generator().manual_seed(3), dtype=torch.uint8)
    taps = [p["codes"].roll(t, 0) for t in range(9)]
    codes = torch.stack(taps, 1).reshape(37, -1)
    got = ops.quant_conv2d(**p | {"x": x, "codes": codes, "kernel": [3, 3], "stride": stride, "padding": padding})
    top, bottom, left, right = padding
    zeros = torch.cat([z[p["group"]][:, None].expand(-1, n) for z, n in zip(p["act_zero"], segments, strict=True)], 1)
    padded = zeros[:, None, None].expand(2, 7 + top + bottom, 6 + left + right, 5).clone()
    padded[:, top : top + 7, left : left + 6] = x
    patches = padded.unfold(1, 3, stride[0]).unfold(2, 3, stride[1]).permute(0, 1, 2, 4, 5, 3)  # b, oh, ow, kh, kw, c
    b, oh, ow = patches.shape[:3]
    # quant_linear takes one segment after the other: (segment, tap, channel).
    rows = torch.cat([s.reshape(b, oh * ow, -1) for s in patches.split(segments, -1)], -1)
    columns = [c.reshape(37, -1) for c in codes.reshape(37, 9, 5).split(segments, -1)]
    flat = ops.quant_linear(**p | {"x": rows, "codes": torch.cat(columns, 1), "segments": [9 * n for n in segments]})
    assert torch.equal(got, flat.reshape(b, oh, ow, 37))


@pytest.mark.invariant("mixdq-4")
def test_padding_with_zero_points_is_padding_with_zeros_and_a_constant_for_each_pixel():
    """Integers alone: zero points add the same to all pixels only where the padding holds them too."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(0, 256, (2, 5, 6, 4), generator=generator, dtype=torch.uint8)
    codes = torch.randint(-127, 128, (8, 36), generator=generator, dtype=torch.int8)
    zero, group, one = torch.tensor([17, 201], dtype=torch.uint8), torch.tensor([1, 0]), torch.ones(2).half()
    weight = codes, torch.ones(8, 1).half(), None, None, None
    y = ops.quant_conv2d(x, group, *weight, [one], [zero], None, [4], [3, 3], [1, 1], [1, 1, 1, 1])
    image, w = x.permute(0, 3, 1, 2).double(), codes.reshape(8, 3, 3, 4).permute(0, 3, 1, 2).double()
    z = zero[group].double()[:, None, None, None]
    filled = torch.stack([F.pad(a, (1, 1, 1, 1), value=float(v)) for a, v in zip(image, z, strict=True)])
    constant = z * w.sum((1, 2, 3))[:, None, None]
    of_each_pixel = z * F.conv2d(torch.ones_like(image), w, padding=1)
    assert torch.equal(y.permute(0, 3, 1, 2).double(), F.conv2d(filled, w) - constant)
    assert torch.equal(y.permute(0, 3, 1, 2).double(), F.conv2d(image, w, padding=1) - of_each_pixel)
    assert not torch.equal(of_each_pixel, constant.expand_as(of_each_pixel))


@pytest.mark.invariant("qdiffusion-2")
def test_parts_under_equal_tables_are_the_whole_layer():
    """To the bit where no sum is rounded, scales being powers of two."""
    whole = packed([21], 1)
    powers = {"scale": torch.full((37, 1), 2.0**-5).half(), "act_scale": [torch.tensor([0.25, 2.0]).half()]}
    for exact in (True, False):
        one = whole | (powers | {"offset": None, "bias": None} if exact else {})
        scale = one["scale"].repeat(1, 2)
        parts = {"scale": scale, "segments": [13, 8], **{name: 2 * one[name] for name in ("act_scale", "act_zero")}}
        y, split = ops.quant_linear(**one), ops.quant_linear(**one | parts)
        assert torch.equal(y, split) if exact else float((y - split).abs().max()) <= 1e-6 * float(y.abs().max())


@pytest.mark.parametrize("bits", [2, 3, 4])
@pytest.mark.invariant("compiler-10")
def test_a_table_of_even_levels_is_arithmetic_on_the_codes(bits):
    p, half = packed([13, 8], 1) | {"row_class": None}, 2 ** (bits - 1)
    codes = torch.randint(0, 2 * half, p["codes"].shape, generator=torch.Generator().manual_seed(bits))
    table = {"codes": codes.to(torch.uint8), "lut": torch.arange(-half, half, dtype=torch.int8)[None]}
    plain = {"codes": (codes - half).to(torch.int8), "lut": None}
    assert torch.equal(ops.quant_linear(**p | table), ops.quant_linear(**p | plain))


def test_float_operators_are_torch_on_channels_first():
    generator = torch.Generator().manual_seed(0)
    x, w = torch.randn(2, 5, 6, 4, generator=generator), torch.randn(8, 3, 3, 2, generator=generator)
    first = x.permute(0, 3, 1, 2)
    y = F.conv2d(F.pad(first, (0, 1, 2, 1)), w.permute(0, 3, 1, 2), None, (2, 1), 0, 1, 2)
    assert torch.equal(ops.conv2d(x, w, None, (2, 1), (2, 1, 0, 1), 2), y.permute(0, 2, 3, 1))
    norm = F.group_norm(first.contiguous(), 2, torch.ones(4), torch.zeros(4), 1e-5).permute(0, 2, 3, 1)
    assert torch.allclose(ops.group_norm(x, 2, torch.ones(4), torch.zeros(4), 1e-5), norm, atol=1e-6)
    up = F.interpolate(first, scale_factor=(2.0, 3.0), mode="nearest").permute(0, 2, 3, 1)
    assert torch.equal(ops.upsample_nearest2d(x, (2, 3)), up)
    q = torch.randn(2, 7, 8, generator=generator)
    heads = q.reshape(2, 7, 2, 4).transpose(1, 2)
    attention = F.scaled_dot_product_attention(heads, heads, heads).transpose(1, 2).reshape(2, 7, 8)
    assert torch.equal(ops.attention(q, q, q, 2), attention)


class Comparing(Interpreter):
    """Each call's real shape and type against those without arithmetic."""

    def __init__(self, program) -> None:
        super().__init__(program)
        self.compared: set[Any] = set()

    def call(self, node, args, kwargs):
        value = super().call(node, args, kwargs)
        if node.target in SHAPES:
            empty = torch.fx.node.map_aggregate(args, lambda a: a.to("meta") if isinstance(a, torch.Tensor) else a)
            shape = SHAPES[node.target](*empty)
            assert (shape.shape, shape.dtype) == (value.shape, value.dtype)
            self.compared.add(node.target)
        return value


@torch.no_grad()
def test_a_text_is_pooled_at_the_first_of_equal_tokens():
    x = torch.arange(24.0).reshape(3, 4, 2)
    tokens = torch.tensor([[5, 9, 9, 1], [9, 2, 9, 3], [1, 2, 3, 4]])
    assert torch.equal(ops.row_of_token(x, tokens), x[torch.arange(3), torch.tensor([1, 0, 3])])
    assert torch.equal(ops.row_of_token(x, tokens, 9), x[torch.arange(3), torch.tensor([1, 0, 0])])
    assert torch.equal(ops.row_of_token(x, tokens, 2), x[torch.arange(3), torch.tensor([0, 1, 1])])


def test_shapes_without_arithmetic():
    compared: set[Any] = set()
    float8 = f"{programs.FRONT},bit-allocation{{uniform=fp8,attention=8}},{programs.BACK}"
    for model, pipeline in (("unet2d", programs.ROTATED), ("pixart", float8), ("pixart", programs.SMALL_FLOATS)):
        for name in ("insert-fake-quant", "round-weights", "fold-fake-quant"):
            comparing = Comparing(programs.after(model, name, pipeline))
            comparing.run(programs.inputs(model, 2))
            compared |= comparing.compared
    assert compared == {*SHAPES}


def test_every_operator_has_a_name_and_a_bound():
    for function, op in ops.OPS.items():
        assert op.name.startswith("mpq::") and op.bound in (0.0, 1e-6, 1e-5) and function.__doc__
    exact = {op.name for op in ops.OPS.values() if op.bound == 0}
    assert {"mpq::quantize", "mpq::quant_linear", "mpq::quant_conv2d", "mpq::time_group"} <= exact


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_fma_is_the_same_in_pieces(monkeypatch, layout):
    """Strides too, by which torch decides how it sums; a broadcast operand stays one."""
    made = torch.Generator().manual_seed(0)
    a = torch.randn(3, 5, 7, 9, generator=made).contiguous(memory_format=layout)
    b, c = torch.randn(5, 1, 1, generator=made), torch.randn(3, 5, 7, 9, generator=made)
    whole = floating.fma(a, b, c)
    monkeypatch.setattr(floating, "PIECE", 16)
    pieces = floating.fma(a, b, c)
    assert torch.equal(pieces, whole) and pieces.stride() == whole.stride()
