"""Values to bfloat16: a thread for neighbours, that go to memory together."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, unravel
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, primfunc, put_values, value_of, values_of
from mpq_compiler.backends.tvm.kernels.problems.rounding import Rounding, arguments

TOGETHER = 8
"""Values of a thread, at most: 16 bytes."""


def build(problem: Rounding, name: str) -> PrimFunc:
    """The kernel ``name(*problems.rounding.arguments(problem))``."""
    return primfunc(name, arguments(problem), lambda batch, buffers: _body(problem, batch, buffers))


def _body(problem: Rounding, batch: Any, buffers: Buffers) -> None:
    p, x, y = problem, flat(buffers["x"]), flat(buffers["y"])

    def scaled(value: Expr) -> Expr:
        return value if p.factor is None else vmath.keep(vmath.mul(value, vmath.f32(p.factor, 1)))

    if p.pitch == p.width:
        together = math.gcd(p.rows * p.width, TOGETHER)
        with each(batch * (p.rows * p.width // together)) as i:
            size = min(together, 4)
            values = [v for first in range(0, together, size) for v in values_of(x, i * together + first, size)]
            put_values(y, [scaled(value) for value in values], i * together)
        return
    with each(batch * (p.rows * p.pitch)) as i:
        row, column = unravel(i, p.pitch)
        value = scaled(value_of(x, row * p.width + T.min(column, p.width - 1)))
        put_values(y, [vmath.keep(tirx.Select(column < p.width, value, vmath.f32(0.0, 1)))], i)
