"""Scales of dynamic activations and time groups of samples, as expressions."""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers
from mpq_compiler.backends.tvm.kernels.problems.quantize import TimeGroup

SMALLEST_SCALE = 2.0**-24
"""The least scale of a dynamic quantizer: a copy of `ops.SMALLEST_SCALE`, whose module imports torch."""


def dynamic_scale(low: Expr, high: Expr, bits: int) -> tuple[Expr, Any]:
    """Scale and zero point (uint8) of a row whose least and greatest values, or zero, are these."""
    top, zero = vmath.f32(float(2**bits - 1), 1), vmath.f32(0.0, 1)
    scale = vmath.keep(vmath.at_least(vmath.div(high - low, top), vmath.f32(SMALLEST_SCALE, 1)))
    # Rounded and limited by the quantizer itself: the code of -low / scale at the scale 1 and the zero point 0.
    code = vmath.quantize(vmath.div(zero - low, scale), vmath.f32(1.0, 1), vmath.i32(0, 1), bits)
    return scale, T.bind(code)


def group_of(problem: TimeGroup, buffers: Buffers, sample: Any) -> Expr:
    """The time group of a sample, int64."""
    t = T.bind(T.cast(buffers["timestep"][sample], "float32"))
    group: Any = tirx.IntImm("int64", 0)
    for i in range(problem.groups - 1):
        group = group + T.cast(buffers["boundaries"][i] <= t, "int64")
    return group
