"""Fills the weight buffers of an integer kernel from the stored form, once, when an artifact is loaded.

Plain loops: this runs once for each layer and is bound by reading the codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    Argument,
    Buffer,
    Buffers,
    primfunc,
    scratch,
    shares,
    store,
)
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, Segment, WeightLayout


def inputs(problem: QuantMatmul) -> list[Argument]:
    """The stored form of a layer: packed codes (`formats.packing`), scales, tables, zero points, bias."""
    p, segments = problem, len(problem.segments)
    stored = [
        # as formats.packing.packed_bytes, whose package imports torch
        Argument("codes", (p.code_bytes or -(-p.outputs * p.reduction * p.bits // 8),), "uint8"),
        Argument("scale", (p.outputs, segments), "float16"),
    ]
    if p.has_offset:
        stored.append(Argument("stored_offset", (p.outputs,), "float16"))
    if p.has_tables:
        stored.append(Argument("tables", (len(p.widths) or p.classes, p.entries), "int8"))
        stored.append(Argument("row_class", (-(-p.outputs // 4) if p.widths else p.row_classes,), "uint8"))
    if not p.dynamic:
        stored.append(Argument("act_zero", (segments, p.groups), "uint8"))
    if p.has_bias:
        stored.append(Argument("stored_bias", (p.outputs,), "float16"))
    return stored


def outputs(problem: QuantMatmul, isa: Isa) -> list[Argument]:
    """The buffers of the kernel, under the names that `gemm.arguments` gives them."""
    return WeightLayout(problem, isa).buffers()


def stored_code(codes: Buffer, index: Any, bits: int, count: int) -> Expr:
    """The code at `index` of a stored stream of `count` (`formats.packing`), int32: unsigned below 8 bits."""
    if bits == 8:
        return T.cast(tirx.reinterpret("int8", codes[index]), "int32")
    if bits not in (3, 5):
        return _field(codes, index * bits, bits)
    low = bits - 1  # in a plane of their own; the highest bits follow in another
    return _field(codes, index * low, low) | _field(codes, low * count + index, 1) << low


def _field(codes: Buffer, bit: Any, width: int) -> Expr:
    """`width` bits from number `bit` of a stream on, within a byte."""
    return T.cast(codes[bit // 8], "int32") >> (bit % 8) & ((1 << width) - 1)


class StoredRows:
    """Reads the codes of a stored weight [rows, columns], one row after the other from row `begin` on.

    widths: the bits of a code by class of row (`formats.packing.pack_rows`); nothing where all have `bits`
    """

    def __init__(self, b: Buffers, shape: tuple[int, int], bits: int, widths: Sequence[int], begin: Any) -> None:
        self.b, (self.rows, self.columns), self.extra = b, shape, range(1, len(widths))
        self.bits = widths[0] if widths else bits
        if not widths:
            return
        self.first = scratch(len(widths), "int32")
        """The bit of the stream where the extra bits of the row begin, by class that has them."""
        for c in self.extra:
            store(self.first, tirx.IntImm("int32", self.bits * self.rows * self.columns), c)
        with T.serial(0, self.rows) as i:
            own = T.bind(self.class_of(i))
            for c in self.extra:  # behind those of fewer bits, and of the rows before
                before = T.min(own, c - 1) + tirx.Select(tirx.all(own >= c, i < begin), 1, 0)
                store(self.first, self.first[c] + before * self.columns, c)

    def class_of(self, i: Any) -> Expr:
        """The class of row i, int32, from 2 bits."""
        return T.cast(self.b["row_class"][i // 4], "int32") >> (i % 4 * 2) & 3

    @contextmanager
    def row(self, i: Any) -> Iterator[Callable[[Any], Expr]]:
        """The code of row i by column, int32."""
        own: Any = T.bind(self.class_of(i)) if self.extra else 0

        def code(column: Any) -> Expr:
            found = stored_code(self.b["codes"], i * self.columns + column, self.bits, self.rows * self.columns)
            for c in self.extra:
                more = _field(self.b["codes"], self.first[c] + column, 1) << (self.bits + c - 1)
                found = found | T.if_then_else(own >= c, more, 0)
            return found

        yield code
        for c in self.extra:
            store(self.first, self.first[c] + tirx.Select(own >= c, self.columns, 0), c)


def build(problem: QuantMatmul, isa: Isa, name: str) -> PrimFunc:
    """The function ``name(*inputs(problem), *outputs(problem, isa))``."""

    def body(_: Any, buffers: Buffers) -> None:
        _Prepare(problem, isa, buffers).emit()

    return primfunc(name, [*inputs(problem), *outputs(problem, isa)], body)


class _Prepare:
    def __init__(self, problem: QuantMatmul, isa: Isa, buffers: Buffers) -> None:
        self.p, self.b, self.w = problem, buffers, WeightLayout(problem, isa)
        self.isa = self.w.isa

    def emit(self) -> None:
        p, w = self.p, self.w
        tiles = self.b["tiles"]
        for axis_0, axis_1 in [tiles.shape]:
            with T.serial(0, axis_0) as a, T.serial(0, axis_1) as b:
                store(tiles, tirx.IntImm(tiles.dtype, 0), a, b)
        if p.bits < 8:
            self._tables()
        work = p.outputs * p.reduction
        with shares(1, w.outputs, work) as (_, begin, end):
            self.codes = StoredRows(self.b, (p.outputs, p.reduction), p.bits, p.widths, begin)
            with T.serial(begin, end) as i:
                self._vectors(i)
                with T.If(i < p.outputs), T.Then(), self.codes.row(i) as codes:
                    self._row(i, codes)

    def _tables(self) -> None:
        """The table of each register of output channels, repeated for byte shuffles of 16 bytes."""
        isa, p = self.isa, self.p
        with T.serial(0, self.w.outputs // isa.lanes) as n:
            block = T.min(n * isa.lanes // 16, p.row_classes - 1)
            table = len(p.widths) - 1 if p.widths else T.bind(T.cast(self.b["row_class"][block], "int32"))
            with T.serial(0, isa.vector // 16) as repeat, T.serial(0, 16) as entry:
                value = self.b["tables"][table, T.min(entry, p.entries - 1)]
                store(self.b["lut"], value, n, repeat * 16 + entry)

    def _vectors(self, i: Any) -> None:
        """Scales, offset and bias of channel i, zero behind the last one; start values and sums are set to zero."""
        p = self.p
        inside = T.min(i, p.outputs - 1)

        def or_zero(value: Expr) -> Expr:
            return tirx.Select(i < p.outputs, T.cast(value, "float32"), tirx.FloatImm("float32", 0.0))

        with T.serial(0, len(p.segments)) as j:
            store(self.b["weight_scale"], or_zero(self.b["scale"][inside, j]), j, i)
            with T.serial(0, self.b["start"].shape[1]) as g:
                store(self.b["start"], tirx.IntImm("int32", 0), j, g, i)
        if self.p.late_zeros:
            store(self.b["sums"], tirx.FloatImm("float32", 0.0), i)
        if p.has_offset:
            store(self.b["offset"], or_zero(self.b["stored_offset"][inside]), i)
        if p.has_bias:
            store(self.b["bias"], or_zero(self.b["stored_bias"][inside]), i)

    def _row(self, i: Any, codes: Callable[[Any], Expr]) -> None:
        """Places the codes of output row i and sums its weights."""
        for first, count in self.p.segment_runs:
            if count == 1:
                self._segment(i, Segment(first), codes)
            else:
                with T.serial(0, count) as each:
                    self._segment(i, Segment(first, each), codes)

    def _segment(self, i: Any, j: Segment, codes: Callable[[Any], Expr]) -> None:
        p, w = self.p, self.w
        taps, kpack, channels = p.kernel[0] * p.kernel[1], self.isa.kpack, p.segments[j.first]
        total = scratch(1, "int32")
        store(total, tirx.IntImm("int32", 0), 0)
        first = T.bind(j.before(w.segment_steps))
        with T.serial(0, taps) as tap:
            source = T.bind(tap * p.channels + j.before(p.segments))
            steps = w.channels[j.first] // kpack
            for begin, end, width in ((0, channels // kpack, kpack), (channels // kpack, steps, channels % kpack)):
                if begin == end:
                    continue
                with T.serial(begin, end) as k:
                    step = T.bind(first + tap * steps + k)
                    for lane in range(width):
                        code = T.bind(codes(source + k * kpack + lane))
                        value = T.bind(self._weight(i, code))
                        self._place(i, step, lane, self._kept(code, value))
                        store(total, total[0] + value, 0)
        if self.p.late_zeros:
            own, before = self.b["weight_scale"][j.index, i], self.b["sums"][i]
            store(self.b["sums"], vmath.fma(T.cast(total[0], "float32"), own, before), i)
            store(self.b["start"], self.isa.unsigned_excess * total[0], j.index, 0, i)
            return
        if p.dynamic:
            store(self.b["start"], total[0], j.index, 0, i)
            return
        with T.serial(0, p.groups) as g:
            zero = T.cast(self.b["act_zero"][j.index, g], "int32") - self.isa.unsigned_excess
            store(self.b["start"], (0 - zero) * total[0], j.index, g, i)

    def _weight(self, i: Any, code: Any) -> Expr:
        p = self.p
        if not p.has_tables:
            return code
        table = self.codes.class_of(i) if p.widths else T.cast(self.b["row_class"][i // 16], "int32")
        return T.cast(self.b["tables"][table, code], "int32")

    def _kept(self, code: Any, value: Any) -> Expr:
        """What stands for a weight in memory: its code; of rows of several widths its place in the last table."""
        p = self.p
        if p.bits == 8:
            return value
        return value - T.cast(self.b["tables"][len(p.widths) - 1, 0], "int32") if p.widths else code

    def _place(self, i: Any, step: Any, lane: int, code: Any) -> None:
        """Writes the code of output channel i and value `lane` of a step of k to its place in the tiles.

        No address here or above is the remainder of a loop variable: LLVM 22 vectorizes loads at ``v % 16``
        in a loop over v as if they were at ``v``.
        """
        w, isa, tiles = self.w, self.isa, self.b["tiles"]
        block, channel = i // w.block, i % w.block
        group, d = step // w.pack, step % w.pack
        base = (group * w.tile.vectors + channel // isa.lanes) * w.pack_bytes
        at = T.bind(base + isa.place(channel % isa.lanes, lane))
        if self.p.bits == 8:
            store(tiles, T.cast(code, "int8"), block, at)
        elif self.p.bits == 3:
            self._merge(tiles, block, at + d // 4 * isa.vector, (code & 3) << (d % 4 * 2))
            self._merge(tiles, block, at + 2 * isa.vector, code >> 2 << d)
        else:
            self._merge(tiles, block, at, code << (d * self.p.bits))

    @staticmethod
    def _merge(tiles: Buffer, block: Any, at: Any, bits: Any) -> None:
        store(tiles, tiles[block, at] | T.cast(bits, "uint8"), block, at)
