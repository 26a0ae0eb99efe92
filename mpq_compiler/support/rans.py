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
    if values.dtype != np.int8 or (values.size and int(values.min()) < -127):
        raise ValueError(f"integers in -127..127 are coded, as int8, not {values.dtype}")
    flat = values.reshape(-1).astype(np.int64) + 127
    made = histogram(np.bincount(flat, minlength=255) if flat.size else np.eye(1, 255, 127, dtype=np.int64)[0], -127)
    known = np.zeros(255, np.uint64)
    known[made.low + 127 :][: len(made.frequencies)] = made.frequencies
    begins = np.concatenate([[0], np.cumsum(known)[:-1]]).astype(np.uint64)
    count = streams(flat.size)
    steps = -(-min(flat.size, STREAM) // LANES)
    padded = np.full(count * STREAM, -1, np.int64)
    padded[: flat.size] = flat
    symbols = padded.reshape(count, -1)[:, : steps * LANES].reshape(count, steps, LANES)
    states = np.full((count, LANES), last_state(made.low), np.uint64)
    words, flags = np.zeros((steps, count, LANES), np.uint16), np.zeros((steps, count, LANES), bool)
    shift, mask = np.uint64(16), np.uint64(0xFFFF)
    for step in range(steps - 1, -1, -1):
        own = symbols[:, step]
        there = own >= 0
        f, begin = known[np.maximum(own, 0)], begins[np.maximum(own, 0)]
        full = there & (states >= f << np.uint64(32 - BITS))
        words[step], flags[step] = states & mask, full
        states = np.where(full, states >> shift, states)
        safe = np.maximum(f, np.uint64(1))
        moved = (states // safe << np.uint64(BITS)) + states % safe + begin
        states = np.where(there, moved, states)
    flags, words = flags.transpose(1, 0, 2), words.transpose(1, 0, 2)
    ends = np.cumsum(flags.reshape(count, -1).sum(1)).astype("<u4")
    parts = (
        np.array([made.low], np.int8).view(np.uint8),
        np.array([len(made.frequencies) - 1], np.uint8),
        made.frequencies.astype("<u2").view(np.uint8),
        ends.view(np.uint8),
        states.astype("<u4").reshape(-1).view(np.uint8),
        words[flags].astype("<u2").view(np.uint8),
        np.zeros(2 * LANES, np.uint8),
    )
    coded = np.concatenate(parts)
    if size is None:
        return coded
    if len(coded) > size:
        raise ValueError(f"{flat.size} integers take {len(coded)} bytes, not {size}")
    return np.concatenate([coded, np.zeros(size - len(coded), np.uint8)])


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
