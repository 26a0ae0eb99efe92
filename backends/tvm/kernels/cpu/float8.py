"""The `mpq::dequantize_float8` kernel: FP8 codes to float32, once, when an artifact is loaded."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.float8 import decode
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, each_vector, primfunc, span, store
from mpq_compiler.backends.tvm.kernels.problems.float8 import DequantizeFloat8, arguments


def build(problem: DequantizeFloat8, isa: str, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``."""

    def body(_: Any, buffers: Buffers) -> None:
        codes, scale, y = (buffers[key] for key in ("codes", "scale", "y"))
        with T.serial(0, problem.rows) as i:
            factor = T.bind(T.cast(scale[i], "float32"))

            def vector(start: Any, lanes: int) -> None:
                value = decode(vmath.cast(codes[i, span(start, lanes)], "int32"), problem.exponent, lanes)
                store(y, vmath.mul(value, vmath.splat(factor, lanes)), i, span(start, lanes))

            each_vector(problem.columns, vector)

    return primfunc(name, arguments(problem), body)
