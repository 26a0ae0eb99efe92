"""Rows of several widths in one weight: one bit more where outliers are, one less elsewhere.

This is the outlier-driven mixed quantization of MPQ-DM (arXiv 2412.11549, section 3.2). In place of N bits, the rows of
largest kurtosis get N + 1 and as many rows of smallest kurtosis get N - 1; the error of the layer's output decides how
many. Kurtosis says little of that error, so rows are also ordered by what a bit gains in each; the better order counts.

Levels are evenly spaced in all rows. Or rows of more bits have a binary branch in place of a further bit of the base,
and the orders of the residual are those of MPQ-DMv2 (arXiv 2507.04290): (N - 1, 0), (N, 0) and (N, 1). Base and branch
are one table, whose levels hold those of the base alone. Either way the levels of fewer bits are among those of more:
rows stay in their order, and a kernel looks all of them up in one table.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import Format, QuantizedWeight, fit_by_parts, output_error, stored_scale, stored_type
from mpq_compiler.formats.residual import ResidualFormat, alternating
from mpq_compiler.formats.uniform import UniformFormat

LOST = 2.0
"""The weight of the error that a row with a bit less adds, since GPTQ removes less error at fewer bits."""


@dataclass(frozen=True)
class RowClassFormat(Format):
    """Evenly spaced levels of bits - 1, bits or bits + 1 by row, ``bits`` on average, with a scale and offset a row."""

    @property
    def has_offset(self) -> bool:
        return True

    @property
    def by_row(self) -> bool:
        return False

    @property
    def index_bits(self) -> int:
        return self.bits + 1

    @property
    def widths(self) -> tuple[UniformFormat, ...]:
        """The formats of the three classes of rows."""
        return tuple(UniformFormat(f"int{bits}", bits) for bits in (self.bits - 1, self.bits, self.bits + 1))

    def classes(self, rows: int) -> int:
        return len(self.widths)

    def class_bytes(self, rows: int) -> int:
        """Bytes of the row classes: two bits a row."""
        return -(-2 * rows // 8)

    def start(self, weight: Tensor) -> QuantizedWeight:
        """Quantizes all rows to ``bits`` bits."""
        return self._of([width.start(weight) for width in self.widths], torch.ones(len(weight), dtype=torch.uint8))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        """Quantizes; where no trade of bits between rows gains, all rows have the codes of the uniform format."""
        rows = weight.flatten(1)
        fits = self._fits(rows, gram)
        less, same, more = (output_error(fit.dequantize() - rows, gram).double() for fit in fits)
        best, most = torch.ones(len(rows), dtype=torch.uint8), 0.0
        for rank in (kurtosis(rows), less - more):
            order = torch.argsort(rank, descending=True, stable=True)
            first, last = order[: len(rows) // 2], order.flip(0)[: len(rows) // 2]
            gain = ((same - more)[first] - LOST * (less - same)[last]).cumsum(0)
            if len(gain) and float(gain.max()) > most:
                most, count = float(gain.max()), int(gain.argmax()) + 1
                best = torch.ones_like(best)
                best[first[:count]], best[last[:count]] = 2, 0
        return self._of(fits, best)

    def _fits(self, rows: Tensor, gram: Tensor | None) -> list[QuantizedWeight]:
        """The fits of rows [O, K] in the three classes."""
        return [width.fit(rows, gram) for width in self.widths]

    def _of(self, fits: Sequence[QuantizedWeight], row_class: Tensor) -> QuantizedWeight:
        """Assembles a weight from one fit for each width: a row's class [O] chooses the fit that it comes from."""
        chosen, rows = row_class.long(), torch.arange(len(row_class))
        codes = torch.stack([f.codes for f in fits])[chosen, rows]
        scale = torch.stack([f.scale for f in fits])[chosen, rows]
        offset = torch.stack([f.offset.float() for f in fits if f.offset is not None])[chosen, rows]
        lut = torch.full((len(fits), 2**self.index_bits), contract.NO_LEVEL, dtype=torch.int8)
        for table, fit in zip(lut, fits, strict=True):
            assert fit.lut is not None
            table[: fit.lut.shape[1]] = fit.lut[0]
        return QuantizedWeight(codes, scale, stored_type(offset), lut, row_class=row_class)


@dataclass(frozen=True)
class ResidualRowFormat(RowClassFormat):
    """A base of bits - 1 without a branch, of ``bits`` without or with one by row, ``bits`` on average.

    The ratio of the branch to a step of the base is the tensor's, as in `ResidualFormat`.
    """

    @property
    def residual(self) -> ResidualFormat:
        """The format of the rows with a branch."""
        return ResidualFormat(f"int{self.bits}+b", self.bits + 1, base_bits=self.bits)

    @property
    def trials(self) -> int:
        return len(self.widths) * self.residual.trials

    def start(self, weight: Tensor) -> QuantizedWeight:
        """Quantizes all rows to ``bits`` bits, beside a branch of a quarter of the step: a further bit."""
        step = int(self.residual.tables(0)[0].diff()[0, 0])
        sizes = zip(self.widths, (step, step, step // 2), strict=True)
        fits = [_on_grid(width.start(weight), size) for width, size in sizes]
        return self._of(fits, torch.ones(len(weight), dtype=torch.uint8))

    def _fits(self, rows: Tensor, gram: Tensor | None) -> list[QuantizedWeight]:
        """The fits of rows [O, K] in the three classes: those without a branch are no worse than uniform formats."""
        more = self.residual.fit(rows, gram)
        assert more.lut is not None and more.alpha is not None
        step = int(more.lut.diff()[0, 0])

        def even(part: Tensor, width: UniformFormat) -> QuantizedWeight:
            found = _on_grid(width.fit(part, gram), step)
            assert found.lut is not None and found.offset is not None
            return alternating(part, gram, found.lut, (found.scale.float(), found.offset.float()[:, None]))

        plain = [fit_by_parts(rows, partial(even, width=width)) for width in self.widths[:2]]
        return [*plain, _above(more)]


def _on_grid(fit: QuantizedWeight, step: int) -> QuantizedWeight:
    """A fit with its levels on a grid so many times as fine."""
    assert fit.lut is not None
    return replace(fit, scale=stored_scale(fit.scale.float() / step), lut=fit.lut * step)


def _above(fit: QuantizedWeight) -> QuantizedWeight:
    """Base and branch as one rising table that holds the base itself: the branch adds nothing or twice alpha."""
    assert fit.alpha is not None and fit.offset is not None
    merged = fit.merged()
    assert merged.lut is not None
    levels, order = contract.rising(merged.lut + fit.alpha)
    offset = stored_type(fit.offset.float() - fit.scale.float()[:, 0] * fit.alpha)
    codes = order.argsort(1)[0][merged.codes.long()].to(torch.uint8)
    return QuantizedWeight(codes, merged.scale, offset, levels.to(torch.int8))


def kurtosis(rows: Tensor) -> Tensor:
    """Pearson's kurtosis of each row of [O, K], f64 [O]: 3 for a Gaussian, 0 for a row of zeros."""
    centred = rows.double() - rows.double().mean(1, keepdim=True)
    variance = centred.square().sum(1) / max(1, rows.shape[1] - 1)
    return centred.pow(4).mean(1) / variance.square().clamp_min(1e-300)


INT2M = RowClassFormat("int2m", bits=2)
INT3M = RowClassFormat("int3m", bits=3)
INT4M = RowClassFormat("int4m", bits=4)
INT2M_B = ResidualRowFormat("int2m+b", bits=2)
INT3M_B = ResidualRowFormat("int3m+b", bits=3)
