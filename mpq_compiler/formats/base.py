"""The base of weight formats: the quantized form, stored types, bytes, and the error that a fit minimizes."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from mpq_compiler import _moved
from mpq_compiler.formats import contract
from mpq_compiler.formats.contract import row_parts

F16_TINY = 2.0**-24
"""The smallest positive half, which is the scale of a constant row."""
F16_MAX = 65504.0
"""The largest finite half."""


def stored_type(value: Tensor) -> Tensor:
    """Converts a float tensor to the type it is stored in: f16, or f32 where a value exceeds the range of f16."""
    half = value.to(torch.float16)
    return half if bool(torch.isfinite(half).all()) else value.to(torch.float32)


def stored_scale(scale: Tensor) -> Tensor:
    """Rounds positive scales to f16; zero (a constant row) and underflow become the smallest positive half."""
    return scale.clamp(F16_TINY, F16_MAX).to(torch.float16)


class Fit(Protocol):
    """A weight in a format: what `Format.fit` returns."""

    @property
    def codes(self) -> Tensor:
        """The codes [O, K]."""

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, f32 [O, K]."""


@dataclass(frozen=True)
class QuantizedWeight:
    """The stored form of one weight [O, K]; see `contract.dequantize_weight`.

    A residual format keeps its branch apart, in ``signs`` and ``alpha``; ``codes`` and ``lut`` are then the base's.
    """

    codes: Tensor
    """u8 [O, K], indices into ``lut``; int8 [O, K], the values themselves, where there is no table."""
    scale: Tensor
    """f16 [O, J], one column for each K-segment."""
    offset: Tensor | None
    """f16 [O], or f32 where f16 overflows; None without offsets."""
    lut: Tensor | None
    """int8 [classes, entries]; None where the codes are the values."""
    signs: Tensor | None = None
    """u8 [O, K], 0 or 1: the binary branch of a residual format."""
    alpha: Tensor | None = None
    """int8 [1]: the magnitude of the branch, on the grid of ``lut``."""
    row_class: Tensor | None = None
    """The table of each row [O], or of each tile of 16 rows; None with one table."""
    segments: tuple[int, ...] | None = None
    """The channel counts of the J columns of ``scale``; None where there is one."""

    def dequantize(self) -> Tensor:
        """The values that codes and branch stand for, f32 [O, K]."""
        merged = self.merged()
        return contract.dequantize(merged.codes, merged.tables)

    @property
    def tables(self) -> contract.WeightTables[Tensor]:
        """What the codes refer to; of a residual format, the base's."""
        return contract.WeightTables(self.scale, self.offset, self.lut, self.row_class, self.segments)

    def of_rows(self, part: slice) -> QuantizedWeight:
        """The rows of ``part`` of a weight whose rows all have one table."""
        offset, signs = (None if value is None else value[part] for value in (self.offset, self.signs))
        return replace(self, codes=self.codes[part], scale=self.scale[part], offset=offset, signs=signs)

    def merged(self) -> QuantizedWeight:
        """Merges base and branch into one table; returns itself where there is no branch."""
        if self.signs is None or self.lut is None or self.alpha is None:
            return self
        codes, lut = contract.merge_branch(self.codes, self.lut, self.signs, self.alpha)
        return QuantizedWeight(codes, self.scale, self.offset, lut, None, None, self.row_class, self.segments)


Choose = Callable[[Sequence[Fit], Tensor], Sequence[Fit]]
"""Chooses the codes of several fits of rows [O, K], one fit for each."""


@dataclass(frozen=True)
class Format(ABC):
    """A weight format.

    A subclass of the weight contract implements `fit` and `has_offset`; with K-groups also `segments`, with several
    tables also `classes`. docs/formats.md adds a format from beginning to end.
    """

    name: str
    """Its name in plans and recipes."""
    bits: int
    """The bits of a stored code, on average."""

    @abstractmethod
    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Fit:
        """Quantizes a weight with the least output error.

        Args:
            weight: f32 [O, ..., C], quantized as rows [O, K].
            gram: the mean of x x^T over calibration rows, [K, K]: the error of a row e is e^T gram e, the mean squared
                error of the layer's output. [K] is its diagonal, for inputs whose whole gram is too large to keep;
                [J, B, B] its J blocks of B inputs along the diagonal, as if inputs of different blocks were
                independent; [K, r] a factor S of it with fewer columns, gram = S S^T. None stands for the identity,
                under which the error is the weight's own.
        """

    def start(self, weight: Tensor) -> Fit:
        """Quantizes weight [O, ..., C] without a search, by its range: what is simulated until a pass calls `fit`."""
        return self.fit(weight)

    def form(self, weight: Tensor) -> Fit:
        """A quantized weight of the form that `fit` gives, fast and however inaccurate, to choose and time kernels."""
        return self.start(weight)

    def rounded(self, rows: Tensor, fit: Fit, choose: Choose) -> Fit:
        """Chooses the codes of a fit of rows [O, K] by ``choose``, which is called as often as the format needs."""
        return choose([fit], rows)[0]

    @property
    def has_offset(self) -> bool:
        """Whether every row has an offset, stored as f16."""
        return False

    @property
    def by_row(self) -> bool:
        """Whether some rows can stand for all: each is quantized alike with any beside it, or as in the given whole."""
        return True

    @property
    def searches(self) -> bool:
        """Whether `fit` uses its gram to compare candidates alone, for which a factor of few columns will do."""
        return False

    @property
    def trials(self) -> int:
        """How often `fit` quantizes the weight to compare what it tries, by which its time is estimated."""
        return 14

    @property
    def walks(self) -> int:
        """How often GPTQ walks over the columns of a weight until its codes are chosen."""
        return 1

    @property
    def integer(self) -> bool:
        """Whether layers multiply its codes by quantized activations; else they compute in float."""
        return True

    def segments(self, channels: int) -> tuple[int, ...]:
        """The channel counts of the K-segments, each of which has a scale of its own."""
        return (channels,)

    def classes(self, rows: int) -> int:
        """The number of tables of a weight with ``rows`` rows."""
        return 1

    def class_bytes(self, rows: int) -> int:
        """Bytes of the row classes, where there are several tables: one byte for each tile of 16 rows."""
        return row_tiles(rows)

    @property
    def index_bits(self) -> int:
        """The bits of the longest code, which number the entries of a table."""
        return self.bits

    @property
    def operand_bits(self) -> int:
        """The bits of a weight as it is multiplied: those of its level on a grid, or of an entry of a table."""
        return self.bits

    def branch_elements(self, rows: int, columns: int) -> int:
        """The number of f16 elements of a float branch; each costs a multiplication for every input row, too."""
        return 0

    def stored_bytes(self, *shape: int) -> int:
        """Bytes of a weight [O, ..., C] in the artifact: codes, scales, offsets, tables and row classes."""
        rows, channels, count = shape[0], shape[-1], math.prod(shape)
        codes = math.ceil(self.bits * count / 8)
        floats = rows * (len(self.segments(channels)) + self.has_offset)
        tables = self.classes(rows)
        entries = 0 if self.bits == 8 else tables * 2**self.index_bits
        return codes + 2 * floats + entries + (self.class_bytes(rows) if tables > 1 else 0)


