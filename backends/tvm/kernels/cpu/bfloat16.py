"""Products in bfloat16 on CPUs with AVX512_BF16: pairs of values in words of 32 bits, sums in float32.

TVM turns vectors of bfloat16 into float32; hence words are int32 here, and the two instructions LLVM's own text.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import span
from mpq_compiler.backends.tvm.kernels.common.vmath import as_int, i32, keep, lanes
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES

_LLVM = """
declare <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float>, <32 x bfloat>, <32 x bfloat>)
declare <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float>, <16 x float>)
define linkonce_odr <16 x float> @mpq_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) #0 {
  %x = bitcast <16 x i32> %a to <32 x bfloat>
  %y = bitcast <16 x i32> %b to <32 x bfloat>
  %r = call <16 x float> @llvm.x86.avx512bf16.dpbf16ps.512(<16 x float> %c, <32 x bfloat> %x, <32 x bfloat> %y)
  ret <16 x float> %r
}
define linkonce_odr <16 x i32> @mpq_bf16_words(<16 x float> %low, <16 x float> %high) #0 {
  %x = call <32 x bfloat> @llvm.x86.avx512bf16.cvtne2ps2bf16.512(<16 x float> %high, <16 x float> %low)
  %r = bitcast <32 x bfloat> %x to <16 x i32>
  ret <16 x i32> %r
}
attributes #0 = { alwaysinline nounwind "target-features"="+avx512bf16,+avx512f" }
"""


@contextmanager
def instructions() -> Iterator[None]:
    """Where `dot` and `words` may be used."""
    with T.attr(T.int32(0), "pragma_import_llvm", _LLVM):
        yield


def dot(total: Any, a: Any, b: Any) -> Any:
    """Add the products of the two bfloat16 in each int32 of a and b to `total`, 16 lanes."""
    return T.call_pure_extern("float32x16", "mpq_dpbf16", total, a, b)


def words(x: Any, row: tuple[Any, ...], start: Any, count: int) -> Any:
    """The 2 * `count` neighbours of a row of a float32 buffer from `start` on as `count` words."""
    if count == LANES:
        halves = (x[(*row, span(start + i * LANES, LANES))] for i in range(2))
        return T.call_pure_extern("int32x16", "mpq_bf16_words", *halves)
    values = keep(x[(*row, span(start, 2 * count))])
    return pair(rounded(_every(values, 2, 0)), rounded(_every(values, 2, 1)))


def rounded(x: Any) -> Any:
    """The bits of x in an int32 whose upper half is the nearest bfloat16, ties to even; NaN stays NaN."""
    count = lanes(x)
    bits = keep(as_int(x))
    odd = tirx.bitwise_and(tirx.shift_right(bits, i32(16, count)), i32(1, count))
    magnitude = tirx.bitwise_and(bits, i32(0x7FFFFFFF, count))
    return tirx.Select(magnitude > i32(0x7F800000, count), i32(0x7FC00000, count), bits + i32(0x7FFF, count) + odd)


def pair(low: Any, high: Any) -> Any:
    """The upper halves of two int32 as one."""
    count = lanes(low)
    half = tirx.bitwise_and(tirx.shift_right(low, i32(16, count)), i32(0xFFFF, count))
    return tirx.bitwise_or(half, tirx.bitwise_and(high, i32(-0x10000, count)))


def _every(vector: Any, step: int, first: int) -> Any:
    """Lanes first, first + step, ..."""
    return tirx.Shuffle([vector], [tirx.IntImm("int32", i) for i in range(first, lanes(vector), step)])
