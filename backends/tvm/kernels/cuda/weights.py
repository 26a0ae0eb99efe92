"""How the weights of an integer product lie in the memory of a GPU, and the kernels that put them there.

Tensor cores take 16 x 8 outputs of 32 products (`mma.m16n8k32`). The weights of 16 output channels and 64 values of k
are 8 registers of 4 bytes in each of 32 lanes; they lie as the lanes read them, so that a kernel copies whole blocks
and no lane moves data of another:

    register (ks, h, kk) of lane l, byte e:   channel 8 h + l // 4,   k = 32 ks + 16 kk + 4 (l % 4) + e

8 bits are the registers themselves, word 4 ks + 2 kk + h, as four warps together want them (`wgmma`). Below, codes lie
so that four of them become the nibbles of a selector of `__byte_perm` by a shift and a mask, which looks them up in a
table of bytes:

    4 bits: word 2 ks + h, bit 16 kk + 4 e            2 bits: word ks, bit 16 h + 2 kk + 4 e
    3 bits: the lower two as 2 bits; the upper one in word 2, bit 16 ks + (2 h + kk) + 4 e

Where codes of 4 bits number the integers from -8 on (`QuantMatmul.integers`) they lie as signed numbers in the upper
and the lower halves of bytes, and become 16 times their value by a shift and a mask:

    word 2 ks + h, bit 8 e + 4 kk

The k axis is, for each segment, [tap][channel], channels padded to chunks of 16 and segments to units of 32. Of a
product with a gate `GATED` channels of the first half are followed by those of the second that belong to them.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.dequantize import dequantize_row, stored_rows
from mpq_compiler.backends.tvm.kernels.common.float8 import decode
from mpq_compiler.backends.tvm.kernels.common.panels import first_output
from mpq_compiler.backends.tvm.kernels.common.stored import StoredRows
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda.threads import each, local, primfunc, workspace
from mpq_compiler.backends.tvm.kernels.problems import dequantize, float8, float_gemm
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable
from mpq_compiler.backends.tvm.kernels.problems.float8 import DequantizeFloat8
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import (
    BLOCK,
    GATED,
    QuantMatmul,
    of_sibling,
    stored_arguments,
    vectors,
)

CHUNK, UNIT, STEP = 16, 32, 64
"""Values of k: of a copy, of an instruction, of a step between barriers."""
CHANNELS = 16
"""Output channels of a fragment: those that share a table."""


@dataclass(frozen=True)
class Fragments:
    """The layout of one problem."""

    problem: QuantMatmul

    @property
    def taps(self) -> int:
        return self.problem.kernel[0] * self.problem.kernel[1]

    @property
    def chunks(self) -> tuple[int, ...]:
        """Chunks of a tap, for each segment."""
        return tuple(-(-c // CHUNK) for c in self.problem.segments)

    @property
    def units(self) -> tuple[int, ...]:
        """Units of each segment."""
        return tuple(-(-self.taps * chunks * CHUNK // UNIT) for chunks in self.chunks)

    @property
    def first_units(self) -> tuple[int, ...]:
        """The unit at which each segment begins."""
        return tuple(itertools.accumulate((0, *self.units[:-1])))

    @property
    def first_channels(self) -> tuple[int, ...]:
        """The channel of the input at which each segment begins."""
        return tuple(itertools.accumulate((0, *self.problem.segments[:-1])))

    @property
    def even(self) -> bool:
        """Whether all segments are alike."""
        return len(set(self.problem.segments)) == 1

    @property
    def steps(self) -> int:
        return -(-sum(self.units) * UNIT // STEP)

    @property
    def outputs(self) -> int:
        """Output channels, padded."""
        return -(-self.problem.outputs // BLOCK) * BLOCK

    @property
    def looked_up(self) -> bool:
        """Whether codes are looked up in tables where they are multiplied."""
        return self.problem.bits < 8 and not self.problem.integers

    @property
    def words(self) -> int:
        """Words of a lane in a fragment."""
        return self.problem.bits

    def buffers(self) -> list[Argument]:
        """The buffers that `build` makes and the product reads; the rest is as in `cpu.weight_layout.WeightLayout`.

        tiles   the codes [fragments of channels, steps, words of lanes]: word w of lane l at place(w, l)
        lut     tables [fragments of channels, words of 4 entries]
        start   the sum of each channel's weights in each segment, which zero points are multiplied by
        """
        p, n = self.problem, self.outputs
        named = [Argument("tiles", (n // CHANNELS, self.steps, 32 * self.words), "uint32")]
        if self.looked_up:
            named.append(Argument("lut", (n // CHANNELS, 2**p.bits // 4), "uint32"))
        return [*named, *vectors(p, n, 1)]

    def channel(self, column: Index) -> Index:
        """The output channel that a column of the product is."""
        if self.problem.gate is None:
            return column
        block = T.bind(tirx.truncdiv(column, 2 * GATED))
        within = T.bind(column - block * (2 * GATED))
        half = T.Select(within < GATED, 0, self.problem.outputs // 2 - GATED)
        return T.bind(block * GATED + within + half)

    def place(self, word: Index, lane: Index) -> Index:
        """The index of a word of a lane in a fragment. Lanes read up to four neighbouring words at once."""
        together = min(4, self.words)
        if self.words <= 4:
            return lane * together + word
        return word // 4 * 128 + lane * 4 + word % 4

    def of_unit(self, unit: Any, values: Sequence[Any]) -> Any:
        """``values[j]`` of the segment j to which a unit belongs."""
        return _chosen(values, lambda j: unit < self.first_units[j + 1])

    def of_segment(self, segment: Any, values: Sequence[Any]) -> Any:
        """``values[segment]``, numbers or expressions."""
        return _chosen(values, lambda j: tirx.EQ(segment, j))


def _chosen(values: Sequence[Any], is_it: Callable[[int], Any]) -> Any:
    """The first value of which it is said that it is, else the last."""
    found, *before = (tirx.IntImm("int32", value) if isinstance(value, int) else value for value in reversed(values))
    for j, value in zip(reversed(range(len(before))), before, strict=True):
        found = tirx.Select(is_it(j), value, found)
    return found


def arguments(problem: QuantMatmul) -> tuple[list[Argument], list[Argument]]:
    """(inputs, outputs) of the kernel that prepares weights."""
    return stored_arguments(problem), Fragments(problem).buffers()


def build(problem: QuantMatmul, name: str) -> PrimFunc:
    """The kernel ``name(*stored_arguments(problem), *Fragments(problem).buffers())``."""
    inputs, outputs = arguments(problem)
    own = problem.alone

    def body(_: object, buffers: Buffers) -> None:
        spaces = [workspace(own.outputs * own.reduction, dtype) for dtype in ("uint8", "int8")]
        for i in range(problem.products):
            stored = {a.name: buffers.get(of_sibling(a.name, i), buffers[a.name]) for a in stored_arguments(own)}
            _Prepare(own, {**buffers, **stored}, i * own.outputs).emit(spaces)

    return primfunc(name, [*inputs, *outputs], body)


class _Prepare:
    """Lays out the weights of one product.

    first: of its outputs, behind those of its siblings
    """

    def __init__(self, problem: QuantMatmul, buffers: Buffers, first: int) -> None:
        self.p, self.b, self.w, self.first = problem, buffers, Fragments(problem), first

    def emit(self, spaces: Sequence[Buffer]) -> None:
        """Emits the grids. spaces: for a byte of each weight, its code or its value, and for its value."""
        p, w = self.p, self.w
        self.kept, values = spaces
        with each(p.outputs, 32) as i:
            rows = StoredRows(self.b, (p.outputs, p.reduction), p.bits, p.widths, i)
            place = local(p.entries, "int32") if p.widths and p.bits < 8 else None
            if place is not None:
                rows.places(place, i, p.entries)
            with rows.row(i) as codes, T.serial(0, p.reduction) as k:
                code = T.bind(codes(k))
                value = T.bind(self._value(rows, i, code))
                store(values, T.cast(value, "int8"), i * p.reduction + k)
                kept = value if p.bits == 8 else code
                if place is not None:
                    kept = place[code]
                store(self.kept, T.cast(kept, "uint8"), i * p.reduction + k)
        if w.looked_up:
            self._tables()
        with each(w.outputs * len(p.segments), 32) as number:
            i, j = unravel(number, len(p.segments))
            self._vectors(i, j, values)
        if p.late_zeros:
            with each(w.outputs, 32) as i:
                total, column = local(1), self.first + i
                store(total, vmath.f32(0.0, 1), 0)
                with T.serial(0, len(p.segments)) as j:
                    own = T.cast(self.b["start"][j, 0, column], "float32")
                    store(total, vmath.fma(own, self.b["weight_scale"][j, column], total[0]), 0)
                store(self.b["sums"], total[0], column)
        with each(w.outputs // CHANNELS * (w.steps * 32), 128) as number:
            fragment, step, lane = unravel(number, w.steps, 32)
            self._fragment(fragment, step, lane)

    def _value(self, rows: StoredRows, i: Any, code: Any) -> Expr:
        p = self.p
        if not p.has_tables:
            return code
        table = rows.class_of(i) if p.widths else T.cast(self.b["row_class"][i // CHANNELS], "int32")
        return T.cast(self.b["tables"][table, code], "int32")

    def _tables(self) -> None:
        p, words = self.p, 2**self.p.bits // 4
        with each(self.w.outputs // CHANNELS * words) as number:
            block, word = unravel(number, words)
            table: Any = len(p.widths) - 1
            if not p.widths:
                own = T.bind(tirx.truncdiv(self.w.channel(block * CHANNELS), CHANNELS))
                table = T.bind(T.cast(self.b["row_class"][T.min(own, p.row_classes - 1)], "int32"))
            packed: Any = T.uint32(0)
            for byte in range(4):
                entry = T.cast(tirx.reinterpret("uint8", self.b["tables"][table, word * 4 + byte]), "uint32")
                packed = packed | entry << T.uint32(8 * byte)
            store(self.b["lut"], packed, self.first // CHANNELS + block, word)

    def _vectors(self, i: Any, j: Any, values: Any) -> None:
        """Scale and sum of column i and segment j; offset and bias of the column. Zero behind the last."""
        p, b = self.p, self.b
        inside, behind = T.min(self.w.channel(i), p.outputs - 1), i >= p.outputs

        def or_zero(value: Expr) -> Expr:
            return tirx.Select(behind, vmath.f32(0.0, 1), T.cast(value, "float32"))

        column = self.first + i
        store(b["weight_scale"], or_zero(b["scale"][inside, j]), j, column)
        total, size = local(1, "int32"), p.segments[0]
        store(total, tirx.IntImm("int32", 0), 0)
        first: Any = j * size
        if not self.w.even:
            size, first = (T.bind(self.w.of_segment(j, each)) for each in (p.segments, self.w.first_channels))
        with T.If(i < p.outputs), T.Then(), T.serial(0, self.w.taps) as tap, T.serial(0, size) as k:
            weight = values[inside * p.reduction + tap * p.channels + first + k]
            store(total, total[0] + T.cast(weight, "int32"), 0)
        store(b["start"], total[0], j, 0, column)
        with T.If(tirx.EQ(j, 0)), T.Then():
            T.evaluate(T.int32(0))
            if p.has_offset:
                store(b["offset"], or_zero(b["stored_offset"][inside]), column)
            if p.has_bias:
                store(b["bias"], or_zero(b["stored_bias"][inside]), column)

    def _fragment(self, fragment: Any, step: Any, lane: Any) -> None:
        """The words of one lane."""
        p, w = self.p, self.w
        words = local(w.words, "uint32")
        for word in range(w.words):
            store(words, T.uint32(0), word)
        for ks in range(2):
            unit = T.bind(step * 2 + ks)
            first, chunks, channels, before = (
                T.bind(w.of_unit(unit, of) if not w.even else of[0])
                for of in (w.first_units, w.chunks, p.segments, w.first_channels)
            )
            own = unit
            if w.even:
                segment = T.bind(tirx.truncdiv(unit, w.units[0]))
                own, before = unit - segment * w.units[0], segment * p.segments[0]
            for h in range(2):
                row = self.w.channel(T.bind(fragment * CHANNELS + (8 * h + lane // 4)))
                for kk in range(2):
                    chunk = T.bind((own - (0 if w.even else first)) * 2 + kk)
                    tap = T.bind(tirx.truncdiv(chunk, chunks))
                    for e in range(4):
                        c = T.bind((chunk - tap * chunks) * CHUNK + (lane % 4 * 4 + e))
                        there = tirx.all(row < p.outputs, tap < w.taps, c < channels, unit < sum(w.units))
                        at = row * p.reduction + tap * p.channels + before + c
                        kept = T.if_then_else(there, T.cast(self.kept[at], "uint32"), self._nothing())
                        self._merge(words, T.bind(kept), ks, h, kk, e)
        for word in range(w.words):
            store(self.b["tiles"], words[word], self.first // CHANNELS + fragment, step, w.place(word, lane))

    def _nothing(self) -> Any:
        """The code where there is no weight: activations are zero there, or the channel is padding."""
        return T.uint32(0)

    def _merge(self, words: Any, code: Any, ks: int, h: int, kk: int, e: int) -> None:
        def put(word: int, bits: Any, shift: int) -> None:
            store(words, words[word] | bits << T.uint32(shift), word)

        match self.p.bits:
            case 8:
                put(4 * ks + 2 * kk + h, code, 8 * e)
            case 4 if self.p.integers:
                put(2 * ks + h, T.bitwise_xor(code, T.uint32(8)), 8 * e + 4 * kk)
            case 4:
                put(2 * ks + h, code, 16 * kk + 4 * e)
            case 2:
                put(ks, code, 16 * h + 2 * kk + 4 * e)
            case 3:
                put(ks, code & T.uint32(3), 16 * h + 2 * kk + 4 * e)
                put(2, code >> T.uint32(2), 16 * ks + (2 * h + kk) + 4 * e)


# ------------------------------------------------------------------------------------- weights of float layers


def build_dequantize(problem: DequantizeTable, name: str) -> PrimFunc:
    """The kernel ``name(*problems.dequantize.arguments(problem))``, a thread for each row."""

    def body(_: Any, buffers: Buffers) -> None:
        with each(problem.rows, 32) as i:
            dequantize_row(problem, buffers, stored_rows(problem, buffers, i), i)

    return primfunc(name, dequantize.arguments(problem), body)


def build_float8(problem: DequantizeFloat8, name: str) -> PrimFunc:
    """The kernel ``name(*problems.float8.arguments(problem))``."""

    def body(_: Any, buffers: Buffers) -> None:
        with each(problem.rows * problem.columns) as number:
            i, k = unravel(number, problem.columns)
            code = T.cast(buffers["codes"][i, k], "int32")
            factor = T.cast(buffers["scale"][i], "float32")
            store(buffers["y"], vmath.mul(decode(code, problem.exponent, 1), factor), i, k)

    return primfunc(name, float8.arguments(problem), body)


def build_pack(problem: Linear | Conv2d, name: str) -> PrimFunc:
    """The kernel ``name(*problems.float_gemm.pack_arguments(problem))``."""
    vectors, terms, lanes = float_gemm.panel_shape(problem)

    def body(_: Any, buffers: Buffers) -> None:
        weight, panel = flat(buffers["weight"]), flat(buffers["panel"])
        with each(vectors * terms * lanes) as number:
            vector, term, lane = unravel(number, terms, lanes)
            store(panel, weight[(first_output(problem, vector) + lane) * terms + term], number)

    return primfunc(name, float_gemm.pack_arguments(problem), body)
