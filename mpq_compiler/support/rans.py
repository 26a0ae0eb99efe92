"""The coded form of integers: asymmetric numeral systems with a histogram for each tensor (rANS). It needs NumPy only.

A coded tensor of n integers in -127..127 is, in little-endian bytes,

- i8 ``low``, the least of its integers, and u8 ``symbols - 1``: the integers low .. low + symbols - 1 have a frequency;
- u16 frequencies of these, which sum to `TOTAL`;
- for each of ceil(n / `STREAM`) streams, u32: the number of words in it and in those before it;
- for each stream `LANES` states, u32;
- the words of all streams, u16, and behind them zeros, `LANES` words at least: what has gone astray reads them before
  it looks where it is.

Stream s has the integers from number ``s * STREAM`` on, of which number i is decoded by lane ``i % LANES``, one after
the other: of a state x, ``slot = x % TOTAL`` is in the integer's part of ``0 .. TOTAL``, which begins at the sum of the
frequencies before its own; then ``x = frequency * (x // TOTAL) + slot - begin``, and ``x * 2^16`` plus the stream's
next word if that is below 2^16. Behind the last integer all states are ``2^16 + low + 128``, and no words are left.

Source: Duda 2013 (arXiv 1311.2540), section 3, in the interleaved form of Giesen 2014 (arXiv 1402.3392), section 4.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

BITS = 12
TOTAL = 1 << BITS
"""The sum of the frequencies."""
LANES = 4
"""States of a stream: while one waits for its table, the others go on."""
STREAM = 1 << 16
"""Integers of a stream, by which threads share a tensor."""
LEAST = 1 << 16
"""The least state between two integers."""
TOGETHER = 1 << 25
"""The most integers that are coded in one walk over streams, unless one tensor has more."""
NONE = 255
"""In the place of an integer plus 127 where a stream has ended."""


@dataclass(frozen=True)
class Histogram:
    """The frequencies of the integers from ``low`` on."""

    low: int
    frequencies: np.ndarray
    """u16, with the sum `TOTAL`."""

    @property
    def bits(self) -> np.ndarray:
        """The bits that each integer takes, f64; infinite for those without a frequency."""
        with np.errstate(divide="ignore"):
            return BITS - np.log2(self.frequencies.astype(np.float64))


def histogram(counts: np.ndarray, low: int) -> Histogram:
    """The frequencies for integers that occur so often, from ``low`` on; each that occurs has one of at least 1.

    What rounding leaves goes where it costs least: one by one to or from the integer that it changes the least bits of.
    """
    counts = counts.astype(np.int64)
    used = np.flatnonzero(counts)
    counts, low = counts[used[0] : used[-1] + 1], low + int(used[0])
    total = int(counts.sum())
    frequencies = np.where(counts > 0, np.maximum(1, (counts * TOTAL + total // 2) // total), 0)
    left = TOTAL - int(frequencies.sum())
    while left:
        step = 1 if left > 0 else -1
        allowed = (counts > 0) & (frequencies + step >= 1)
        with np.errstate(divide="ignore", invalid="ignore"):
            gain = np.where(allowed, counts * np.log2((frequencies + step) / np.maximum(frequencies, 1)), -np.inf)
        frequencies[int(np.argmax(gain))] += step
        left -= step
    return Histogram(low, frequencies.astype(np.uint16))


def counts(values: np.ndarray) -> np.ndarray:
    """How often each integer from -127 on occurs in int8 values, none of them -128; of no values one 0."""
    shifted = values.reshape(-1).view(np.uint8) ^ np.uint8(128) if values.size else np.array([128], np.uint8)
    found: np.ndarray = np.bincount(shifted, minlength=256)[1:]
    return found


def last_state(low: int) -> int:
    """The states behind the last integer, which stand for ``low`` as well: another would show."""
    return LEAST + low + 128


def streams(count: int) -> int:
    """The number of streams of so many integers."""
    return max(1, -(-count // STREAM))


def header_bytes(symbols: int, count: int) -> int:
    """The bytes before the words."""
    return 2 + 2 * symbols + (4 + 4 * LANES) * streams(count)


def bound(counts: np.ndarray, low: int) -> int:
    """The bytes, at most, that integers take which occur so often, from ``low`` on."""
    count, made = int(counts.sum()), histogram(counts, low)
    own = counts[made.low - low :][: len(made.frequencies)]
    bits = float(own @ np.where(own > 0, made.bits, 0.0))
    # A state is rounded down in every step, by less than 2^-16 of itself; words are whole.
    rounding = count * 2.0**-15 + 16 * LANES * streams(count)
    return header_bytes(len(made.frequencies), count) + 2 * (int(np.ceil((bits + rounding) / 16)) + LANES)


def encode(values: np.ndarray, size: int | None = None) -> np.ndarray:
    """Codes int8 values (any shape, none -128) as u8.

    Args:
        values: the integers, in row-major order.
        size: of the result, which ends with zeros; as many bytes as it takes by default.

    Raises:
        ValueError: they take more than ``size`` bytes, or are no int8 above -128.
    """
    (coded,) = encode_all([values])
    return coded if size is None else padded(coded, size)


def padded(coded: np.ndarray, size: int) -> np.ndarray:
    """What is coded with zeros behind it, u8 [size]. ValueError: it takes more bytes."""
    if len(coded) > size:
        raise ValueError(f"integers take {len(coded)} bytes, not {size}")
    found: np.ndarray = np.concatenate([coded, np.zeros(size - len(coded), np.uint8)])
    return found


def encode_all(tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes several tensors as `encode` does each: one after the other takes a walk over a stream for each.

    Raises:
        ValueError: values are no int8 above -128.
    """
    for values in tensors:
        if values.dtype != np.int8 or (values.size and int(values.min()) < -127):
            raise ValueError(f"integers in -127..127 are coded, as int8, not {values.dtype}")
    found: list[np.ndarray] = []
    together: list[np.ndarray] = []
    for values in tensors:
        if together and sum(one.size for one in (*together, values)) > TOGETHER:
            found += _encode(together)
            together = []
        together.append(values)
    return found + (_encode(together) if together else [])


