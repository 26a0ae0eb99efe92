"""Products in bfloat16 on CPUs with AVX512_BF16 or FEAT_BF16: pairs of values in 32 bits, sums in float32.

TVM turns vectors of bfloat16 into float32; hence words are int32 here, and the instructions LLVM's own text. A sum is
rounded once for a pair by vdpbf16ps and bfdot, once for two of them by bfmmla, and denormals are zeros.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import span
from mpq_compiler.backends.tvm.kernels.common.vmath import as_int, i32, keep, lanes
from mpq_compiler.backends.tvm.kernels.cpu.isa import of_family
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.table import TARGETS

_X86 = """
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


_BFDOT = "llvm.aarch64.neon.bfdot.v4f32.v8bf16"
_QUARTERS = "\n".join(
    f"""  %c{i} = shufflevector <16 x float> %c, <16 x float> poison, <4 x i32> <{lanes}>
  %a{i} = shufflevector <16 x i32> %a, <16 x i32> poison, <4 x i32> <{lanes}>
  %b{i} = shufflevector <16 x i32> %b, <16 x i32> poison, <4 x i32> <{lanes}>
  %x{i} = bitcast <4 x i32> %a{i} to <8 x bfloat>
  %y{i} = bitcast <4 x i32> %b{i} to <8 x bfloat>
  %r{i} = call <4 x float> @{_BFDOT}(<4 x float> %c{i}, <8 x bfloat> %x{i}, <8 x bfloat> %y{i})"""
    for i, lanes in enumerate(", ".join(f"i32 {4 * i + lane}" for lane in range(4)) for i in range(4))
)
_EIGHT, _SIXTEEN = (", ".join(f"i32 {lane}" for lane in range(count)) for count in (8, 16))
_ARM = f"""
declare <4 x float> @{_BFDOT}(<4 x float>, <8 x bfloat>, <8 x bfloat>)
declare <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float>, <8 x bfloat>, <8 x bfloat>)
define linkonce_odr <16 x float> @mpq_dpbf16(<16 x float> %c, <16 x i32> %a, <16 x i32> %b) #0 {{
{_QUARTERS}
  %low = shufflevector <4 x float> %r0, <4 x float> %r1, <8 x i32> <{_EIGHT}>
  %high = shufflevector <4 x float> %r2, <4 x float> %r3, <8 x i32> <{_EIGHT}>
  %r = shufflevector <8 x float> %low, <8 x float> %high, <16 x i32> <{_SIXTEEN}>
  ret <16 x float> %r
}}
define linkonce_odr <4 x float> @mpq_bfmmla(<4 x float> %c, <4 x i32> %a, <4 x i32> %b) #0 {{
  %x = bitcast <4 x i32> %a to <8 x bfloat>
  %y = bitcast <4 x i32> %b to <8 x bfloat>
  %r = call <4 x float> @llvm.aarch64.neon.bfmmla(<4 x float> %c, <8 x bfloat> %x, <8 x bfloat> %y)
  ret <4 x float> %r
}}
define linkonce_odr <16 x i32> @mpq_bf16_words(<16 x float> %low, <16 x float> %high) #0 {{
  %x = fptrunc <16 x float> %low to <16 x bfloat>
  %y = fptrunc <16 x float> %high to <16 x bfloat>
  %l = bitcast <16 x bfloat> %x to <8 x i32>
  %h = bitcast <16 x bfloat> %y to <8 x i32>
  %r = shufflevector <8 x i32> %l, <8 x i32> %h, <16 x i32> <{_SIXTEEN}>
  ret <16 x i32> %r
}}
attributes #0 = {{ alwaysinline nounwind "target-features"="+bf16,+neon" }}
"""


@contextmanager
def instructions(isa: str) -> Iterator[None]:
    """Where `dot`, `words` and, on AArch64, `square` may be used."""
    with T.attr(T.int32(0), "pragma_import_llvm", _ARM if TARGETS[of_family(isa).name].arch == "aarch64" else _X86):
        yield


def dot(total: Any, a: Any, b: Any) -> Any:
    """Add the products of the two bfloat16 in each int32 of a and b to `total`, 16 lanes."""
    return T.call_pure_extern("float32x16", "mpq_dpbf16", total, a, b)


def square(total: Any, a: Any, b: Any) -> Any:
    """Add the products of two rows of four bfloat16 and two others, in int32x4 each, to `total`, float32x4 (bfmmla).

    Its four sums are those of the first row of a with both of b, then of the second.
    """
    return T.call_pure_extern("float32x4", "mpq_bfmmla", total, a, b)


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
