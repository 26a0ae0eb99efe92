"""The innermost loops: dot products of a tile of rows and a block of output channels, sums in registers."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, scratch, span, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import loop, quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.gather import Rows
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Runs, Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import Block, Weights
from mpq_compiler.backends.tvm.kernels.cpu.isa import Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment

STACK_BYTES = 1024
"""TVM leaves scratch memory below this on the stack, and takes larger one from its pool."""

Load = Callable[[int, Any], Expr]
Save = Callable[[Expr, int, Any], None]


class Accumulation:
    """The sums of a tile of rows and a block: `begin`, `add`, `end`.

    ahead: see `Block.ahead`

    Loops over the cells of the tile are unrolled late, so that TVM's passes see little code; LLVM then
    keeps the accumulators in registers.
    """

    def __init__(
        self, schedule: Schedule, rows: Rows, block: Block, tile: Tile, weights: Weights, ahead: tuple[Any, int, Any]
    ) -> None:
        self.s, self.rows, self.block, self.tile = schedule, rows, block, tile
        self.weights, self.prefetched = weights, ahead
        self.isa = isa = schedule.isa
        self.units = -(-tile.rows // isa.unit)
        self.lanes, cells = isa.words * isa.unit, self.units * tile.vectors
        # With few accumulators the latency of the dot product would show: some steps get their own.
        self.sets = max(1, 8 // (cells * isa.unit * isa.parts))
        self.starts = scratch(tile.rows, "int32")
        self.columns = scratch(tile.vectors * isa.vector, isa.weight)
        # In parts that are small enough for the stack, where a prefetch cannot touch them and LLVM sees it.
        self.unit_size = self.sets * tile.vectors * self.lanes
        self.most = max(1, (STACK_BYTES - 1) // (4 * self.unit_size))
        self.accumulators = [
            scratch(min(self.most, self.units - u) * self.unit_size, "int32") for u in range(0, self.units, self.most)
        ]

    def begin(self, j: Segment, r: Any, offset: Any, initial: Callable[[Any, Any], Expr]) -> None:
        """Sets the accumulators of rows r and on of the chunk, in segment j.

        offset:  of the first activation from a row's start
        initial: row and register -> the first value
        """
        s, tile = self.s, self.tile
        in_line = s.paired and s.p.out_width % tile.rows == 0
        with T.unroll(0, tile.rows) as i:
            store(self.starts, self.rows.row_start(j, r, i, in_line) + offset * s.together, i)

        def unit(u: Any, _: Load, save: Save) -> None:
            """The first values of a unit: those of the first set, zeros in the others."""
            with T.unroll(0, tile.vectors) as v:
                save(self.isa.joined([initial(i, v) for i in self._rows_of(u)]), 0, v)
                for number in range(1, self.sets):
                    save(vmath.i32(0, self.lanes), number, v)

        self._each_unit(unit)

    def add(self, runs: Runs) -> None:
        """Adds all products."""
        weights, fresh = self.weights, self.weights.fresh
        if weights.first:
            unpack = partial(weights.unpack, runs.count * runs.steps, self.tile.vectors, self.s.w.pack)
            when(fresh, unpack)
            loop(runs.count, partial(self._along, runs, False))
        else:
            when(
                fresh,
                lambda: loop(runs.count, partial(self._along, runs, True)),
                lambda: loop(runs.count, partial(self._along, runs, False)),
            )

    def end(self, product: Buffer, to: Any) -> None:
        """product[to ..] = the sums, int32 [tile.rows, tile.vectors, words]."""
        isa, vectors = self.isa, self.tile.vectors

        def unit(u: Any, load: Load, _: Save) -> None:
            """The sums of a unit, of all sets."""
            with T.unroll(0, vectors) as v:
                total = load(0, v)
                for number in range(1, self.sets):
                    total = total + load(number, v)
                for n, i in reversed([*enumerate(self._rows_of(u))]):  # what stands for a missing row first
                    store(product, isa.row(total, n), span(to + (i * vectors + v) * isa.words, isa.words))

        self._each_unit(unit)

    def _rows_of(self, u: Any) -> list[Any]:
        """The rows of a unit; those behind the tile's last row are that row again."""
        unit, rows = self.isa.unit, self.tile.rows
        found = [u * unit + n for n in range(unit)]
        return found if rows % unit == 0 else [T.min(row, rows - 1) for row in found]

    def _each_unit(self, body: Callable[[Any, Load, Save], None]) -> None:
        """Calls body(unit, load(set, v), save(value, set, v)) for all units of rows."""
        for part, acc in enumerate(self.accumulators):
            with T.unroll(0, min(self.most, self.units - part * self.most)) as i:

                def cell(number: int, v: Any, i: Any = i) -> Any:
                    """The place of register v in a set."""
                    return span(i * self.unit_size + (number * self.tile.vectors + v) * self.lanes, self.lanes)

                def load(number: int, v: Any, acc: Buffer = acc, cell: Any = cell) -> Expr:
                    """The accumulator of register v in a set."""
                    return acc[cell(number, v)]

                def save(value: Expr, number: int, v: Any, acc: Buffer = acc, cell: Any = cell) -> None:
                    """Sets the accumulator of register v in a set."""
                    store(acc, value, cell(number, v))

                body(part * self.most + i, load, save)

    def _along(self, runs: Runs, fresh: bool, tap: Any) -> None:
        """The steps of one run, some at once."""
        each = max(self.sets, self.isa.load_steps, self.s.w.pack if fresh and self.weights.by_packs else 1)
        if runs.steps >= each:
            with T.serial(0, runs.steps // each) as k:
                self._several(runs, k * each, each, tap, fresh)
        if runs.steps % each:
            self._several(runs, runs.steps // each * each, runs.steps % each, tap, fresh)

    def _several(self, runs: Runs, k: Any, count: int, tap: Any, fresh: bool) -> None:
        """`count` steps from step k of a run on."""
        here = T.bind(tap * runs.steps + k)
        group, lanes = self.isa.load_steps, self.isa.word_lanes
        offset, size = runs.offset(tap) * self.s.together, self.isa.kpack * self.s.together  # of a step
        if count % group or group == 1 or self.s.paired:
            for d in range(count):
                at = T.bind(offset + (k + d) * size)
                self._step(here, d, d % self.sets, partial(self.rows.word, self.starts, at), fresh)
            return
        words = scratch(self.tile.rows * group * lanes, "int32")
        for d in range(0, count, group):
            with T.unroll(0, self.tile.rows) as i:
                at = self.starts[i] + offset + (k + d) * size
                loaded = self.rows.units[span(at, group * size)]
                loaded = tirx.reinterpret(f"int32x{group * lanes}", loaded)
                store(words, loaded, span(i * group * lanes, group * lanes))
            for e in range(group):

                def word(i: Any, e: int = e) -> Expr:
                    """The activations of row i in step e of the group."""
                    at = (i * group + e) * lanes
                    return words[at if lanes == 1 else span(at, lanes)]

                self._step(here, d + e, (d + e) % self.sets, word, fresh)

    def _step(self, k: Any, d: int, number: int, word: Callable[[Any], Expr], fresh: bool) -> None:
        """Accumulate step k + d of the weights into one set of accumulators.

        word: row -> its activations in that step
        """
        isa, tile, (first, lines, apart) = self.isa, self.tile, self.prefetched
        for line in range(lines if d % isa.load_steps == 0 else 0):
            at = quotient(k + d, isa.load_steps) * lines + line
            self.block.prefetch(first + at * apart)
        for v in range(tile.vectors if fresh else 0):
            column = T.bind(self.weights.decoded(k, d, v))
            self.weights.keep(column, k + d, v)
            store(self.columns, column, span(v * isa.vector, isa.vector))

        def cell(v: Any, u: Any, load: Load, save: Save) -> None:
            """The dot products of a unit and register v."""
            words = [word(i) for i in self._rows_of(u)[:: self.s.together]]
            column = self.columns[span(v * isa.vector, isa.vector)] if fresh else self.weights.ready(k + d, v)
            save(isa.dot(load(number, v), isa.spread(words), column), number, v)

        def unit(u: Any, load: Load, save: Save) -> None:
            """The accumulators of a unit and all registers."""
            with T.unroll(0, tile.vectors) as v:
                cell(v, u, load, save)

        if self.s.paired:  # sums leave no registers for all weights of a step
            with T.unroll(0, tile.vectors) as v:
                self._each_unit(partial(cell, v))
        else:
            self._each_unit(unit)
