"""Products in bfloat16 whose weights stay in codes of 2 to 8 bits in memory: `float_products` of what these decode to.

Codes are decoded on their way to shared memory, as activations are rounded there: each thread looks up 8 or 16 of them
(`looked_up`), makes floats of the bytes (below), and rounds what `common.dequantize` would have made. So no bit of a
result depends on where a weight is decoded.

A byte b in the lowest bits of the float 2^23 makes it 2^23 + b. Bytes are signed, and have 128 added by `BIASED`.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.stored import stored_code
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, span, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16, float_products
from mpq_compiler.backends.tvm.kernels.cuda.gemm import tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.lookup import byte_perm, looked_up
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, local, primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, Fragments
from mpq_compiler.backends.tvm.kernels.problems import dequantize
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, WeightOnly

LANES = 64
"""Lanes of a step of a fragment: 2 units of 32 lanes, with 8 codes in each lane."""
BIASED = 0x80808080
TWO_23 = 0x4B000000
"""Bits of the float 2^23. A byte put into its lowest bits adds that integer to it, so that codes become floats."""


def words(bits: int) -> tuple[int, str]:
    """(how many words, of which type) the 8 codes of a lane take: 3 bits take 4, so that each selects by a nibble.

    Code 4 h + 2 kk + e is that of channel 8 h + lane // 4 and value 16 ks + 8 kk + 2 (lane % 4) + e. It is byte
    2 kk + e of word h, nibble 4 h + 2 kk + e, or the bits 4 (2 kk + e) + 2 h and one more.
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
                        word, bit = _place(table.bits, h, 2 * kk + e)
                        moved = (T.cast(code, "uint32") & T.uint32(2**table.bits - 1)) << T.uint32(bit)
                        store(packed, packed[word] | moved, word)
            for word in range(count):
                store(panel, T.cast(packed[word], dtype), number * count + word)

    return primfunc(name, pack_arguments(problem), body)


def _place(bits: int, h: int, i: int) -> tuple[int, int]:
    """(word, first bit) of a code."""
    if bits == 8:
        return h, 8 * i
    return 0, 4 * i + 2 * h if bits == 2 else 16 * h + 4 * i


def build(problem: WeightOnly, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        own = replace(float_products.in_bytes(problem.product), epilogue=problem.product.epilogue)
        _Kernel(problem.table, own, tiles.tile(own, float_products.TILES), buffers | {"out": buffers["y"]}).emit(batch)

    return primfunc(name, arguments(problem), body)


class _Kernel(float_products.Kernel):
    def __init__(self, table: DequantizeTable, *rest: Any) -> None:
        super().__init__(*rest)
        self.table = table
        self.count, self.dtype = words(table.bits)
        self.shares = self.t.columns // CHANNELS * LANES // self.t.threads
        """Lanes whose codes a thread decodes in a step."""

    def _allocate(self) -> None:
        super()._allocate()
        self.codes = local(self.shares * self.count, self.dtype)

    def _lane(self, i: int) -> tuple[Any, Any]:
        """(fragment of the tile, lane of its step) that a thread decodes."""
        return T.bind((i * self.t.threads + self.thread) // LANES), T.bind(self.thread % LANES)

    def _load_weights(self, step: Any, stage: Any) -> None:
        for i in range(self.shares):
            fragment, lane = self._lane(i)
            source = ((self.first_column // CHANNELS + fragment) * self.w.steps + step) * LANES + lane
            for word in range(self.count):
                store(self.codes, self.b["weight"][source * self.count + word], i * self.count + word)

    def _put(self, step: Any, stage: Any) -> None:
        super()._put(step, stage)
        p, w, b, segments = self.p, self.w, self.b, len(self.table.segments)
        decoded = local(4, "uint32")
        for i in range(self.shares):
            fragment, lane = self._lane(i)
            block = T.bind(self.first_column // CHANNELS + fragment)
            chunks = [T.bind(((step * 2 + lane // 32) * 2 + kk) % w.chunks[0]) for kk in range(2)]
            places = [T.bind(T.min(c * float_products.VALUES // self.table.segments[0], segments - 1)) for c in chunks]
            for h in range(2):
                channel = T.bind(T.min(block * CHANNELS + (8 * h + lane % 32 // 4), p.outputs - 1))
                bytes_ = vmath.keep(T.bitwise_xor(self._bytes(i, h, block), T.uint32(BIASED)))
                for kk in range(2):
                    scale = vmath.keep(T.cast(b["scale"][channel * segments + places[kk]], "float32"))
                    pair = [self._weight(bytes_, 2 * kk + e, scale, channel) for e in range(2)]
                    store(decoded, bfloat16.pair(*pair), 2 * kk + h)
            target = stage * (self.t.columns // CHANNELS * self.fragment) + (fragment * LANES + lane) * 4
            store(self.weights, decoded[span(0, 4)], span(target, 4))

    def _weight(self, bytes_: Expr, i: int, scale: Expr, channel: Any) -> Expr:
        """The weight that byte i codes, computed as `common.dequantize.dequantize_row` does."""
        value = tirx.reinterpret("float32", byte_perm(bytes_, T.uint32(TWO_23), T.uint32(0x7440 + i)))
        weight = vmath.mul(value - vmath.f32(2.0**23 + 128, 1), scale)
        if self.table.offset is None:
            return weight
        return weight + T.cast(self.b["offset"][channel], "float32")

    def _bytes(self, i: int, h: int, block: Any) -> Expr:
        """The levels of the 4 weights of a channel, signed."""
        if self.table.bits == 8:
            return self.codes[i * self.count + h]
        size, number = 2**self.table.bits // 4, 0
        if self.table.classes > 1:
            inside = T.min(block, -(-self.p.outputs // CHANNELS) - 1)
            number = T.bind(T.cast(self.b["row_class"][inside], "int32"))
        tables = T.decl_buffer((self.table.classes * size,), "uint32", data=self.b["tables"].data)
        entries = [tables[number * size + word] for word in range(size)]
        code = T.cast(self.codes[i], "uint32")
        if self.table.bits == 2:
            return looked_up(entries, (code >> T.uint32(2 * h)) & T.uint32(0x3333))
        return looked_up(entries, code >> T.uint32(16 * h))
