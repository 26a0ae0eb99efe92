"""Recorded arrays: NumPy arrays whose values are not known yet, which note what is computed of them.

A pipeline that is given parts which return such arrays does what it always does, and leaves a list of instructions:
calls of the parts, and the float32 operations in between, one at a time as NumPy rounds them. `mpq_draw.c` runs the
list, so a program in C draws with the same bits. What moves values and changes none (slices, transpositions, joins) is
recorded as copies between strided views, or not at all.

The dummies behind a recorded array are NaN: a value that escapes the recording shows (`Recording.data`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any, Self, cast

import numpy as np

from mpq_compiler.support.errors import UserError

Array = np.ndarray
Value = Any
DIMENSIONS = 6
"""Dimensions of a view in an instruction."""
TYPES = ("float32", "int64", "uint8")
"""The types of buffers, by their numbers."""


class Op(IntEnum):
    """What an instruction does, by its number in mpq_draw.c."""

    COPY = 0
    ADD = 1
    SUBTRACT = 2
    MULTIPLY = 3
    DIVIDE = 4
    LEAST = 5
    MOST = 6
    NEGATE = 7
    ROUND = 8
    BYTE = 9
    INPUT = 10
    CALL = 11
    PICTURE = 12


BINARY: dict[np.ufunc, Op] = {
    np.add: Op.ADD,
    np.subtract: Op.SUBTRACT,
    np.multiply: Op.MULTIPLY,
    np.divide: Op.DIVIDE,
    np.minimum: Op.LEAST,
    np.maximum: Op.MOST,
}
MOVES: frozenset[Callable[..., Value]] = frozenset(
    {
        np.broadcast_to, np.expand_dims, np.moveaxis, np.repeat, np.reshape, np.split, np.squeeze, np.swapaxes, np.take,
        np.tile, np.transpose,
    }
)  # fmt: skip
"""Functions of one array that change no value."""
FILLS: frozenset[Callable[..., Value]] = frozenset({np.zeros_like, np.ones_like})
"""Functions that read the shape alone."""
View = tuple[int, int, tuple[int, ...]]
"""A view of a buffer: its number, the offset and the strides, in elements."""


@dataclass
class Recording:
    """A list of instructions, and the buffers that they are on."""

    buffers: list[tuple[str, int, bytes | None]] = field(default_factory=list)
    """The type and the elements of each buffer, and its content, where it is known."""
    instructions: list[list[int]] = field(default_factory=list)
    _constants: dict[tuple[str, bytes], int] = field(default_factory=dict)

    def made(self, shape: Sequence[int], dtype: str = "float32") -> Recorded:
        """An array of a new buffer, for an instruction to fill."""
        return self._whole(self._buffer(dtype, math.prod(shape), None), shape)

    def constant(self, value: Array) -> Recorded:
        """An array whose values are known. ValueError: values that escaped a recording."""
        value = np.ascontiguousarray(value)
        if value.dtype.name not in TYPES:
            raise UserError(f"the pipeline computes in {value.dtype.name} between its parts, which a program cannot")
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            raise ValueError("a value escaped the recording")
        key = (value.dtype.name, value.tobytes())
        if key not in self._constants:
            self._constants[key] = self._buffer(value.dtype.name, value.size, key[1])
        return self._whole(self._constants[key], value.shape)

    def of(self, value: Value) -> Recorded:
        """A value as a recorded array."""
        return value if isinstance(value, Recorded) else self.constant(np.asarray(value))

    def whole(self, value: Array) -> int:
        """The buffer that holds exactly this array, in C's order; it is copied to one where none does."""
        array = self.of(value)
        size = self.buffers[array.buffer][1]
        if array.size != size or not np.array_equal(array.index.reshape(-1), np.arange(size)):
            array = self.compute(Op.COPY, array.shape, array, dtype=array.dtype.name)
        return array.buffer

    def compute(self, op: Op, shape: Sequence[int], *operands: Recorded, dtype: str = "float32") -> Recorded:
        """Records an operation; its operands are broadcast to the shape."""
        made = self.made(shape, dtype)
        self.fill(op, made, *operands)
        return made

    def fill(self, op: Op, to: Recorded, *operands: Recorded) -> None:
        """Records an operation whose result goes to a view."""
        arrays = (to, *(np.broadcast_to(operand, to.shape) for operand in operands))
        buffers = [cast(Recorded, array).buffer for array in arrays]
        for shape, found in _strided([cast(Recorded, array).index for array in arrays]):
            views = [(buffer, offset, strides) for buffer, (offset, strides) in zip(buffers, found, strict=True)]
            self._add(op, shape, *views)

    def call(self, part: int, function: int, inputs: Sequence[Array], shape: Sequence[int]) -> Recorded:
        """Records a call of a part; returns its output."""
        for buffer in [self.whole(array) for array in inputs]:  # copies come before
            self._add(Op.INPUT, (), (0, 0, ()), (buffer, 0, ()))
        made = self.made(shape)
        self._add(Op.CALL, (), (made.buffer, 0, ()), (part, 0, ()), (function, 0, ()))
        return made

    def picture(self, pixels: Array) -> None:
        """Records what is drawn: bytes [H, W, channels]."""
        self._add(Op.PICTURE, (), (0, 0, ()), (self.whole(pixels), 0, ()))
        self.instructions[-1][1:4] = pixels.shape

    def data(self) -> dict[str, Array]:
        """The recording as arrays, which `mpq_draw.c` reads."""
        described, constants = [], bytearray()
        for dtype, size, content in self.buffers:
            described.append([TYPES.index(dtype), size, -1 if content is None else len(constants)])
            if content is not None:
                constants += content + bytes(-len(content) % 8)
        return {
            "buffers": np.array(described, np.int64),
            "instructions": np.array(self.instructions, np.int64),
            "constants": np.frombuffer(bytes(constants), np.uint8),
        }

    def _buffer(self, dtype: str, size: int, content: bytes | None) -> int:
        self.buffers.append((dtype, size, content))
        return len(self.buffers) - 1

    def _whole(self, buffer: int, shape: Sequence[int]) -> Recorded:
        index = np.arange(self.buffers[buffer][1]).reshape(shape)
        return Recorded.at(self, buffer, index, self.buffers[buffer][0])

    def _add(self, op: Op, shape: Sequence[int], *views: View) -> None:
        row = [int(op), *[1] * (DIMENSIONS - len(shape)), *shape]
        for buffer, offset, strides in (*views, *[(0, 0, ())] * (3 - len(views))):
            row += [buffer, offset, *[0] * (DIMENSIONS - len(strides)), *strides]
        self.instructions.append([int(value) for value in row])


