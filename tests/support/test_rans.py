"""Entropy coding of integers: what is coded comes back, in few bytes, and what is damaged is noticed."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler.support import rans


def normal(count: int, deviation: float, seed: int = 0) -> np.ndarray:
    drawn = np.random.default_rng(seed).normal(0, deviation, count)
    return np.clip(np.rint(drawn), -127, 127).astype(np.int8)


def counts(values: np.ndarray) -> np.ndarray:
    return np.bincount(values.astype(int).ravel() + 127, minlength=255)


@given(st.lists(st.integers(-127, 127), min_size=1, max_size=300), st.integers(0, 20))
@settings(deadline=None)
@pytest.mark.invariant("compiler-1")
def test_what_is_coded_comes_back(values, room):
    given_ = np.array(values, np.int8)
    coded = rans.encode(given_)
    assert coded.dtype == np.uint8 and len(coded) <= rans.bound(counts(given_), -127)
    assert np.array_equal(rans.decode(rans.encode(given_, len(coded) + room), len(given_)), given_)


@pytest.mark.parametrize(("count", "deviation"), [(rans.STREAM, 0.4), (rans.STREAM + 1, 2), (3 * rans.STREAM - 5, 40)])
def test_several_streams_take_their_entropy(count, deviation):
    values = normal(count, deviation)
    coded = rans.encode(values)
    assert np.array_equal(rans.decode(coded, count), values)
    share = counts(values)[counts(values) > 0] / count
    entropy = -(share @ np.log2(share)) * count / 8
    assert entropy < len(coded) <= rans.bound(counts(values), -127) < 1.012 * entropy + 600


def test_tensors_that_are_coded_together_have_the_bytes_of_their_own(monkeypatch):
    tensors = [normal(count, 1 + count % 7) for count in (1, 5000, rans.STREAM + 77, 3 * rans.STREAM, 3)]
    tensors += [np.zeros(0, np.int8), np.zeros(70_000, np.int8), normal(6000, 40).reshape(60, 100)]
    alone = [rans.encode(values) for values in tensors]
    for most in (rans.TOGETHER, 100_000):
        monkeypatch.setattr(rans, "TOGETHER", most)
        together = rans.encode_all(tensors)
        assert all(np.array_equal(one, other) for one, other in zip(alone, together, strict=True))


@given(st.lists(st.integers(0, 10**7), min_size=1, max_size=255).filter(any))
def test_frequencies_sum_and_no_integer_is_without_one(numbers):
    made = rans.histogram(np.array(numbers), -127)
    frequencies = made.frequencies.astype(int)
    used = np.array(numbers)[made.low + 127 :][: len(frequencies)]
    assert frequencies.sum() == rans.TOTAL and ((frequencies > 0) == (used > 0)).all()


def test_what_is_damaged_is_noticed():
    values = normal(3000, 1.1)
    coded, draw = rans.encode(values), np.random.default_rng(1)
    for size in (0, 1, 2, 20, len(coded) - 2 * rans.LANES - 2):
        with pytest.raises(ValueError, match=r"fewer than|sums to|end behind"):
            rans.decode(coded[:size], len(values))
    for _ in range(200):
        other = coded.copy()
        other[draw.integers(len(coded) - 2 * rans.LANES)] ^= np.uint8(1 << draw.integers(8))
        with pytest.raises(ValueError, match=r"sums to|end behind|does not end where"):
            rans.decode(other, len(values))


def test_what_it_does_not_code():
    with pytest.raises(ValueError, match=r"-127\.\.127"):
        rans.encode(np.array([-128], np.int8))
    with pytest.raises(ValueError, match="as int8, not int16"):
        rans.encode(np.array([1], np.int16))
    with pytest.raises(ValueError, match=r"take .* bytes, not 30"):
        rans.encode(normal(500, 3), 30)
