"""The layout of quantized weights in the memory of a CPU, and the micro-kernels to choose from.

`gemm` (the kernel) and `prepare` (which fills the kernel's buffers when an artifact is loaded) share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx

from mpq_compiler.backends.tvm.kernels.common.template import Index
from mpq_compiler.backends.tvm.kernels.cpu.isa import SME, Isa, Tile
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import FEW_SEGMENTS, QuantMatmul, vectors


@dataclass(frozen=True)
class Segment:
    """A segment of the channels: number ``first + i``, of the size of number ``first``.

    ``i`` is the variable of a loop over a run of equal segments, or 0.
    """

    first: int
    i: Any = 0

    @property
    def index(self) -> Any:
        return self.first + self.i

    def before(self, sizes: Sequence[int]) -> Any:
        """The sum of the sizes of all segments before this one."""
        return sum(sizes[: self.first]) + self.i * sizes[self.first]


@dataclass(frozen=True)
class WeightLayout:
    """How weights lie in the memory of a kernel.

    Output channels come in blocks of `tile.vectors` registers of `isa.lanes` channels. Within a block
    the order is [step of k][vector][lane][kpack], so that a step reads whole registers in a row; where AMX
    multiplies, [tile of k][vector][step][lane][kpack]: the 16 steps of a register that are one of its tiles. The K
    axis is, for each segment, [vertical tap][horizontal tap][channel], channels padded to a multiple of
    kpack, or of the depth of tiles (activations are zero there, so the codes do not matter).

    Below 8 bits, `pack` successive steps of one vector share bytes: byte e of the group holds the code of
    element e of step d at bit ``bits * d``; 3 bits are a plane of 2 bits (two byte vectors, the first for
    steps 0 to 3) and, behind it, one of 1 bit. Where a matrix engine looks codes up itself (`looked_up`), those of a
    step lie together instead, each behind the one before it.

    isa: as given, or `narrowed`: then lane and kpack are those of several lanes together
    """

    problem: QuantMatmul
    isa: Isa

    def __post_init__(self) -> None:
        p = self.problem
        if len(p.segments) <= FEW_SEGMENTS:
            object.__setattr__(self, "isa", self.isa.narrowed(p.outputs, min(p.segments)))
        object.__setattr__(self, "isa", self.isa.in_tiles(p.rows, p.outputs, p.segments))

    @property
    def tile(self) -> Tile:
        """The micro-kernel, but for its rows."""
        if self.problem.tile is not None:
            return Tile(*self.problem.tile)
        if len(self.problem.segments) > FEW_SEGMENTS:
            return self.isa.grouped(min(self.problem.segments))
        return self.isa.tile(self.problem.outputs)

    def fitted(self) -> Tile:
        """The micro-kernel with rows that fit the problem."""
        p, tile, unit = self.problem, self.tile, self.isa.unit
        if unit > 1 and not p.pointwise and p.out_width % tile.rows and tile.rows > 2 * unit:
            tile = replace(tile, rows=tile.rows - unit)  # rows of several lines take registers for their addresses
        return self.isa.fitted(tile, p.rows)

    @property
    def block(self) -> int:
        """Output channels of a block."""
        return self.tile.vectors * self.isa.lanes

    @property
    def blocks(self) -> int:
        return -(-self.problem.outputs // self.block)

    @property
    def outputs(self) -> int:
        """Output channels, padded to whole blocks."""
        return self.blocks * self.block

    @property
    def channels(self) -> tuple[int, ...]:
        """Channels of each segment, padded to whole steps."""
        return tuple(-(-c // self.isa.step) * self.isa.step for c in self.problem.segments)

    @property
    def segment_steps(self) -> tuple[int, ...]:
        """Steps of k of each segment."""
        taps = self.problem.kernel[0] * self.problem.kernel[1]
        return tuple(taps * c // self.isa.kpack for c in self.channels)

    @property
    def pack(self) -> int:
        """Steps that share bytes."""
        return {8: 1, 4: 2, 2: 4, 3: 8}[self.problem.bits]

    @property
    def looked_up(self) -> bool:
        """Whether SME looks codes up as it multiplies (LUTI): one table for all, and whole groups of steps in a run."""
        p = self.problem
        one = p.bits in (2, 4) and p.classes == 1 and not p.widths
        return self.isa.engine == SME and self.isa.depth > 0 and one and self.aligned

    @property
    def aligned(self) -> bool:
        """Whether the steps of a tap are whole groups, in every segment."""
        return all(channels // self.isa.kpack % self.pack == 0 for channels in self.channels)

    @property
    def packs(self) -> int:
        """Groups of `pack` steps."""
        return -(-sum(self.segment_steps) // self.pack)

    @property
    def steps(self) -> int:
        """Steps of k of a block, padded to whole groups."""
        return self.packs * self.pack

    @property
    def pack_bytes(self) -> int:
        """Bytes of one vector over one group of steps."""
        return self.isa.vector * self.pack * self.problem.bits // 8

    def register(self, step: Index, vector: Index) -> Index:
        """The number of a register of a step, in the order in which those of 8 bits, and unpacked ones, lie."""
        if not self.isa.amx:
            return step * self.tile.vectors + vector
        depth = self.isa.tile_steps
        tile = tirx.truncdiv(step, depth)
        return (tile * (self.tile.vectors - 1) + vector) * depth + step

    def buffers(self) -> list[Argument]:
        """The buffers that `prepare` makes and `gemm` reads.

        tiles   the codes (int8 for 8 bits, else packed bytes)
        lut     the table of each register of output channels, repeated over its bytes; where codes are looked up by
                SME each entry is the first byte of a word
        start   int32 first values of the accumulators: -z_j[g] * sum of the row's weights in segment j;
                where zero points are dynamic that sum itself, and with late zero points only what activations lack
                against their codes, [J, 1, n]
        sums    with late zero points, those sums over all segments, scaled
        """
        p, n = self.problem, self.outputs
        tiles = (self.blocks, self.packs * self.tile.vectors * self.pack_bytes)
        named = [Argument("tiles", tiles, "int8" if p.bits == 8 else "uint8")]
        if p.bits < 8:
            named.append(Argument("lut", (n // self.isa.lanes, self.isa.vector), "int8"))
        return [*named, *vectors(p, n)]


WORTH_TRYING = 1.12
"""Tiles are tried (`tiles`) whose work, by the weights of `Isa`, is not more than so many times the least."""


def tiles(problem: QuantMatmul, isa: Isa) -> list[tuple[int, int]]:
    """Micro-kernels (registers, rows) for a problem: the one that is taken without a search, then others."""
    layout = WeightLayout(replace(problem, tile=None), isa)
    isa, first = layout.isa, layout.tile
    chosen = layout.fitted()
    grouped = len(problem.segments) > FEW_SEGMENTS

    def work(tile: Tile) -> float:
        block = tile.vectors * isa.lanes
        rows = -(-problem.rows // tile.rows) * tile.rows if problem.rows > tile.rows else problem.rows
        return -(-problem.outputs // block) * block * rows * tile.cost

    others = []
    for tile in (first,) if grouped else isa.tiles:
        heights = isa.heights(tile, problem.rows)
        few = problem.rows < heights[-1]  # then it does not matter
        others += [replace(tile, rows=rows) for rows in ([isa.fitted(tile, problem.rows).rows] if few else heights)]
    found = [(t.vectors, t.rows) for t in others if work(t) <= WORTH_TRYING * work(chosen)]
    return list(dict.fromkeys([(chosen.vectors, chosen.rows), *found]))
