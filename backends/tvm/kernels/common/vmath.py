"""Vector mathematics as TIR expressions: the same bits on every CPU target, for any number of lanes.

Every function takes and returns float32 expressions (scalar, or vector of any lane count) and is pure, so it
may be called anywhere an expression is allowed, from TVMScript as well as from the IR builder.

The contraction rule
--------------------
TVM compiles with LLVM's ``AllowFPOpFusion = Fast``: the instruction selector turns *any* ``fmul`` that feeds
an ``fadd`` or ``fsub`` into a fused multiply-add, whether or not the two come from one source expression, and
does so differently on each target. No option of TVM's ``llvm`` target turns this off. Hence, in every float32
kernel of this package:

1. a multiply-add that is meant to be fused is written :func:`fma`;
2. every other float32 product is written :func:`mul` (quotient: :func:`div`), never with ``*`` or ``/``.

``mul`` wraps the product in ``llvm.arithmetic.fence``, an identity at run time (it selects to no instruction)
through which LLVM may not combine floating-point operations. ``div`` is fenced as well because LLVM rewrites
a division by a power of two as a product. For CUDA both are the intrinsics that round by themselves (`Dialect`). Float
additions, subtractions, comparisons and selects may be written with Python operators.
``tests/backends/tvm/test_fp_contract.py`` proves the rule on three targets.

Further rules that the functions follow: only IEEE division and square root; one polynomial for all targets;
clamps by ``Select`` ordered so that NaN passes through (``max``/``min`` instructions differ between ISAs); no
conversion of out-of-range floats to integers.

Sources: exp, log, sin, cos: the single precision kernels of Cephes (S. Moshier). erf, tanh: the rational
approximations of Eigen. exp2: minimax polynomial of relative error 7.5e-8.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import IRBuilder
from tvm.script.ir_builder import tirx as builder

from mpq_compiler.backends.tvm.kernels.problems import operations

MAGIC = 12582912.0
"""1.5 * 2^23. For |x| <= 2^22, ``x + MAGIC`` rounds x to the nearest integer, ties to even, and leaves that
integer in two's complement in the low bits of the sum."""

LOG2_E = 1.4426950408889634
EXP2 = (1.327647129073739e-3, 9.675540961325169e-3, 5.550713092088699e-2, 0.24022120237350464,
        0.6931469440460205, 1.0000001192092896)  # fmt: skip
"""2^r on [-1/2, 1/2], highest power first."""


# ---------------------------------------------------------------------------------------------- expressions


def lanes(x: Expr) -> int:
    """Number of lanes of an expression (1 for a scalar)."""
    return int(x.ty.dtype.lanes)


def _vector(base: str, count: int) -> str:
    return base if count == 1 else f"{base}x{count}"


def splat(x: Expr, count: int) -> Expr:
    """A scalar expression in all of `count` lanes (vectors pass through unchanged)."""
    return x if count == 1 or lanes(x) == count else tirx.Broadcast(x, count)


def cast(x: Expr, base: str) -> Expr:
    """Cast x to elements of type `base`; x itself where they are."""
    target = _vector(base, lanes(x))
    return x if str(x.ty) == target else tirx.Cast(target, x)


def f32(value: float, count: int) -> Expr:
    """A float32 constant in `count` lanes."""
    return splat(tirx.FloatImm("float32", float(value)), count)


def i32(value: int, count: int) -> Expr:
    """An int32 constant in `count` lanes."""
    return splat(tirx.IntImm("int32", value), count)


def keep(value: Expr) -> Expr:
    """`value` computed once, here, in a kernel under construction by the IR builder.

    It goes through a local buffer of one vector, which LLVM turns into a register. Floats are not named by
    ``bind``: TVM's analyzer expands bound variables (in exponential time where each is used twice) and refuses
    some float expressions outright.
    """
    count = lanes(value)
    base = str(value.ty).split("x")[0]
    place = builder.alloc_buffer((count,), base, align=64, **local())
    index = 0 if count == 1 else tirx.Ramp(0, 1, count)
    builder.buffer_store(place, value, [index])
    return place[index]


