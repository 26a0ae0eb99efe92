"""INT2, INT3, INT4 and INT8: evenly spaced levels with one scale a row, and below 8 bits one offset."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import Format, QuantizedWeight, fit_by_parts, output_error, stored_scale, stored_type
from mpq_compiler.formats.contract import nearest_codes

SHRINK = tuple(1 - 0.05 * i for i in range(14))
"""Fractions of the min-max range that the scale search tries."""
BINARY = tuple(0.7 + 0.05 * i for i in range(13))
"""Fractions of the closed form's scale that the search of one-bit levels tries."""


@dataclass(frozen=True)
class UniformFormat(Format):
    """Evenly spaced levels ``scale[i] * (code - 2^(bits-1)) + offset[i]`` of 1 to 5 bits, or INT8.

    INT8 is symmetric and has no table: a code is its value (-127..127).
    """

    @property
    def searches(self) -> bool:
        return True

    @property
    def trials(self) -> int:
        return 1 if self.bits == 8 else len(SHRINK)  # five without a table, which takes most of the time

    @property
    def has_offset(self) -> bool:
        return self.bits < 8

    @property
    def table(self) -> Tensor | None:
        """The table int8 [1, 2^bits]; None for INT8."""
        if self.bits == 8:
            return None
        half = 2 ** (self.bits - 1)
        return torch.arange(-half, half, dtype=torch.int8)[None]

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        return fit_by_parts(weight.flatten(1), lambda rows: self._fit(rows, gram))

    def _fit(self, weight: Tensor, gram: Tensor | None) -> QuantizedWeight:
        """Fits rows [O, K], each by itself."""
        best: tuple[Tensor, Tensor, Tensor | None] | None = None
        least = torch.full((len(weight),), torch.inf)
        for scale, offset in self._tried(weight):
            level = self.quantize(weight, scale, offset).dequantize()
            error = output_error(level - weight, gram)
            better = error < least
            if best is None:
                best = (scale, error, offset)
            else:
                scale = torch.where(better[:, None], scale, best[0])
                if offset is not None and best[2] is not None:
                    offset = torch.where(better, offset, best[2])
                best = (scale, error, offset)
            least = torch.minimum(error, least)
        assert best is not None
        return self.quantize(weight, best[0], best[2])

    def start(self, weight: Tensor) -> QuantizedWeight:
        weight = weight.flatten(1)
        return self.quantize(weight, *self.range_parameters(weight))

    def quantize(self, weight: Tensor, scale: Tensor, offset: Tensor | None) -> QuantizedWeight:
        """Quantizes weight [O, K] to the nearest codes at given stored parameters."""
        return QuantizedWeight(nearest_codes(weight, scale, offset, self.table, None), scale, offset, self.table)

    def _tried(self, weight: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        """The scales and offsets to choose from: those of shrunken ranges, and for one bit those around the mean.

        The two levels of one bit lie on both sides of the mean at the mean distance from it (XNOR-Net, arXiv
        1603.05279, eq. 6), for the range says nothing about them.
        """
        if self.bits > 1:
            for shrink in SHRINK if self.bits < 8 else SHRINK[:5]:
                yield self.range_parameters(weight, shrink)
            return
        mean = weight.mean(1, keepdim=True)
        distance = (weight - mean).abs().mean(1, keepdim=True)
        for factor in BINARY:
            yield self._centred(mean, stored_scale(2 * factor * distance))

    def range_parameters(self, weight: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor | None]:
        """The scale f16 [O, 1] and offset f16 [O] whose levels span ``shrink`` of each row's range."""
        if self.bits == 8:
            return stored_scale(weight.abs().amax(1, keepdim=True) * (shrink / contract.LUT_MAX)), None
        low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
        middle, half = (low + high) / 2, (high - low) * (shrink / 2)
        return self._centred(middle, stored_scale(2 * half / (2**self.bits - 1)))

    @staticmethod
    def _centred(middle: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """The scale, and the offset that centres levels on ``middle``: codes -2^(b-1) .. 2^(b-1)-1 centre on -1/2."""
        return scale, stored_type((middle + scale.to(torch.float32) / 2)[:, 0])


INT2 = UniformFormat("int2", bits=2)
INT3 = UniformFormat("int3", bits=3)
INT4 = UniformFormat("int4", bits=4)
INT8 = UniformFormat("int8", bits=8)
