"""Formats of one fixed table without offsets: ``scale[i, j] * LUT[code]``, with a scale for each row or K-group."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.formats import contract, floating
from mpq_compiler.formats.base import Format, QuantizedWeight, diagonal, output_error, stored_scale, weighted
from mpq_compiler.formats.contract import nearest_codes

SHRINK = tuple(1 - 0.05 * i for i in range(14))
"""Fractions of the largest magnitude that the scale search tries."""
SWEEPS = 2
"""Passes of the search over the K-groups; each group is searched given the error that the others leave."""


@dataclass(frozen=True)
class TableFormat(Format):
    """The levels of ``table`` with a scale for each row, or for each group of ``size`` input channels of a row.

    A group has the same channels at every tap of a convolution, and the last one of a layer may be shorter. A packed
    layer accumulates each group by itself, like the parts of a concatenated input.
    """

    table: tuple[int, ...] | None = None
    """The int8 entries in the order of the codes; None: 8-bit codes are the values."""
    size: int | None = None
    """Input channels of a K-group; None has one scale a row."""
    shared: bool = False
    """Whether all rows share one scale, which maps the tensor's largest magnitude to the largest level.

    It is stored for every row nevertheless.
    """

    @property
    def by_row(self) -> bool:
        return not self.shared

    def segments(self, channels: int) -> tuple[int, ...]:
        size = min(self.size or channels, channels)
        whole, rest = divmod(channels, size)
        return (size,) * whole + ((rest,) if rest else ())

    @property
    def operand_bits(self) -> int:
        return 8 if self.table == floating.NF4 else self.bits  # a codebook like those that are learned

    @property
    def lut(self) -> Tensor | None:
        """The table as int8 [1, 2^bits], or None."""
        return None if self.table is None else torch.tensor([self.table], dtype=torch.int8)

    @property
    def top(self) -> int:
        """The largest magnitude that is a level with both signs."""
        return contract.LUT_MAX if self.table is None else min(max(self.table), -min(self.table))

    def start(self, weight: Tensor) -> QuantizedWeight:
        segments = self.segments(weight.shape[-1])
        return self.quantize(weight.flatten(1), self._peaks(weight.flatten(1), segments), segments)

    def _peaks(self, rows: Tensor, segments: tuple[int, ...]) -> Tensor:
        """The scales f16 [O, J] that map the largest magnitude of each group to the largest level."""
        group = contract.column_segments(segments, rows.shape[1]).expand(len(rows), -1)
        peak = torch.zeros(len(rows), len(segments)).scatter_reduce(1, group, rows.abs(), "amax")
        if self.shared:
            peak = peak.amax(0, keepdim=True).expand_as(peak)
        return stored_scale(peak / self.top)

    def quantize(self, rows: Tensor, scale: Tensor, segments: tuple[int, ...]) -> QuantizedWeight:
        """Quantizes rows [O, K] to the nearest codes at given scales [O, J]."""
        several = segments if len(segments) > 1 else None
        codes = nearest_codes(rows, scale, None, self.lut, None, several)
        return QuantizedWeight(codes, scale, None, self.lut, segments=several)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        """Quantizes; each group searches a grid of shrunken ranges for the least output error of its whole row."""
        rows, segments = weight.flatten(1), self.segments(weight.shape[-1])
        if gram is not None and gram.dim() == 3 and len(segments) > 1:
            gram = diagonal(gram)  # K-groups lie across its blocks
        widest = self._peaks(rows, segments)
        scale = widest.clone()
        error = self.quantize(rows, scale, segments).dequantize() - rows
        group = contract.column_segments(segments, rows.shape[1])
        for _ in range(SWEEPS if len(segments) > 1 else 1):
            for j in range(len(segments)):
                columns = (group == j).nonzero().flatten()
                own, others, inner = rows[:, columns], _cross(error, gram, columns), _block(gram, columns)
                least = self._together(output_error(error[:, columns], inner) + 2 * (error[:, columns] * others).sum(1))
                for shrink in SHRINK if self.bits < 8 else SHRINK[:5]:
                    tried = stored_scale(widest[:, j : j + 1].float() * shrink)
                    e = self.quantize(own, tried, (len(columns),)).dequantize() - own
                    total = self._together(output_error(e, inner) + 2 * (e * others).sum(1))
                    better = total < least
                    least = torch.where(better, total, least)
                    scale[:, j] = torch.where(better, tried[:, 0], scale[:, j])
                    error[:, columns] = torch.where(better[:, None], e, error[:, columns])
        return self.quantize(rows, scale, segments)

    def _together(self, errors: Tensor) -> Tensor:
        """The errors [O] by which rows choose their scales: their sum where all rows share a scale."""
        return errors.sum().expand_as(errors) if self.shared else errors


def _block(gram: Tensor | None, columns: Tensor) -> Tensor | None:
    """The part of a gram that belongs to some columns; None stays None, and blocks are those of all columns."""
    if gram is None or gram.dim() == 3:
        return gram
    if gram.dim() == 1:
        return gram[columns]
    return gram[columns][:, columns]


def _cross(error: Tensor, gram: Tensor | None, columns: Tensor) -> Tensor:
    """The other columns' share of half the error's gradient: ``sum_k e_k G[k, columns]`` over the columns k besides."""
    if gram is None or gram.dim() != 2 or len(columns) == len(gram):
        return torch.zeros(len(error), len(columns))
    return error @ gram[:, columns] - weighted(error[:, columns], _block(gram, columns))


TABLES: dict[str, tuple[int, ...]] = {
    "int2": (-3, -1, 1, 3),
    "int3": tuple(range(-4, 4)),
    "int4": tuple(range(-8, 8)),
    "fp4": floating.E2M1,
    "nf4": floating.NF4,
}
"""The tables that K-groups may have, by the name of their format.

Without an offset, two bits are better spent on both signs than on a zero: it gains 1 dB.
"""

INT2G64 = TableFormat("int2g64", bits=2, table=TABLES["int2"], size=64)
INT3G64 = TableFormat("int3g64", bits=3, table=TABLES["int3"], size=64)
INT4G64 = TableFormat("int4g64", bits=4, table=TABLES["int4"], size=64)
INT4T = TableFormat("int4t", bits=4, table=TABLES["int4"], shared=True)
FP4 = TableFormat("fp4", bits=4, table=floating.E2M1)
FP4T = TableFormat("fp4t", bits=4, table=floating.E2M1, shared=True)
NF4 = TableFormat("nf4", bits=4, table=floating.NF4)
