"""Products in bfloat16 whose weights stay in codes of 2 to 8 bits in memory: `float_products` of what these decode to.

Codes stay codes in shared memory too, and become the registers of tensor cores as they are multiplied: each thread
looks up 8 of a fragment at once (`looked_up`), makes floats of the bytes (below), and rounds what `common.dequantize`
would have made. So no bit of a result depends on where a weight is decoded.

A byte b in bits 8 to 15 of the float 2^15 makes it 2^15 + b; levels are signed, and have 128 added by `BIASED`. Where
codes of 4 bits number integers, nothing is looked up: in bits 16 to 19 of the float 128 a code makes 128 more of it.
What is too much is taken off where the scale is multiplied, in one step: products of the scale, which has 11 bits, with
2^15 + 128, with 128 less the first level and with a level are floats, so that nothing is rounded there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.stored import stored_code
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16, float_products, wgmma
from mpq_compiler.backends.tvm.kernels.cuda.gemm import tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.lookup import byte_perm, looked_up
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import Tile
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, local, primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, CHUNK, STEP, UNIT, Fragments
from mpq_compiler.backends.tvm.kernels.problems import dequantize
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

LANES = 64
"""Lanes of a step of a fragment: 2 units of 32 lanes, with 8 codes in each lane."""
BIASED = 0x80808080
TWO_15, TWO_7 = 0x4700, 0x4300
"""The upper halves of the floats 2^15 and 2^7: of a byte in lower bits than these the float is the sum of both."""


def words(bits: int) -> tuple[int, str]:
    """(how many words, of which type) the 8 codes of a lane take: 3 bits take 4, so that each selects by a nibble.

    Code 4 h + 2 kk + e is that of channel 8 h + lane // 4 and value 16 ks + 8 kk + 2 (lane % 4) + e. It is byte
    2 kk + e of word h, nibble 4 h + 2 kk + e, or the bits 4 (2 kk + e) + 2 h and one more; where it is an integer,
    nibble 2 (2 kk + e) + h.
    """
    return {2: (1, "uint16"), 3: (1, "uint32"), 4: (1, "uint32"), 8: (2, "uint32")}[bits]


def pack_arguments(problem: WeightOnly) -> list[Argument]:
    """codes: as stored; panel: [fragments of channels, steps, words of lanes]."""
    w, (count, dtype) = Fragments(float_products.in_bytes(problem.product)), words(problem.table.bits)
    codes = next(a for a in dequantize.arguments(problem.table) if a.name == "codes")
    return [codes, Argument("panel", (w.outputs // CHANNELS, w.steps, LANES * count), dtype)]


def arguments(problem: WeightOnly) -> list[Argument]:
    """The buffers of `float_products` with the weight of `pack_arguments` and its table; the result comes last."""
    *own, y = float_products.arguments(problem.product)
    own = [replace(pack_arguments(problem)[1], name="weight") if a.name == "weight" else a for a in own]
    return [*own, *(a for a in dequantize.arguments(problem.table)[:-1] if a.name != "codes"), y]


def build_pack(problem: WeightOnly, name: str) -> PrimFunc:
    """The kernel ``name(*pack_arguments(problem))``, a thread for the codes of a lane."""
    w, table = Fragments(float_products.in_bytes(problem.product)), problem.table
    count, dtype = words(table.bits)
    channels = sum(table.segments)

    def body(_: Any, buffers: Buffers) -> None:
        panel = flat(buffers["panel"])
        with each(w.outputs // CHANNELS * w.steps * LANES) as number:
            fragment, step, ks, lane = unravel(number, w.steps, 2, 32)
            packed = local(count, "uint32")
            for word in range(count):
                store(packed, T.uint32(0), word)
            for h in range(2):
                output = T.bind(fragment * CHANNELS + (8 * h + lane // 4))
                for kk in range(2):
                    chunk = T.bind((step * 2 + ks) * 2 + kk)
                    tap = T.bind(tirx.truncdiv(chunk, w.chunks[0]))
                    for e in range(2):
                        c = T.bind((chunk - tap * w.chunks[0]) * float_products.VALUES + lane % 4 * 2 + e)
                        there = tirx.all(output < table.rows, tap < w.taps, c < channels)
                        at = T.bind(T.if_then_else(there, output * table.columns + tap * channels + c, 0))
                        code = stored_code(buffers["codes"], at, table.bits, table.rows * table.columns)
                        word, bit = _place(table, h, 2 * kk + e)
                        moved = (T.cast(code, "uint32") & T.uint32(2**table.bits - 1)) << T.uint32(bit)
                        store(packed, packed[word] | moved, word)
            for word in range(count):
                store(panel, T.cast(packed[word], dtype), number * count + word)

    return primfunc(name, pack_arguments(problem), body)


def _place(table: DequantizeTable, h: int, i: int) -> tuple[int, int]:
    """(word, first bit) of a code."""
    if table.bits == 8:
        return h, 8 * i
    if table.integers:
        return 0, 8 * i + 4 * h
    return 0, 4 * i + 2 * h if table.bits == 2 else 16 * h + 4 * i


def workspaces(problem: WeightOnly) -> list[Argument]:
    """Those of `float_products`."""
    return float_products.workspaces(problem.product)


def build(problem: WeightOnly, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem), *workspaces(problem))``."""
    return built(problem, name, lambda own: tiles.tile(own, float_products.TILES), Kernel)


