"""What every weight format shares: the quantized form, nearest codes, stored types and bytes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from mpq_compiler import _moved
from mpq_compiler.formats import contract

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


class Fit(Protocol):
    """A weight in a format: what `Format.fit` yields."""

    @property
    def codes(self) -> Tensor: ...

    def dequantize(self) -> Tensor:
        """f32 [O, K]."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored form of one weight [O, K]; see `contract.dequantize_weight`.

    A residual format also keeps its branch apart: ``signs`` u8 [O, K] and ``alpha`` int8 [1], with ``codes`` and
    ``lut`` those of the base.
    """

    codes: Tensor
    scale: Tensor
    offset: Tensor | None
    lut: Tensor | None
    signs: Tensor | None = None
    alpha: Tensor | None = None
    row_class: Tensor | None = None
    segments: tuple[int, ...] | None = None
    """The channel counts of the J columns of ``scale``; None where there is one."""

    def dequantize(self) -> Tensor:
        """f32 [O, K]."""
        q = self.merged()
        return contract.dequantize_weight(q.codes, q.scale, q.offset, q.lut, q.row_class, q.codes.shape, q.segments)

    def merged(self) -> QuantizedWeight:
        """Base and branch as one table; itself where there is no branch."""
        if self.signs is None or self.lut is None or self.alpha is None:
            return self
        codes, lut = contract.merge_branch(self.codes, self.lut, self.signs, self.alpha)
        return QuantizedWeight(codes, self.scale, self.offset, lut, None, None, self.row_class, self.segments)


@dataclass(frozen=True)
class Format(ABC):
    """A weight format: its name in plans and recipes, and the bits of a stored code, on average.

    A subclass of the weight contract says how to `fit` and whether it `has_offset`; with K-groups also its `segments`,
    with several tables its `classes`. docs/formats.md adds one from beginning to end.
    """

    name: str
    bits: int

    @abstractmethod
    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Fit:
        """The quantized form of weight f32 [O, ..., C], as rows [O, K], with the least output error.

        ``gram`` [K, K] is the mean of x x^T over calibration rows; the error of a row e is then e^T gram e, the
        mean squared error of the layer's output. [K] is its diagonal, where it is too large to keep, and None stands
        for the identity (weight error).
        """

    def start(self, weight: Tensor) -> Fit:
        """Levels that span the range of weight [O, ..., C], at once: what is simulated until a pass calls `fit`."""
        return self.fit(weight)

    def form(self, weight: Tensor) -> Fit:
        """What `fit` yields, at once and however far from the weight: all that kernels are chosen and timed by."""
        return self.start(weight)

    @property
    def has_offset(self) -> bool:
        """Whether rows have an offset, stored as f16."""
        return False

    @property
    def integer(self) -> bool:
        """Whether layers multiply the codes with quantized activations; else they compute in float."""
        return True

    def segments(self, channels: int) -> tuple[int, ...]:
        """The channel counts that have a scale of their own."""
        return (channels,)

    def classes(self, rows: int) -> int:
        """The number of tables of a weight with so many rows."""
        return 1

    def class_bytes(self, rows: int) -> int:
        """Bytes of the row classes, where there are several tables: one for each tile of 16 rows."""
        return row_tiles(rows)

    @property
    def index_bits(self) -> int:
        """The bits that number the entries of its tables: those of the longest code, where codes differ in length."""
        return self.bits

    def branch_elements(self, rows: int, columns: int) -> int:
        """Elements of a float branch beside the table, stored as f16: each also costs a multiplication a row."""
        return 0

    def stored_bytes(self, *shape: int) -> int:
        """Bytes in the artifact of a weight [O, ..., C]: codes, scales, offsets, tables and row classes."""
        rows, channels, count = shape[0], shape[-1], math.prod(shape)
        codes = math.ceil(self.bits * count / 8)
        floats = rows * (len(self.segments(channels)) + self.has_offset)
        tables = self.classes(rows)
        entries = 0 if self.bits == 8 else tables * 2**self.index_bits
        return codes + 2 * floats + entries + (self.class_bytes(rows) if tables > 1 else 0)


def row_tiles(rows: int) -> int:
    """Tiles of 16 rows, each with a row class."""
    return -(-rows // contract.TILE_ROWS)


def output_error(error: Tensor, gram: Tensor | None) -> Tensor:
    """e^T gram e per row of error [..., O, K] -> [..., O], for a gram [K, K], a diagonal [K] or the identity (None)."""
    return (error * weighted(error, gram)).sum(-1)


def weighted(rows: Tensor, gram: Tensor | None) -> Tensor:
    """``rows @ gram`` for a gram [K, K], a diagonal [K] or the identity (None)."""
    if gram is None:
        return rows
    return rows * gram if gram.dim() == 1 else rows @ gram


def diagonal(gram: Tensor) -> Tensor:
    """The diagonal [K] of a gram that is kept whole or as its diagonal."""
    return gram if gram.dim() == 1 else gram.diagonal()


__getattr__ = _moved.forward(__name__)  # names that went to `contract`
