"""Entropy-coded integers: one step for the whole tensor, as many levels as it takes, coded in a given number of bits.

In place of a table of 2^b levels for each row, an open grid: what GPTQ pushes beyond the last level of a table has a
level here, rows of little power take few bits and others more, and no row has a scale of its own. Codes are coded by a
histogram (`support.rans`), and the step is the least whose codes fit. So the bytes of a weight follow from its shape,
as those of every format, and the fit keeps to them. In memory codes are those of `int8`; up to `FOUR_BITS` bits, where
next to none would lie beyond the levels of `int4`, those of that.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import F16_MAX, Choose, Fit, Format, QuantizedWeight, stored_scale
from mpq_compiler.support import rans

LEAST_BYTES = 64
"""The bytes that a weight may take at least: a histogram and states, of a tensor of a few numbers."""
FOUR_BITS = 1.5
"""The rate up to which codes are -8 to 7, which costs nothing there, and half a decibel at 2.5 bits."""
CLOSE = 0.004
"""How close the bytes of a fit come to those that it may take, as a share of them."""
SHORT = 0.008
"""The share of its bytes by which a first fit may fall short, so that the search ends with it."""
FINE = 1 / 1024
"""The octaves to which a step is found."""
SAMPLE = 1 << 16
"""Numbers of a weight that show how many more bits chosen codes take than the nearest ones."""
AHEAD = (0.4, 0.8, 1.2)
"""Octaves above the step of the nearest codes at which that is seen, at one bit; at more bits they are fewer."""
TOGETHER = 1 << 24
"""The most numbers whose codes are chosen in one walk, over all fits of the same rows."""
TRIES = 6
"""How often codes are chosen for a whole weight, until they fit; mostly they do the first time."""
BINS = 1 << 11
"""Bins on each side of zero by which the bytes of a weight's nearest codes are foreseen at any step."""


@dataclass(frozen=True)
class EntropyFormat(Format):
    """Integers -127..127 times one step, coded in ``rate`` bits each at most, histogram and states among them."""

    rate: float = 2.0

    @property
    def trials(self) -> int:
        return 8

    @property
    def walks(self) -> int:
        return 5

    @property
    def index_bits(self) -> int:
        """Those of a code in memory."""
        return 4 if self.rate <= FOUR_BITS else 8

    @property
    def operand_bits(self) -> int:
        return self.index_bits

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
        most = self.coded_bytes(rows.numel())
        place = self._place(_Spread.over(rows), most)
        while self.bytes_of((found := self.at(rows, 2**place)).codes) > most:  # bins are not quite the numbers
            place += FINE
        return found

    def rounded(self, rows: Tensor, fit: Fit, choose: Choose) -> Fit:
        """Chooses codes at the least step whose chosen codes fit: they take more bits than the nearest ones."""
        return rounded_together([self], rows, choose)[0]

    def _search(self, rows: _Spread, some: _Spread, part: bool) -> Generator[_Asked, Sequence[Fit], Fit | None]:
        """Searches for the step: asks for fits with chosen codes, and returns that of all rows, or None.

        How many more bits chosen codes take than the nearest hardly depends on the step, and in a large weight some
        rows show it. Where these are all that is wanted, a ``part``, it returns theirs.
        """
        most = self.coded_bytes(rows.of.numel())
        places = [self._place(rows, most) + ahead * self.rate**-1.5 for ahead in AHEAD]
        more = self._more(some, places, (yield [self.at(some.of, 2**place) for place in places], some.of))
        if part:
            step = 2 ** self._place(rows, most * (1 - CLOSE / 2), more)
            (chosen,) = yield [self.at(some.of, step)], some.of
            return chosen
        margins = (0.0, 0.5, 1.5) if some is rows else (0.5,)  # of few rows walks take as long as one
        best: Fit | None = None
        for attempt in range(TRIES):
            aims = [most * (1 - (margin + max(0, attempt - 1) ** 2) * CLOSE) for margin in margins]
            places = [self._place(rows, aim, more) for aim in aims]
            found = yield [self.at(rows.of, 2**place) for place in places], rows.of
            fitting = [one for one in found if self.bytes_of(one.codes) <= most]
            best = max([*fitting, *([best] if best is not None else [])], key=self._bytes, default=None)
            if best is not None and (attempt or self._bytes(best) >= most * (1 - SHORT)):
                break
            more = self._more(rows, places, found)
        return best

    def _bytes(self, fit: Fit) -> int:
        """The bytes of a fit's codes."""
        return self.bytes_of(fit.codes)

    def at(self, rows: Tensor, step: float) -> QuantizedWeight:
        """The nearest codes at a step, which is rounded up to f16 so that no more codes are used."""
        scale = stored_scale(torch.tensor(step, dtype=torch.float32))
        if float(scale) < min(step, F16_MAX):
            scale = torch.nextafter(scale, torch.tensor(torch.inf, dtype=torch.float16))
        column = scale.expand(len(rows), 1).contiguous()
        return QuantizedWeight(contract.nearest_codes(rows, column, None, self.table, None), column, None, self.table)

    def _place(self, spread: _Spread, most: float, more: _More | None = None) -> float:
        """The logarithm of the least step at which codes take so many bytes, where they take ``more`` than the nearest.

        From coarse to fine, for codes beyond the ends of a table of sixteen take fewer bits again.
        """

        def fits(place: float) -> bool:
            beyond = 0.0 if more is None else spread.of.numel() * float(np.interp(place, *more))
            return self._bytes_at(spread, place) + beyond <= most

        low, high = math.log2(spread.peak / contract.LUT_MAX), math.log2(4 * spread.peak)
        while (tried := max(low, high - 0.5)) < high and fits(tried):
            high = tried
        low = tried
        while high - low > FINE:
            middle = (low + high) / 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _more(self, spread: _Spread, places: Sequence[float], found: Sequence[Fit]) -> _More:
        """The bytes for each number that codes, chosen at steps of these logarithms, take beyond the nearest."""
        seen = []
        for one, place in zip(found, places, strict=True):
            seen.append((place, (self.bytes_of(one.codes) - self._bytes_at(spread, place)) / spread.of.numel()))
        ordered, more = zip(*sorted(seen), strict=True)
        return ordered, more

    def _bytes_at(self, spread: _Spread, place: float) -> int:
        """The bytes that the nearest codes take at a step of that logarithm, about."""
        low, high = (-8, 7) if self.index_bits == 4 else (-contract.LUT_MAX, contract.LUT_MAX)
        codes = np.rint(spread.values / 2**place).clip(low, high).astype(np.int64)
        counts = np.bincount(codes - low, spread.counts, high - low + 1)
        return rans.bound(counts.astype(np.int64), low)

    @staticmethod
    def bytes_of(codes: Tensor) -> int:
        """The bytes that codes take, at most."""
        return rans.bound(rans.counts(integers(codes)), -contract.LUT_MAX)


