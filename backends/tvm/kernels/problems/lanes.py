"""Lanes of vectors: they are part of the arithmetic where a sum is folded, and of the layout of packed weights."""

from __future__ import annotations

LANES = 16
"""Lanes of every vector; LLVM splits vectors on narrower machines."""


def width(extent: int, most: int = LANES) -> int:
    """Lanes for a loop over `extent` elements: the largest power of two within both."""
    return min(most, 1 << (extent.bit_length() - 1))
