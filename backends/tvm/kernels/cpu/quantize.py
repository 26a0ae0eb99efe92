"""The stand-alone `mpq::quantize`, `mpq::dynamic_quantize` and `mpq::time_group` kernels."""

from __future__ import annotations

import math
import operator
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import quantizer
from mpq_compiler.backends.tvm.kernels.common.quantize import dynamic_scale, group_of
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffers,
    each_vector,
    primfunc,
    scratch,
    shares,
    some_vectors,
    span,
    store,
    vectors,
)
from mpq_compiler.backends.tvm.kernels.problems.quantize import DynamicQuantize, Problem, Quantize, TimeGroup, arguments

LANES = 64
"""Wide expressions, which LLVM splits into independent chains of registers."""


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
        inverse, zero = quantizer(buffers, sample)

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
        inverse, zero = quantizer(buffers, sample)
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
