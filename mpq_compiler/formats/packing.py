"""The stored form of weight codes: one little-endian bit stream, without padding. Needs numpy only.

Over the n = O*K codes of a weight in row-major order:

- 8 bits: the int8 values themselves;
- 4 bits: two codes a byte, the first in the low nibble;
- 2 bits: four codes a byte, the first in the lowest bits;
- 3 and 5 bits: two planes, one behind the other in the bit stream: the low 2 (4) bits of every code,
  packed as above in 2n (4n) bits, then the top bit of every code in n bits, in all
  ceil(bits * n / 8) bytes.
"""

from __future__ import annotations

import numpy as np

BITS = (2, 3, 4, 5, 8)


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def _planes(bits: int) -> tuple[int, ...]:
    """Width of each bit plane, lowest bits first."""
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed; there are {', '.join(map(str, BITS))}")
    return (bits - 1, 1) if bits in (3, 5) else (bits,)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """u8[ceil(bits * n / 8)] of `codes` (any shape, n values): int8 for 8 bits, else uint8 below 2^bits."""
    planes = _planes(bits)
    if bits == 8:
        if codes.dtype != np.int8:
            raise ValueError(f"8-bit codes must be int8, not {codes.dtype}")
        return np.ascontiguousarray(codes).reshape(-1).view(np.uint8).copy()
    if codes.dtype != np.uint8:
        raise ValueError(f"{bits}-bit codes must be uint8, not {codes.dtype}")
    flat = codes.reshape(-1)
    if flat.size and int(flat.max()) >= 1 << bits:
        raise ValueError(f"code {int(flat.max())} does not fit {bits} bits")
    stream, shift = [], 0
    for width in planes:
        plane = ((flat >> shift) & ((1 << width) - 1)).astype(np.uint8)
        stream.append(np.unpackbits(plane[:, None], axis=1, count=width, bitorder="little").reshape(-1))
        shift += width
    return np.packbits(np.concatenate(stream), bitorder="little")


def unpack_codes(packed: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """The codes of `pack_codes`: int8 for 8 bits, else uint8; ValueError when the sizes do not agree."""
    planes, count = _planes(bits), int(np.prod(shape))
    if packed.dtype != np.uint8 or packed.size != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, "
            f"not {packed.size} values of {packed.dtype}"
        )
    if bits == 8:
        return packed.reshape(-1).view(np.int8).reshape(shape).copy()
    stream = np.unpackbits(packed.reshape(-1), count=bits * count, bitorder="little")
    codes, start, shift = np.zeros(count, np.uint8), 0, 0
    for width in planes:
        plane = stream[start : start + width * count].reshape(count, width)
        codes |= np.packbits(plane, axis=1, bitorder="little").reshape(count) << np.uint8(shift)
        start, shift = start + width * count, shift + width
    return codes.reshape(shape)
