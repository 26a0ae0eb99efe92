"""The `mpq::dequantize_float8` kernel: FP8 codes to float32, once, when an artifact is loaded."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Argument, Buffers, each_vector, primfunc, span, store


@dataclass(frozen=True)
class DequantizeFloat8:
    """``scale[i] * float8(codes[i, k])`` for codes u8 [rows, columns] and scale f16 [rows].

    exponent:  bits of the exponent: 2 (E2M5) to 5 (E5M2)
    """

    rows: int
    columns: int
    exponent: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.exponent <= 5:
            raise ValueError(f"FP8 has 2 to 5 bits of exponent, not {self.exponent}")


def arguments(problem: DequantizeFloat8) -> list[Argument]:
    """The buffers in calling order, the output last."""
    shape = (problem.rows, problem.columns)
    return [Argument("codes", shape, "uint8"), Argument("scale", (problem.rows,), "float16"), Argument("y", shape)]


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


def decode(code: Expr, exponent: int, lanes: int) -> Expr:
    """``(-1)^sign * 2^(max(e, 1) - b - M) * (m + (2^M if e > 0 else 0))`` of int32 codes: every factor is exact."""

    def constant(value: int) -> Expr:
        return vmath.i32(value, lanes)

    mantissa = 7 - exponent
    bias = 2 ** (exponent - 1) - 1
    e = code >> constant(mantissa) & constant(2**exponent - 1)
    m = code & constant(2**mantissa - 1)
    normal = e > constant(0)
    significand = tirx.Select(normal, m + constant(2**mantissa), m)
    power = tirx.Select(normal, e, constant(1)) + constant(127 - bias - mantissa)  # of two, as the bits of a float32
    magnitude = vmath.mul(vmath.cast(significand, "float32"), vmath.as_float(power << constant(23)))
    sign = (code & constant(0x80)) << constant(24)
    return vmath.as_float(vmath.as_int(magnitude) | sign)