class Lets:
    """Names for sub-expressions, so that an expression used twice is computed once.

    In a kernel under construction the names are kept (`keep`) before the statement that uses them; elsewhere
    they are ``Let`` expressions around the body.

    >>> let = Lets()
    >>> square = let(mul(x, x), "square")
    >>> return let.close(square + square)
    """

    def __init__(self) -> None:
        self._bound: list[tuple[tirx.Var, Expr]] = []
        self._in_kernel = IRBuilder.is_in_scope()

    def __call__(self, value: Expr, name: str) -> Expr:
        if isinstance(value, (tirx.Var, tirx.FloatImm, tirx.IntImm)):
            return value
        if self._in_kernel:
            return keep(value)
        var = tirx.Var(name, value.ty)
        self._bound.append((var, value))
        return var

    def close(self, body: Expr) -> Expr:
        """`body` inside the bindings made so far."""
        for var, value in reversed(self._bound):
            body = tirx.Let(var, value, body)
        return body


def as_int(x: Expr) -> Expr:
    """The bits of a float32 as int32."""
    return tirx.reinterpret(_vector("int32", lanes(x)), x)


def as_float(x: Expr) -> Expr:
    """int32 bits as a float32."""
    return tirx.reinterpret(_vector("float32", lanes(x)), x)


@dataclass(frozen=True)
class Dialect:
    """How a code generator is told of operations that round once, each by itself.

    code: the bits of `MAGIC` plus a whole number as they are; of NaN, something whose low byte is 0
    local: options of `alloc_buffer` for memory of one thread, in registers where there are enough
    """

    fma: Callable[[Expr, Expr, Expr], Expr]
    mul: Callable[[Expr, Expr], Expr]
    div: Callable[[Expr, Expr], Expr]
    sqrt: Callable[[Expr], Expr]
    code: Callable[[Expr], Expr]
    local: dict[str, Any]


def _llvm(name: str, *args: Expr) -> Expr:
    return tirx.call_llvm_pure_intrin(_vector("float32", lanes(args[0])), name, *args)


def _fence(x: Expr) -> Expr:
    """x, which LLVM may not combine with the operation that uses it (see the contraction rule above)."""
    return _llvm("llvm.arithmetic.fence", x)


def _cuda(name: str) -> Callable[..., Expr]:
    """A function of CUDA that rounds to nearest, and that its compiler contracts with nothing; scalars only."""
    return lambda *args: tirx.call_pure_extern("float32", name, *args)


LLVM = Dialect(
    fma=lambda a, b, c: _llvm("llvm.fma", a, b, c),
    mul=lambda a, b: _fence(a * b),
    div=lambda a, b: _fence(a / b),
    sqrt=lambda x: _llvm("llvm.sqrt", x),
    code=lambda bits: bits,  # 0x7fc00000, or what a NaN of a CPU was, which ends in zeros too
    local={"annotations": {"disable_lower_builtin": 1}},
)
CUDA = Dialect(
    fma=_cuda("__fmaf_rn"),
    mul=_cuda("__fmul_rn"),
    div=_cuda("__fdiv_rn"),
    sqrt=_cuda("__fsqrt_rn"),
    code=lambda bits: tirx.Select(bits > i32(0x7F800000, 1), i32(0, 1), bits),  # NaN is 0x7fffffff
    local={"scope": "local"},
)
_dialect: ContextVar[Dialect] = ContextVar("dialect", default=LLVM)


@contextmanager
def dialect(chosen: Dialect) -> Iterator[None]:
    """Kernels built within are for that code generator."""
    token = _dialect.set(chosen)
    try:
        yield
    finally:
        _dialect.reset(token)


def local() -> dict[str, Any]:
    """`Dialect.local` of the code generator that kernels are built for."""
    return _dialect.get().local


def fma(a: Expr, b: Expr, c: Expr) -> Expr:
    """The sum a * b + c, rounded once."""
    return _dialect.get().fma(a, b, c)


def mul(a: Expr, b: Expr) -> Expr:
    """The product a * b, rounded, and never contracted with a later addition."""
    return _dialect.get().mul(a, b)


def div(a: Expr, b: Expr) -> Expr:
    """The quotient a / b (IEEE), never turned into a product that is contracted with a later addition."""
    return _dialect.get().div(a, b)


def sqrt(x: Expr) -> Expr:
    """Correctly rounded square root."""
    return _dialect.get().sqrt(x)


def rsqrt(x: Expr) -> Expr:
    """1 / sqrt(x), each operation correctly rounded (no reciprocal estimates: they differ between CPUs)."""
    return div(f32(1.0, lanes(x)), sqrt(x))


