"""Values in half precision between kernels: pairs in words of 32 bits; what is computed of them is in float32."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import replace

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.problems.argument import HALF, Argument

_NAMES: ContextVar[tuple[str, ...]] = ContextVar("half", default=())


@contextmanager
def arguments(names: tuple[str, ...]) -> Iterator[None]:
    """Kernels that are built within have these arguments in `HALF`, where they have them in float32."""
    token = _NAMES.set(names)
    try:
        yield
    finally:
        _NAMES.reset(token)


def stored(buffers: Sequence[Argument]) -> list[Argument]:
    """The buffers of a kernel as they are stored."""
    return [replace(a, dtype=HALF) if a.name in _NAMES.get() else a for a in buffers]


def pair(low: Expr, high: Expr) -> Expr:
    """Two float32 as one word: each the nearest float16, ties to even, the largest where it is beyond; NaN stays NaN.

    So does diffusers where it runs transformers in half precision: it clips what it adds up to the largest.
    """
    word = T.alloc_buffer((1,), "uint32", align=64, scope="local")
    T.evaluate(T.ptx["cvt.rn.satfinite.f16x2.f32"](word[0], high, low))
    return word[0]


def floats(word: Expr) -> list[Expr]:
    """The two values of a word, in float32."""
    halves = (word & T.uint32(0xFFFF), word >> T.uint32(16))
    return [vmath.cast(tirx.reinterpret("float16", T.cast(own, "uint16")), "float32") for own in halves]
