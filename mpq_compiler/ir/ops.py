"""The `mpq::` operators: what each node of the graph means, in plain torch.

These functions are the definition that every backend is checked against. Activations are contiguous and
channels-last: images [B, H, W, C], tokens [B, T, C], vectors [B, C]. A row belongs to the sample
``row // (rows / B)`` of the batch.

Rounding is to nearest, ties to even, in every step of the exact arithmetic; `fma` is the fused
multiply-add of IEEE 754.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import entries, float_largest, round_float
from mpq_compiler.targets.numerics import BF16, EXP2_COARSE, F32, KEY_BLOCK, NUMERICS, SMALLEST, rotation_sign

_F = TypeVar("_F", bound=Callable[..., Any])

LOG2_E = 1.4426950408889634
LOWEST = -1e30
"""Less than any logit, and finite."""

FEW_SEGMENTS = 2
"""Of more segments, K-groups, what dynamic rows have of their own counts once (`quant_linear`)."""

SMALLEST_SCALE = 2.0**-24
"""Of a quantizer whose range is measured at run time; the smallest positive half, as for stored scales."""


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


@op("linear", bound=1e-5)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, numerics: str = F32) -> Tensor:
    """``x @ weight^T + bias`` of x [..., K] and weight [O, K], with ``numerics`` as in `conv2d`.

    It stands for ``aten.linear`` where the numerics are not those of float32.
    """
    return F.linear(*_rounded(x, weight, numerics), bias)


NUMERICAL: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linear.default: linear}
"""What stands for operators that have no numerics."""


def _rounded(x: Tensor, weight: Tensor, numerics: str) -> tuple[Tensor, Tensor]:
    """What a contraction multiplies."""
    if numerics == F32:
        return x, weight
    if numerics != BF16:
        raise ValueError(f"linear layers and convolutions have the numerics {F32} and {BF16}, not '{numerics}'")
    return x.bfloat16().to(torch.float32), weight.bfloat16().to(torch.float32)


@op("conv2d", bound=1e-5)
def conv2d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0, 0, 0),
    groups: int = 1,
    numerics: str = F32,
) -> Tensor:
    """Convolution of x [B, H, W, C] with weight [O, kh, kw, C/groups]; padding is (top, bottom, left, right).

    ``numerics`` "bf16": x and weight are rounded to bfloat16 first; products and sums are in float32.
    """
    x, weight = _rounded(x, weight, numerics)
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


@op("hadamard")
def hadamard(x: Tensor, block: int) -> Tensor:
    """``H (s * x) / sqrt(block)`` of every ``block`` neighbouring channels of x [..., C]: an orthogonal rotation.

    ``block`` is a power of two that divides C, H Sylvester's matrix of that size, and s its `rotation_signs`. In this
    order, in f32: the signs; for h = 1, 2, 4 ... below ``block`` every pair (y[i], y[i + h]), where i lacks the bit h,
    becomes its sum and its difference; all times f32(1/sqrt(block)).
    """
    rotated: Tensor = _Hadamard.apply(x, block)
    return rotated


class _Hadamard(torch.autograd.Function):
    """`hadamard`, whose transpose takes the same steps from the last to the first, and the signs behind them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.block = block
        return _butterflies(x, block)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _butterflies(gradient, ctx.block, transposed=True), None


CACHED = 1 << 17
"""Values that two buffers of a core's second cache hold."""


