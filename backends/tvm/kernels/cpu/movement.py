"""Kernels that move elements without changing them: any element type, bit for bit.

One template serves upsampling, concatenation, permutation, slicing, expansion and padding: a list of strided
copies into one output (`Movement`; the functions below make them). Rows of a table are gathered by `Gather`, one row
of each sample by `TokenRow`.
The batch stays where it is: dimension 0 of every operand that has one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffers,
    constant,
    each_vector,
    head,
    partial,
    primfunc,
    sample_view,
    scratch,
    shares,
    some_vectors,
    span,
    store,
    transpose,
    vectors,
)
from mpq_compiler.backends.tvm.kernels.common.tokens import place_of_token
from mpq_compiler.backends.tvm.kernels.common.vmath import keep
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Shape
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES, width
from mpq_compiler.backends.tvm.kernels.problems.movement import Copy, Gather, Movement, TokenRow, arguments
from mpq_compiler.backends.tvm.kernels.problems.strides import merge_dimensions, sample_extents

BYTES = {"float32": 4, "int32": 4, "int64": 8, "float16": 2, "int8": 1, "uint8": 1, "bool": 1, "float64": 8}


def build(problem: Movement | Gather | TokenRow, isa: str = "avx512vnni", name: str = "movement") -> PrimFunc:
    """The kernel. All targets share one form; `isa` is accepted for uniformity."""
    del isa

    def body(batch: Any, buffers: Buffers) -> None:
        if isinstance(problem, Gather):
            _gather(problem, batch, buffers)
        elif isinstance(problem, TokenRow):
            _token_row(problem, batch, buffers)
        else:
            _move(problem, batch, buffers)

    return primfunc(name, arguments(problem), body)


def _move(problem: Movement, batch: Any, buffers: Buffers) -> None:
    most = 128 // BYTES[problem.dtype]

    samples = batch if problem.shape[:1] == (BATCH,) else 1
    if problem.fill is not None:
        size, fill = math.prod(sample_extents(problem.shape)), problem.fill
        with shares(samples, vectors(size, most), size / most) as (b, first, end):
            y, start = sample_view(buffers["y"], problem.shape, b)

            def put(i: Any, lanes: int) -> None:
                store(y, constant(fill, problem.dtype, lanes), span(start + i, lanes))

            some_vectors(size, first, end, put, most)
    for together in _side_by_side(problem.copies):
        (extents, strides), *_ = merged = [
            merge_dimensions(copy.extents, [copy.source_strides, copy.target_strides]) for copy in together
        ]
        in_vectors = strides[1][-1] == 1 and strides[0][-1] in (0, 1)
        turned = len(together) == 1 and problem.dtype == "float32" and _turned(extents, strides)
        outer = vectors(extents[0], most) if len(extents) == 1 and in_vectors else extents[0]
        if turned and 0 in turned:
            outer = -(-extents[0] // LANES)
        nanoseconds = sum(math.prod(own) for own, _ in merged) / (most if in_vectors else 4)
        with shares(samples, outer, nanoseconds) as (b, first, end):
            y, start = sample_view(buffers["y"], problem.shape, b)
            places = []
            for copy in together:
                x, origin = sample_view(buffers[f"x{copy.source}"], problem.inputs[copy.source], b)
                places.append((x, origin + copy.source_offset, start + copy.target_offset))
            if len(together) == 1:
                ((x, at, to),) = places
                if turned:
                    _turn(x, y, extents, strides, at, to, turned, (first, end))
                    continue
                _nest(x, y, extents, strides, at, to, most, (first, end))
                continue
            with T.serial(first, end) as i:
                for (x, at, to), (own, (source, target)) in zip(places, merged, strict=True):
                    rest = [source[1:], target[1:]]
                    _nest(x, y, own[1:], rest, at + i * source[0], to + i * target[0], most)


def _turned(extents: list[int], strides: list[list[int]]) -> tuple[int, int] | None:
    """The dimensions of which each has neighbours on one side: of the source, of the target; None where one has both.

    Rows of fewer than 16 neighbours in the target are written whole, where a vector can be as short.
    """
    source, target = strides
    own = next((d for d, n in enumerate(extents) if n > 1 and source[d] == 1), None)
    last = len(extents) - 1
    short = extents[last] < LANES and width(extents[last]) != extents[last]
    if own is None or own == last or target[last] != 1 or source[last] == 0 or extents[last] == 1 or short:
        return None
    return own, last


def _turn(
    x: Any, y: Any, extents: list[int], strides: list[list[int]], at: Any, to: Any, turned: tuple[int, int],
    part: tuple[Any, Any],
) -> None:  # fmt: skip
    """A copy in blocks of 16 x 16, which are transposed in registers; `part` of the steps of the outermost loop."""
    (source, target), (own, last) = strides, turned
    rows, lanes = min(extents[last], LANES), min(extents[own], LANES)

    def block(at: Any, to: Any) -> None:
        def row(j: int) -> Any:
            start = at + j * source[last]
            return x[span(start, LANES)] if lanes == LANES else partial(x, (), start, lanes)[0]

        found = [keep(row(j)) for j in range(rows)] + [vmath.f32(0.0, LANES)] * (LANES - rows)
        for i, value in enumerate(transpose(found)[:lanes]):
            store(y, value if rows == LANES else head(value, rows), span(to + i * target[own], rows))

    def loop(d: int, at: Any, to: Any) -> None:
        if d == len(extents):
            block(at, to)
            return
        size = LANES if d in turned else 1
        with T.serial(*((0, -(-extents[d] // size)) if d else part)) as i:
            first = T.max(T.min(i * size, extents[d] - size), 0) if d in turned else i
            loop(d + 1, at + first * source[d], to + first * target[d])

    loop(0, at, to)


def _side_by_side(copies: Sequence[Copy]) -> list[list[Copy]]:
    """Copies by the loop that they have in common: those whose parts of a row lie in one, which is written whole."""
    found: dict[Any, list[Copy]] = {}
    for copy in copies:
        extents, (_, target) = merge_dimensions(copy.extents, [copy.source_strides, copy.target_strides])
        rows = (extents[0], target[0]) if len(extents) > 1 else copy
        found.setdefault(rows, []).append(copy)
    return list(found.values())


def _nest(
    x: Any, y: Any, extents: list[int], strides: list[list[int]], at: Any, to: Any, most: int,
    part: tuple[Any, Any] | None = None,
) -> None:  # fmt: skip
    """A copy; where there is a `part`, those of the steps (vectors) of its outermost loop."""
    (step, *inner_steps), (stride, *inner_strides) = strides
    if len(extents) > 1:
        with T.serial(*(part or (0, extents[0]))) as i:
            _nest(x, y, extents[1:], [inner_steps, inner_strides], at + i * step, to + i * stride, most)
    elif stride == 1 and step in (0, 1):

        def vector(i: Any, lanes: int) -> None:
            value = x[span(at + i, lanes)] if step else vmath.splat(x[at], lanes)
            store(y, value, span(to + i, lanes))

        if part:
            some_vectors(extents[0], *part, vector, most)
        else:
            each_vector(extents[0], vector, most)
    else:
        with T.serial(*(part or (0, extents[0]))) as i:
            store(y, x[at + i * step], to + i * stride)


def _gather(problem: Gather, batch: Any, buffers: Buffers) -> None:
    count = math.prod(problem.positions)
    index_shape: Shape = (BATCH, *problem.positions)
    table = buffers["table"]
    with shares(batch, count, count * problem.width / 8) as (b, begin, end):
        index, first = sample_view(buffers["index"], index_shape, b)
        y, start = sample_view(buffers["y"], (*index_shape, problem.width), b)
        with T.serial(begin, end) as i:
            row = T.cast(index[first + i], "int32")
            row = T.bind(T.max(T.min(row, problem.rows - 1), 0))
            to = start + i * problem.width

            def copy(c: Expr, lanes: int) -> None:
                found = table[row, span(c, lanes)]
                if problem.stored is not None:
                    found = T.cast(found, problem.dtype if lanes == 1 else f"{problem.dtype}x{lanes}")
                store(y, found, span(to + c, lanes))

            each_vector(problem.width, copy, 64 // BYTES[problem.dtype])


def _token_row(problem: TokenRow, batch: Expr, buffers: Buffers) -> None:
    with shares(batch, 1, problem.rows + problem.width / 8) as (b, begin, end), T.serial(begin, end):
        tokens, first = sample_view(buffers["tokens"], (BATCH, problem.rows), b)
        x, origin = sample_view(buffers["x"], (BATCH, problem.rows, problem.width), b)
        y, start = sample_view(buffers["y"], (BATCH, problem.width), b)
        row = origin + place_of_token(problem, tokens, first, scratch(1, "int32")) * problem.width
        each_vector(
            problem.width,
            lambda c, lanes: store(y, x[span(row + c, lanes)], span(start + c, lanes)),
            64 // BYTES[problem.dtype],
        )
