"""The inverse of glue that scales, shifts and moves numbers, as what lies between latents and their decoder.

A pipeline says how latents become what its decoder takes, and how pixels come of what it gives. A picture that is to be
drawn from needs the way back, of which it says nothing. It is found by calling the glue. Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from mpq_compiler.sampling.convention import Convention
from mpq_compiler.sampling.glue import Glue

Array = np.ndarray
CLOSE = 1e-4
"""How near to its origin what went there and back must be, relative to the largest number."""


class Inverse:
    """The inverse of a function of float32 arrays that gives each number scaled and shifted, perhaps in another place.

    Raises:
        ValueError: the function does something else.
    """

    def __init__(self, function: Callable[[Array], Array], shape: tuple[int, ...]) -> None:
        """``shape`` is that of the function's argument."""
        self._shape, size = shape, int(np.prod(shape))
        shift = function(np.zeros(shape, np.float32)).astype(np.float64)
        scale = function(np.ones(shape, np.float32)) - shift
        if shift.size != size or not (np.abs(scale) > 0).all():
            raise ValueError("it gives other numbers than it takes")
        self._shift, self._scale = shift.ravel(), scale.ravel()
        numbers = np.arange(size, dtype=np.float32).reshape(shape)
        self._places = np.rint((function(numbers).ravel() - self._shift) / self._scale).astype(np.int64)
        probe = np.random.Generator(np.random.PCG64(0)).standard_normal(shape, dtype=np.float32)
        whole = np.array_equal(np.sort(self._places), np.arange(size))
        if not whole or np.abs(self(function(probe)) - probe).max() > CLOSE * np.abs(probe).max():
            raise ValueError("it does more than to scale, to shift and to move numbers")

    def __call__(self, result: Array) -> Array:
        """The argument that gives a result, float32."""
        found = np.empty(self._shift.size, np.float32)
        found[self._places] = (result.ravel() - self._shift) / self._scale
        return found.reshape(self._shape)


def of_decoded(decoded: Glue, convention: Convention, shape: tuple[int, ...]) -> Inverse:
    """The way from what a decoder takes to latents of a shape. ValueError: there is none."""
    return Inverse(lambda latents: decoded(latents=convention.pack(latents))["z"], shape)


def of_images(images: Glue) -> InverseOfPixels:
    """The way from pixels to what a decoder gives. ValueError: there is none."""
    return InverseOfPixels(lambda sample: images(sample=sample)["images"])


class InverseOfPixels:
    """The inverse of a function that gives every number scaled, shifted and cut to what lies from 0 to 1.

    Raises:
        ValueError: the function does something else.
    """

    def __init__(self, function: Callable[[Array], Array]) -> None:
        probe = np.zeros((1, 3, 2, 2), np.float32)
        low, high = (float(function(probe + np.float32(value)).flat[0]) for value in (0, 0.5))
        if low == high:
            raise ValueError("it gives the same pixels for different numbers")
        self._shift, self._scale = low, 2 * (high - low)
        pixels = np.linspace(0, 1, probe.size, dtype=np.float32).reshape(probe.shape)
        if np.abs(function(self(pixels)) - pixels).max() > CLOSE:
            raise ValueError("it does more than to scale, to shift and to cut numbers")

    def __call__(self, pixels: Array) -> Array:
        """The numbers that give pixels from 0 to 1, float32."""
        found: Array = ((pixels - self._shift) / self._scale).astype(np.float32)
        return found
