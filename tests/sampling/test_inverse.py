"""The way back through glue that scales, shifts and moves numbers; whatever does more is refused."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_compiler.sampling.inverse import Inverse, InverseOfPixels

Array = np.ndarray


@given(
    st.integers(1, 4), st.integers(1, 9), st.integers(1, 9), st.floats(0.05, 20), st.floats(-5, 5), st.integers(0, 9)
)
def test_there_and_back(channels: int, height: int, width: int, scale: float, shift: float, seed: int) -> None:
    draw = np.random.default_rng(seed)
    shape = (1, channels, height, width)
    signs = draw.choice([-1, 1], (1, channels, 1, 1)).astype(np.float32)
    places = draw.permutation(channels * height * width)

    def function(x: Array) -> Array:
        scaled = x * signs * np.float32(scale) + np.float32(shift)
        return scaled.ravel()[places].reshape(1, height * width, channels)

    x = draw.standard_normal(shape, np.float32)
    np.testing.assert_allclose(Inverse(function, shape)(function(x)), x, atol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x[..., :1],
        lambda x: x * 0,
        lambda x: np.repeat(x[..., :1], x.shape[-1], -1),
        lambda x: x + x[..., ::-1],
        lambda x: np.tanh(x),
        lambda x: np.clip(x, -1, 1),
    ],
    ids=["part", "nothing", "copies", "sums", "curve", "cut"],
)
def test_what_has_no_way_back(function: Callable[[Array], Array]) -> None:
    with pytest.raises(ValueError, match=r"it (gives|does) "):
        Inverse(function, (1, 2, 3, 4))


def test_pixels() -> None:
    inverse = InverseOfPixels(lambda x: np.clip(x / 2 + 0.5, 0, 1))
    np.testing.assert_allclose(inverse(np.array([0.0, 0.25, 1.0])), [-1, -0.5, 1], atol=1e-6)
    for function in (lambda x: np.clip(x * 0, 0, 1), lambda x: np.clip(x, 0, 1) ** 2):
        with pytest.raises(ValueError, match=r"it (gives|does) "):
            InverseOfPixels(function)
