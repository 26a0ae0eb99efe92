"""The stand-alone `mpq::quantize`, `mpq::dynamic_quantize` and `mpq::time_group` kernels."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    BATCH,
    Argument,
    Buffers,
    Shape,
    each_vector,
    primfunc,
    quantizer,
    quantizer_arguments,
    scratch,
    shares,
    some_vectors,
    span,
    store,
    vectors,
)

SMALLEST_SCALE = 2.0**-24
"""As `ops.SMALLEST_SCALE`, whose module imports torch."""
LANES = 64
"""Wide expressions, which LLVM splits into independent chains of registers."""


@dataclass(frozen=True)
class Quantize:
    """``quantize(x [B, *shape]) -> u8``, scale and zero point by the time group of the sample.

    shape:   of one sample
    bits:    of a code
    groups:  G, number of time groups
    parts:   channels (of the last dimension) of x0, x1, ... where x is those tensors side by side
    """

    shape: tuple[int, ...]
    bits: int = 8
    groups: int = 1
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class DynamicQuantize:
    """``dynamic_quantize(x [B, rows, width]) -> u8, scale f32 [B, rows], zero point u8 [B, rows]``.

    rows:   of one sample
    width:  of a row
    bits:   of a code
    """

    rows: int
    width: int
    bits: int = 8


@dataclass(frozen=True)
class TimeGroup:
    """``time_group(timestep [B], boundaries f32 [G-1]) -> i64 [B]``: how many boundaries are <= the timestep.

    groups:  G, at least 2
    dtype:   of the timestep, int64 or float32; compared as float32, as torch does
    """

    groups: int
    dtype: str = "int64"

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError("a single time group needs no kernel")


Problem = Quantize | DynamicQuantize | TimeGroup


def outputs(problem: Problem) -> int:
    """How many of the `arguments` are outputs."""
    return 3 if isinstance(problem, DynamicQuantize) else 1


def arguments(problem: Problem) -> list[Argument]:
    """The buffers in calling order, the outputs last."""
    if isinstance(problem, TimeGroup):
        return [
            Argument("timestep", (BATCH,), problem.dtype),
            Argument("boundaries", (problem.groups - 1,)),
            Argument("out", (BATCH,), "int64"),
        ]
    if isinstance(problem, DynamicQuantize):
        rows: Shape = (BATCH, problem.rows)
        return [
            Argument("x", (*rows, problem.width)),
            Argument("out", (*rows, problem.width), "uint8"),
            Argument("scale", rows),
            Argument("zero", rows, "uint8"),
        ]
    shape: Shape = (BATCH, *problem.shape)
    parts = [Argument(f"x{i}", (*shape[:-1], count)) for i, count in enumerate(problem.parts)]
    return [
        *(parts or [Argument("x", shape)]),
        *quantizer_arguments(problem.bits, problem.groups),
        Argument("out", shape, "uint8"),
    ]


def build(problem: Problem, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``; the same source for every CPU target."""
    if isinstance(problem, DynamicQuantize):
        return primfunc(name, arguments(problem), lambda batch, buffers: _dynamic(problem, batch, buffers))
    if isinstance(problem, TimeGroup):
        return primfunc(name, arguments(problem), lambda batch, buffers: _time_group(problem, batch, buffers))
    return primfunc(name, arguments(problem), lambda batch, buffers: _quantize(problem, batch, buffers))


def _quantize(problem: Quantize, batch: Any, buffers: Buffers) -> None:
    if problem.parts:
        _quantize_parts(problem, batch, buffers)
        return
    size = math.prod(problem.shape)
    x = T.decl_buffer((batch * size,), "float32", data=buffers["x"].data)
    out = T.decl_buffer((batch * size,), "uint8", data=buffers["out"].data)
    with shares(batch, vectors(size, LANES), size / 16) as (sample, first, end):
        scale, zero = quantizer(buffers, sample)
        inverse = T.bind(vmath.reciprocal(scale))

        def vector(start: Any, lanes: int) -> None:
            at = span(sample * size + start, lanes)
            store(out, vmath.quantize(x[at], inverse, zero, problem.bits), at)

        some_vectors(size, first, end, vector, LANES)


