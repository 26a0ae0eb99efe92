"""Elements moved as they are, but for their precision: a thread for each of a copy."""

from __future__ import annotations

import math
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Index,
    constant,
    sample_view,
    store,
    unravel,
)
from mpq_compiler.backends.tvm.kernels.common.tokens import place_of_token
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, local, primfunc, put_values, value_of
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Shape
from mpq_compiler.backends.tvm.kernels.problems.movement import Gather, Movement, TokenRow, arguments
from mpq_compiler.backends.tvm.kernels.problems.strides import merge_dimensions


def build(problem: Movement | Gather | TokenRow, name: str) -> PrimFunc:
    """The kernel ``name(*problems.movement.arguments(problem))``."""

    def body(batch: Expr, buffers: Buffers) -> None:
        if isinstance(problem, Gather):
            _gather(problem, batch, buffers)
        elif isinstance(problem, TokenRow):
            _token_row(problem, batch, buffers)
        else:
            _move(problem, batch, buffers)

    return primfunc(name, arguments(problem), body)


def _move(problem: Any, batch: Any, buffers: Buffers) -> None:
    samples = batch if problem.shape[:1] == (BATCH,) else 1
    if problem.fill is not None:
        size = math.prod(1 if extent == BATCH else int(extent) for extent in problem.shape)
        with each(samples * size) as i:
            y, _ = sample_view(buffers["y"], problem.shape, 0)
            _put(y, constant(problem.fill, problem.dtype, 1), i)
    for copy in problem.copies:
        extents, (source, target) = merge_dimensions(copy.extents, [copy.source_strides, copy.target_strides])
        with each(samples * math.prod(extents)) as i:
            sample, *place = unravel(i, *extents)
            x, origin = sample_view(buffers[f"x{copy.source}"], problem.inputs[copy.source], sample)
            y, start = sample_view(buffers["y"], problem.shape, sample)
            at = origin + copy.source_offset + sum(p * step for p, step in zip(place, source, strict=True))
            to = start + copy.target_offset + sum(p * step for p, step in zip(place, target, strict=True))
            _put(y, x[at] if x.dtype == y.dtype else value_of(x, at), to)


def _put(y: Buffer, value: Expr, at: Index) -> None:
    """Store a value of the type of `y`, or float32 in its precision."""
    if str(value.ty) == y.dtype:
        store(y, value, at)
    else:
        put_values(y, [value], at)


def _gather(problem: Any, batch: Any, buffers: Buffers) -> None:
    count, shape = math.prod(problem.positions), (BATCH, *problem.positions)
    with each(batch * (count * problem.width)) as i:
        position, column = unravel(i, problem.width)
        index, _ = sample_view(buffers["index"], shape, 0)
        target: Shape = (*shape, problem.width)
        y, _ = sample_view(buffers["y"], target, 0)
        row = T.cast(index[position], "int32")
        found = buffers["table"][T.max(T.min(row, problem.rows - 1), 0), column]
        store(y, found if problem.stored is None else T.cast(found, problem.dtype), i)


def _token_row(problem: TokenRow, batch: Expr, buffers: Buffers) -> None:
    with each(batch * problem.width) as i:
        sample, column = unravel(i, problem.width)
        tokens, first = sample_view(buffers["tokens"], (BATCH, problem.rows), sample)
        x, origin = sample_view(buffers["x"], (BATCH, problem.rows, problem.width), sample)
        y, _ = sample_view(buffers["y"], (BATCH, problem.width), 0)
        row = place_of_token(problem, tokens, first, local(1, "int32"))
        store(y, x[origin + row * problem.width + column], i)