def neg(x: Expr) -> Expr:
    """-x, exact, signed zeros included."""
    return mul(x, f32(-1.0, lanes(x)))


def binade(x: Expr) -> Expr:
    """The largest power of two that is at most |x|; 0 for what is smaller than any normal float32."""
    return as_float(as_int(x) & i32(0x7F800000, lanes(x)))


def square(x: Expr) -> Expr:
    """The square x * x."""
    let = Lets()
    x = let(x, "x")
    return let.close(mul(x, x))


def at_least(x: Expr, low: Expr) -> Expr:
    """max(x, low) for a `low` that is never NaN; NaN in x passes through."""
    let = Lets()
    x = let(x, "x")
    return let.close(tirx.Select(x < low, low, x))


def at_most(x: Expr, high: Expr) -> Expr:
    """min(x, high) for a `high` that is never NaN; NaN in x passes through."""
    let = Lets()
    x = let(x, "x")
    return let.close(tirx.Select(x > high, high, x))


def clamp(x: Expr, low: Expr, high: Expr) -> Expr:
    """Limit x to [low, high], which are never NaN; NaN in x passes through."""
    return at_most(at_least(x, low), high)  # each selects to one instruction on x86, which a nest does not


def maximum(a: Expr, b: Expr) -> Expr:
    """max(a, b), NaN if either is NaN (as ``torch.maximum``)."""
    let = Lets()
    a, b = let(a, "a"), let(b, "b")
    return let.close(tirx.Select(a >= b, a, tirx.Select(a < b, b, a + b)))


def minimum(a: Expr, b: Expr) -> Expr:
    """min(a, b), NaN if either is NaN (as ``torch.minimum``)."""
    let = Lets()
    a, b = let(a, "a"), let(b, "b")
    return let.close(tirx.Select(a <= b, a, tirx.Select(a > b, b, a + b)))


def compare(relation: Callable[[Expr, Expr], Expr]) -> Callable[[Expr, Expr], Expr]:
    """The relation as a function that is 1 where it holds and 0 elsewhere, as with NaN (but for ``!=``)."""

    def function(a: Expr, b: Expr) -> Expr:
        count = lanes(a)
        return tirx.Select(relation(a, b), f32(1.0, count), f32(0.0, count))

    return function


def where(condition: Expr, a: Expr, b: Expr) -> Expr:
    """Select a where the condition is not 0, else b."""
    return tirx.Select(tirx.NE(condition, f32(0.0, lanes(condition))), a, b)


def rotate_pairs(x: Expr) -> Expr:
    """(-x1, x0, -x3, x2, ...): a quarter turn of each pair of lanes, of which there are two or more."""
    count = lanes(x)
    places = [tirx.IntImm("int32", lane) for lane in range(count)]
    swapped = tirx.Shuffle([x], [places[lane ^ 1] for lane in range(count)])
    return mul(swapped, tirx.Shuffle([f32(1.0 if lane % 2 else -1.0, 1) for lane in range(count)], places))


def relu(x: Expr) -> Expr:
    """max(x, 0), NaN to NaN."""
    return at_least(x, f32(0.0, lanes(x)))


def polynomial(x: Expr, coefficients: Sequence[float]) -> Expr:
    """Horner's rule by fma, highest power first. `x` is used once per coefficient: pass a variable."""
    count = lanes(x)
    total = f32(coefficients[0], count)
    for c in coefficients[1:]:
        total = fma(total, x, f32(c, count))
    return total


# -------------------------------------------------------------------------------------------- exponentials


def _exp2_of_product(
    let: Lets, x: Expr, factor: float, coefficients: Sequence[float] = EXP2
) -> tuple[Expr, Expr]:
    """2^(x*factor) as (p, t): p = 2^r with |r| <= 1/2, and t whose low bits hold the integer part."""
    count = lanes(x)
    t = let(fma(x, f32(factor, count), f32(MAGIC, count)), "t")
    r = let(fma(x, f32(factor, count), f32(MAGIC, count) - t), "r")
    return let(polynomial(r, coefficients), "p"), t


