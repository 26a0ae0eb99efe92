"""What every container is given, and what it says that it made of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Grid:
    """Where the values of a weight lie: ``scale[o, j] * level + offset[o]``, a low-rank branch added."""

    scale: np.ndarray
    """f32 [O, J]."""
    segments: tuple[int, ...]
    """The counts of input channels that the J columns of ``scale`` are for."""
    offset: np.ndarray | None = None
    """f32 [O]."""
    exponent: int | None = None
    """The bits of exponent of levels that are 8-bit floats; None: they are whole numbers."""
    branch: tuple[np.ndarray, np.ndarray] | None = None
    """The factors f16 of the branch: [O, r], and [r, ...] with the weight's other dimensions."""


@dataclass(frozen=True)
class Layer:
    """A parameter of the model with the artifact's value, f32."""

    name: str
    """Its name in diffusers' model."""
    value: np.ndarray
    format: str | None
    """The format of a quantized weight; None for a float."""
    bits: int | None
    """The bits that a code needs to be as fine as the artifact's; None for a float."""
    grid: Grid | None
    """The grid that the values lie on; None where they lie on none."""
    bytes: float
    """The bytes that it takes in the artifact."""

    @property
    def step(self) -> np.ndarray | None:
        """The scales [O] where every value is a whole number of them; None where it is not."""
        grid = self.grid
        if grid is None or len(grid.segments) > 1:
            return None
        more = (grid.offset, grid.exponent, grid.branch)
        return grid.scale[:, 0] if all(part is None for part in more) else None


@dataclass(frozen=True)
class Written:
    """A parameter as it was written."""

    layer: Layer
    type: str
    bytes: int
    sqnr_db: float
    """The SQNR of the written value against the artifact's; infinite where they are equal."""
