"""The tile of rows that is finished while the next one is multiplied: a matrix engine leaves the vector units idle."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, Shared, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import loop, quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.finish import Finish, Summed
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.tiles import save_sums

BLOCK, FIRST, ROW, CELLS = range(4)
"""Where the waiting tile's block (-1 where none waits), chunk and row are noted, and how many notes there are."""


class Spread:
    """A tile that waits, and its rows, some of which each step of the next tile finishes.

    The sums of its last segment stay in tiles until the next one's first products (`TileAccumulation`), which need not
    wait for them to be stored.
    """

    def __init__(self, schedule: Schedule, team: Shared, finish: Finish) -> None:
        self.s, self.tile, self.finish = schedule, schedule.tile, finish
        self.segments = len(schedule.p.segments)
        self.size = self.tile.rows * self.tile.vectors * schedule.isa.words
        """Sums of a tile and a segment."""
        self.products = team.workspace(self.segments * self.size, "int32")
        self.each = -(-self.tile.rows * schedule.isa.tile_steps // schedule.w.segment_steps[0])
        """Rows that a step of the first segment finishes: sums of further ones take their place."""
        self.cells = team.workspace(CELLS, "int32")
        store(self.cells, T.int32(-1), BLOCK)

    def before(self, j: int) -> tuple[Buffer, Index]:
        """Where the sums go that tiles hold when segment j begins."""
        return self.products, (j - 1) % self.segments * self.size

    def begin(self, *coming: Index) -> None:
        """Reads what waits: then a tile may be multiplied.

        coming: block, first row of the chunk and row of the tile that will wait then
        """
        self.coming = coming
        block, first, row = (T.bind(self.cells[cell]) for cell in (BLOCK, FIRST, ROW))
        self.waits = block >= 0
        block = T.max(block, 0)  # channels of which are read even where none waits
        products = [(self.products, j * self.size) for j in range(self.segments)]

        def group(i: Index) -> Index:
            """The time group of row i."""
            if self.s.p.groups == 1:
                return 0
            return T.bind(T.cast(self.finish.b["group"][quotient(first + row + i, self.s.p.rows)], "int32"))

        self.row = self.finish.of_tile(Summed(self.tile, products, None, group, block, first, row))

    def step(self, k: Index) -> None:
        """Finishes the rows whose turn it is at step k of the first segment of the next tile.

        Of those rows of the next tile, whose turn is a tile later, the memory is asked for: sums would wait for it
        where other kernels have pushed it out of the second cache.
        """
        first = k * self.each

        def each(body: Callable[[Index], None]) -> None:
            """Those rows, or as many as there are."""
            if self.each == 1:
                body(first)
                return
            with T.serial(0, T.min(self.each, self.tile.rows - first)) as i:
                body(first + i)

        there = first < self.tile.rows
        when(tirx.all(self.waits, there), partial(each, self.row))
        when(there, partial(each, partial(self.finish.ask, self.tile, *self.coming)))

    def end(self, block: Index, first: Index, r: Index) -> None:
        """The tile that has been multiplied waits from now on."""
        for cell, value in ((BLOCK, block), (FIRST, first), (ROW, r)):
            store(self.cells, value, cell)

    def flush(self) -> None:
        """Finishes what waits."""
        self.begin()

        def rows() -> None:
            """All of the tile."""
            save_sums(self.tile, *self.before(0))
            loop(self.tile.rows, self.row)
            store(self.cells, T.int32(-1), BLOCK)

        when(self.waits, rows)
