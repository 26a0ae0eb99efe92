"""Results: scales, bias, offsets and the epilogue of a row, and its stores."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm import DataType, tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import apply, quantizer_of
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, span, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.gather import Rows
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import Block, prefetch
from mpq_compiler.backends.tvm.kernels.cpu.isa import Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue

Group = Callable[[Index], Index]
"""Number of a row of a tile -> its time group."""


@dataclass(frozen=True)
class Summed:
    """A tile whose sums are in memory.

    products: int32 sums of each segment and where they begin; of many segments none, but what is ``scaled``
    block:    number of the block of output channels
    first:    number of the chunk's first row in the product
    r:        number of the tile's first row in the chunk
    """

    tile: Tile
    products: list[tuple[Buffer, Index]]
    scaled: Buffer | None
    group: Group
    block: Index
    first: Index
    r: Index


@dataclass(frozen=True)
class OfRow:
    """Scales and, with offsets, sums of zero points of a row, for each segment; what its results are quantized by."""

    scales: list[Expr]
    zeros: list[Expr]
    quant: tuple[Expr, Expr] | None


@dataclass(frozen=True)
class OfChannels:
    """Bias of a register of channels; for each segment, what its sums and its activations' are multiplied by.

    starts: what is added to the sums of each segment before that, in int32; none where they began with it
    """

    bias: Expr
    factors: list[Expr]
    offsets: list[Expr]
    starts: list[Expr]


class Finish:
    """Makes results of the sums of a tile."""

    def __init__(self, schedule: Schedule, buffers: Buffers, rows: Rows, block: Block) -> None:
        self.s, self.p, self.isa, self.w, self.b = schedule, schedule.p, schedule.isa, schedule.w, buffers
        self.rows, self.block = rows, block
        self.epilogue = self.p.epilogue or Epilogue()

    def of_tile(self, summed: Summed) -> Callable[[Index], None]:
        """What makes results of a row of the tile, by its number. What all rows have in common is read now."""
        p = self.p
        if p.groups > 1 or p.dynamic:
            return partial(self.row, summed)
        own, found = self._of_row(summed, 0, 0), []
        for v in range(summed.tile.vectors):
            of = self._of_channels(summed, v, own)
            several = ([*map(T.bind, each)] for each in (of.factors, of.offsets, of.starts))
            found.append(OfChannels(T.bind(of.bias), *several))
        return partial(self.row, summed, own=own, of=found)

    def row(
        self, summed: Summed, i: Index, own: OfRow | None = None, of: Sequence[OfChannels] | None = None
    ) -> None:
        """Scales, bias (where nothing is ``scaled`` yet), offsets, epilogue and store of row i of a tile.

        own, of: what is known of the row, and of each register of channels
        """
        p, w, lanes = self.p, self.w, self.isa.lanes
        tile, products, scaled = summed.tile, summed.products, summed.scaled
        r = summed.r + i
        m = T.bind(summed.first + r)
        own = own or self._of_row(summed, m, summed.group(i))
        minus_zero = T.bind(0.0 - T.cast(self.b["act_zero"][m], "float32")) if self.p.late_zeros else None
        sums = [
            T.bind(T.cast(self.rows.sums[j * self.s.most_rows + r] - zeros, "float32"))
            for j, zeros in enumerate(own.zeros)
        ]

        def vector(v: int, live: int) -> None:
            """Registers v of the block; its first `live` lanes are channels of the output."""
            n = T.bind(self.block.channel(v, summed.block))
            channels = of[v] if of else self._of_channels(summed, v, own)
            y = channels.bias
            if scaled is not None:
                total = scaled[span((i * tile.vectors + v) * lanes, lanes)]
                if self.p.late_zeros:
                    centred = vmath.fma(vmath.splat(minus_zero, lanes), self.b["sums"][span(n, lanes)], total)
                    total = vmath.fma(vmath.splat(own.scales[0], lanes), centred, y)
                y = total
            for j, ((product, at), factor) in enumerate(zip(products, channels.factors, strict=True)):
                total = self.isa.folded(product[span(at + (i * tile.vectors + v) * self.isa.words, self.isa.words)])
                if channels.starts:
                    total = total + channels.starts[j]
                total = tirx.Cast(f"float32x{lanes}", total)
                y = vmath.fma(total, factor, y)
            for total, factor in zip(sums, channels.offsets, strict=True):
                y = vmath.fma(vmath.splat(total, lanes), factor, y)
            mask = None
            if live < lanes:
                mask = tirx.Shuffle([T.bool(k < live) for k in range(lanes)], list(range(lanes)))

            def load(k: int) -> Expr:
                """Operand k of the epilogue."""
                buffer, kind = self.b[f"operand{k}"], self.epilogue.operands[k].kind
                if kind == "scalar":
                    return buffer[0]
                row = {"full": m, "sample": quotient(m, p.rows), "channel": 0}[kind]
                at = span(row * p.outputs + n, lanes)
                if mask is None:
                    return buffer[at]
                return T.masked_load(f"float32x{lanes}", buffer, at, mask)

            steps, at = self.epilogue.steps, m * p.outputs + n
            if self.epilogue.keeps:
                y = vmath.keep(apply(replace(self.epilogue, steps=steps[:-1], keeps=False), y, load))
                self._store_live(self.b["full"], y, at, live)
                steps = steps[-1:]
            y = apply(replace(self.epilogue, steps=steps, keeps=False), y, load, own.quant)
            self._store_live(self.b["out"], y, self._place(m, n), live)

        # In the last block, registers behind the output's last channel are not stored, one perhaps in part.
        inner = T.bool(True) if w.blocks == 1 else summed.block < w.blocks - 1
        for v in range(tile.vectors):
            live = min(lanes, p.outputs - (w.blocks - 1) * w.block - v * lanes)
            if live == lanes:
                vector(v, lanes)
            elif w.blocks == 1:
                if live > 0:
                    vector(v, live)
            elif live > 0:
                when(inner, partial(vector, v, lanes), partial(vector, v, live))
            else:
                when(inner, partial(vector, v, lanes))

    def _of_row(self, summed: Summed, m: Index, group: Index) -> OfRow:
        """What row m, of a time group, has of its own."""
        segments = [Segment(j) for j in range(len(self.p.segments))]
        scales, zeros, quant = [], [], None
        if summed.products or self.p.has_offset or self.p.dynamic:
            scales = [T.bind(self.b["act_scale"][self.s.entry(j, m, group)]) for j in segments]
        if self.p.has_offset:
            zeros = [self.rows.zeros_of(j, m, group) for j in segments]
        if self.epilogue.bits is not None:
            quant = quantizer_of(self.b, group)
        return OfRow(scales, zeros, quant)

    def _of_channels(self, summed: Summed, v: int, row: OfRow) -> OfChannels:
        """What register v of channels has, for a row."""
        lanes, n = self.isa.lanes, self.block.channel(v, summed.block)
        bias = self.b["bias"][span(n, lanes)] if self.p.has_bias else vmath.f32(0.0, lanes)
        weights = [self.b["weight_scale"][span(n + j * self.w.outputs, lanes)] for j in range(len(summed.products))]
        factors = [vmath.mul(vmath.splat(a, lanes), b) for a, b in zip(row.scales, weights, strict=False)]
        of_sums = row.scales if self.p.has_offset else []
        offsets = [vmath.mul(vmath.splat(a, lanes), self.b["offset"][span(n, lanes)]) for a in of_sums]
        starts: list[Expr] = []
        if self.s.adds_starts:
            starts = [self.b["start"][span(n + j * self.w.outputs, lanes)] for j in range(len(summed.products))]
        return OfChannels(bias, factors, offsets, starts)

    def ask(self, tile: Tile, block: Index, first: Index, r: Index, i: Index) -> None:
        """Asks for the memory of row i of a tile, r of the chunk's row ``first``: results, and what epilogues read."""
        m, n = T.bind(first + r + i), self.block.channel(0, block)
        full = [f"operand{k}" for k, operand in enumerate(self.epilogue.operands) if operand.kind == "full"]
        places = {name: m * self.p.outputs + n for name in (*full, *(["full"] if self.epilogue.keeps else []))}
        for name, at in (places | {"out": self._place(m, n)}).items():
            line = 64 // DataType(self.b[name].dtype).itemsize
            with T.unroll(0, -(-tile.vectors * self.isa.lanes // line)) as number:
                prefetch(self.b[name], at + number * line, 2)

    def _place(self, m: Index, n: Index) -> Index:
        """Where the result of row m and channel n is stored."""
        if self.p.into is None:
            return m * self.p.outputs + n
        size, offset, row = self.p.into
        sample = T.bind(quotient(m, self.p.rows))
        return sample * size + (m - sample * self.p.rows) * row + (n + offset)

    def _store_live(self, out: Buffer, value: Expr, at: Any, live: int) -> None:
        """Stores the first `live` lanes of `value`.

        In parts of a power of two, since LLVM 22 writes four bytes for a masked store of one uint8 that was
        narrowed from int32.
        """
        lanes = self.isa.lanes
        if live == lanes:
            store(out, value, span(at, lanes))
            return
        vector, done = T.bind(value), 0
        for size in (8, 4, 2, 1):
            if live & size:
                part = tirx.Shuffle([vector], list(range(done, done + size)))
                store(out, part, span(at + done, size))
                done += size