def _encode(tensors: Sequence[np.ndarray]) -> list[np.ndarray]:
    """Codes tensors in one walk over the steps of all their streams."""
    flats = [values.reshape(-1) for values in tensors]
    made = [histogram(counts(flat), -127) for flat in flats]
    numbers = [streams(flat.size) for flat in flats]
    frequencies, begins = np.ones((len(flats), 256), np.uint32), np.zeros((len(flats), 256), np.uint32)
    for row, (one, into) in zip(made, zip(frequencies, begins, strict=True), strict=True):
        here = slice(row.low + 127, row.low + 127 + len(row.frequencies))
        one[here] = np.maximum(row.frequencies, 1)
        into[here] = np.cumsum(row.frequencies) - row.frequencies
    steps = -(-min(STREAM, max(flat.size for flat in flats)) // LANES)
    symbols = np.full((sum(numbers), steps * LANES), NONE, np.uint8)
    states = np.empty((len(symbols), LANES), np.uint32)
    table = np.repeat(np.arange(len(flats), dtype=np.int32) * 256, numbers)[:, None]
    at = 0
    for flat, row, number in zip(flats, made, numbers, strict=True):
        for start in range(0, flat.size, STREAM):
            piece = flat[start : start + STREAM].astype(np.int16) + 127
            symbols[at + start // STREAM, : len(piece)] = piece
        states[at : at + number] = last_state(row.low)
        at += number
    symbols = np.ascontiguousarray(symbols.reshape(len(symbols), steps, LANES).transpose(1, 0, 2))
    words, flags = np.empty(symbols.shape, np.uint16), np.empty(symbols.shape, bool)
    for step in range(steps - 1, -1, -1):
        own = symbols[step]
        there, place = own != NONE, table + own
        f, begin = frequencies.ravel()[place], begins.ravel()[place]
        full = there & (states >> np.uint32(32 - BITS) >= f)
        words[step], flags[step] = states, full
        states = np.where(full, states >> np.uint32(16), states)
        whole = states // f
        moved = (whole << np.uint32(BITS)) + (states - whole * f) + begin
        states = np.where(there, moved, states)
    found, at = [], 0
    for row, number in zip(made, numbers, strict=True):
        here = slice(at, at + number)
        found.append(_joined(row, states[here], *(x[:, here].transpose(1, 0, 2) for x in (words, flags))))
        at += number
    return found


def _joined(made: Histogram, states: np.ndarray, words: np.ndarray, flags: np.ndarray) -> np.ndarray:
    """The bytes of a tensor: its histogram, its states [streams, LANES], and words of streams where there are flags."""
    ends = np.cumsum(flags.reshape(len(flags), -1).sum(1)).astype("<u4")
    parts = (
        np.array([made.low], np.int8).view(np.uint8),
        np.array([len(made.frequencies) - 1], np.uint8),
        made.frequencies.astype("<u2").view(np.uint8),
        ends.view(np.uint8),
        states.astype("<u4").reshape(-1).view(np.uint8),
        words[flags].astype("<u2").view(np.uint8),
        np.zeros(2 * LANES, np.uint8),
    )
    coded: np.ndarray = np.concatenate(parts)
    return coded


def decode(coded: np.ndarray, count: int) -> np.ndarray:
    """Decodes ``count`` integers to int8 [count].

    Raises:
        ValueError: what is coded is damaged: it ends early, its histogram does not sum, or a stream ends elsewhere.
    """
    number, symbols = streams(count), int(coded[1]) + 1 if len(coded) > 1 else 1
    start = header_bytes(symbols, count)
    if len(coded) < start:
        raise ValueError(f"{len(coded)} bytes are fewer than the {start} in which a coded tensor begins")
    low = int(coded[:1].view(np.int8)[0])
    frequencies = coded[2 : 2 + 2 * symbols].view("<u2").astype(np.int64)
    if int(frequencies.sum()) != TOTAL or not -127 <= low <= low + symbols - 1 <= 127:
        raise ValueError(f"its histogram sums to {int(frequencies.sum())}, from {low} to {low + symbols - 1}")
    at = 2 + 2 * symbols
    ends = coded[at : at + 4 * number].view("<u4").astype(np.int64)
    states = coded[at + 4 * number : start].view("<u4").astype(np.uint64).reshape(number, LANES)
    words = coded[start : start + (len(coded) - start) // 2 * 2].view("<u2").astype(np.uint64)
    places = np.concatenate([[0], ends[:-1]])
    if (np.diff(ends, prepend=0) < 0).any() or int(ends[-1]) > len(words) - LANES:
        raise ValueError(f"its streams end behind word {int(ends.max())} of {len(words) - LANES}")
    slots = np.repeat(np.arange(symbols), frequencies)
    begins = (np.cumsum(frequencies) - frequencies).astype(np.uint64)
    steps = -(-min(count, STREAM) // LANES)
    values = np.zeros((number, steps * LANES), np.int8)
    sizes = np.minimum(STREAM, count - STREAM * np.arange(number))
    frequency = frequencies.astype(np.uint64)
    for i in range(steps * LANES):
        lane, live = i % LANES, i < sizes
        slot = states[:, lane] & np.uint64(TOTAL - 1)
        symbol = slots[slot.astype(np.int64)]
        values[:, i] = low + symbol
        moved = frequency[symbol] * (states[:, lane] >> np.uint64(BITS)) + slot - begins[symbol]
        reads = live & (moved < LEAST)
        word = words[places]
        states[:, lane] = np.where(live, np.where(reads, moved << np.uint64(16) | word, moved), states[:, lane])
        places = np.where(reads, np.minimum(places + 1, ends), places)
    if (places != ends).any() or (states != last_state(low)).any():
        raise ValueError("a stream does not end where its last integer does")
    return np.concatenate([row[:size] for row, size in zip(values, sizes, strict=True)])
