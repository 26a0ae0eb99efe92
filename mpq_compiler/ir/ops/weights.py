"""Weights out of their stored parts, and open weights moved to their nearest levels."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import WeightTables, round_float
from mpq_compiler.ir.ops.registry import op

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
    """Move weight [O, ...] to its nearest level, with a straight-through gradient."""
    tables = WeightTables(scale, offset, lut, row_class, segments)
    codes = contract.quantize(weight.detach().reshape(weight.shape[0], -1), tables)
    level = contract.dequantize(codes, tables).reshape(weight.shape)
    return level.detach() + (weight - weight.detach())  # the level itself: weight + (level - weight) would round


dequantize_float8 = op("dequantize_float8")(contract.dequantize_float8)


@op("fake_quantize_float8")
def fake_quantize_float8(weight: Tensor, scale: Tensor, exponent: int = 4) -> Tensor:
    """Move weight [O, ...] to its nearest FP8 level, with a straight-through gradient."""
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
