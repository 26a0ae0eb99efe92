"""Linear layers and convolutions in bfloat16 on tensor cores, sums in float32 (meaning: `ops.linear`, `ops.conv2d`).

In bytes this is the product of `gemm`: a channel in bfloat16 is two channels of 8 bits, `mma.m16n8k16` takes the
registers that `mma.m16n8k32` takes, and weights lie as `weights.Fragments` of 8 bits. Activations alone come otherwise:
as float32 from memory, a step ahead, into registers, where they are rounded on their way to shared memory. They are
loaded before the products of a step and stored behind them, which hides the latency of memory.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, span, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel, tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import Tile
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, each, local, primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, CHUNK, STEP, UNIT, Fragments
from mpq_compiler.backends.tvm.kernels.problems import float_gemm
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

TILES = Tile(128, 128, 2, 4, stages=2), Tile(128, 64, 4, 2, stages=2), Tile(64, 64, stages=2)
"""More warps than `gemm` has for as many outputs: each has the floats of a step in registers besides."""
BYTES = 2
"""Bytes of a channel in bfloat16."""
VALUES = CHUNK // BYTES
"""Channels of a chunk."""


def in_bytes(problem: Linear | Conv2d) -> QuantMatmul:
    """The product of 8-bit integers that has its shape in bytes, without an epilogue."""
    if isinstance(problem, Linear):
        return QuantMatmul.linear((problem.positions,), BYTES * problem.inputs, problem.outputs, has_bias=problem.bias)
    p = problem
    return QuantMatmul(
        p.height, p.width, BYTES * p.channels, p.outputs, p.kernel, p.stride, p.padding, has_bias=p.bias
    )  # fmt: skip


def arguments(problem: Linear | Conv2d) -> list[Argument]:
    """The buffers of `problems.float_gemm` in calling order, with the weight as `pack_arguments` lays it out."""
    panel = pack_arguments(problem)[1]
    return [replace(a, shape=panel.shape) if a.name == "weight" else a for a in float_gemm.arguments(problem)]


def pack_arguments(problem: Linear | Conv2d) -> list[Argument]:
    """weight; panel: the words of `weights.Fragments` [fragments of channels, steps, words of lanes]."""
    weight, panel = float_gemm.pack_arguments(problem)
    return [weight, replace(panel, shape=Fragments(in_bytes(problem)).buffers()[0].shape)]


def build(problem: Linear | Conv2d, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        own = replace(in_bytes(problem), epilogue=problem.epilogue)
        named = buffers | {"tiles": buffers["weight"], "out": buffers["y"]}
        Kernel(own, tiles.tile(own, TILES), named).emit(batch)

    return primfunc(name, arguments(problem), body)


def build_pack(problem: Linear | Conv2d, name: str) -> PrimFunc:
    """The kernel ``name(*pack_arguments(problem))``, a thread for each word."""
    w = Fragments(in_bytes(problem))
    depth = w.problem.channels // BYTES

    def body(_: Any, buffers: Buffers) -> None:
        weight, panel = flat(buffers["weight"]), flat(buffers["panel"])
        with each(w.outputs // CHANNELS * (w.steps * 32 * w.words)) as number:
            fragment, step, ks, lane, kk, h = unravel(number, w.steps, 2, 32, 2, 2)  # as of `Fragments.place`
            output = T.bind(fragment * CHANNELS + (8 * h + lane // 4))
            chunk = T.bind((step * 2 + ks) * 2 + kk)
            tap = T.bind(tirx.truncdiv(chunk, w.chunks[0]))
            first = T.bind((chunk - tap * w.chunks[0]) * VALUES + lane % 4 * BYTES)

            def value(channel: Any) -> Expr:
                there = tirx.all(output < w.problem.outputs, tap < w.taps, channel < depth)
                at = T.if_then_else(there, (output * w.taps + tap) * depth + channel, 0)
                return T.if_then_else(there, weight[at], vmath.f32(0.0, 1))

            word = bfloat16.pair(value(first), value(first + 1))
            store(panel, tirx.reinterpret("int32", word), number)

    return primfunc(name, pack_arguments(problem), body)


class Kernel(kernel.Kernel):
    """The product of bfloat16: the tiles and stages of the integer product, with floats rounded as they are fetched."""

    instruction, sum_type = bfloat16.MMA, "float32"
    _has_border = False
    """Pixels of the border are zeros, as `_fetch` gives what is not there."""

    def _products(self) -> None:
        w = self.w
        self.floats = local(self.copies * VALUES)
        self._fetch(0)
        self._load_weights(0, 0)
        T.evaluate(T.ptx.cp.async_.commit_group())
        self._put(0, 0)
        with T.serial(0, w.steps) as step:
            T.evaluate(T.ptx.cp.async_.wait_group(0))
            barrier()
            ahead = T.bind(step + 1)
            stage, other = T.bind(step % 2), T.bind(ahead % 2)
            with T.If(ahead < w.steps), T.Then():
                self._fetch(ahead)
                self._load_weights(ahead, other)
            T.evaluate(T.ptx.cp.async_.commit_group())
            for ks in range(STEP // UNIT):
                self._unit(stage, ks)
            with T.If(ahead < w.steps), T.Then():
                self._put(ahead, other)

    def _fetch(self, step: Any) -> None:
        """The floats that this thread copies in a step into registers; zeros where there are none."""
        p, w, x = self.p, self.w, self.b["x"]
        depth = p.channels // BYTES
        together = max(n for n in (4, 2, 1) if depth % n == 0)
        tap, byte = self._split(T.bind(step * (STEP // CHUNK) + self.chunk), w.chunks[0])
        channel = T.bind(byte // BYTES)
        for i in range(self.copies):
            row = T.bind(self._copied_row(i))
            there, start = tirx.all(row < self.total, tap < w.taps), row * (depth // together)
            if not p.pointwise:
                dy, dx = T.bind(tirx.truncdiv(tap, p.kernel[1])), T.bind(tirx.truncmod(tap, p.kernel[1]))
                there = tirx.all(there, self._is_inside(i, tap) > 0)
                start = tirx.truncdiv(self.pixel[i], BYTES * together) + (dy * p.width + dx) * (depth // together)
            at = T.bind(start + channel // together)  # a multiple, which TVM has to see
            for first in range(0, VALUES, together):
                place = span(i * VALUES + first, together)
                with T.If(tirx.all(there, channel + first < depth)):
                    with T.Then():
                        store(self.floats, x[span((at + first // together) * together, together)], place)
                    with T.Else():
                        store(self.floats, vmath.f32(0.0, together), place)

    def _put(self, step: Any, stage: Any) -> None:
        """Write what `_fetch` has read to shared memory."""
        words = local(CHUNK // 4, "uint32")
        for i in range(self.copies):
            for k in range(CHUNK // 4):
                store(words, bfloat16.pair(*(self.floats[i * VALUES + BYTES * k + e] for e in range(2))), k)
            store(
                self.x_words,
                words[span(0, CHUNK // 4)],
                span(self._target(self._copied_row(i), stage) // 4, CHUNK // 4),
            )

    def _sum(self, at: int) -> Expr:
        return self.sums[at]

    def _added(self, y: Expr, total: Expr, row: Any, column: Any, segment: Any) -> Expr:
        return y + total
