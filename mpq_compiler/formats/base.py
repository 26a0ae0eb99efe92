"""What every weight format shares: the quantized form, nearest codes, stored types and bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler import ops

F16_TINY = 2.0**-24
"""Smallest positive half; the scale of a row that is constant."""
F16_MAX = 65504.0


def stored_type(value: Tensor) -> Tensor:
    """A float tensor as it is stored (f16), or f32 where a value does not fit the range of f16."""
    half = value.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else value.to(torch.float32)


def stored_scale(scale: Tensor) -> Tensor:
    """Positive scales on the f16 grid: zero (a constant row) and underflow become the smallest positive half."""
    return scale.clamp(F16_TINY, F16_MAX).to(torch.float16)


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored form of one weight [O, K]; see `ops.dequantize_weight`.

    A residual format also keeps its branch apart: ``signs`` u8 [O, K] and ``alpha`` int8 [1], with ``codes`` and
    ``lut`` those of the base.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    lut: Tensor | None
    signs: Tensor | None = None
    alpha: Tensor | None = None

    def dequantize(self) -> Tensor:
        """f32 [O, K]."""
        merged = self.merged()
        return ops.dequantize_weight(merged.codes, merged.scale, merged.offset, merged.lut, None, self.codes.shape)

    def merged(self) -> QuantizedWeight:
        """Base and branch as one table; itself where there is no branch."""
        if self.signs is None or self.lut is None or self.alpha is None:
            return self
        codes, lut = ops.merge_branch(self.codes, self.lut, self.signs, self.alpha)
        return QuantizedWeight(codes, self.scale, self.offset, lut)


@dataclass(frozen=True)
class Format(ABC):
    """A weight format: its name in plans and recipes, and the bits of one stored code."""

    name: str
    bits: int

    @abstractmethod
    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        """The quantized form of weight f32 [O, K] with the least output error.

        ``gram`` [K, K] is the mean of x x^T over calibration rows; the error of a row e is then e^T gram e, the
        mean squared error of the layer's output. None stands for the identity (weight error).
        """

    @property
    @abstractmethod
    def has_offset(self) -> bool: ...

    def stored_bytes(self, rows: int, columns: int) -> int:
        """Bytes in the artifact of a [rows, columns] weight: codes, scales, offsets and table."""
        codes = math.ceil(self.bits * rows * columns / 8)
        table = 0 if self.bits == 8 else 2**self.bits
        return codes + 2 * rows * (2 if self.has_offset else 1) + table


def nearest_codes(
    weight: Tensor, scale: Tensor, offset: Tensor | None, lut: Tensor | None, row_class: Tensor | None
) -> Tensor:
    """Codes of the levels nearest to weight [O, K]; ties go to the lower level (8 bits: to the even code).

    u8 indices where there is a table, int8 values where there is none.
    """
    shifted = weight if offset is None else weight - offset.to(torch.float32)[:, None]
    t = shifted / scale.to(torch.float32)[:, :1]
    if lut is None:
        return torch.round(t).clamp(-ops.LUT_MAX, ops.LUT_MAX).to(torch.int8)
    if lut.shape[0] == 1:
        return _nearest_entry(t, lut[0])
    assert row_class is not None
    codes = torch.empty(weight.shape, dtype=torch.uint8, device=weight.device)
    for c in range(lut.shape[0]):
        rows = row_class.long().repeat_interleave(ops.TILE_ROWS)[: len(weight)] == c
        codes[rows] = _nearest_entry(t[rows], lut[c])
    return codes


def _nearest_entry(t: Tensor, table: Tensor) -> Tensor:
    order = torch.argsort(table.to(torch.int32), stable=True)
    levels = table[order].to(torch.float32)
    index = torch.bucketize(t, (levels[1:] + levels[:-1]) / 2)
    return order[index].to(torch.uint8)


def output_error(error: Tensor, gram: Tensor | None) -> Tensor:
    """e^T gram e per row of error [..., O, K] -> [..., O], for a gram [K, K], a diagonal [K] or the identity (None)."""
    if gram is None:
        return error.square().sum(-1)
    return (error * (error * gram if gram.dim() == 1 else error @ gram)).sum(-1)


def diagonal(gram: Tensor) -> Tensor:
    """The diagonal [K] of a gram that is kept whole or as its diagonal."""
    return gram if gram.dim() == 1 else gram.diagonal()