def _butterflies(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    """Some rows at a time, so that each step finds them in the cache; channels outermost: sums of long runs."""
    signs, scale = rotation_signs(block).to(x)[:, None], block**-0.5
    first, last = (scale, signs) if transposed else (signs, scale)
    rows, together = x.reshape(-1, block), max(1, CACHED // block)
    result, buffers = torch.empty_like(rows), x.new_empty(2, together * block)
    steps = [1 << i for i in range(block.bit_length() - 1)]
    for part, out in zip(rows.split(together), result.split(together), strict=True):
        y, z = buffers[:, : part.numel()].reshape(2, block, len(part))
        torch.mul(part.T, first, out=y)
        for step in reversed(steps) if transposed else steps:
            a, b = y.reshape(block // (2 * step), 2, -1).unbind(1)
            total, difference = z.reshape(block // (2 * step), 2, -1).unbind(1)
            torch.add(a, b, out=total)
            torch.sub(a, b, out=difference)
            y, z = z, y
        torch.mul(y, last, out=out.T)
    return result.reshape(x.shape)


@functools.cache
def rotation_signs(block: int) -> Tensor:
    """`numerics.rotation_sign` [block].

    Such signs spread what all channels have in common evenly over the rotated ones; without any, the first has it all.
    """
    return torch.tensor([rotation_sign(i) for i in range(block)])


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
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    scale: float | None = None,
    mask: Tensor | None = None,
    numerics: str = "f32",
) -> Tensor:
    """softmax(q k^T * scale + mask) v per head, token-major.

    q [B, Tq, H*D], k and v [B, Tk, H*D], additive mask broadcast to [B, H, Tq, Tk]; scale is 1/sqrt(D) by default.
    ``numerics`` "bf16" and "int8" are approximations with a meaning of their own (`fast_attention`); gradients are
    those of "f32". The bounds of kernels are `numerics.BOUNDS`.
    """
    query, key, value = (split_heads(t, heads) for t in (q, k, v))
    if numerics == "f32":
        return join_heads(F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale))
    fast = join_heads(fast_attention(query, key, value, scale, mask, numerics))
    if torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v)):
        exact = attention(q, k, v, heads, scale, mask)
        return exact + (fast - exact).detach()
    return fast


@torch.no_grad()
def fast_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None, mask: Tensor | None, kind: str) -> Tensor:
    """`attention` of heads, q [B, H, Tq, D], k and v [B, H, Tk, D], with the numerics "bf16" or "int8".

    Both: ``l = (q * f32(scale * log2 e)) k^T + mask * log2 e``, so that the softmax is one of powers of two.

    bf16: q (scaled), k, v and the weights of the products, ``p = 2^(l - max_k l)``, rounded to bfloat16; products and
    sums in float32; ``y = (p v) / sum_k p`` with the weights of the sum as they were.

    int8 (after SageAttention, arXiv 2410.02367), with integer sums exact and everything else f32 unless said:

    1. ``k' = k - c``, c the mean of k over all keys, its sum taken key by key in ascending order, times f32(1/Tk)
    2. codes of a set of values x: ``s = m * f32(1/127)``, ``rint(x * (127/m))``, m its largest magnitude, at least
       1e-20; a set for each query (of q, scaled), each block of `KEY_BLOCK` keys (of k') and each dimension (of v)
    3. ``l = f32(Q K^T) * (s_q * s_k)``, + mask * log2 e by `fma`
    4. by block j: ``m_j = max l``, ``P_j = rint(2^(l - (m_j - f32(log2 255))))``, the power by `_exp2_coarse`
    5. ``y = (sum_j w_j (P_j V_j)) / (sum_j w_j sum P_j) * s_v`` with ``w_j = 2^(m_j - max_j m_j)``, in f64
    """
    factor = torch.tensor(attention_scale(q, scale) * LOG2_E, dtype=torch.float32, device=q.device)
    bias = None if mask is None else mask.to(torch.float32)
    if kind == "bf16":
        query, key, value = (x.bfloat16().float() for x in (q * factor, k, v))
        logits = query @ key.transpose(-1, -2)
        if bias is not None:
            logits = (logits + bias * LOG2_E).clamp_min(LOWEST)
        weights = torch.exp2(logits - logits.amax(-1, keepdim=True))
        return weights.bfloat16().float() @ value / weights.sum(-1, keepdim=True)
    if kind != "int8":
        raise ValueError(f"attention has the numerics {', '.join(NUMERICS)}, not '{kind}'")
    total = torch.zeros_like(k[..., 0, :])
    for row in k.unbind(-2):
        total = total + row
    k = k - (total * torch.tensor(1 / k.shape[-2], dtype=torch.float32))[..., None, :]
    q_codes, q_scale = _codes(q * factor, -1)
    v_codes, v_scale = _codes(v, -2)
    shift = torch.tensor(math.log2(255), dtype=torch.float32)
    blocks = []
    for start in range(0, k.shape[-2], KEY_BLOCK):
        keys = slice(start, start + KEY_BLOCK)
        k_codes, k_scale = _codes(k[..., keys, :], (-2, -1))
        logits = (q_codes @ k_codes.transpose(-1, -2)) * (q_scale * k_scale)  # the product is exact in f32
        if bias is not None:
            part = bias if bias.shape[-1] == 1 else bias[..., keys]
            logits = fma(part.expand_as(logits), torch.tensor(LOG2_E, dtype=torch.float32), logits).clamp_min(LOWEST)
        highest = logits.amax(-1, keepdim=True).clamp_min(LOWEST)
        weights = torch.round(_exp2_coarse(logits - (highest - shift)))
        blocks.append((highest, (weights @ v_codes[..., keys, :]).double(), weights.sum(-1, keepdim=True).double()))
    highest, products, sums = (torch.stack(parts) for parts in zip(*blocks, strict=True))
    share = torch.exp2((highest - highest.amax(0)).double())
    return ((share * products).sum(0) / (share * sums).sum(0)).to(torch.float32) * v_scale


