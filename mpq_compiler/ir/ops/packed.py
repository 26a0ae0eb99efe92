"""Linear layers and convolutions on codes: integer sums, then an epilogue in f32."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn.functional import linear

from mpq_compiler.formats.contract import LUT_MAX, NO_LEVEL, WeightTables, entries
from mpq_compiler.ir.ops.activations import per_sample
from mpq_compiler.ir.ops.floating import conv2d, fma
from mpq_compiler.ir.ops.registry import op

WHOLE = 1 << 24
"""The size up to which float32 has every whole number: sums of products that stay below are exact in any order."""
LARGEST_CODE = 255
"""The largest size of an activation's code less its zero point."""
FEW_SEGMENTS = 2
"""Most segments whose sums are scaled one by one: with more, dynamic rows apply their own scale once (`_late_rows`)."""


def _epilogue(
    accumulators: list[Tensor],
    sums: list[Tensor] | None,
    group: Tensor | None,
    tables: WeightTables[Tensor],
    act_scale: Sequence[Tensor],
    bias: Tensor | None,
) -> Tensor:
    """The f32 epilogue over int accumulators [R, ..., O] (exact), segment by segment, offsets last."""
    first = accumulators[0]
    y = torch.zeros((), dtype=torch.float32, device=first.device) if bias is None else bias.to(torch.float32)
    y = y.expand(first.shape)
    for j, accumulator in enumerate(accumulators):
        factor = per_sample(act_scale[j].to(torch.float32), group, first) * tables.scale[:, j].to(torch.float32)
        y = fma(accumulator.to(torch.float32), factor, y)
    return _with_offsets(y, sums, group, tables.offset, act_scale)


def _with_offsets(
    y: Tensor, sums: list[Tensor] | None, group: Tensor | None, offset: Tensor | None, act_scale: Sequence[Tensor]
) -> Tensor:
    """Add to y [R, ..., O] the offsets of the weight's rows, times the sum of each segment's inputs."""
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
    peak: int,
) -> Tensor:
    """``act_scale[m] * (sum_j scale[i, j] * sum_k q * w - z[m] * sum_j scale[i, j] * sum_k w) + bias``, in fused steps.

    The segments' codes x [..., K_j] and weights [O, K_j], at most ``peak`` large, are whole; a segment then costs one
    multiply-add.
    """
    total = torch.zeros((), device=scale.device)
    weights = torch.zeros(len(scale), device=scale.device)
    for j, (part, w) in enumerate(zip(x, weight, strict=True)):
        own = scale[:, j].to(torch.float32)
        product = _exactly(linear, part, w, peak).to(torch.float32)
        total = fma(product, own, total.expand(product.shape))
        weights = fma(w.sum(1, dtype=torch.float64).to(torch.float32), own, weights)
    zero, unit = (per_sample(values.to(torch.float32), None, total) for values in (act_zero, act_scale))
    y = torch.zeros(len(scale), device=scale.device) if bias is None else bias.to(torch.float32)
    return fma(unit, fma(-zero, weights, total), y.expand(total.shape))


def _centred(x: Tensor, group: Tensor | None, act_zero: Sequence[Tensor], segments: Sequence[int]) -> list[Tensor]:
    """The codes less the zero point, q - z_j, by channel segment: whole numbers in f32."""
    parts = torch.split(x.to(torch.float32), list(segments), dim=-1)
    return [p - per_sample(act_zero[j].to(torch.float32), group, p) for j, p in enumerate(parts)]


def _exactly(multiply: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor, peak: int) -> Tensor:
    """Products summed over the channels, exactly: in f32 over so many channels at a time that no sum exceeds `WHOLE`.

    That takes a third to two thirds of the time in f64, which is for those who have let torch round products.

    Args:
        multiply: sums products over the last dimension of both.
        x: whole numbers, f32 [..., C], at most `LARGEST_CODE` large.
        weight: whole numbers, f32 [O, ..., C].
        peak: their largest size.

    Returns:
        The sums, in f32, or in f64 where there are several.
    """
    if torch.get_float32_matmul_precision() != "highest":
        return multiply(x.double(), weight.double())
    taps = math.prod(weight.shape[1:-1])
    together = max(1, WHOLE // (LARGEST_CODE * max(1, peak) * taps))
    parts = zip(x.split(together, -1), weight.split(together, -1), strict=True)
    total = multiply(*next(parts))
    for part in parts:
        total = total.double().add_(multiply(*part))
    return total


def _peak(lut: Tensor | None) -> int:
    """The largest size of a weight's entries."""
    if lut is None:
        return LUT_MAX
    return int(torch.where(lut == NO_LEVEL, 0, lut).to(torch.int16).abs().max())


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
    Rows with tables of their own and more than `FEW_SEGMENTS` segments apply scale and zero point once (`_late_rows`).
    """
    tables = WeightTables(scale, offset, lut, row_class, segments)
    weight, peak = torch.split(entries(codes, lut, row_class), list(segments), dim=1), _peak(lut)
    parts = _centred(x, group, act_zero, segments)
    sums = [p.sum(-1, keepdim=True, dtype=torch.float64) for p in parts] if offset is not None else None
    if group is None and len(segments) > FEW_SEGMENTS:
        codes_of = torch.split(x.to(torch.float32), list(segments), dim=-1)
        y = _late_rows(codes_of, weight, scale, act_scale[0], act_zero[0], bias, peak)
        return _with_offsets(y, sums, group, offset, act_scale)
    accumulators = [_exactly(linear, p, w, peak) for p, w in zip(parts, weight, strict=True)]
    return _epilogue(accumulators, sums, group, tables, act_scale, bias)


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
    tables = WeightTables(scale, offset, lut, row_class, segments)
    rows = entries(codes, lut, row_class).reshape(codes.shape[0], kernel[0], kernel[1], -1)
    weight, peak = torch.split(rows, list(segments), dim=3), _peak(lut)
    parts = _centred(x, group, act_zero, segments)

    def convolved(image: Tensor, taps: Tensor) -> Tensor:
        return conv2d(image, taps, None, stride, padding)

    accumulators = [_exactly(convolved, p, w, peak) for p, w in zip(parts, weight, strict=True)]
    sums = None
    if offset is not None:
        sums = [_exactly(convolved, p, torch.ones_like(w[:1]), 1) for p, w in zip(parts, weight, strict=True)]
    return _epilogue(accumulators, sums, group, tables, act_scale, bias)
