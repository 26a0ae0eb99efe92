"""What every container is given, and what it says that it made of it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


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
    step: np.ndarray | None
    """The scales [O] where every value is a whole number of them; None where it is not."""
    bytes: float
    """The bytes that it takes in the artifact."""


@dataclass(frozen=True)
class Written:
    """A parameter as it was written."""

    layer: Layer
    type: str
    bytes: int
    sqnr_db: float
    """The SQNR of the written value against the artifact's; infinite where they are equal."""
