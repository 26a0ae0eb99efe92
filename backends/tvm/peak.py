"""What one core of this machine can do at most: dot products of 8-bit integers, f32 multiply-adds, on registers only.

What kernels reach is told as a share of it (`mpqc bench`, benchmarks/kernels.py).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels import vmath
from mpq_compiler.backends.tvm.kernels.isa import Isa
from mpq_compiler.backends.tvm.kernels.template import Argument, primfunc, scratch, shares, span, store

ROUNDS = 20000
"""Of the loop in a call: some milliseconds."""

Loop = tuple[Callable[[], object], int]
"""A call, and the multiply-accumulates that it makes."""


def integer(target: Isa, parts: int = 1) -> Loop:
    """Dot products as the integer kernels make them, int32 sums in registers; as often for each of some parts.

    Parts are shared among threads: what two threads make of two of them is what no kernel can do better.
    """
    weights = f"{target.weight}x{target.vector}"

    def step(total: Expr, word: Expr) -> Expr:
        # The sum itself as the weights: a constant operand would let vpmaddwd move out of the loop.
        return target.dot(total, target.spread(word), tirx.reinterpret(weights, total))

    return _loop("peak_integer", target, "int32", step, target.vector, parts)


def floating(target: Isa) -> Loop:
    """Fused multiply-adds of f32 vectors."""

    def step(total: Expr, word: Expr) -> Expr:
        return vmath.fma(total, tirx.Broadcast(word, target.lanes), total)

    return _loop("peak_floating", target, "float32", step, target.lanes)


def _loop(
    name: str, target: Isa, dtype: str, step: Callable[[Expr, Expr], Expr], work: int, parts: int = 1
) -> Loop:
    """``step(sum, word)`` again and again on as many sums as the widest tile of the target has."""
    tile = target.tiles[0]
    cells = tile.rows * tile.vectors

    def body(_: Any, buffers: dict[str, Any]) -> None:
        with shares(1, parts, float("inf") if parts > 1 else 0) as (_, begin, end), T.serial(begin, end) as part:
            total = scratch(cells * target.lanes, dtype)
            for i in range(cells):
                store(total, tirx.Broadcast(buffers["y"][part, i], target.lanes), span(i * target.lanes, target.lanes))
            word = T.bind(buffers["y"][part, 0])
            with T.serial(0, ROUNDS):
                for i in range(cells):
                    at = span(i * target.lanes, target.lanes)
                    store(total, step(total[at], word), at)
            for i in range(cells):
                store(buffers["y"], total[i * target.lanes], part, i)

    loop = primfunc(name, [Argument("y", (parts, cells), dtype)], body)
    function = tvm.compile(tvm.IRModule({name: loop}), target=target.target())[name]
    y = tvm.runtime.tensor(np.zeros((parts, cells), dtype))
    return lambda: function(y), ROUNDS * cells * work * parts
