"""Fills the weight buffers of an integer kernel from the stored form, once, when an artifact is loaded.

Plain loops: this runs once for each layer and is bound by reading the codes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.stored import StoredRows
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, primfunc, scratch, shares, store
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment, WeightLayout
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul, stored_arguments


def outputs(problem: QuantMatmul, isa: Isa) -> list[Argument]:
    """The buffers of the kernel, under the names that `gemm.arguments` gives them."""
    return WeightLayout(problem, isa).buffers()


def build(problem: QuantMatmul, isa: Isa, name: str) -> PrimFunc:
    """The function ``name(*stored_arguments(problem), *outputs(problem, isa))``."""

    def body(_: Any, buffers: Buffers) -> None:
        _Prepare(problem, isa, buffers).emit()

    return primfunc(name, [*stored_arguments(problem), *outputs(problem, isa)], body)


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
            self.place = scratch(p.entries, "int32") if p.widths and p.bits < 8 else None
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
                at = entry * (isa.vector // 16) + repeat if self.w.looked_up else repeat * 16 + entry
                store(self.b["lut"], value, n, at)

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
        if self.place is not None:
            self.codes.places(self.place, i, self.p.entries)
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
            steps, whole = w.channels[j.first] // kpack, channels // kpack
            for begin, end, width in ((0, whole, kpack), (whole, whole + 1, channels % kpack)):
                if begin == end or not width:
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
        """The byte that stores a weight: its code; where rows have several widths, its place in the last table."""
        p = self.p
        if p.bits == 8:
            return value
        return code if self.place is None else self.place[code]

    def _place(self, i: Any, step: Any, lane: int, code: Any) -> None:
        """Writes the code of output channel i and value `lane` of a step of k to its place in the tiles.

        No address here or above is the remainder of a loop variable: LLVM 22 vectorizes loads at ``v % 16``
        in a loop over v as if they were at ``v``.
        """
        w, isa, tiles = self.w, self.isa, self.b["tiles"]
        block, channel = i // w.block, i % w.block
        group, d = step // w.pack, step % w.pack
        vector = channel // isa.lanes
        base = (w.register(step, vector) if self.p.bits == 8 else group * w.tile.vectors + vector) * w.pack_bytes
        at = T.bind(base + isa.place(channel % isa.lanes, lane))
        if self.p.bits == 8:
            store(tiles, T.cast(code, "int8"), block, at)
        elif w.looked_up:
            bits = self.p.bits
            own = channel % isa.lanes * (isa.kpack * bits // 8) + lane * bits // 8
            self._merge(tiles, block, T.bind(base + d * (isa.vector * bits // 8) + own), code << lane * bits % 8)
        elif self.p.bits == 3:
            self._merge(tiles, block, at + d // 4 * isa.vector, (code & 3) << (d % 4 * 2))
            self._merge(tiles, block, at + 2 * isa.vector, code >> 2 << d)
        else:
            self._merge(tiles, block, at, code << (d * self.p.bits))

    @staticmethod
    def _merge(tiles: Buffer, block: Any, at: Any, bits: Any) -> None:
        store(tiles, tiles[block, at] | T.cast(bits, "uint8"), block, at)