def exp2_unchecked(x: Expr, factor: float = 1.0, coefficients: Sequence[float] = EXP2) -> Expr:
    """2^(x*factor) for |x*factor| <= 126, by adding to the exponent field.

    NaN may be lost: callers let it reach the result by another way.
    """
    let = Lets()
    x = let(x, "x")
    p, t = _exp2_of_product(let, x, factor, coefficients)
    return let.close(as_float(as_int(p) + tirx.shift_left(as_int(t), i32(23, lanes(x)))))


def exp2_nonpositive(x: Expr, coefficients: Sequence[float] = EXP2) -> Expr:
    """2^x for x <= 0, as softmax needs it: below -126 it saturates at 2^-126; NaN to NaN."""
    let = Lets()
    count = lanes(x)
    x = let(at_least(x, f32(-126.0, count)), "x")
    p, t = _exp2_of_product(let, x, 1.0, coefficients)
    power = tirx.shift_left(as_int(t), i32(23, count)) + i32(127 << 23, count)
    return let.close(mul(p, as_float(power)))


def exp2(x: Expr) -> Expr:
    """2^x over the whole range: denormals, infinities, zero and NaN included."""
    let = Lets()
    count = lanes(x)
    x = let(clamp(x, f32(-151.0, count), f32(129.0, count)), "x")
    p, t = _exp2_of_product(let, x, 1.0)
    return let.close(_scale(let, p, t))


def _scale(let: Lets, p: Expr, t: Expr) -> Expr:
    """The product p * 2^n, n the integer held by t = n + MAGIC, in two factors: 2^n alone may not be a float."""
    count = lanes(p)
    n = let(as_int(t) - i32(0x4B400000, count), "n")
    half = let(tirx.shift_right(n, i32(1, count)), "half")
    first = as_float(tirx.shift_left(half + i32(127, count), i32(23, count)))
    second = as_float(tirx.shift_left(n - half + i32(127, count), i32(23, count)))
    return mul(mul(p, first), second)


def exp(x: Expr) -> Expr:
    """e^x over the whole range (denormals, infinities, zero and NaN included), within 1 ulp."""
    let = Lets()
    count = lanes(x)
    x = let(clamp(x, f32(-104.0, count), f32(89.0, count)), "x")
    t = let(fma(x, f32(LOG2_E, count), f32(MAGIC, count)), "t")
    n = let(t - f32(MAGIC, count), "n")
    # ln 2 in two parts, the first short enough that n times it is exact
    r = let(fma(n, f32(2.12194440e-4, count), fma(n, f32(-0.693359375, count), x)), "r")
    p = polynomial(r, (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 0.5))
    p = let(fma(p, mul(r, r), r) + f32(1.0, count), "p")
    return let.close(_scale(let, p, t))


def sigmoid(x: Expr) -> Expr:
    """1 / (1 + e^-x)."""
    let = Lets()
    count = lanes(x)
    x = let(clamp(x, f32(-87.0, count), f32(87.0, count)), "x")
    p, t = _exp2_of_product(let, x, -LOG2_E)
    power = tirx.shift_left(as_int(t), i32(23, count)) + i32(127 << 23, count)
    return let.close(div(f32(1.0, count), f32(1.0, count) + mul(p, as_float(power))))


def silu(x: Expr) -> Expr:
    """The product x * sigmoid(x), within 1.2e-7 * max(1, |x|); -inf gives -1.4e-36."""
    let = Lets()
    count = lanes(x)
    x = let(at_least(x, f32(-87.0, count)), "x")
    e = exp2_unchecked(at_most(x, f32(87.0, count)), -LOG2_E)
    return let.close(div(x, f32(1.0, count) + e))


def gelu_tanh(x: Expr) -> Expr:
    """The tanh form of gelu, computed as x * sigmoid(2u), u = sqrt(2/pi) * (x + 0.044715 x^3)."""
    let = Lets()
    count = lanes(x)
    a = 2.0 * math.sqrt(2.0 / math.pi) * LOG2_E
    x = let(at_least(x, f32(-10.0, count)), "x")
    y = let(at_most(x, f32(10.0, count)), "y")
    u = mul(y, fma(mul(y, y), f32(a * 0.044715, count), f32(a, count)))
    return let.close(div(x, f32(1.0, count) + exp2_unchecked(u, -1.0)))


ERF_NUMERATOR = (-2.72614225801306e-10, 2.77068142495902e-08, -2.10102402082508e-06, -5.69250639462346e-05,
                 -7.34990630326855e-04, -2.95459980854025e-03, -1.60960333262415e-02)  # fmt: skip
