"""Tiles of integer products, and how many blocks of threads share one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, Fragments
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul


@dataclass(frozen=True)
class Tile:
    """How a block of threads shares a product.

    rows, columns: of the block
    down, across:  its warps
    stages:        steps in shared memory at once
    together:      blocks that a processor must have registers for
    """

    rows: int
    columns: int
    down: int = 2
    across: int = 2
    stages: int = 3
    together: int = 1

    @property
    def threads(self) -> int:
        return 32 * self.down * self.across

    @property
    def row_fragments(self) -> int:
        """Fragments of 16 rows of a warp."""
        return self.rows // self.down // 16

    @property
    def column_fragments(self) -> int:
        """Fragments of `CHANNELS` columns of a warp."""
        return self.columns // self.across // CHANNELS


TILES = Tile(128, 128), Tile(128, 64), Tile(64, 64)


def tile(problem: QuantMatmul, tiles: Sequence[Tile] = TILES) -> Tile:
    """The largest tile that the columns divide into and the rows fill; the largest of all only for one segment.

    Several segments have a second set of sums, of floats.
    """
    for found in tiles[:-1] if len(problem.segments) == 1 else tiles[1:-1]:
        if Fragments(problem).outputs % found.columns == 0 and problem.rows >= found.rows:
            return found
    return tiles[-1]


PROCESSORS = 132
"""The processors of an H100 and an H200; an A100 has 108."""
BLOCKS = 2 * PROCESSORS
"""Blocks of threads that keep a GPU busy."""
LEAST_STEPS = 12
"""Steps that a block of threads takes at least, so that filling its stages pays: 20 shared by two took 1.8 times as
long on an H200, 80 shared by three 0.7 times."""


def most_splits(problem: QuantMatmul) -> int:
    """How many blocks share the k axis of a tile, for one sample.

    Several segments have an order of their sums, and what a gate joins waits in one block.
    """
    if len(problem.segments) > 1 or problem.gate is not None:
        return 1
    w, own = Fragments(problem), tile(problem)
    tiles = -(-problem.rows // own.rows) * (w.outputs // own.columns)
    return max(1, min(BLOCKS // tiles, w.steps // LEAST_STEPS))