@dataclass(frozen=True)
class _Spread:
    """How often the numbers of a weight are about which value."""

    of: Tensor
    """The weight, [O, K]."""
    values: np.ndarray
    """The middles of bins, f64 [2 * BINS + 1]."""
    counts: np.ndarray
    """How many numbers each has, f64."""

    @staticmethod
    def over(rows: Tensor) -> _Spread:
        """The spread of rows [O, K]."""
        peak = float(rows.abs().amax()) or 1.0
        counts = torch.zeros(2 * BINS + 1, dtype=torch.int64)
        for part in contract.row_parts(rows):
            places = (rows[part] / peak * BINS).round().long() + BINS
            counts += torch.bincount(places.flatten(), minlength=len(counts))
        return _Spread(rows, np.arange(-BINS, BINS + 1) * (peak / BINS), counts.double().numpy())

    @property
    def peak(self) -> float:
        """The largest magnitude."""
        return float(self.values[-1])


_More = tuple[Sequence[float], Sequence[float]]
"""What chosen codes take beyond the nearest ones, in bytes for each number, by the logarithm of the step, ascending."""


_Asked = tuple[list[QuantizedWeight], Tensor]
"""Fits whose codes are to be chosen, and the rows that they are of."""


def rounded_together(
    formats: Sequence[EntropyFormat], rows: Tensor, choose: Choose, within: Tensor | None = None
) -> list[Fit]:
    """Fits rows [O, K] in several formats with chosen codes, as `EntropyFormat.rounded` does in each.

    ``choose`` has the fits of all formats in one walk, as long as they are few numbers. Where no chosen codes fit, they
    are the nearest ones. Of rows that stand for those of a weight ``within``, the step is that of the whole weight.
    """
    whole = _Spread.over(rows if within is None else within)
    stride = max(1, rows.numel() // SAMPLE)
    part = within is not None
    some = whole if stride == 1 and not part else _Spread.over(rows if part else rows[::stride].contiguous())
    found: dict[int, Fit] = {}
    searches = [format_._search(whole, some, part) for format_ in formats]
    asked = {number: next(search) for number, search in enumerate(searches)}
    while asked:
        over = next(iter(asked.values()))[1]
        wanted = [fit for of, _ in asked.values() for fit in of]
        step = max(1, TOGETHER // over.numel())
        chosen = iter([one for i in range(0, len(wanted), step) for one in choose(wanted[i : i + step], over)])
        following: dict[int, _Asked] = {}
        for number, (of, _) in asked.items():
            try:
                following[number] = searches[number].send([next(chosen) for _ in of])
            except StopIteration as end:
                found[number] = formats[number].fit(rows) if end.value is None else end.value
        asked = following
    return [found[number] for number in range(len(formats))]


def integers(codes: Tensor) -> np.ndarray:
    """The integers int8 that are coded: codes themselves, or what they number in the table from -8 on."""
    found: np.ndarray = (codes if codes.dtype == torch.int8 else codes.to(torch.int8) - 8).numpy()
    return found