ERF_DENOMINATOR = (-1.45660718464996e-05, -2.13374055278905e-04, -1.68282697438203e-03,
                   -7.37332916720468e-03, -1.42647390514189e-02)  # fmt: skip
TANH_NUMERATOR = (-2.76076847742355e-16, 2.00018790482477e-13, -8.60467152213735e-11, 5.12229709037114e-08,
                  1.48572235717979e-05, 6.37261928875436e-04, 4.89352455891786e-03)  # fmt: skip
TANH_DENOMINATOR = (1.19825839466702e-06, 1.18534705686654e-04, 2.26843463243900e-03,
                    4.89352518554385e-03)  # fmt: skip


def _odd_rational(x: Expr, limit: float, above: Sequence[float], below: Sequence[float]) -> Expr:
    """The rational x * P(x^2) / Q(x^2), with x limited to [-limit, limit] and the result to [-1, 1]."""
    let = Lets()
    count = lanes(x)
    x = let(clamp(x, f32(-limit, count), f32(limit, count)), "x")
    z = let(mul(x, x), "z")
    y = div(mul(x, polynomial(z, above)), polynomial(z, below))
    return let.close(clamp(y, f32(-1.0, count), f32(1.0, count)))


def erf(x: Expr) -> Expr:
    """The error function, within 2e-7."""
    return _odd_rational(x, 4.0, ERF_NUMERATOR, ERF_DENOMINATOR)


def tanh(x: Expr) -> Expr:
    """The hyperbolic tangent, within 3e-7."""
    return _odd_rational(x, 7.90531110763549805, TANH_NUMERATOR, TANH_DENOMINATOR)


def gelu(x: Expr) -> Expr:
    """x/2 * (1 + erf(x / sqrt 2)), within 2.2e-7 * max(1, |x|)."""
    let = Lets()
    count = lanes(x)
    x = let(at_least(x, f32(-1e30, count)), "x")  # -inf would meet 0
    e = erf(mul(x, f32(math.sqrt(0.5), count)))
    return let.close(mul(mul(x, f32(0.5, count)), f32(1.0, count) + e))


# ----------------------------------------------------------------------------------- logarithm, sine, cosine


def log(x: Expr) -> Expr:
    """The natural logarithm: denormals right, 0 to -inf, negative to NaN, inf and NaN to themselves."""
    let = Lets()
    count = lanes(x)
    x = let(x, "x")
    tiny = x < f32(1.17549435e-38, count)  # not bound: TVM cannot bind a vector of truth values
    bits = let(as_int(tirx.Select(tiny, mul(x, f32(2.0**23, count)), x)), "bits")
    m = let(as_float(tirx.bitwise_or(
        tirx.bitwise_and(bits, i32(0x7FFFFF, count)), i32(0x3F000000, count))), "m")  # fmt: skip
    exponent = tirx.shift_right(bits, i32(23, count)) - tirx.Select(tiny, i32(149, count), i32(126, count))
    e = let(cast(exponent, "float32"), "e")
    low = m < f32(math.sqrt(0.5), count)
    e = let(e - tirx.Select(low, f32(1.0, count), f32(0.0, count)), "e")
    m = let(tirx.Select(low, m + m, m) - f32(1.0, count), "m")
    z = let(mul(m, m), "z")
    p = polynomial(m, (
        7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
        -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1))  # fmt: skip
    y = fma(e, f32(-2.12194440e-4, count), mul(mul(p, z), m))
    y = fma(z, f32(-0.5, count), y)
    y = let(fma(e, f32(0.693359375, count), m + y), "y")
    infinite = f32(math.inf, count)
    special = tirx.Select(x < f32(0.0, count), f32(math.nan, count), x)  # inf and NaN stay themselves
    special = tirx.Select(tirx.EQ(x, f32(0.0, count)), f32(-math.inf, count), special)
    return let.close(tirx.Select(tirx.And(x > f32(0.0, count), x < infinite), y, special))


