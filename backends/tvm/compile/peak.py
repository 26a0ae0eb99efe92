"""The peak performance of one core of this machine: 8-bit dot products and f32 multiply-adds on registers.

`mpqc bench` and benchmarks/kernels.py state the performance of kernels as a share of it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import primfunc, scratch, shares, span, store
from mpq_compiler.backends.tvm.kernels.cpu import amx
from mpq_compiler.backends.tvm.kernels.cpu import bfloat16 as pairs
from mpq_compiler.backends.tvm.kernels.cpu.isa import AMX, TILE_BYTES, TILE_ROWS, Isa
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.targets.numerics import BF16, features_of
from mpq_compiler.targets.table import TARGETS, with_features

ROUNDS = 20000
"""The iterations of the loop in a call, which take some milliseconds."""

Loop = tuple[Callable[[], object], int]
"""A call, and the number of its multiply-accumulates."""


def integer(target: Isa, parts: int = 1) -> Loop:
    """A loop of dot products as the integer kernels compute them, with int32 sums in registers.

    parts: repeats the loop, and divides the repetitions among threads. The performance of two threads on two parts is
    the peak for kernels on two threads.
    """
    if target.engine == AMX:
        return _tiles(target, parts)
    weights = f"{target.weight}x{target.vector}"

    def step(total: Expr, word: Expr) -> Expr:
        # The sum itself as the weights: a constant operand would let vpmaddwd move out of the loop.
        each = word if target.word_lanes == 1 else tirx.Broadcast(word, target.word_lanes)
        return target.dot(total, target.spread([each] * target.unit), tirx.reinterpret(weights, total))

    lanes = target.words * target.unit
    return _loop("peak_integer", target, "int32", step, target.vector * target.unit, parts, lanes=lanes)


def _tiles(target: Isa, parts: int) -> Loop:
    """A loop of products of tiles, four sums by two tiles of activations and two of weights, as kernels have them.

    What is multiplied is random: of zeros a Xeon of 2023 multiplies a third more in the same time.
    """
    cells = [(half, v) for half in range(2) for v in range(2)]
    size = TILE_ROWS * TILE_BYTES

    def body(_: Any, buffers: dict[str, Any]) -> None:
        configuration = scratch(amx.CONFIGURATION, "int32")
        with shares(1, parts, float("inf") if parts > 1 else 0) as (_, begin, end), T.serial(begin, end) as part:
            amx.configure(configuration)
            y = T.decl_buffer((2 * parts * size,), "uint8", data=buffers["y"].data)
            for t in (*amx.LEFT, *amx.RIGHT):
                amx.load(t, y, part * size, TILE_BYTES)
            with T.serial(0, ROUNDS):
                for half, v in cells:
                    amx.dot(amx.sums(half, v), amx.LEFT[half], amx.RIGHT[v])
            for half, v in cells:
                amx.save(amx.sums(half, v), y, (parts + part) * size, TILE_BYTES)
            amx.release()

    loop = primfunc("peak_tiles", [Argument("y", (2, parts, size), "uint8")], body)
    function = tvm.compile(tvm.IRModule({"peak_tiles": loop}), target=target.target())["peak_tiles"]
    y = tvm.runtime.tensor(np.random.default_rng(0).integers(0, 256, (2, parts, size), np.uint8))
    return lambda: function(y), ROUNDS * len(cells) * TILE_ROWS * TILE_BYTES * TILE_ROWS * parts


def floating(target: Isa) -> Loop:
    """A loop of fused multiply-adds of f32 vectors."""

    def step(total: Expr, word: Expr) -> Expr:
        return vmath.fma(total, tirx.Broadcast(word, target.lanes), total)

    return _loop("peak_floating", target, "float32", step, target.lanes)


def reading(target: Isa, bytes_: int) -> Loop:
    """A loop of loads of whole registers over a buffer of about ``bytes_`` bytes; its second item is these bytes."""
    lanes, cells = target.lanes, target.tiles[0].rows
    steps = bytes_ // (4 * lanes * cells)
    size = steps * lanes * cells

    def body(_: Any, buffers: dict[str, Any]) -> None:
        total = scratch(cells * lanes, "int32")
        for i in range(cells):
            store(total, vmath.i32(0, lanes), span(i * lanes, lanes))
        with T.serial(0, steps) as step:
            for i in range(cells):
                at = span(i * lanes, lanes)
                store(total, total[at] + buffers["x"][span((step * cells + i) * lanes, lanes)], at)
        for i in range(cells):
            store(buffers["y"], total[span(i * lanes, lanes)], span(i * lanes, lanes))

    loop = primfunc("reading", [Argument("x", (size,), "int32"), Argument("y", (cells * lanes,), "int32")], body)
    function = tvm.compile(tvm.IRModule({"reading": loop}), target=target.target())["reading"]
    x, y = (tvm.runtime.tensor(np.ones(n, np.int32)) for n in (size, cells * lanes))
    return lambda: function(x, y), 4 * size


def bfloat16(target: Isa) -> Loop:
    """A loop of products of bfloat16 pairs with f32 sums, for CPUs with AVX512_BF16 and targets of their vectors."""

    def step(total: Expr, word: Expr) -> Expr:
        return pairs.dot(total, tirx.Broadcast(vmath.as_int(word), target.lanes), vmath.as_int(total))

    return _loop("peak_bfloat16", target, "float32", step, 2 * target.lanes, features=features_of(BF16, "x86_64"))


def _loop(
    name: str, target: Isa, dtype: str, step: Callable[[Expr, Expr], Expr], work: int, parts: int = 1,
    features: tuple[str, ...] = (), lanes: int = 0,
) -> Loop:  # fmt: skip
    """Compiles a loop that repeats ``step(sum, word)`` on as many sums as the widest tile of the target has.

    work: multiply-accumulates of a step. lanes: of a sum, where they differ from the target's.
    """
    tile, lanes = target.tiles[0], lanes or target.lanes
    cells = tile.rows * tile.vectors * target.lanes // lanes

    def body(_: Any, buffers: dict[str, Any]) -> None:
        with shares(1, parts, float("inf") if parts > 1 else 0) as (_, begin, end), T.serial(begin, end) as part:
            total = scratch(cells * lanes, dtype)
            for i in range(cells):
                store(total, tirx.Broadcast(buffers["y"][part, i], lanes), span(i * lanes, lanes))
            word = T.bind(buffers["y"][part, 0])
            with pairs.instructions(target.name) if features else nullcontext(), T.serial(0, ROUNDS):
                for i in range(cells):
                    at = span(i * lanes, lanes)
                    store(total, step(total[at], word), at)
            for i in range(cells):
                store(buffers["y"], total[i * lanes], part, i)

    loop = primfunc(name, [Argument("y", (parts, cells), dtype)], body)
    row = with_features(TARGETS[target.name], features)
    function = tvm.compile(tvm.IRModule({name: loop}), target=tvm.target.Target(dict(row.tvm)))[name]
    y = tvm.runtime.tensor(np.zeros((parts, cells), dtype))
    return lambda: function(y), ROUNDS * cells * work * parts
