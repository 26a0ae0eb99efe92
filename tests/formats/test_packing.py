"""The stored form of weight codes against its definition, and back again."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_compiler.formats.packing import BITS, pack_codes, packed_bytes, unpack_codes


@given(
    bits=st.sampled_from(BITS),
    rows=st.integers(0, 9),
    columns=st.integers(1, 37),
    seed=st.integers(0, 2**32 - 1),
)
def test_round_trip(bits, rows, columns, seed):
    draw = np.random.default_rng(seed)
    codes = draw.integers(*((-128, 128) if bits == 8 else (0, 2**bits)), (rows, columns))
    codes = codes.astype(np.int8 if bits == 8 else np.uint8)
    packed = pack_codes(codes, bits)
    assert packed.dtype == np.uint8
    assert packed.size == packed_bytes(codes.size, bits) == (bits * codes.size + 7) // 8
    again = unpack_codes(packed, codes.shape, bits)
    assert again.dtype == codes.dtype
    np.testing.assert_array_equal(again, codes)


@given(bits=st.sampled_from((2, 3, 4, 5)), count=st.integers(1, 70), seed=st.integers(0, 2**32 - 1))
def test_bits_lie_where_the_definition_says(bits, count, seed):
    codes = np.random.default_rng(seed).integers(0, 2**bits, count).astype(np.uint8)
    stream = int.from_bytes(pack_codes(codes, bits).tobytes(), "little")
    low = bits - 1 if bits in (3, 5) else bits
    for i, code in enumerate(codes.tolist()):
        assert (stream >> (low * i)) % 2**low == code % 2**low
        if low < bits:
            assert (stream >> (low * count + i)) & 1 == code >> low
    assert stream >> (bits * count) == 0


def test_known_bytes():
    assert pack_codes(np.array([1, 2, 3, 15], np.uint8), 4).tolist() == [0x21, 0xF3]
    assert pack_codes(np.array([1, 2, 3, 0, 2], np.uint8), 2).tolist() == [0b00111001, 0b10]
    assert pack_codes(np.array([4, 3, 7], np.uint8), 3).tolist() == [0b01_111100, 0b1]
    assert pack_codes(np.array([-127, 127], np.int8), 8).tolist() == [129, 127]


@pytest.mark.parametrize(
    ("codes", "bits", "says"),
    [
        (np.array([4], np.uint8), 2, "code 4 does not fit 2 bits"),
        (np.array([4], np.int8), 2, "must be uint8"),
        (np.array([4], np.uint8), 8, "must be int8"),
        (np.array([4], np.uint8), 6, "cannot be packed"),
    ],
)
def test_wrong_codes_are_refused(codes, bits, says):
    with pytest.raises(ValueError, match=says):
        pack_codes(codes, bits)


def test_wrong_sizes_are_refused():
    with pytest.raises(ValueError, match="take 2 bytes"):
        unpack_codes(np.zeros(3, np.uint8), (4,), 3)