def _quantize_parts(problem: Quantize, batch: Any, buffers: Buffers) -> None:
    """Row by row, of every part its channels."""
    rows, width = math.prod(problem.shape[:-1]), problem.shape[-1]
    names = [f"x{i}" for i in range(len(problem.parts))]
    x = {
        name: T.decl_buffer((batch * rows * count,), "float32", data=buffers[name].data)
        for name, count in zip(names, problem.parts, strict=True)
    }
    out = T.decl_buffer((batch * rows * width,), "uint8", data=buffers["out"].data)
    with shares(batch, rows, rows * width / 8) as (sample, begin, end):
        scale, zero = quantizer(buffers, sample)
        inverse = T.bind(vmath.reciprocal(scale))
        with T.serial(begin, end) as r:
            row, first = T.bind(sample * rows + r), 0
            for name, count in zip(names, problem.parts, strict=True):

                def vector(start: Any, lanes: int, name: str = name, count: int = count, first: int = first) -> None:
                    codes = vmath.quantize(x[name][span(row * count + start, lanes)], inverse, zero, problem.bits)
                    store(out, codes, span(row * width + (first + start), lanes))

                each_vector(count, vector, LANES)
                first += count


def _dynamic(problem: DynamicQuantize, batch: Any, buffers: Buffers) -> None:
    """Row by row: the range, for which order does not matter, then the codes while the row is in the cache."""
    rows, width = problem.rows, problem.width
    x = T.decl_buffer((batch * rows * width,), "float32", data=buffers["x"].data)
    out = T.decl_buffer((batch * rows * width,), "uint8", data=buffers["out"].data)
    with shares(batch, rows, rows * width / 5) as (sample, begin, end), T.serial(begin, end) as row:
        first = T.bind((sample * rows + row) * width)
        low, high = _range(x, first, width)
        scale, point = dynamic_scale(low, high, problem.bits)
        store(buffers["scale"], scale, sample, row)
        store(buffers["zero"], point, sample, row)
        inverse, code_of_zero = T.bind(vmath.reciprocal(scale)), T.bind(T.cast(point, "int32"))

        def vector(start: Any, lanes: int) -> None:
            at = span(first + start, lanes)
            store(out, vmath.quantize(x[at], inverse, code_of_zero, problem.bits), at)

        each_vector(width, vector, LANES)


def dynamic_scale(low: Expr, high: Expr, bits: int) -> tuple[Expr, Any]:
    """Scale and zero point (uint8) of a row whose least and greatest values, or zero, are these."""
    top, zero = vmath.f32(float(2**bits - 1), 1), vmath.f32(0.0, 1)
    scale = vmath.keep(vmath.at_least(vmath.div(high - low, top), vmath.f32(SMALLEST_SCALE, 1)))
    # Rounded and limited by the quantizer itself: the code of -low / scale at the scale 1 and the zero point 0.
    code = vmath.quantize(vmath.div(zero - low, scale), vmath.f32(1.0, 1), vmath.i32(0, 1), bits)
    return scale, T.bind(code)


def _range(x: Any, first: Any, width: int) -> tuple[Any, Any]:
    """The least and the greatest of zero and ``width`` values; NaN is neither."""
    lanes = min(LANES, 1 << (width.bit_length() - 1))
    beyond = operator.lt, operator.gt
    ends = scratch(lanes), scratch(lanes)
    for end in ends:
        store(end, vmath.f32(0.0, lanes), span(0, lanes))

    def vector(start: Any, count: int) -> None:
        values = vmath.keep(x[span(first + start, count)])
        for end, is_beyond in zip(ends, beyond, strict=True):
            known = end[span(0, count)]
            store(end, tirx.Select(is_beyond(values, known), values, known), span(0, count))

    each_vector(width, vector, LANES)
    found = []
    for end, is_beyond in zip(ends, beyond, strict=True):
        value, left = end[span(0, lanes)], lanes
        while left > 1:
            left //= 2
            a, b = (vmath.keep(tirx.Shuffle([value], list(range(k, k + left)))) for k in (0, left))
            value = vmath.keep(tirx.Select(is_beyond(b, a), b, a))
        found.append(vmath.keep(value))
    return found[0], found[1]


def _time_group(problem: TimeGroup, batch: Any, buffers: Buffers) -> None:
    with T.serial(0, batch) as sample:
        store(buffers["out"], group_of(problem, buffers, sample), sample)


def group_of(problem: TimeGroup, buffers: Buffers, sample: Any) -> Expr:
    """The time group of a sample, int64."""
    t = T.bind(T.cast(buffers["timestep"][sample], "float32"))
    group: Any = tirx.IntImm("int64", 0)
    for i in range(problem.groups - 1):
        group = group + T.cast(buffers["boundaries"][i] <= t, "int64")
    return group
