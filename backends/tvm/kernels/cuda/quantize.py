"""Quantizers that stand alone, and the time group."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import quantizer
from mpq_compiler.backends.tvm.kernels.common.quantize import dynamic_scale, group_of
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda.threads import (
    combined,
    each,
    grid,
    local,
    power,
    primfunc,
    strided,
    value_of,
)
from mpq_compiler.backends.tvm.kernels.problems.quantize import DynamicQuantize, Problem, Quantize, TimeGroup, arguments


def build(problem: Problem, name: str) -> PrimFunc:
    """The kernel ``name(*problems.quantize.arguments(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        if isinstance(problem, DynamicQuantize):
            _dynamic(problem, batch, buffers)
        elif isinstance(problem, TimeGroup):
            with each(batch) as sample:
                store(buffers["out"], group_of(problem, buffers, sample), sample)
        else:
            _quantize(problem, batch, buffers)

    return primfunc(name, arguments(problem), body)


def _quantize(problem: Quantize, batch: Any, buffers: Buffers) -> None:
    size, width = math.prod(problem.shape), problem.shape[-1]
    out, first = flat(buffers["out"]), 0
    for number, count in enumerate(problem.parts or (width,)):
        x = flat(buffers[f"x{number}" if problem.parts else "x"])
        with each(batch * (size // width * count)) as i:
            row, channel = unravel(i, count)
            quant = quantizer(buffers, tirx.truncdiv(row, size // width))
            code = vmath.quantize(value_of(x, i), *quant, problem.bits)
            store(out, code, row * width + (first + channel))
        first += count


def _chosen(is_beyond: Callable[[Any, Any], Any], a: Expr, b: Expr) -> Expr:
    return tirx.Select(is_beyond(b, a), b, a)


def _dynamic(problem: DynamicQuantize, batch: Any, buffers: Buffers) -> None:
    """A block for each row: its range, then its codes."""
    width, threads = problem.width, power(problem.width)
    x, out, scales, zeros = (flat(buffers[name]) for name in ("x", "out", "scale", "zero"))
    with grid(batch * problem.rows, threads) as (row, thread):
        ends = local(2)
        beyond = operator.lt, operator.gt
        for end in range(2):
            store(ends, vmath.f32(0.0, 1), end)
        with strided(thread, width, threads) as c:
            value = vmath.keep(value_of(x, row * width + c))
            for end, is_beyond in enumerate(beyond):
                store(ends, tirx.Select(is_beyond(value, ends[end]), value, ends[end]), end)
        low, high = (
            combined([ends[end]], thread, threads, partial(_chosen, is_beyond))[0]
            for end, is_beyond in enumerate(beyond)
        )
        scale, point = dynamic_scale(low, high, problem.bits)
        with T.If(thread == 0), T.Then():
            store(scales, scale, row)
            store(zeros, point, row)
        inverse, code_of_zero = vmath.keep(vmath.reciprocal(scale)), T.bind(T.cast(point, "int32"))
        with strided(thread, width, threads) as c:
            code = vmath.quantize(value_of(x, row * width + c), inverse, code_of_zero, problem.bits)
            store(out, code, row * width + c)
