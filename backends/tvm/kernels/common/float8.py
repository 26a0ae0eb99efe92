"""FP8 codes as float32."""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr

from mpq_compiler.backends.tvm.kernels.common import vmath


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
