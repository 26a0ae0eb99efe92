"""The stored form of weight codes: one little-endian bit stream, without padding. It needs NumPy only.

Over the n = O*K codes of a weight in row-major order:

- 8 bits: the int8 values themselves;
- 4 bits: two codes a byte, the first in the low nibble;
- 1 and 2 bits: eight and four codes a byte, the first in the lowest bits;
- 3 and 5 bits: two planes, one behind the other in the bit stream: the low 2 (4) bits of every code,
  packed as above in 2n (4n) bits, then the top bit of every code in n bits, in all
  ceil(bits * n / 8) bytes.

Where rows have several widths, those of class c have c bits more than those of class 0. The lowest bits of all rows, as
many as class 0 has, come first, packed as above. Behind them, in the same bit stream, comes one more bit of each code
in the rows of class 1 and above, then one more in those of class 2 and above.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

BITS = (1, 2, 3, 4, 5, 8)
"""The widths of codes that can be packed."""


def packed_bytes(count: int, bits: int) -> int:
    """Bytes that `count` codes of `bits` bits take."""
    return -(-count * bits // 8)


def _planes(bits: int) -> tuple[int, ...]:
    """The width of each bit plane, lowest bits first."""
    if bits not in BITS:
        raise ValueError(f"codes of {bits} bits cannot be packed; there are {', '.join(map(str, BITS))}")
    return (bits - 1, 1) if bits in (3, 5) else (bits,)


def pack_codes(codes: np.ndarray, bits: int) -> np.ndarray:
    """Packs `codes` (any shape, n values; int8 for 8 bits, else uint8 below 2^bits) to u8 [ceil(bits * n / 8)].

    Raises:
        ValueError: a width, type or code that does not fit.
    """
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
    return np.packbits(np.concatenate(_stream(flat, planes)), bitorder="little")


def _stream(codes: np.ndarray, planes: Sequence[int]) -> list[np.ndarray]:
    """Splits codes [n] into single bits, plane by plane."""
    shifts = [sum(planes[:i]) for i in range(len(planes))]
    fields = (((codes >> shift) & ((1 << width) - 1), width) for shift, width in zip(shifts, planes, strict=True))
    return [
        np.unpackbits(field[:, None].astype(np.uint8), axis=1, count=width, bitorder="little").reshape(-1)
        for field, width in fields
    ]


def unpack_codes(packed: np.ndarray, shape: tuple[int, ...], bits: int) -> np.ndarray:
    """Unpacks what `pack_codes` packed: int8 for 8 bits, else uint8. ValueError: the sizes do not agree."""
    planes, count = _planes(bits), int(np.prod(shape))
    if packed.dtype != np.uint8 or packed.size != packed_bytes(count, bits):
        raise ValueError(
            f"{count} codes of {bits} bits take {packed_bytes(count, bits)} bytes, "
            f"not {packed.size} values of {packed.dtype}"
        )
    if bits == 8:
        return packed.reshape(-1).view(np.int8).reshape(shape).copy()
    stream = np.unpackbits(packed.reshape(-1), count=bits * count, bitorder="little")
    return _codes(stream, count, planes).reshape(shape)


def _codes(stream: np.ndarray, count: int, planes: Sequence[int]) -> np.ndarray:
    """Joins the planes at the beginning of a stream of bits to codes u8 [count]."""
    codes, start, shift = np.zeros(count, np.uint8), 0, 0
    for width in planes:
        plane = stream[start : start + width * count].reshape(count, width)
        codes |= np.packbits(plane, axis=1, bitorder="little").reshape(count) << np.uint8(shift)
        start, shift = start + width * count, shift + width
    return codes


def pack_rows(codes: np.ndarray, classes: np.ndarray, bits: int) -> np.ndarray:
    """Packs codes u8 [O, K] whose rows have classes u8 [O]: ``bits`` bits in class 0, one more in each further class.

    Raises:
        ValueError: a code does not fit its row's bits.
    """
    most = codes.max(1, initial=0) >> (bits + classes)
    if most.any():
        row = int(most.argmax())
        raise ValueError(f"code {codes[row].max()} of row {row} does not fit {bits + classes[row]} bits")
    stream = _stream(codes.reshape(-1), _planes(bits))
    for c in range(1, int(classes.max(initial=0)) + 1):
        stream += _stream(codes[classes >= c].reshape(-1) >> (bits + c - 1), (1,))
    return np.packbits(np.concatenate(stream), bitorder="little")


def unpack_rows(packed: np.ndarray, shape: tuple[int, int], classes: np.ndarray, bits: int) -> np.ndarray:
    """Unpacks what `pack_rows` packed. ValueError: the sizes do not agree."""
    (rows, columns), widths = shape, bits + classes.astype(int)
    total = int(widths.sum()) * columns
    if packed.dtype != np.uint8 or packed.size != -(-total // 8):
        raise ValueError(
            f"rows of these classes take {-(-total // 8)} bytes, not {packed.size} values of {packed.dtype}"
        )
    stream = np.unpackbits(packed.reshape(-1), count=total, bitorder="little")
    codes, start = _codes(stream, rows * columns, _planes(bits)).reshape(shape), bits * rows * columns
    for c in range(1, int(classes.max(initial=0)) + 1):
        chosen = classes >= c
        size = int(chosen.sum()) * columns
        codes[chosen] |= stream[start : start + size].reshape(-1, columns) << np.uint8(bits + c - 1)
        start += size
    return codes
