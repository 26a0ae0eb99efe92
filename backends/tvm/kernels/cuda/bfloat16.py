"""Products in bfloat16 on tensor cores: pairs of values in words of 32 bits, sums in float32."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer

MMA = "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32"


def pair(low: Any, high: Any) -> Expr:
    """Two float32 as one word: each the nearest bfloat16, ties to even; NaN stays NaN."""
    word = T.alloc_buffer((1,), "uint32", align=64, scope="local")
    T.evaluate(T.ptx["cvt.rn.bf16x2.f32"](word[0], high, low))
    return word[0]


def multiply(sums: Buffer, at: int, a: Sequence[Any], b: Sequence[Any]) -> None:
    """Adds to 4 sums of each lane, from `at` on, the product of 16 x 16 and 16 x 8 values, 4 and 2 words of each lane.

    Lane 4 g + t (PTX ISA, m16n8k16) has of `a` rows g, g + 8, g, g + 8 and terms 2 t, + 1, in the last two words 8 on;
    of `b` column g and the same terms, in the second word 8 on; sums of rows g, g, g + 8, g + 8, columns 2 t, + 1.
    """
    results = [sums[at + e] for e in range(4)]
    T.evaluate(T.ptx[MMA](*results, *a, *b, *results))