def row_tiles(rows: int) -> int:
    """The number of tiles of 16 rows, each of which has a row class."""
    return -(-rows // contract.TILE_ROWS)


def fit_by_parts(rows: Tensor, fit: Callable[[Tensor], QuantizedWeight]) -> QuantizedWeight:
    """Joins the fits of `row_parts` of rows [O, K], which must all have the same table and alpha."""
    parts = [fit(rows[part]) for part in row_parts(rows)]
    if len(parts) == 1:
        return parts[0]
    codes, scale = (torch.cat([getattr(part, name) for part in parts]) for name in ("codes", "scale"))
    offset, signs = (_joined([getattr(part, name) for part in parts]) for name in ("offset", "signs"))
    return replace(parts[0], codes=codes, scale=scale, offset=offset, signs=signs)


def _joined(parts: list[Tensor | None]) -> Tensor | None:
    found = [part for part in parts if part is not None]
    return torch.cat(found) if found else None


def departures(fit: Fit, weight: Tensor) -> Iterator[Tensor]:
    """What a fit departs by from its weight [O, ..., C], f32 [R, K]: of all rows, or of some after the other."""
    if not isinstance(fit, QuantizedWeight) or fit.row_class is not None:
        yield fit.dequantize() - weight.to(torch.float32).flatten(1)
        return
    for part in row_parts(fit.codes):
        yield fit.of_rows(part).dequantize() - weight[part].to(torch.float32).flatten(1)


def output_error(error: Tensor, gram: Tensor | None) -> Tensor:
    """The output error e^T gram e of each row of error [..., O, K]; gram as in `Format.fit`."""
    if gram is not None and _is_factor(gram):
        return (error @ gram).square().sum(-1)
    return (error * weighted(error, gram)).sum(-1)


def row_errors(fit: Fit, weight: Tensor, gram: Tensor | None) -> Tensor:
    """The output error of each row of a fit of weight [O, ..., C], [O]; gram as in `Format.fit`."""
    return torch.cat([output_error(error, gram) for error in departures(fit, weight)])


def errors_of_rows(fits: Sequence[Fit], rows: Tensor, gram: Tensor | None) -> list[Tensor]:
    """The output errors of each row of several fits of the same rows [O, K], as `row_errors` has them of each.

    Of few rows a gram is read once for as many fits as `contract.TOGETHER` allows.
    """
    step = max(1, contract.TOGETHER // rows.numel())
    if step == 1:
        return [row_errors(fit, rows, gram) for fit in fits]
    parts = (torch.stack([fit.dequantize() for fit in fits[i : i + step]]) for i in range(0, len(fits), step))
    return [error for part in parts for error in output_error(part - rows, gram)]


def weighted(rows: Tensor, gram: Tensor | None) -> Tensor:
    """Multiplies rows [..., K] by a gram as in `Format.fit`."""
    if gram is None:
        return rows
    if gram.dim() == 1:
        return rows * gram
    if gram.dim() == 3:
        return torch.cat([part @ block for part, block in zip(rows.chunk(len(gram), -1), gram, strict=True)], -1)
    return rows @ gram @ gram.T if _is_factor(gram) else rows @ gram


def diagonal(gram: Tensor) -> Tensor:
    """The diagonal [K] of a gram as in `Format.fit`, but for None."""
    if gram.dim() == 1:
        return gram
    if gram.dim() == 3:
        return gram.diagonal(dim1=1, dim2=2).flatten()
    return gram.square().sum(1) if _is_factor(gram) else gram.diagonal()


def _is_factor(gram: Tensor) -> bool:
    return gram.dim() == 2 and gram.shape[1] < gram.shape[0]


__getattr__ = _moved.forward(__name__)  # names that went to `contract`
