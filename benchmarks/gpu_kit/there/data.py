"""Arrays that both sides draw alike, so that the kit need not carry them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np


def drawn(what: Mapping[str, Any]) -> np.ndarray:
    """The array of a description: `shape`, `dtype`, `seed`, and `low` and `high` (exclusive) or a `deviation`.

    By NumPy's legacy generator, whose numbers stay as they are in all its releases.
    """
    draw, shape = np.random.RandomState(what["seed"]), tuple(what["shape"])
    if "deviation" in what:
        return (what["deviation"] * draw.standard_normal(shape)).astype(what["dtype"])
    if what["low"] == 0 and what["high"] == 256 and what["dtype"] == "uint8":
        return np.frombuffer(draw.bytes(int(np.prod(shape))), np.uint8).reshape(shape)
    return draw.randint(what["low"], what["high"], shape).astype(what["dtype"])


def edges(result: np.ndarray, lines: int) -> np.ndarray:
    """The first and the last lines of the second dimension, one behind the other."""
    return np.ascontiguousarray(np.concatenate([result[:, :lines], result[:, -lines:]], 1))


def empty(shape: Sequence[int], dtype: str) -> np.ndarray:
    """To be written, full of a byte that no kernel leaves behind by chance."""
    array = np.empty(tuple(shape), dtype)
    array.view(np.uint8)[...] = 0xA5
    return array