def build_on_hopper(problem: WeightOnly, name: str) -> PrimFunc:
    """The kernel of Hopper, by `wgmma`, called as that of `build`."""
    return built(problem, name, wgmma.tile, OnHopper)


def built(problem: WeightOnly, name: str, tile: Callable[[QuantMatmul], Tile], made: type[Codes]) -> PrimFunc:
    """The kernel of a kind, whose tile is chosen for the product in bytes."""
    return float_products.built(problem.product, arguments(problem), name, tile, partial(made, problem.table))


class Codes(float_products.Floats):
    """A product whose weights are decoded in registers, where they are multiplied."""

    def __init__(self, table: DequantizeTable, *rest: Any) -> None:
        self.table = table
        self.count, self.dtype = words(table.bits)
        super().__init__(*rest)

    @property
    def fragment(self) -> int:
        return LANES * self.count // (1 if self.dtype == "uint32" else 2)

    def _allocate(self) -> None:
        super()._allocate()
        t, b, table = self.t, self.b, self.table
        weight = b["weight"]
        own = self.w.outputs // CHANNELS * self.w.steps * self.fragment
        b["tiles"] = T.decl_buffer((own,), "uint32", data=weight.data)
        self.scales = local(2 * t.column_fragments)
        self.taken_off = local(2 * t.column_fragments)
        self.bias = local(t.column_fragments)
        self.offsets = local(2 * t.column_fragments) if table.offset is not None else None
        size = 0 if table.bits == 8 or table.integers else 2**table.bits // 4
        self.codes = local(STEP // UNIT * t.column_fragments * self.count, "uint32")
        self.entries = local(max(1, size * t.column_fragments), "uint32")
        """The table of each fragment, its levels biased."""
        for j in range(t.column_fragments):
            block = T.bind(self.first_column // CHANNELS + self._fragment(j))
            number: Any = 0
            if table.classes > 1:
                inside = T.min(block, -(-self.p.outputs // CHANNELS) - 1)
                number = T.bind(T.cast(b["row_class"][inside], "int32"))
            self._set_bias(j, number)
            for h in range(2):
                channel = self._channel(block, h)
                if len(table.segments) == 1:
                    self._set_scale(2 * j + h, b["scale"][channel])
                if self.offsets is not None:
                    store(self.offsets, T.cast(b["offset"][channel], "float32"), 2 * j + h)
            if size:
                tables = T.decl_buffer((table.classes * size,), "uint32", data=b["tables"].data)
                for word in range(size):
                    biased = T.bitwise_xor(tables[number * size + word], T.uint32(BIASED))
                    store(self.entries, biased, j * size + word)

    def _set_bias(self, j: int, number: Index) -> None:
        """What floats of codes have too much, less than nothing: where these are integers, by their first level."""
        bias: Any = vmath.f32(-(2.0**15 + 128), 1)
        if self.table.integers:
            first = T.cast(tirx.reinterpret("int8", self.b["tables"][number * 16]), "float32")
            bias = vmath.keep(first - vmath.f32(128.0, 1))
        store(self.bias, bias, j)

    def _channel(self, block: Index, h: int) -> Index:
        """The channel of a fragment whose weights a lane has; behind the last one it again."""
        return T.bind(T.min(block * CHANNELS + (8 * h + self.lane // 4), self.p.outputs - 1))

    def _set_scale(self, own: int, scale: Expr) -> None:
        value = vmath.keep(T.cast(scale, "float32"))
        store(self.scales, value, own)
        store(self.taken_off, vmath.mul(value, self.bias[own // 2]), own)

    @property
    def _one_group(self) -> bool:
        """Whether all channels of a step have their scale in common, of several groups."""
        each, aligned = STEP // float_products.BYTES, self.w.taps == 1 or self.p.channels % STEP == 0
        return len(self.table.segments) > 1 and self.table.segments[0] % each == 0 and aligned

    def _set_scales(self, j: int, h: int, chunk: Index) -> None:
        """The scale of the group that a chunk belongs to."""
        segments = self.table.segments
        channels = T.bind(chunk % self.w.chunks[0] * float_products.VALUES)
        group = T.bind(T.min(tirx.truncdiv(channels, segments[0]), len(segments) - 1))
        channel = self._channel(T.bind(self.first_column // CHANNELS + self._fragment(j)), h)
        self._set_scale(2 * j + h, self.b["scale"][channel * len(segments) + group])

    def _begin_step(self, stage: Index) -> None:
        """Read the codes of a step, which then are on their way while products are waited for.

        Where it is the first of a group, its scales too.
        """
        if self._one_group:
            chunk, group = T.bind(self.step * (STEP // CHUNK)), self.table.segments[0] // float_products.VALUES
            begins = tirx.EQ(tirx.truncmod(tirx.truncmod(chunk, self.w.chunks[0]), group), 0)
            with T.If(tirx.any(begins, tirx.EQ(self.step, self.first_step))), T.Then():
                for j in range(self.t.column_fragments):
                    for h in range(2):
                        self._set_scales(j, h, chunk)
        for ks in range(STEP // UNIT):
            place = T.bind(ks * 32 + self.lane)
            for j in range(self.t.column_fragments):
                fragment = T.bind(stage * (self.t.columns // CHANNELS) + self._fragment(j)) * self.fragment
                at = (ks * self.t.column_fragments + j) * self.count
                for word in range(self.count):
                    if self.dtype == "uint32":
                        code = self.weights[fragment + place * self.count + word]
                    else:
                        code = self.weights[fragment + place // 2] >> (T.cast(place % 2, "uint32") * T.uint32(16))
                    store(self.codes, code, at + word)

    def _decode(self, stage: Index, ks: int, j: int, first: int = 0) -> None:
        each_chunk = len(self.table.segments) > 1 and not self._one_group
        at = (ks * self.t.column_fragments + j) * self.count
        codes = [self.codes[at + word] for word in range(self.count)]
        for h in range(2):
            bytes_ = vmath.keep(self._bytes(codes, h, j))
            for kk in range(2):
                if each_chunk:
                    self._set_scales(j, h, (2 * self.step + ks) * 2 + kk)
                pair = [self._weight(bytes_, 2 * kk + e, 2 * j + h) for e in range(2)]
                store(self.decoded, bfloat16.pair(*pair), first + 4 * j + 2 * h + kk)

    def _weight(self, bytes_: Expr, i: int, own: int) -> Expr:
        """The weight that byte i codes, the float that `common.dequantize.dequantize_row` computes."""
        word = byte_perm(bytes_, T.uint32(TWO_15), T.uint32(0x5404 + 16 * i))
        if self.table.integers:
            word = byte_perm(bytes_, T.uint32(TWO_7), T.uint32(0x5044 + 256 * i))
        value = tirx.reinterpret("float32", word)
        weight = vmath.fma(value, self.scales[own], self.taken_off[own])
        return weight if self.offsets is None else weight + self.offsets[own]

    def _bytes(self, codes: list[Expr], h: int, j: int) -> Expr:
        """The levels of the 4 weights of a channel, and 128 each; or codes that are integers."""
        bits = self.table.bits
        if self.table.integers:
            return (codes[0] >> T.uint32(4) if h else codes[0]) & T.uint32(0x0F0F0F0F)
        if bits == 8:
            return T.bitwise_xor(codes[h], T.uint32(BIASED))
        size = 2**bits // 4
        entries = [self.entries[j * size + word] for word in range(size)]
        if bits == 2:
            return looked_up(entries, (codes[0] >> T.uint32(2 * h)) & T.uint32(0x3333))
        return looked_up(entries, codes[0] >> T.uint32(16 * h))


class Kernel(Codes, float_products.Kernel):
    """By the instruction of one warp."""


class OnHopper(Codes, float_products.OnHopper):
    """By that of four."""
