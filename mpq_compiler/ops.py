"""The `mpq::` operators: what each node of the graph means, in plain torch.

These functions are the definition that every backend is checked against. Activations are contiguous and
channels-last: images [B, H, W, C], tokens [B, T, C], vectors [B, C]. A row belongs to the sample
``row // (rows / B)`` of the batch.

Rounding is to nearest, ties to even, in every step of the exact arithmetic; `fma` is the fused
multiply-add of IEEE 754.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_F = TypeVar("_F", bound=Callable[..., Any])

LUT_MAX = 127
"""Largest magnitude of a table entry and of an int8 code, the same on every target."""

TILE_ROWS = 16
"""Rows (output channels) that share a row class, and with it a table."""


@dataclass(frozen=True)
class Op:
    """What the compiler knows of an operator besides its meaning."""

    name: str
    bound: float
    """Largest allowed ``max|y - y'| / max|y'|`` of a lowered kernel on the same inputs; 0 is bit-exact."""


OPS: dict[Callable[..., Any], Op] = {}


def op(name: str, bound: float = 0.0) -> Callable[[_F], _F]:
    def register(function: _F) -> _F:
        OPS[function] = Op(f"mpq::{name}", bound)
        return function

    return register


# --- float operators of the rewritten graph -----------------------------------------------------------------


@op("conv2d", bound=1e-5)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    groups: int = 1,
) -> Tensor:
    """Convolution of x [B, H, W, C] with weight [O, kh, kw, C/groups]; padding is (top, bottom, left, right)."""
    image, pads = _pad_channels_first(x, padding)
    y = F.conv2d(image, weight.permute(0, 3, 1, 2), bias, list(stride), pads, 1, groups)
    return y.permute(0, 2, 3, 1).contiguous()


def _pad_channels_first(x: Tensor, padding: Sequence[int]) -> tuple[Tensor, list[int]]:
    """x as [B, C, H, W] and the symmetric padding left for the convolution itself."""
    top, bottom, left, right = padding
    image = x.permute(0, 3, 1, 2)
    if top == bottom and left == right:
        return image, [top, left]
    return F.pad(image, (left, right, top, bottom)), [0, 0]


@op("group_norm", bound=1e-5)
def group_norm(x: Tensor, groups: int, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    """Group normalization of x [B, ..., C] over all positions and C/groups channels."""
    rows = x.reshape(x.shape[0], -1, x.shape[-1]).transpose(1, 2)
    return F.group_norm(rows, groups, weight, bias, eps).transpose(1, 2).reshape(x.shape).contiguous()


@op("rms_norm", bound=1e-5)
def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """``x / sqrt(mean(x^2) + eps) * weight`` over the last dimension of x [..., C]; weight [C]."""
    y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


@op("upsample_nearest2d")
def upsample_nearest2d(x: Tensor, factors: Sequence[int]) -> Tensor:
    """Each pixel of x [B, H, W, C] repeated ``factors`` = (fh, fw) times."""
    return x.repeat_interleave(factors[0], 1).repeat_interleave(factors[1], 2)


@op("prepend")
def prepend(x: Tensor, token: Tensor) -> Tensor:
    """``token`` [C] before the tokens of every sample of x [B, T, C] -> [B, T+1, C]."""
    return torch.cat([token.expand(x.shape[0], 1, -1), x], 1)


@op("attention", bound=1e-5)
def attention(
    q: Tensor, k: Tensor, v: Tensor, heads: int, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) v per head, token-major.

    q [B, Tq, H*D], k and v [B, Tk, H*D], additive mask broadcast to [B, H, Tq, Tk]; scale is 1/sqrt(D) by default.
    """
    query, key, value = (t.reshape(t.shape[0], t.shape[1], heads, -1).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    return y.transpose(1, 2).reshape(q.shape[0], q.shape[1], -1).contiguous()


# --- time groups and activations ----------------------------------------------------------------------------


@op("time_group")
def time_group(timestep: Tensor, boundaries: Tensor) -> Tensor:
    """The group of each sample: how many of the ascending ``boundaries`` [G-1] are <= its timestep [B] -> i64 [B].

    Timesteps outside the calibrated range fall into the first or the last group.
    """
    return (timestep.to(torch.float32)[:, None] >= boundaries[None, :]).sum(1)


def per_sample(table: Tensor, group: Tensor, like: Tensor) -> Tensor:
    """``table[group]`` [B] shaped to broadcast over ``like`` [R, ...] whose R rows are batch-major."""
    values = table[group]
    if like.shape[0] != values.shape[0]:
        values = values.repeat_interleave(like.shape[0] // values.shape[0])
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _clamped(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    s = per_sample(scale.to(torch.float32), group, x)
    z = per_sample(zero_point.to(torch.float32), group, x)
    inverse = torch.ones((), dtype=torch.float32, device=x.device) / s
    return torch.maximum(torch.minimum(x * inverse, (2**bits - 1) - z), -z), s, z


@op("quantize")
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> Tensor:
    """Codes u8 of x: ``rint(clamp(x * (1/scale[g]), -z, 2^bits-1-z)) + z``; scale, zero_point [G], group i64 [B]."""
    clamped, _, z = _clamped(x, scale, zero_point, group, bits)
    return (torch.round(clamped) + z).to(torch.uint8)


@op("fake_quantize")
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> Tensor:
    """``scale * (quantize(x) - z)`` in f32; straight-through gradients to x and scale (Esser 2020, eq. 2-3)."""
    clamped, s, _ = _clamped(x, scale, zero_point, group, bits)
    return (clamped + (torch.round(clamped) - clamped).detach()) * s


# --- weights ------------------------------------------------------------------------------------------------


def entries(codes: Tensor, lut: Tensor | None, row_class: Tensor | None) -> Tensor:
    """The int8 values that codes [O, K] stand for, as f32: ``lut[row_class[i // 16], code]``, or the code itself."""
    if lut is None:
        return codes.to(torch.float32)
    table = lut.to(torch.float32)
    if lut.shape[0] == 1:
        return table[0][codes.long()]
    assert row_class is not None
    classes = row_class.long().repeat_interleave(TILE_ROWS)[: codes.shape[0]]
    return table[classes[:, None], codes.long()]


@op("dequantize_weight")
def dequantize_weight(
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    shape: Sequence[int],
) -> Tensor:
    """``scale[i, 0] * LUT[class(i)][code[i, k]] + offset[i]`` as f32 of ``shape`` (codes [O, K])."""
    w = entries(codes, lut, row_class) * scale.to(torch.float32)[:, :1]
    if offset is not None:
        w = w + offset.to(torch.float32)[:, None]
    return w.reshape(list(shape))


@op("fake_quantize_weight")
def fake_quantize_weight(
    weight: Tensor, scale: Tensor, offset: Tensor | None, lut: Tensor | None, row_class: Tensor | None
) -> Tensor:
    """weight [O, ...] moved to its nearest level, with a straight-through gradient."""
    from mpq_compiler.formats.base import nearest_codes

    rows = weight.reshape(weight.shape[0], -1)
    codes = nearest_codes(rows.detach(), scale, offset, lut, row_class)
    level = dequantize_weight(codes, scale, offset, lut, row_class, weight.shape)
    return level.detach() + (weight - weight.detach())  # the level itself: weight + (level - weight) would round


@op("binary_branch")
def binary_branch(signs: Tensor, scale: Tensor, alpha: Tensor, shape: Sequence[int]) -> Tensor:
    """The residual ``scale[i] * alpha * (2 * signs - 1)``: signs u8 {0, 1} [O, K], alpha int8 [1] on the table's grid.

    One term of MPQ-DMv2's residual quantizer with the ratio alpha/scale shared by the layer (arXiv 2507.04290).
    """
    sign = signs.to(torch.float32) * 2 - 1
    return (sign * alpha.to(torch.float32) * scale.to(torch.float32)[:, :1]).reshape(list(shape))


def merge_branch(codes: Tensor, lut: Tensor, signs: Tensor, alpha: Tensor) -> tuple[Tensor, Tensor]:
    """Base codes and a binary branch as one table: code' = 2*code + sign, LUT'[c, 2k+s] = LUT[c, k] +- alpha."""
    step = alpha.to(torch.int16)
    table = torch.stack([lut.to(torch.int16) - step, lut.to(torch.int16) + step], dim=-1).flatten(1)
    return codes * 2 + signs, table.to(torch.int8)


# --- packed operators ---------------------------------------------------------------------------------------


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Fused multiply-add in f32: a*b + c rounded once.

    The product is exact in f64; the sum is rounded to odd there, after which rounding to f32 is the correct one
    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums").
    """
    product = a.double() * b.double()
    c64 = c.double()
    total = product + c64
    part = total - product
    error = (product - (total - part)) + (c64 - part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & ((bits & 1) == 0) & torch.isfinite(total)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + torch.where(inexact_even, step, 0)).view(torch.float64).to(torch.float32)


def _epilogue(
    accumulators: list[Tensor],
    sums: list[Tensor] | None,
    group: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    act_scale: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """The f32 epilogue over int accumulators [R, ..., O] (exact in f64), segment by segment, offsets last."""
    first = accumulators[0]
    y = torch.zeros((), dtype=torch.float32, device=first.device) if bias is None else bias.to(torch.float32)
    y = y.expand(first.shape)
    for j, accumulator in enumerate(accumulators):
        factor = per_sample(act_scale[j].to(torch.float32), group, first) * scale[:, j].to(torch.float32)
        y = fma(accumulator.to(torch.float32), factor, y)
    if offset is not None and sums is not None:
        for j, total in enumerate(sums):
            factor = per_sample(act_scale[j].to(torch.float32), group, first) * offset.to(torch.float32)
            y = fma(total.to(torch.float32).expand(first.shape), factor, y)
    return y


def _centred(x: Tensor, group: Tensor, act_zero: Sequence[Tensor], segments: Sequence[int]) -> list[Tensor]:
    """q - z_j per channel segment, in f64 where every product and sum of the contraction is exact."""
    parts = torch.split(x.to(torch.float64), list(segments), dim=-1)
    return [p - per_sample(act_zero[j].to(torch.float64), group, p) for j, p in enumerate(parts)]


@op("quant_linear")
def quant_linear(
    x: Tensor,
    group: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    act_scale: Sequence[Tensor],
    act_zero: Sequence[Tensor],
    bias: Tensor | None,
    segments: Sequence[int],
) -> Tensor:
    """Linear layer on codes: x u8 [B, ..., K], codes [O, K], scale [O, J] -> f32 [B, ..., O].

    act_scale and act_zero hold a tensor [G] for each of the J segments.

    ``A_j = sum_k (q - z_j) * LUT[code]`` exactly; then `_epilogue`. Segments are the J channel counts, summing to K.
    """
    weight = torch.split(entries(codes, lut, row_class).double(), list(segments), dim=1)
    parts = _centred(x, group, act_zero, segments)
    accumulators = [p @ w.T for p, w in zip(parts, weight, strict=True)]
    sums = [p.sum(-1, keepdim=True) for p in parts] if offset is not None else None
    return _epilogue(accumulators, sums, group, scale, offset, act_scale, bias)


@op("quant_conv2d")
def quant_conv2d(
    x: Tensor,
    group: Tensor,
    codes: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    act_scale: Sequence[Tensor],
    act_zero: Sequence[Tensor],
    bias: Tensor | None,
    segments: Sequence[int],
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Tensor:
    """Convolution on codes: x u8 [B, H, W, C], codes [O, kh*kw*C] in (kh, kw, c) order -> f32 [B, OH, OW, O].

    Padded pixels hold the zero point, so they add nothing to ``A_j``.
    """
    rows = entries(codes, lut, row_class).double().reshape(codes.shape[0], kernel[0], kernel[1], -1)
    weight = torch.split(rows, list(segments), dim=3)
    parts = _centred(x, group, act_zero, segments)
    accumulators = [conv2d(p, w, None, stride, padding) for p, w in zip(parts, weight, strict=True)]
    sums = None
    if offset is not None:
        ones = [torch.ones_like(w[:1]) for w in weight]
        sums = [conv2d(p, w, None, stride, padding) for p, w in zip(parts, ones, strict=True)]
    return _epilogue(accumulators, sums, group, scale, offset, act_scale, bias)


def name_of(target: Any) -> str:
    """The printed name of a call target: ``mpq::quantize`` or ``aten.silu.default`` without its default overload."""
    if target in OPS:
        return OPS[target].name
    return str(target).removesuffix(".default")
