"""Linear layers and convolutions in bfloat16 on tensor cores, sums in float32 (meaning: `ops.linear`, `ops.conv2d`).

In bytes this is the product of `gemm`, or on Hopper of `wgmma`: a channel in bfloat16 is two channels of 8 bits, the
instructions of 16 values take the registers and the operands that those of 32 bytes take, and weights lie as
`weights.Fragments` of 8 bits. Activations are in bfloat16 in memory (`plan.rounding`). Where few tiles share a long k
axis, as many blocks share each, whatever the batch: sums of floats have an order.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16, wgmma
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel, tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import Tile
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, CHUNK, Fragments
from mpq_compiler.backends.tvm.kernels.problems import float_gemm
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, ROUNDED, Argument
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

TILES = Tile(128, 128, 2, 4), Tile(128, 64), Tile(64, 64)
"""More warps than `gemm` has in the largest: what decodes weights takes registers besides."""
BYTES = 2
"""Bytes of a channel in bfloat16."""
VALUES = CHUNK // BYTES
"""Channels of a chunk."""
LEAST_STEPS = 24
"""Steps that a block of threads takes at least, where several share the k axis: their sums are floats in memory."""

Product = Linear | Conv2d


def in_bytes(problem: Product) -> QuantMatmul:
    """The product of 8-bit integers that has its shape in bytes, without an epilogue."""
    if isinstance(problem, Linear):
        return QuantMatmul.linear((problem.positions,), BYTES * problem.inputs, problem.outputs, has_bias=problem.bias)
    p = problem
    return QuantMatmul(
        p.height, p.width, BYTES * p.channels, p.outputs, p.kernel, p.stride, p.padding, has_bias=p.bias
    )  # fmt: skip


def arguments(problem: Product) -> list[Argument]:
    """The buffers of `problems.float_gemm` in calling order, with x rounded and the weight of `pack_arguments`."""
    x, _, *rest = float_gemm.arguments(problem)
    return [replace(x, dtype=ROUNDED), replace(pack_arguments(problem)[1], name="weight"), *rest]


def workspaces(problem: Product) -> list[Argument]:
    """The `parts` of sums where blocks share the k axis."""
    own = in_bytes(problem)
    count = splits(own)
    return [] if count == 1 else [Argument("parts", (BATCH, count * own.rows * own.outputs))]


def splits(own: QuantMatmul) -> int:
    """How many blocks share the k axis of a tile of a product in bytes, so that one sample keeps a GPU busy."""
    w, tile = Fragments(own), tiles.tile(own, TILES)
    blocks = -(-own.rows // tile.rows) * (w.outputs // tile.columns)
    return max(1, min(tiles.BLOCKS // blocks, w.steps // LEAST_STEPS))


def pack_arguments(problem: Product) -> list[Argument]:
    """weight; panel: the words of `weights.Fragments` [fragments of channels, steps, words of lanes]."""
    weight, panel = float_gemm.pack_arguments(problem)
    return [weight, replace(panel, shape=Fragments(in_bytes(problem)).buffers()[0].shape)]


def build(problem: Product, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem), *workspaces(problem))``."""
    return built(problem, arguments(problem), name, lambda own: tiles.tile(own, TILES), Kernel)


def build_on_hopper(problem: Product, name: str) -> PrimFunc:
    """The kernel of Hopper, by `wgmma`, called as that of `build`."""
    return built(problem, arguments(problem), name, wgmma.tile, OnHopper)


def built(
    problem: Product,
    given: list[Argument],
    name: str,
    tile: Callable[[QuantMatmul], Tile],
    make: Callable[..., kernel.Kernel],
) -> PrimFunc:
    """The kernel of a product that is called with buffers as given, and its workspaces.

    tile: chosen for the product in bytes; make: the arguments of `kernel.Kernel` -> the kernel
    """

    def body(batch: Any, buffers: Buffers) -> None:
        own = replace(in_bytes(problem), epilogue=problem.epilogue)
        x = T.decl_buffer((batch * (own.height * own.width * own.channels),), "uint8", data=buffers["x"].data)
        named = buffers | {"tiles": buffers["weight"], "out": buffers["y"], "x": x}
        make(own, tile(own), named, splits(own)).emit(batch)

    return primfunc(name, [*given, *workspaces(problem)], body)


def build_pack(problem: Product, name: str) -> PrimFunc:
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


class Floats(kernel.Kernel):
    """A product of bfloat16, whatever the instruction: sums are floats, and have an order."""

    sum_type = "float32"
    _has_border = False
    """Pixels of the border are zeros, as all that is not copied."""

    def _shared_by(self, tiles: Index) -> Index:
        return tirx.IntImm("int32", self.most_splits)

    def _sum(self, at: int) -> Expr:
        return self.sums[at]

    def _added(self, y: Expr, total: Expr, row: Any, column: Any, segment: Any) -> Expr:
        return y + total


class Kernel(Floats):
    """By the instruction of one warp."""

    instruction = bfloat16.MMA


class OnHopper(Floats, wgmma.Kernel):
    """By that of four."""

    terms, signs = "k16.f32.bf16.bf16", (1, 1, 0)
