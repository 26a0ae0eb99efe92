"""Movements of elements without changing them: any element type, bit for bit.

A list of strided copies into one output (`Movement`) describes upsampling, concatenation, permutation, slicing,
expansion and padding; the functions below make them. `Gather` takes rows of a table, `TokenRow` one row of a sample.
The batch stays where it is:
dimension 0 of every operand that has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.strides import sample_extents


@dataclass(frozen=True)
class Copy:
    """A loop nest that copies from input `source` to the output; offsets and strides within one sample."""

    source: int
    extents: tuple[int, ...]
    source_strides: tuple[int, ...]
    target_strides: tuple[int, ...]
    source_offset: int = 0
    target_offset: int = 0


@dataclass(frozen=True)
class Movement:
    """y = copies of the inputs; where `fill` is given, it is everywhere else.

    Arguments: x0, x1, ..., y.
    """

    inputs: tuple[Shape, ...]
    shape: Shape
    copies: tuple[Copy, ...]
    dtype: str = "float32"
    fill: float | None = None


@dataclass(frozen=True)
class Gather:
    """y [B, *positions, width] = table [rows, width] at index i64 [B, *positions] (indices are clamped).

    A table in float16 may be read as it is stored, and its rows converted alone. Arguments: index, table, y.
    """

    rows: int
    width: int
    positions: tuple[int, ...] = ()
    dtype: str = "float32"
    index_dtype: str = "int64"
    stored: str | None = None
    """The type of the table, where it is another than that of y."""


@dataclass(frozen=True)
class TokenRow:
    """y [B, width] = x [B, rows, width] at the first of tokens [B, rows] that is `token`, or else at the largest.

    The first row where no token is `token`. Arguments: tokens, x, y.
    """

    rows: int
    width: int
    token: int | None = None
    dtype: str = "float32"
    token_dtype: str = "int64"


def arguments(problem: Movement | Gather | TokenRow) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    if isinstance(problem, TokenRow):
        return [
            Argument("tokens", (BATCH, problem.rows), problem.token_dtype),
            Argument("x", (BATCH, problem.rows, problem.width), problem.dtype),
            Argument("y", (BATCH, problem.width), problem.dtype),
        ]
    if isinstance(problem, Gather):
        index: Shape = (BATCH, *problem.positions)
        return [
            Argument("index", index, problem.index_dtype),
            Argument("table", (problem.rows, problem.width), problem.stored or problem.dtype),
            Argument("y", (*index, problem.width), problem.dtype),
        ]
    return [
        *(Argument(f"x{i}", shape, problem.dtype) for i, shape in enumerate(problem.inputs)),
        Argument("y", problem.shape, problem.dtype),
    ]


def _contiguous(extents: Sequence[int]) -> list[int]:
    strides = [1] * len(extents)
    for d in reversed(range(len(extents) - 1)):
        strides[d] = strides[d + 1] * extents[d + 1]
    return strides


def upsample(shape: Shape, factors: tuple[int, int], dtype: str = "float32") -> Movement:
    """Nearest neighbours: x [B, H, W, C] to [B, H*fh, W*fw, C]."""
    (fh, fw), (_, h, w, c) = factors, sample_extents(shape)
    target = (shape[0], h * fh, w * fw, c)
    copy = Copy(
        0,
        (h, w, fh, fw, c),
        (w * c, c, 0, 0, 1),
        (fh * w * fw * c, fw * c, w * fw * c, c, 1),
    )
    return Movement((shape,), target, (copy,), dtype)


def concat(shapes: Sequence[Shape], dim: int, dtype: str = "float32") -> Movement:
    """The inputs one after another along `dim`, which is not the batch."""
    rank = len(shapes[0])
    dim %= rank
    if shapes[0][dim] == BATCH:
        raise ValueError("samples of the batch cannot be concatenated")
    total = sum(int(shape[dim]) for shape in shapes)
    target = (*shapes[0][:dim], total, *shapes[0][dim + 1 :])
    strides, offset, copies = _contiguous(sample_extents(target)), 0, []
    for i, shape in enumerate(shapes):
        extents = sample_extents(shape)
        copies.append(Copy(i, tuple(extents), tuple(_contiguous(extents)), tuple(strides), 0, offset * strides[dim]))
        offset += int(shape[dim])
    return Movement(tuple(shapes), target, tuple(copies), dtype)


def permute(shape: Shape, order: Sequence[int], dtype: str = "float32") -> Movement:
    """y[i0, i1, ...] with dimension d of y being dimension order[d] of x; the batch stays first."""
    if BATCH in shape and order[0] != 0:
        raise ValueError("the batch must stay the first dimension")
    extents, strides = sample_extents(shape), _contiguous(sample_extents(shape))
    target = tuple(shape[d] for d in order)
    extents = [extents[d] for d in order]
    copy = Copy(0, tuple(extents), tuple(strides[d] for d in order), tuple(_contiguous(extents)))
    return Movement((shape,), target, (copy,), dtype)


def slice_(
    shape: Shape, starts: Sequence[int], stops: Sequence[int], steps: Sequence[int] | None = None,
    dtype: str = "float32",
) -> Movement:  # fmt: skip
    """x[start:stop:step] in every dimension; the entries of the batch are ignored."""
    steps = steps or [1] * len(shape)
    strides = _contiguous(sample_extents(shape))
    counts, offset = [], 0
    for d, extent in enumerate(shape):
        if extent == BATCH:
            counts.append(1)
            continue
        counts.append(len(range(starts[d], stops[d], steps[d])))
        offset += starts[d] * strides[d]
    target = tuple(BATCH if e == BATCH else n for e, n in zip(shape, counts, strict=True))
    moved = tuple(stride * step for stride, step in zip(strides, steps, strict=True))
    copy = Copy(0, tuple(counts), moved, tuple(_contiguous(counts)), offset)
    return Movement((shape,), target, (copy,), dtype)


def expand(shape: Shape, target: Shape, dtype: str = "float32") -> Movement:
    """Broadcast to `target` from the right; an input without batch may gain one."""
    padded = (1,) * (len(target) - len(shape)) + tuple(shape)
    if any(s not in (1, t) for s, t in zip(padded, target, strict=True)):
        raise ValueError(f"{shape} does not broadcast to {target}")
    extents, source = sample_extents(target), sample_extents(padded)
    strides = [s if e != 1 else 0 for s, e in zip(_contiguous(source), source, strict=True)]
    copy = Copy(0, tuple(extents), tuple(strides), tuple(_contiguous(extents)))
    return Movement((shape,), target, (copy,), dtype)


def pad(shape: Shape, before: Sequence[int], after: Sequence[int], fill: float = 0.0,
        dtype: str = "float32") -> Movement:  # fmt: skip
    """Pad with `before` and `after` elements of value `fill` in each dimension; none along the batch."""
    target = tuple(
        BATCH if extent == BATCH else int(extent) + b + a for extent, b, a in zip(shape, before, after, strict=True)
    )
    extents, strides = sample_extents(shape), _contiguous(sample_extents(target))
    offset = sum(b * s for b, s, e in zip(before, strides, shape, strict=True) if e != BATCH)
    copy = Copy(0, tuple(extents), tuple(_contiguous(extents)), tuple(strides), 0, offset)
    return Movement((shape,), target, (copy,), dtype, fill)