def _codes(x: Tensor, dims: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Codes of -127..127 as f32, and their scale: a set of values over ``dims`` shares one (`fast_attention`)."""
    most = x.abs().amax(dims, keepdim=True).clamp_min(SMALLEST)
    return torch.round(x * (127 / most)), most * torch.tensor(1 / 127, dtype=torch.float32)


def _exp2_coarse(x: Tensor) -> Tensor:
    """2^x for -126 <= x <= 126, as kernels compute it: 2^-126 below. `numerics.EXP2_COARSE` by Horner's rule and fma.

    (In f64 the products are exact and the sums rounded once more than in a fma, which matters once in 2^29.)
    """
    x = x.clamp_min(-126.0)
    whole = torch.round(x)
    rest = (x - whole).double()
    power = torch.full_like(x, EXP2_COARSE[0])
    for coefficient in EXP2_COARSE[1:]:
        power = (power.double() * rest + torch.tensor(coefficient, dtype=torch.float32)).to(torch.float32)
    return torch.ldexp(power, whole)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """[B, T, H*D] as [B, H, T, D]."""
    return x.reshape(x.shape[0], x.shape[1], heads, -1).transpose(1, 2)


def join_heads(x: Tensor) -> Tensor:
    """[B, H, T, D] as [B, T, H*D]."""
    return x.transpose(1, 2).reshape(x.shape[0], x.shape[2], -1).contiguous()


def attention_probabilities(
    q: Tensor, k: Tensor, heads: int, scale: float | None = None, mask: Tensor | None = None
) -> Tensor:
    """softmax(q k^T * scale + mask) of `attention`, [B, H, Tq, Tk]."""
    query, key = split_heads(q, heads), split_heads(k, heads)
    logits = query @ key.transpose(-1, -2) * attention_scale(query, scale)
    return torch.softmax(logits if mask is None else logits + mask, -1)


def attention_scale(query: Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else scale


# --- time groups and activations ----------------------------------------------------------------------------


@op("time_group")
def time_group(timestep: Tensor, boundaries: Tensor) -> Tensor:
    """The group of each sample: how many of the ascending ``boundaries`` [G-1] are <= its timestep [B] -> i64 [B].

    Timesteps outside the calibrated range fall into the first or the last group.
    """
    return (timestep.to(torch.float32)[:, None] >= boundaries[None, :]).sum(1)


def per_sample(table: Tensor, group: Tensor | None, like: Tensor) -> Tensor:
    """``table[group]`` [B] shaped to broadcast over ``like`` [R, ...] whose R rows are batch-major.

    Without a group the table has an entry for each row of ``like`` [..., K] (`dynamic_quantize`).
    """
    if group is None:
        return table.reshape(*like.shape[:-1], 1)
    values = table[group]
    if like.shape[0] != values.shape[0]:
        values = values.repeat_interleave(like.shape[0] // values.shape[0])
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _clamped(
    x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
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


@op("fake_quantize_float")
def fake_quantize_float(x: Tensor, scale: Tensor, group: Tensor, exponent: int, bits: int) -> Tensor:
    """x moved to the nearest of ``scale[g]`` times the small floats of `round_float`, in f32; scale [G], group i64 [B].

    ``round_float(x / scale) * scale``; straight-through gradients to x within the range, and to the scale.
    """
    s = per_sample(scale.to(torch.float32), group, x)
    t = x / s
    largest = float_largest(exponent, bits)
    clamped = t.clamp(-largest, largest)
    return (round_float(t.detach(), exponent, bits) + (clamped - clamped.detach())) * s


def row_ranges(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale f32 [R] and zero point f32 [R] of the range of each of the R rows of x [..., K], widened to contain zero.

    With n = 2^bits - 1, low = min(0, min_k x) and high = max(0, max_k x), all in f32:
    ``scale = max((high - low) / n, SMALLEST_SCALE)`` and ``z = clamp(rint(-low / scale), 0, n)``.
    """
    low, high = x.detach().flatten(0, -2).to(torch.float32).aminmax(dim=-1)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(SMALLEST_SCALE)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


@op("dynamic_quantize")
def dynamic_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u8 of x [..., K] by the range of each row, with scale f32 [R] and zero point u8 [R] of `row_ranges`.

    The codes are those of `quantize` with these tables, a row its own group.
    """
    scale, zero = row_ranges(x, bits)
    clamped, _, z = _clamped(x, scale, zero, None, bits)
    return (torch.round(clamped) + z).to(torch.uint8), scale, zero.to(torch.uint8)


@op("dynamic_fake_quantize")
def dynamic_fake_quantize(x: Tensor, bits: int) -> Tensor:
    """``scale * (codes - z)`` of `dynamic_quantize` in f32; the gradient passes straight through, at the ends too."""
    scale, zero = row_ranges(x, bits)
    clamped, s, _ = _clamped(x.detach(), scale, zero, None, bits)
    return torch.round(clamped) * s + (x - x.detach())


dequantize_weight = op("dequantize_weight")(contract.dequantize_weight)


@op("fake_quantize_weight")
def fake_quantize_weight(
    weight: Tensor,
    scale: Tensor,
    offset: Tensor | None,
    lut: Tensor | None,
    row_class: Tensor | None,
    segments: Sequence[int] | None = None,
) -> Tensor:
    """weight [O, ...] moved to its nearest level, with a straight-through gradient."""
    from mpq_compiler.formats.contract import nearest_codes

    rows = weight.reshape(weight.shape[0], -1)
    codes = nearest_codes(rows.detach(), scale, offset, lut, row_class, segments)
    level = dequantize_weight(codes, scale, offset, lut, row_class, weight.shape, segments)
    return level.detach() + (weight - weight.detach())  # the level itself: weight + (level - weight) would round


dequantize_float8 = op("dequantize_float8")(contract.dequantize_float8)


@op("fake_quantize_float8")
def fake_quantize_float8(weight: Tensor, scale: Tensor, exponent: int = 4) -> Tensor:
    """weight [O, ...] moved to its nearest FP8 level, with a straight-through gradient."""
    s = scale.to(torch.float32).reshape(-1, *[1] * (weight.dim() - 1))
    level = round_float(weight.detach() / s, exponent, 8) * s
    return level + (weight - weight.detach())


@op("binary_branch")
def binary_branch(signs: Tensor, scale: Tensor, alpha: Tensor, shape: Sequence[int]) -> Tensor:
    """The residual ``scale[i] * alpha * (2 * signs - 1)``: signs u8 {0, 1} [O, K], alpha int8 [1] on the table's grid.

    One term of MPQ-DMv2's residual quantizer with the ratio alpha/scale shared by the layer (arXiv 2507.04290).
    """
    sign = signs.to(torch.float32) * 2 - 1
    return (sign * alpha.to(torch.float32) * scale.to(torch.float32)[:, :1]).reshape(list(shape))


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
    group: Tensor | None,
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
    return _with_offsets(y, sums, group, offset, act_scale)


def _with_offsets(
    y: Tensor, sums: list[Tensor] | None, group: Tensor | None, offset: Tensor | None, act_scale: Sequence[Tensor]
) -> Tensor:
    """y [R, ..., O] and, where rows of the weight have offsets, theirs: times the sum of each segment's inputs."""
    if offset is not None and sums is not None:
        for j, total in enumerate(sums):
            factor = per_sample(act_scale[j].to(torch.float32), group, y) * offset.to(torch.float32)
            y = fma(total.to(torch.float32).expand(y.shape), factor, y)
    return y


def _late_rows(
    x: Sequence[Tensor],
    weight: Sequence[Tensor],
    scale: Tensor,
    act_scale: Tensor,
    act_zero: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """``act_scale[m] * (sum_j scale[i, j] * sum_k q * w - z[m] * sum_j scale[i, j] * sum_k w) + bias``, in fused steps.

    The segments' codes x [..., K_j] and weights [O, K_j] are whole f64; a segment then costs one multiply-add.
    """
    total = torch.zeros((), device=scale.device)
    weights = torch.zeros(len(scale), device=scale.device)
    for j, (part, w) in enumerate(zip(x, weight, strict=True)):
        own = scale[:, j].to(torch.float32)
        product = (part @ w.T).to(torch.float32)
        total = fma(product, own, total.expand(product.shape))
        weights = fma(w.sum(1).to(torch.float32), own, weights)
    zero, unit = (per_sample(values.to(torch.float32), None, total) for values in (act_zero, act_scale))
    y = torch.zeros(len(scale), device=scale.device) if bias is None else bias.to(torch.float32)
    return fma(unit, fma(-zero, weights, total), y.expand(total.shape))


def _centred(x: Tensor, group: Tensor | None, act_zero: Sequence[Tensor], segments: Sequence[int]) -> list[Tensor]:
    """q - z_j per channel segment, in f64 where every product and sum of the contraction is exact."""
    parts = torch.split(x.to(torch.float64), list(segments), dim=-1)
    return [p - per_sample(act_zero[j].to(torch.float64), group, p) for j, p in enumerate(parts)]


@op("quant_linear")
def quant_linear(
    x: Tensor,
    group: Tensor | None,
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

    act_scale and act_zero hold a tensor for each of the J segments: [G], of which ``group`` [B] chooses by sample, or,
    where group is None, one entry for each row of x.

    ``A_j = sum_k (q - z_j) * LUT[code]`` exactly; then `_epilogue`. Segments are the J channel counts, summing to K.
    What rows have of their own counts once for more than `FEW_SEGMENTS` (`_late_rows`).
    """
    weight = torch.split(entries(codes, lut, row_class).double(), list(segments), dim=1)
    parts = _centred(x, group, act_zero, segments)
    sums = [p.sum(-1, keepdim=True) for p in parts] if offset is not None else None
    if group is None and len(segments) > FEW_SEGMENTS:
        y = _late_rows(torch.split(x.double(), list(segments), dim=-1), weight, scale, act_scale[0], act_zero[0], bias)
        return _with_offsets(y, sums, group, offset, act_scale)
    accumulators = [p @ w.T for p, w in zip(parts, weight, strict=True)]
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


# --- attention ----------------------------------------------------------------------------------------------


@op("fake_quantize_attention")
def fake_quantize_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    heads: int,
    scale: float | None,
    mask: Tensor | None,
    bits: int,
) -> Tensor:
    """`attention` with its probabilities fake-quantized; straight-through gradients. p_scale, p_zero [G]."""
    p = attention_probabilities(q, k, heads, scale, mask)
    return join_heads(fake_quantize(p, p_scale, p_zero, group, bits) @ split_heads(v, heads))


@op("quant_attention", bound=1e-6)
def quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    q_scale: Tensor,
    q_zero: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    heads: int,
    scale: float | None,
    mask: Tensor | None,
    bits: int,
) -> Tensor:
    """`attention` on codes u8: q [B, Tq, H*D], k and v [B, Tk, H*D]; tables [G], chosen by group i64 [B] -> f32.

    In this order, with integer sums exact and everything else f32:

    1. ``S = sum_d (q - q_zero) * (k - k_zero)``, ``l = f32(S) * ((q_scale * k_scale) * scale)``, + mask
    2. ``e = exp(l - max_k l)``, ``p = e / f32(sum_k e)``, the sum in f64
    3. P, the codes of p by `quantize` with p_scale, p_zero and ``bits``
    4. ``y = f32(sum_k (P - p_zero) * (v - v_zero)) * (p_scale * v_scale)``
    """
    if mask is not None:
        mask = mask.expand(len(q), heads, q.shape[1], k.shape[1])
    tables = (q_scale, q_zero, k_scale, k_zero, v_scale, v_zero, p_scale, p_zero)
    samples = [slice(b, b + 1) for b in range(len(q))]  # one at a time: the products are large
    return torch.cat(
        [
            _quant_attention(q[b], k[b], v[b], group[b], *tables, heads, scale, None if mask is None else mask[b], bits)
            for b in samples
        ]
    )


def _quant_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    group: Tensor,
    q_scale: Tensor,
    q_zero: Tensor,
    k_scale: Tensor,
    k_zero: Tensor,
    v_scale: Tensor,
    v_zero: Tensor,
    p_scale: Tensor,
    p_zero: Tensor,
    heads: int,
    scale: float | None,
    mask: Tensor | None,
    bits: int,
) -> Tensor:
    def centred(x: Tensor, zero: Tensor) -> Tensor:
        return split_heads(x.to(torch.float64) - per_sample(zero.to(torch.float64), group, x), heads)

    query, key, value = centred(q, q_zero), centred(k, k_zero), centred(v, v_zero)
    q_s, k_s, v_s, p_s = (per_sample(t.to(torch.float32), group, query) for t in (q_scale, k_scale, v_scale, p_scale))
    factor = q_s * k_s * torch.tensor(attention_scale(query, scale), dtype=torch.float32)
    logits = (query @ key.transpose(-1, -2)).to(torch.float32) * factor
    if mask is not None:
        logits = logits + mask
    e = torch.exp(logits - logits.amax(-1, keepdim=True))
    p = e / e.sum(-1, keepdim=True, dtype=torch.float64).to(torch.float32)
    codes = quantize(p, p_scale, p_zero, group, bits).to(torch.float64)
    y = (codes - per_sample(p_zero.to(torch.float64), group, codes)) @ value
    return join_heads(y.to(torch.float32) * (p_s * v_s))


def name_of(target: Any) -> str:
    """The printed name of a call target: ``mpq::quantize`` or ``aten.silu.default`` without its default overload."""
    if target in OPS:
        return OPS[target].name
    return str(target).removesuffix(".default")
