"""Buffers of kernels: what a problem's ``arguments`` lists."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

BATCH = "B"
"""The only symbolic size."""
Shape = tuple[int | str, ...]
ROUNDED = "uint16"
"""Element type of values stored in bfloat16, as the upper halves of the nearest float32."""
HALF = "float16"
"""Element type of values that kernels of GPUs hand on in half precision (`plan.halves`)."""


@dataclass(frozen=True)
class Argument:
    """A buffer of a kernel: its name, its shape (``"B"`` is the batch) and its element type."""

    name: str
    shape: Shape
    dtype: str = "float32"


def sized(shape: Sequence[int | str], batch: int) -> tuple[int, ...]:
    """A shape at a batch size."""
    return tuple(batch if extent == BATCH else int(extent) for extent in shape)
