"""What the sums in tiles of matrix engines have in common, whatever multiplies."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

from mpq_compiler.backends.tvm.kernels.common.template import Index
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.gather import Rows
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Runs, Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import Block, Weights
from mpq_compiler.backends.tvm.kernels.cpu.isa import TILE_ROWS, Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment


@dataclass
class InTiles:
    """What `Accumulation` is to registers: the sums of a tile of rows and a block, by `begin`, `add`, `end`."""

    s: Schedule
    rows: Rows
    block: Block
    tile: Tile
    weights: Weights
    prefetched: tuple[Index, int, Index]
    """`Block.ahead`."""

    def __post_init__(self) -> None:
        self.isa = self.s.isa
        self.halves = self.tile.rows // TILE_ROWS

    def _cells(self) -> list[tuple[int, int]]:
        """(half of the rows, register) of each tile of sums."""
        return [(half, v) for half in range(self.halves) for v in range(self.tile.vectors)]

    def _row_start(self, j: Segment, r: Index, half: int) -> Index:
        """Where the activations of a half of the rows begin, r the first row of the chunk."""
        found: Index = self.rows.row_start(j, r + half * TILE_ROWS, 0, False)
        return found

    def _unpack(self, runs: Runs) -> None:
        """Unpacks the weights where they have not been yet."""
        weights = self.weights
        if weights.first:
            when(weights.fresh, partial(weights.unpack, runs.count * runs.steps, self.tile.vectors, self.s.w.pack))
