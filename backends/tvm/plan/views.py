"""Where the elements of a tensor lie in another, as strides: what copies are made of."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq_compiler.backends.tvm.plan.calls import BATCH, Shape, Value


@dataclass(frozen=True)
class View:
    """The places of a tensor's elements in a value: slices, permutes and repetitions are views."""

    source: Value
    shape: Shape
    """The shape of the tensor."""
    strides: tuple[int, ...]
    """The stride of each dimension, in elements of a sample of the source; 0 for the batch."""
    offset: int = 0
    """The place of the first element within a sample."""

    @property
    def extents(self) -> tuple[int, ...]:
        """The shape of a sample, with 1 for the batch."""
        return tuple(1 if extent == BATCH else int(extent) for extent in self.shape)

    @property
    def is_whole(self) -> bool:
        """Whether it is the source in another shape."""
        batched = self.shape[:1] == (BATCH,)
        if self.offset or batched != self.source.batched or math.prod(self.extents) != self.source.size:
            return False
        strides = contiguous(self.shape).strides
        return all(n == 1 or a == b for n, a, b in zip(self.extents, self.strides, strides, strict=True))

    def reshaped(self, shape: Shape) -> View | None:
        """The view in another shape; None where no strides express it."""
        dims = [(n, s) for n, s in zip(self.extents, self.strides, strict=True) if n != 1]
        strides: list[int] = []
        for extent in reversed([1 if d == BATCH else int(d) for d in shape]):
            if extent == 1:
                strides.append(0)
                continue
            while len(dims) > 1 and dims[-1][0] % extent:  # merge with the dimension before
                (outer, step), (inner, stride) = dims[-2:]
                if step != inner * stride:
                    return None
                dims[-2:] = [(outer * inner, stride)]
            if not dims or dims[-1][0] % extent:
                return None
            size, stride = dims.pop()
            strides.append(stride)
            if size != extent:
                dims.append((size // extent, stride * extent))
        return None if dims else View(self.source, shape, tuple(reversed(strides)), self.offset)


def whole(value: Value) -> View:
    """The view of a whole value."""
    strides, step = [], 1
    for extent in reversed(value.shape):
        one = extent == BATCH or extent == 1
        strides.append(0 if one else step)
        step *= 1 if one else int(extent)
    return View(value, value.shape, tuple(reversed(strides)))


def contiguous(shape: Shape) -> View:
    """The view of a whole value of that shape, whichever it is."""
    return whole(Value("", shape, ""))