def _sine(x: Expr, quarter_turns: int) -> Expr:
    """sin(x + quarter_turns * pi/2)."""
    let = Lets()
    count = lanes(x)
    x = let(x, "x")
    t = let(fma(x, f32(2.0 / math.pi, count), f32(MAGIC, count)), "t")
    n = let(t - f32(MAGIC, count), "n")
    # pi/2 in three parts of 24 bits: the first product and difference are exact (both are multiples of 2^-23)
    r = fma(n, f32(-1.57079637050628662109375, count), x)
    r = fma(n, f32(4.37113900018624283e-8, count), r)
    r = let(fma(n, f32(1.71512449e-15, count), r), "r")
    z = let(mul(r, r), "z")
    sine = fma(mul(polynomial(z, (-1.9515295891e-4, 8.3321608736e-3, -1.6666654611e-1)), z), r, r)
    cosine = fma(polynomial(z, (2.443315711809948e-5, -1.388731625493765e-3, 4.166664568298827e-2)),
                 mul(z, z), fma(z, f32(-0.5, count), f32(1.0, count)))  # fmt: skip
    quadrant = let(as_int(t) + i32(quarter_turns, count), "quadrant")
    odd = tirx.NE(tirx.bitwise_and(quadrant, i32(1, count)), i32(0, count))
    sign = tirx.shift_left(tirx.bitwise_and(quadrant, i32(2, count)), i32(30, count))
    value = as_int(tirx.Select(odd, cosine, sine))
    return let.close(as_float(tirx.bitwise_xor(value, sign)))


def sin(x: Expr) -> Expr:
    """sin(x), within 1.2e-7 for |x| <= 1e4 (the range reduction is not meant for more than about 1e6)."""
    return _sine(x, 0)


def cos(x: Expr) -> Expr:
    """cos(x), within 1.2e-7 for |x| <= 1e4 (the range reduction is not meant for more than about 1e6)."""
    return _sine(x, 1)


# --------------------------------------------------------------------------------------------- quantization


def quantize(x: Expr, inverse_scale: Expr, zero_point: Expr, bits: int) -> Expr:
    """``int(rint(clamp(f32(x * inverse_scale), -z, 2^bits-1-z))) + z`` as uint8, ties to even.

    Arguments
    ---------
    x:              float32, any lanes
    inverse_scale:  float32 scalar or lanes of x: ``f32(1) / scale``, computed in float32 (see `reciprocal`)
    zero_point:     int32 scalar or lanes of x, 0 <= z < 2^bits

    NaN becomes z (the code of 0), on every target: those that arithmetic makes, of which the low byte is 0.
    """
    let = Lets()
    count = lanes(x)
    z = let(splat(zero_point, count), "z")
    zf = let(cast(z, "float32"), "zf")
    y = let(mul(x, splat(inverse_scale, count)), "y")
    y = clamp(y, f32(0.0, count) - zf, f32(float(2**bits - 1), count) - zf)
    bits_of = let(as_int(y + f32(MAGIC, count)), "bits")
    code = _dialect.get().code(bits_of) + z  # the low byte of the bits of MAGIC, and of NaN, is 0
    return let.close(cast(code, "uint8"))


def reciprocal(scale: Expr) -> Expr:
    """``f32(1) / scale``."""
    return div(f32(1.0, lanes(scale)), scale)


UNARY = {
    "silu": silu, "gelu": gelu, "gelu_tanh": gelu_tanh, "sigmoid": sigmoid, "tanh": tanh, "relu": relu,
    "exp": exp, "log": log, "erf": erf, "sin": sin, "cos": cos, "sqrt": sqrt, "rsqrt": rsqrt, "neg": neg,
    "square": square, "binade": binade,
}  # fmt: skip
"""Unary functions by the name that epilogues and pointwise programs use."""

BINARY = {
    "add": lambda a, b: a + b,
    "sub": lambda a, b: a - b,
    "rsub": lambda a, b: b - a,
    "mul": mul,
    "div": div,
    "rdiv": lambda a, b: div(b, a),
    "maximum": maximum,
    "minimum": minimum,
    "eq": compare(tirx.EQ),
    "ne": compare(tirx.NE),
    "lt": compare(tirx.LT),
    "le": compare(tirx.LE),
    "gt": compare(tirx.GT),
    "ge": compare(tirx.GE),
}
"""Binary functions by name; ``rsub(a, b) = b - a`` and ``rdiv(a, b) = b / a``; what compares gives 1 or 0."""

TERNARY = {"where": where}
"""Functions of three operands by name."""

assert ({*UNARY}, {*BINARY}, {*TERNARY}) == (operations.UNARY, operations.BINARY, operations.TERNARY)
