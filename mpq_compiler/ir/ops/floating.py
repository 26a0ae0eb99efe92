"""Float operators of the rewritten graph: contractions, norms, rotations, moves of data; and `fma`."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from mpq_compiler.ir.ops.registry import op
from mpq_compiler.targets.numerics import BF16, F32, rotation_sign

PIECE = 1 << 16
"""The most numbers for which `fma` computes at a time."""


@op("linear", bound=1e-5)
def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, numerics: str = F32) -> Tensor:
    """``x @ weight^T + bias`` of x [..., K] and weight [O, K], with ``numerics`` as in `conv2d`.

    It replaces ``aten.linear`` where the numerics are not those of float32.
    """
    return F.linear(*_rounded(x, weight, numerics), bias)


NUMERICAL: dict[Callable[..., Any], Callable[..., Any]] = {torch.ops.aten.linear.default: linear}
"""Aten operator -> the operator that replaces it where numerics other than float32 are chosen."""


def _rounded(x: Tensor, weight: Tensor, numerics: str) -> tuple[Tensor, Tensor]:
    """Both operands of a contraction, rounded to its numerics."""
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
    """Permute x to [B, C, H, W] and pad it; return it and the symmetric padding left for the convolution itself."""
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


@op("keep")
def keep(x: Tensor) -> Tensor:
    """``x`` itself, which later steps of a sampler may take in place of computing it (`ir.reuse`)."""
    return x


@op("hadamard")
def hadamard(x: Tensor, block: int) -> Tensor:
    """``H (s * x) / sqrt(block)`` of every ``block`` neighbouring channels of x [..., C]: an orthogonal rotation.

    ``block`` is a power of two that divides C, H Sylvester's matrix of that size, and s its `rotation_signs`. In this
    order, in f32: the signs; for h = 1, 2, 4 ... below ``block`` every pair (y[i], y[i + h]), where i lacks the bit h,
    becomes its sum and its difference; all times f32(1/sqrt(block)).
    """
    apply: Callable[..., Tensor] = _Hadamard.apply
    return apply(x, block)


class _Hadamard(torch.autograd.Function):
    """Autograd of `hadamard`: its transpose takes the steps in reverse order, and the signs last."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, block: int) -> Tensor:
        ctx.block = block
        return _butterflies(x, block)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return _butterflies(gradient, ctx.block, transposed=True), None


CACHED = 1 << 17
"""Values in a block of rows whose two f32 buffers fit a core's L2 cache."""


def _butterflies(x: Tensor, block: int, transposed: bool = False) -> Tensor:
    """`hadamard` in blocks of rows that stay in the cache; channels are outermost, so that each sum is of long runs."""
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
    """Signs f32 [block] of `numerics.rotation_sign`.

    The signs spread the mean of the channels evenly over the rotated ones; without them the first would hold it all.
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


@op("row_of_token")
def row_of_token(x: Tensor, tokens: Tensor, token: int | None = None) -> Tensor:
    """The row of x [B, T, C] at the first of ``tokens`` [B, T] that is ``token``, or else at the largest -> [B, C].

    The first row where no token is ``token``. So CLIP pools a text: at its end.
    """
    keys = tokens if token is None else (tokens == token).to(torch.int32)
    return x.gather(1, keys.argmax(1)[:, None, None].expand(-1, 1, x.shape[-1]))[:, 0]


@op("for_each_sample")
def for_each_sample(x: Tensor, like: Tensor) -> Tensor:
    """The one row of x [1, ...] for every sample of ``like`` [B, ...] -> [B, ...]."""
    return x.expand(like.shape[0], *x.shape[1:]).contiguous()


def fma(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Fused multiply-add in f32: a*b + c rounded once.

    The product is exact in f64; the sum is rounded to odd there, after which rounding to f32 is the correct one
    (Boldo and Melquiond 2008, "Emulation of FMA and correctly rounded sums"). Large tensors are computed in pieces:
    this takes ten tensors of f64.
    """
    if a.is_meta or math.prod(torch.broadcast_shapes(a.shape, b.shape, c.shape)) <= PIECE:
        return _rounded_once(a, b, c)
    like = a.to("meta") * b.to("meta") + c.to("meta")  # has the strides that torch would choose
    found = torch.empty_strided(like.shape, like.stride(), dtype=torch.float32, device=a.device)
    _fma_into(found, *(x.expand(like.shape) for x in (a, b, c)))
    return found


def _fma_into(found: Tensor, a: Tensor, b: Tensor, c: Tensor) -> None:
    """Writes a*b + c, all of one shape, by halves of the outermost dimension that has any."""
    if found.numel() <= PIECE:
        found.copy_(_rounded_once(a, b, c))
        return
    dim = next(d for d, size in enumerate(found.shape) if size > 1)
    for parts in zip(*(x.chunk(2, dim) for x in (found, a, b, c)), strict=True):
        _fma_into(*parts)


def _rounded_once(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    product = a.double() * b.double()
    c64 = c.double()
    total = product + c64
    part = total - product
    error = (product - (total - part)) + (c64 - part)
    bits = total.view(torch.int64)
    inexact_even = (error != 0) & ((bits & 1) == 0) & torch.isfinite(total)
    step = torch.where((error > 0) == (total > 0), 1, -1)
    return (bits + torch.where(inexact_even, step, 0)).view(torch.float64).to(torch.float32)
