"""The innermost loops on tiles of a matrix engine: 32 or 16 rows by 32 or 16 output channels, 64 values of k a step."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, scratch, store
from mpq_compiler.backends.tvm.kernels.cpu import amx
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import loop, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.in_tiles import InTiles
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Runs
from mpq_compiler.backends.tvm.kernels.cpu.isa import TILE_ROWS, Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment


@dataclass
class TileAccumulation(InTiles):
    """The sums in tiles of AMX.

    Of the eight tiles four hold sums, two the activations of 16 rows each, two the weights of 16 channels each.

    before: where the sums go that tiles hold when these begin; then these stay in tiles; None: they are saved at once
    beside: step of k -> what the vector units do in it
    """

    before: tuple[Buffer, Index] | None
    beside: Callable[[Index], None] | None

    def __post_init__(self) -> None:
        super().__post_init__()
        self.starts = scratch(self.halves, "int32")
        self.steps = self.isa.tile_steps

    def begin(self, j: Segment, r: Index, first: tuple[Buffer, Index, int] | None) -> None:
        """Sets the sums of rows r and on of the chunk, in segment j.

        first: where the first values lie, and how many int32 a row's are behind those of the row before; None are zeros
        """
        for half in range(self.halves):
            store(self.starts, self._row_start(j, r, half), half)
        self.apart = self.rows.apart(j)
        self.first = first
        if self.before is None:
            for half, v in self._cells():
                self._set(half, v)

    def add(self, runs: Runs) -> None:
        """Adds all products."""
        steps = runs.steps // self.steps
        self.total = runs.count * steps
        if self.s.ring:
            self._unpack_step(0)
        else:
            self._unpack(runs)

        def run(tap: Index) -> None:
            """One run, whose activations are neighbours."""
            offset = runs.offset(tap)
            with T.serial(0, steps) as k:
                self._step(T.bind(tap * steps + k), T.bind(offset + k * self.isa.depth))

        loop(runs.count, run)

    def _step(self, k: Index, offset: Index) -> None:
        """Adds step k of the weights, of activations at an offset from a row's start.

        Each tile is loaded as late as it can be, so that products need not wait for all.
        """
        self._prefetch(k)
        registers = [self.weights.place(k * self.steps, v) for v in range(self.tile.vectors)]
        places = [(weights, T.bind(begin)) for weights, begin in registers]

        def products(before: tuple[Buffer, Index] | None) -> None:
            """All products of the step. In the first one those of a tile need not wait for other tiles to be saved."""
            for half in range(self.halves):
                amx.load(amx.LEFT[half], self.rows.units, T.bind(self.starts[half] + offset), self.apart)
                for v in range(self.tile.vectors):
                    if half == 0:
                        amx.load(amx.RIGHT[v], *places[v], self.isa.vector, self.s.passing)
                    if before:
                        _save(half, v, self.tile, *before)
                        self._set(half, v)
                    amx.dot(amx.sums(half, v), amx.LEFT[half], amx.RIGHT[v])

        when(self.before is not None and k == 0, partial(products, self.before), partial(products, None))
        if self.s.ring:
            when(k + 1 < self.total, partial(self._unpack_step, k + 1))
        if self.beside:
            self.beside(k)

    def _unpack_step(self, k: Index) -> None:
        """Unpacks the weights of step k, which the next tiles are loaded from."""
        self.weights.unpack(self.steps, self.tile.vectors, self.s.w.pack, k * self.steps)

    def _set(self, half: int, v: int) -> None:
        """Sets a tile of sums to its first values."""
        if self.first is None:
            amx.zero(amx.sums(half, v))
        else:
            buffer, at, row = self.first
            amx.load(amx.sums(half, v), buffer, at + half * TILE_ROWS * row + v * self.isa.lanes, 4 * row)

    def _prefetch(self, k: Index) -> None:
        """Asks for weights of the next block, unless tiles before have asked for all."""
        first, lines, apart = self.prefetched

        def ask() -> None:
            """Asks for this step's share."""
            with T.unroll(0, lines) as line:
                self.block.prefetch(first + (k * lines + line) * apart)

        when(isinstance(apart, int) or apart > 0, ask)

    def end(self, product: Buffer, to: Index) -> None:
        """product[to ..] = the sums, int32 [tile.rows, tile.vectors, lanes], unless they stay."""
        if self.before is None:
            save_sums(self.tile, product, to)


def save_sums(tile: Tile, product: Buffer, to: Index) -> None:
    """product[to ..] = the sums in all tiles, int32 [tile.rows, tile.vectors, 16]."""
    for half in range(tile.rows // TILE_ROWS):
        for v in range(tile.vectors):
            _save(half, v, tile, product, to)


def _save(half: int, v: int, tile: Tile, product: Buffer, to: Index) -> None:
    """One tile of sums in memory, where `save_sums` has it."""
    row = tile.vectors * TILE_ROWS
    amx.save(amx.sums(half, v), product, to + half * TILE_ROWS * row + v * TILE_ROWS, 4 * row)
