"""Results kept between calls stay those of their inputs, whatever interrupts a call."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from mpq_compiler.runtime.memo import Part

ENTRY = {
    "name": "time",
    "inputs": [{"name": "t", "shape": [1], "dtype": "float32"}],
    "outputs": [{"name": "y", "shape": [1, 3], "dtype": "float32"}],
}


class Interrupted:
    """A function of which one call is interrupted."""

    def __init__(self) -> None:
        self.failing = False

    def __call__(self, t: np.ndarray) -> list[np.ndarray]:
        if self.failing:
            self.failing = False
            raise KeyboardInterrupt
        return [np.full((1, 3), 10 * t[0], np.float32)]


def results(part: Part, *values: float) -> list[float]:
    arrays: dict[str, Any] = {"t": np.array(values, np.float32)}
    return [float(row[0]) for row in part.results(arrays, len(values))[0][0]]


@pytest.mark.parametrize("batch", [1, 2])
def test_an_interrupted_call_spoils_nothing(batch: int) -> None:
    call = Interrupted()
    part = Part(ENTRY, lambda array: array, call, room=0)
    assert part.rows == 2
    first = (1.0, 2.0)[:batch]
    for values in ((1.0, 2.0), first):
        assert results(part, *values) == [10 * v for v in values]
    call.failing = True
    with pytest.raises(KeyboardInterrupt):
        results(part, *(5.0, 3.0)[:batch])
    for values in (first, (3.0, 4.0), (4.0,), (2.0, 3.0), (3.0,), first):
        assert results(part, *values) == [10 * v for v in values]


def test_an_interrupted_batch_is_not_taken_for_the_one_before() -> None:
    call = Interrupted()
    part = Part(ENTRY, lambda array: array, call, room=1 << 20)
    assert results(part, 1.0, 2.0) == [10, 20] and results(part, 5.0) == [50]
    call.failing = True
    with pytest.raises(KeyboardInterrupt):
        results(part, 5.0, 6.0)
    assert results(part, 1.0, 2.0) == [10, 20] and results(part, 5.0, 6.0) == [50, 60]
