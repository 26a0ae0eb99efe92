"""Entropy-coded integers: one step for the whole tensor, as many levels as it takes, coded in a given number of bits.

In place of a table of 2^b levels for each row, an open grid: what GPTQ pushes beyond the last level of a table has a
level here, rows of little power take few bits and others more, and no row has a scale of its own. Codes are coded by a
histogram (`support.rans`), and the step is the least whose codes fit. So the bytes of a weight follow from its shape,
as those of every format, and the fit keeps to them. In memory codes are those of `int8`; up to `FOUR_BITS` bits, where
next to none would lie beyond the levels of `int4`, those of that.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import F16_MAX, Fit, Format, QuantizedWeight, stored_scale
from mpq_compiler.support import rans

LEAST_BYTES = 64
"""The bytes that a weight may take at least: a histogram and states, of a tensor of a few numbers."""
CLOSE = 0.004
"""How close the bytes of a fit come to those that it may take, as a share of them, before the search ends."""
FOUR_BITS = 1.5
"""The rate up to which codes are -8 to 7, which costs nothing there, and half a decibel at 2.5 bits."""
TRIES = 8
"""How many steps are tried where codes follow from each other, so that each takes a walk over the weight."""


@dataclass(frozen=True)
class EntropyFormat(Format):
    """Integers -127..127 times one step, coded in ``rate`` bits each at most, histogram and states among them."""

    rate: float = 2.0

    @property
    def trials(self) -> int:
        return 8

    @property
    def index_bits(self) -> int:
        """Those of a code in memory."""
        return 4 if self.rate <= FOUR_BITS else 8

    @property
    def table(self) -> Tensor | None:
        """The table int8 [1, 16]; None where a code is its own value."""
        return torch.arange(-8, 8, dtype=torch.int8)[None] if self.index_bits == 4 else None

    def stored_bytes(self, *shape: int) -> int:
        """Bytes of a weight [O, ..., C] in the artifact: its coded integers, the step in f16, and the table."""
        return self.coded_bytes(math.prod(shape)) + 2 + (16 if self.index_bits == 4 else 0)

    def coded_bytes(self, count: int) -> int:
        """The bytes of so many integers."""
        return max(LEAST_BYTES, math.ceil(self.rate * count / 8))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        rows = weight.flatten(1)
        return self.at(rows, self._least_step(rows))

    def rounded(self, rows: Tensor, fit: Fit, choose: Callable[[Fit], Fit]) -> Fit:
        """Chooses codes at the least step whose chosen codes fit: they take more bits than the nearest ones."""
        assert isinstance(fit, QuantizedWeight)
        most, place, slope = self.coded_bytes(rows.numel()), math.log2(float(fit.scale[0, 0])), 1.0
        failed: tuple[float, float] | None = None
        fitted: tuple[float, float, Fit] | None = None
        tried = 0
        while fitted is None or (fitted[1] <= -CLOSE * self.rate and tried < TRIES):
            found = choose(self.at(rows, 2**place))
            bits = 8 * (self.bytes_of(found.codes) - most) / rows.numel()  # too many for each number
            if bits <= 0 and (fitted is None or place < fitted[0]):
                fitted = (place, bits, found)
            elif bits > 0 and (failed is None or place > failed[0]):
                failed = (place, bits)
            if failed is not None and fitted is not None:
                slope = (failed[1] - fitted[1]) / (fitted[0] - failed[0])
            begin = failed if fitted is None or (failed is not None and failed[1] < -fitted[1]) else fitted
            assert begin is not None
            place = begin[0] + (begin[1] + CLOSE * self.rate / 2) / slope
            if fitted is None:
                slope /= 2  # coarser steps save fewer bits: farther next time
            tried += 1
        return fitted[2]

    def at(self, rows: Tensor, step: float) -> QuantizedWeight:
        """The nearest codes at a step, which is rounded up to f16 so that no more codes are used."""
        scale = stored_scale(torch.tensor(step, dtype=torch.float32))
        if float(scale) < min(step, F16_MAX):
            scale = torch.nextafter(scale, torch.tensor(torch.inf, dtype=torch.float16))
        column = scale.expand(len(rows), 1).contiguous()
        return QuantizedWeight(contract.nearest_codes(rows, column, None, self.table, None), column, None, self.table)

    def _least_step(self, rows: Tensor) -> float:
        """The least step at which the nearest codes fit, to a two hundredth."""
        most, peak = self.coded_bytes(rows.numel()), float(rows.abs().amax())
        if peak == 0:
            return 1.0
        low, high = math.log2(peak / contract.LUT_MAX), math.log2(4 * peak)
        if self.bytes_of(self.at(rows, 2**low).codes) <= most:
            return 2**low
        while high - low > 1 / 128:
            middle = (low + high) / 2
            if self.bytes_of(self.at(rows, 2**middle).codes) <= most:
                high = middle
            else:
                low = middle
        return 2**high

    @staticmethod
    def bytes_of(codes: Tensor) -> int:
        """The bytes that codes take, at most."""
        counts = np.bincount(integers(codes).view(np.uint8).ravel() ^ np.uint8(128), minlength=256)
        return rans.bound(counts[1:], -127)


def integers(codes: Tensor) -> np.ndarray:
    """The integers int8 that are coded: codes themselves, or what they number in the table from -8 on."""
    found: np.ndarray = (codes if codes.dtype == torch.int8 else codes.to(torch.int8) - 8).numpy()
    return found