Strided = tuple[tuple[int, ...], list[tuple[int, tuple[int, ...]]]]
"""A shape, and offset and strides in each buffer."""


def _strided(indices: Sequence[Array]) -> list[Strided]:
    """Elements by their places in buffers, as strided views; several where one does not do."""
    indices = _even(indices)
    shape = indices[0].shape
    kept = [axis for axis, size in enumerate(shape) if size > 1]
    found = []
    for index in indices:
        first = int(index.flat[0])
        steps = [int(index[tuple(int(i == axis) for i in range(index.ndim))]) - first for axis in kept]
        grid = first + sum(
            (np.arange(shape[axis]).reshape([-1 if i == axis else 1 for i in range(index.ndim)]) * step
             for axis, step in zip(kept, steps, strict=True)),
            start=np.zeros([1] * index.ndim, np.int64),
        )  # fmt: skip
        if not np.array_equal(np.broadcast_to(grid, shape), index):
            return _by_rows(indices, kept[0])
        found.append((first, steps))
    sizes, merged = _merged([shape[axis] for axis in kept], [steps for _, steps in found])
    if len(sizes) > DIMENSIONS:
        return _by_rows(indices, kept[0])
    return [(tuple(sizes), [(first, tuple(steps)) for (first, _), steps in zip(found, merged, strict=True)])]


