"""Results: scales, bias, offsets and the epilogue of a row, and its stores."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import apply
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, span, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.gather import Rows
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import Block
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


class Finish:
    """Makes results of the sums of a tile."""

    def __init__(self, schedule: Schedule, buffers: Buffers, rows: Rows, block: Block) -> None:
        self.s, self.p, self.isa, self.w, self.b = schedule, schedule.p, schedule.isa, schedule.w, buffers
        self.rows, self.block = rows, block
        self.epilogue = self.p.epilogue or Epilogue()

    def row(self, summed: Summed, i: Index) -> None:
        """Scales, bias (where nothing is ``scaled`` yet), offsets, epilogue and store of row i of a tile."""
        p, w, lanes = self.p, self.w, self.isa.lanes
        tile, products, scaled = summed.tile, summed.products, summed.scaled
        r, group = summed.r + i, summed.group(i)
        m = T.bind(summed.first + r)
        scales = []
        if products or p.has_offset or p.dynamic:
            scales = [T.bind(self.b["act_scale"][self.s.entry(Segment(j), m, group)]) for j in range(len(p.segments))]
        minus_zero = T.bind(0.0 - T.cast(self.b["act_zero"][m], "float32")) if self.p.late_zeros else None
        sums = []
        if p.has_offset:
            for j in range(len(p.segments)):
                total = self.rows.sums[j * self.s.most_rows + r] - self.rows.zeros_of(Segment(j), m, group)
                sums.append(T.bind(T.cast(total, "float32")))
        quant = None
        if self.epilogue.bits is not None:
            quant = (T.bind(self.b["qscale"][group]), T.bind(self.b["qzero"][group]))

        def vector(v: int, live: int) -> None:
            """Registers v of the block; its first `live` lanes are channels of the output."""
            n = T.bind(self.block.channel(v, summed.block))
            y = self.b["bias"][span(n, lanes)] if p.has_bias else vmath.f32(0.0, lanes)
            if scaled is not None:
                total = scaled[span((i * tile.vectors + v) * lanes, lanes)]
                if self.p.late_zeros:
                    centred = vmath.fma(vmath.splat(minus_zero, lanes), self.b["sums"][span(n, lanes)], total)
                    total = vmath.fma(vmath.splat(scales[0], lanes), centred, y)
                y = total
            for j, (product, at) in enumerate(products):
                scale = self.b["weight_scale"][span(n + j * w.outputs, lanes)]
                total = self.isa.folded(product[span(at + (i * tile.vectors + v) * self.isa.words, self.isa.words)])
                total = tirx.Cast(f"float32x{lanes}", total)
                y = vmath.fma(total, vmath.mul(vmath.splat(scales[j], lanes), scale), y)
            for j, total in enumerate(sums):
                factor = vmath.mul(vmath.splat(scales[j], lanes), self.b["offset"][span(n, lanes)])
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
            y = apply(replace(self.epilogue, steps=steps, keeps=False), y, load, quant)
            if p.into is not None:
                size, offset, row = p.into
                sample = T.bind(quotient(m, p.rows))
                at = sample * size + (m - sample * p.rows) * row + (n + offset)
            self._store_live(self.b["out"], y, at, live)

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
