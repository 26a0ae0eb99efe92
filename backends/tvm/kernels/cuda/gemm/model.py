"""The time that a GPU takes for a product in a tile, by which tiles of Hopper's products are chosen.

A processor takes its blocks of threads in rounds of as many as it has room for. A step takes it time for the outputs
of a block, for what it copies, and some whatever the tile; where blocks share the k axis, their sums go through memory.
The factors are least squares over 254 measurements on an H200 (13 tiles, 11 layers of Stable Diffusion 1.5 and XL at
batches 1 and 2; an eighth off, root mean square). On these the tile that it chooses takes 1.04 times the time of the
best one at most, both batches together (`benchmarks.gpu_tiles`). They are of W8A8 whose products ended with each step,
four in memory at once: what runs on into the next, and tiles of more columns, have not been timed yet.
"""

from __future__ import annotations

from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import BLOCKS, PROCESSORS, Tile, most_splits
from mpq_compiler.backends.tvm.kernels.cuda.weights import STEP, Fragments
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

LAUNCH, ROUND = 0.84, 2.08
"""Microseconds: of a launch; of a round of blocks, which fill their stages and store results."""
OUTPUT, COPIED, EACH = 0.97e-5, 3.1e-4, 0.168
"""Microseconds of a step: for each output of the tile; for each of its rows and columns; for each round."""
SPLIT = 7.1e-6
"""Microseconds for each output where blocks share the k axis."""
BATCHES = (1, 2)
"""Alike: a prompt, and one with guidance."""
SHARED, REGISTERS = 227 << 10, 1 << 16
"""Bytes and registers of a processor."""


def microseconds(problem: QuantMatmul, tile: Tile, batch: int) -> float:
    """The time of a product."""
    factors = LAUNCH, ROUND, OUTPUT, COPIED, EACH, SPLIT
    return sum(factor * term for factor, term in zip(factors, terms(problem, tile, batch), strict=True))


def terms(problem: QuantMatmul, tile: Tile, batch: int) -> tuple[float, ...]:
    """How often each factor counts, in the order in which they stand above."""
    w = Fragments(problem)
    tiles = -(-batch * problem.rows // tile.rows) * (w.outputs // tile.columns)
    splits = max(1, min(BLOCKS // tiles, most_splits(problem)))
    blocks, steps = -(-tiles * splits // PROCESSORS), w.steps / splits
    rounds = -(-blocks // room(tile))
    step = blocks * tile.rows * tile.columns, blocks * (tile.rows + tile.columns), rounds
    shared = batch * problem.rows * problem.outputs if splits > 1 else 0
    return 1, rounds, *(steps * each for each in step), shared


def room(tile: Tile) -> int:
    """Blocks of threads that a processor has room for: a thread has half a register for each row, and 45."""
    registers = -(-(tile.rows // 2 + 45) // 8) * 8 * tile.threads
    memory = tile.stages * (tile.rows + tile.columns) * STEP + 1024
    return max(1, min(REGISTERS // registers, SHARED // memory))


def fastest(problem: QuantMatmul, tiles: list[Tile]) -> Tile:
    """The tile that the batches take least time in, each relative to its own best."""
    times = {tile: [microseconds(problem, tile, batch) for batch in BATCHES] for tile in tiles}
    best = [min(each) for each in zip(*times.values(), strict=True)]
    return min(times, key=lambda tile: sum(t / b for t, b in zip(times[tile], best, strict=True)))
