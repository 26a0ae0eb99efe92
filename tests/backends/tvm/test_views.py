"""Views of values against NumPy's: what strides can say, and nothing else."""

from __future__ import annotations

import math

import numpy as np
import pytest

from mpq_compiler.backends.tvm.plan.calls import Value
from mpq_compiler.backends.tvm.plan.views import View, whole

SHAPE = (4, 6, 5, 2)
SOURCE = np.arange(math.prod(SHAPE), dtype=np.int32)


def view_of(array: np.ndarray, batched: bool = True) -> View:
    """The view that reads `SOURCE` as the array does, which is made of it."""
    value = Value("x", (*(("B",) if batched else ()), *SHAPE), "float32")
    strides = tuple(s // array.itemsize for s in array.strides)
    offset = (array.__array_interface__["data"][0] - SOURCE.__array_interface__["data"][0]) // array.itemsize
    if batched:
        return View(value, ("B", *array.shape), (0, *strides), offset)
    return View(value, array.shape, strides, offset)


def read(view: View) -> np.ndarray:
    """A sample of the view."""
    places = np.full(view.extents, view.offset)
    for axis, (extent, stride) in enumerate(zip(view.extents, view.strides, strict=True)):
        places += (np.arange(extent) * stride).reshape(-1, *[1] * (len(view.extents) - axis - 1))
    return SOURCE[places]


ARRAYS = {
    "all": SOURCE.reshape(SHAPE),
    "permuted": SOURCE.reshape(SHAPE).transpose(2, 0, 1, 3),
    "part of the channels": SOURCE.reshape(4, 6, 10)[..., 3:7],
    "every second": SOURCE.reshape(4, 30, 2)[..., 1],
    "part of the rows": SOURCE.reshape(SHAPE)[1:3],
    "repeated": np.broadcast_to(SOURCE.reshape(SHAPE)[:, :1], SHAPE),
    "one element": SOURCE[7:8],
}
SHAPES = [(240,), (24, 10), (4, 6, 10), (4, 60), (120, 2), (6, 4), (24, 4), (4, 24), (96,), (30, 4), (120,), (4, 30),
          (2, 60), (12, 10), (1, 4, 30), (5, 48), (5, 4, 12), (5, 24, 2), (5, 1, 2, 12, 2), (1,), (1, 1)]  # fmt: skip


@pytest.mark.parametrize("batched", [True, False])
@pytest.mark.parametrize("name", ARRAYS)
def test_reshapes_that_need_no_copy(name: str, batched: bool) -> None:
    array = ARRAYS[name]
    view = view_of(array, batched)
    assert (read(view).ravel() == array.ravel()).all()
    found = 0
    for shape in SHAPES:
        if math.prod(shape) != array.size:
            continue
        reshaped = view.reshaped((*view.shape[:batched], *shape))
        alike = np.shares_memory(array.reshape(shape), SOURCE)
        assert (reshaped is not None) == alike, shape
        if reshaped is not None:
            found += 1
            assert (read(reshaped).ravel() == array.ravel()).all() and reshaped.extents[batched:] == shape
    assert found


@pytest.mark.parametrize("name", ARRAYS)
def test_only_the_source_itself_is_whole(name: str) -> None:
    view = view_of(ARRAYS[name])
    assert view.is_whole == (name == "all")
    assert view_of(ARRAYS["all"]).reshaped(("B", 1, 24, 10)).is_whole
    assert whole(view.source).is_whole


def test_what_is_the_same_for_all_samples_is_no_value_of_each() -> None:
    table = Value("table", (2, 5), "float32")
    assert not View(table, ("B", 5), (0, 1)).is_whole  # its first row, as many elements as it has at batch 2