def _even(indices: Sequence[Array]) -> Sequence[Array]:
    """Splits dimensions along which a view goes on with another stride, as it does behind a reshape."""
    axis = 0
    while axis < indices[0].ndim:
        size, first = indices[0].shape[axis], [0] * axis
        for index in indices:
            steps = np.diff(index[tuple(first)].reshape(size, -1)[:, 0])
            odd = steps != steps[:1]
            run = int(np.argmax(odd)) + 1 if odd.any() else size
            if size % run == 0 and run < size:
                shape = [*index.shape[:axis], size // run, run, *index.shape[axis + 1 :]]
                indices = [each.reshape(shape) for each in indices]
                break
        else:
            axis += 1
    return indices


def _by_rows(indices: Sequence[Array], axis: int) -> list[Strided]:
    rows = range(indices[0].shape[axis])
    return [each for row in rows for each in _strided([np.take(index, [row], axis) for index in indices])]


def _merged(sizes: Sequence[int], strides: Sequence[Sequence[int]]) -> tuple[list[int], list[list[int]]]:
    """Dimensions as few as they can be: those that follow each other in every view are one."""
    kept, found = [*sizes[:1]], [[*each[:1]] for each in strides]
    for axis in range(1, len(sizes)):
        if all(each[axis - 1] == each[axis] * sizes[axis] for each in strides):
            kept[-1] *= sizes[axis]
            for steps, each in zip(found, strides, strict=True):
                steps[-1] = each[axis]
        else:
            kept.append(sizes[axis])
            for steps, each in zip(found, strides, strict=True):
                steps.append(each[axis])
    return kept, found


class Recorded(np.ndarray):
    """An array whose values are those of a recording's buffer, at the places `index`."""

    recording: Recording
    buffer: int
    index: Array
    """The place in the buffer of each element, int64 of the array's shape."""

    @classmethod
    def at(cls, recording: Recording, buffer: int, index: Array, dtype: str) -> Self:
        dummy = np.array(np.nan if dtype == "float32" else np.iinfo(dtype).max, dtype)
        made = np.broadcast_to(dummy, index.shape).view(cls)
        made.recording, made.buffer, made.index = recording, buffer, index
        return made

    def _moved(self, index: Array) -> Self:
        return type(self).at(self.recording, self.buffer, index, self.dtype.name)

    def _unary(self, op: Op, dtype: str = "float32") -> Recorded:
        return self.recording.compute(op, self.shape, self, dtype=dtype)

    def __array_function__(
        self, func: Callable[..., Value], types: Value, args: Iterable[Value], kwargs: Mapping[str, Value]
    ) -> Value:
        args = [*args]
        if func in MOVES:
            first, *rest = args
            found = func(first.index, *rest, **kwargs)
            return [first._moved(each) for each in found] if isinstance(found, list) else first._moved(found)
        if func in FILLS:
            return func(np.empty(self.shape, self.dtype), *args[1:], **kwargs)
        if func is np.concatenate:
            return self._joined(*args, **kwargs)
        if func is np.stack:
            axis: int = kwargs["axis"] if "axis" in kwargs else [*args[1:], 0][0]
            return self._joined([np.expand_dims(part, axis) for part in args[0]], axis)
        if func is np.pad:
            return self._padded(*args, **kwargs)
        if func is np.clip:
            return args[0].clip(*args[1:], **kwargs)
        raise UserError(f"the pipeline computes '{func.__name__}' between its parts, which a program cannot")

    def _joined(self, parts: Sequence[Array], axis: int = 0) -> Recorded:
        sizes = [part.shape[axis] for part in parts]
        shape = [*parts[0].shape]
        shape[axis] = sum(sizes)
        made = self.recording.made(shape, self.dtype.name)
        for part, to in zip(parts, np.split(made, np.cumsum(sizes)[:-1], axis), strict=True):
            self.recording.fill(Op.COPY, cast(Recorded, to), self.recording.of(part))
        return made

    def _padded(self, x: Array, pairs: Sequence[tuple[int, int]], constant_values: float) -> Recorded:
        shape = [size + sum(pair) for size, pair in zip(x.shape, pairs, strict=True)]
        made = self.recording.made(shape, self.dtype.name)
        self.recording.fill(Op.COPY, made, self.recording.constant(np.array(constant_values, self.dtype)))
        within = tuple(slice(before, before + size) for size, (before, _) in zip(x.shape, pairs, strict=True))
        self.recording.fill(Op.COPY, made[within], self.recording.of(x))
        return made

    def __array_ufunc__(self, ufunc: np.ufunc, method: str, *inputs: Value, **kwargs: Value) -> Value:
        if ufunc is np.isfinite and method == "__call__":
            return np.ones(self.shape, bool)  # the program looks at what parts give
        if method != "__call__" or kwargs or (ufunc not in BINARY and ufunc is not np.negative):
            raise UserError(f"the pipeline computes '{ufunc.__name__}' between its parts, which a program cannot")
        if ufunc is np.negative:
            return self._unary(Op.NEGATE)
        # Python's numbers take the type of the arrays beside them, NumPy's have their own.
        dtype = np.result_type(*(value.dtype if isinstance(value, Array) else value for value in inputs))
        if dtype != np.float32:
            raise UserError(f"the pipeline computes in {dtype} between its parts, which a program cannot")
        operands = [
            value if isinstance(value, Recorded) else self.recording.constant(np.asarray(value, np.float32))
            for value in inputs
        ]
        shape = np.broadcast_shapes(*(operand.shape for operand in operands))
        return self.recording.compute(BINARY[ufunc], shape, *operands)

    def clip(self, min: Value = None, max: Value = None, **kwargs: Value) -> Value:  # type: ignore[override]  # up, down
        found: Value = self
        if min is not None:
            found = np.maximum(found, np.float32(min))
        return found if max is None else np.minimum(found, np.float32(max))

    def round(self, decimals: Value = 0, out: Value = None) -> Value:
        return self._unary(Op.ROUND)

    def astype(self, dtype: Value, *args: Value, **kwargs: Value) -> Value:
        wanted = np.dtype(dtype)
        if wanted == self.dtype:
            return self
        if wanted != np.uint8 or self.dtype != np.float32:
            raise UserError(f"the pipeline converts {self.dtype} to {wanted} between its parts, which a program cannot")
        return self._unary(Op.BYTE, "uint8")

    def copy(self, *args: Value, **kwargs: Value) -> Value:
        return self

    def reshape(self, *shape: Value, **kwargs: Value) -> Value:
        return self._moved(self.index.reshape(*shape, **kwargs))

    def transpose(self, *axes: Value) -> Value:
        return self._moved(self.index.transpose(*axes))

    def swapaxes(self, a: Value, b: Value) -> Value:
        return self._moved(self.index.swapaxes(a, b))

    def squeeze(self, *axes: Value, **kwargs: Value) -> Value:
        return self._moved(self.index.squeeze(*axes, **kwargs))

    def __getitem__(self, key: Value) -> Value:
        return self._moved(np.asarray(self.index[key]))

    def __setitem__(self, key: Value, value: Value) -> None:
        raise UserError("the pipeline writes to a part's output, which a program cannot")
