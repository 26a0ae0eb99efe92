"""The static description of a quantized linear layer or convolution, and the layout of its weights in memory.

`gemm` (the kernel) and `prepare` (which fills the kernel's buffers when an artifact is loaded) share it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from mpq_compiler.backends.tvm.kernels.common.template import Argument, Shape
from mpq_compiler.backends.tvm.kernels.cpu.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa, Tile

FEW_SEGMENTS = 2
"""Up to so many segments code is written out for each; more are K-groups, and loops over equal ones."""


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
class QuantMatmul:
    """``quant_linear`` or ``quant_conv2d`` with everything fixed but the batch.

    height, width:  of the input, channels-last; a linear layer has its rows here
    channels:       C, the input channels
    outputs:        O, the output channels
    kernel, stride: (vertical, horizontal)
    padding:        (top, bottom, left, right); padded pixels hold the zero point
    bits:           of a stored weight code: 2, 3, 4 or 8
    classes:        number of look-up tables; each 16 output rows choose one (bits < 8)
    segments:       channel counts with scales and zero points of their own; they add up to C
    groups:         G, number of time groups: of the input and of the epilogue's quantizer
    dynamic:        every row of the input has a scale and a zero point of its own; linear layers only
    has_offset:     weights have an offset for each row
    has_bias:       there is a bias
    epilogue:       what happens to the result before it is stored
    rank:           of the input: 4 for [B,H,W,C], 3 for [B,H,C], 2 for [B,C]
    into:           (elements of a sample, offset of the first row, from one row to the next) of a larger buffer, of
                    which the result is a part
    tile:           (registers, rows) of the micro-kernel, where it is another than `tiles` chooses; the registers are
                    those of `prepare` as well, and 0 rows are as many as fit best
    widths:         for `prepare`: the bits of a stored code by class of row, where rows differ in them; in memory all
                    codes have `bits` and number the entries of the last table, or are values (8)
    code_bytes:     then: of the stored stream
    """

    height: int
    width: int
    channels: int
    outputs: int
    kernel: tuple[int, int] = (1, 1)
    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int, int, int] = (0, 0, 0, 0)
    bits: int = 8
    classes: int = 1
    segments: tuple[int, ...] = ()
    groups: int = 1
    dynamic: bool = False
    has_offset: bool = False
    has_bias: bool = True
    epilogue: Epilogue | None = None
    rank: int = 4
    into: tuple[int, int, int] | None = None
    tile: tuple[int, int] | None = None
    widths: tuple[int, ...] = ()
    code_bytes: int = 0

    def __post_init__(self) -> None:
        if not self.segments:
            object.__setattr__(self, "segments", (self.channels,))
        if self.bits not in (2, 3, 4, 8):
            raise ValueError(f"weights of {self.bits} bits have no kernel; there are 2, 3, 4 and 8")
        if sum(self.segments) != self.channels or min(self.segments) < 1:
            raise ValueError(f"segments {self.segments} do not partition {self.channels} channels")
        if min(self.out_height, self.out_width, self.channels, self.outputs, self.groups, self.classes) < 1:
            raise ValueError(f"nothing to compute in {self}")
        if self.rank not in (2, 3, 4) or (self.rank < 4 and self.width != 1) or (self.rank < 3 and self.height != 1):
            raise ValueError(f"an input of rank {self.rank} cannot be {self.height} x {self.width}")
        if self.dynamic and not self.pointwise:
            raise ValueError("the rows that a convolution adds up cannot have scales of their own")

    @classmethod
    def linear(cls, leading: tuple[int, ...], channels: int, outputs: int, **options) -> QuantMatmul:
        """A linear layer on an input [B, *leading, channels] with at most two leading dimensions."""
        height, width = (*leading, 1, 1)[:2]
        return cls(height, width, channels, outputs, rank=2 + len(leading), **options)

    @property
    def out_height(self) -> int:
        return (self.height + self.padding[0] + self.padding[1] - self.kernel[0]) // self.stride[0] + 1

    @property
    def out_width(self) -> int:
        return (self.width + self.padding[2] + self.padding[3] - self.kernel[1]) // self.stride[1] + 1

    @property
    def rows(self) -> int:
        """Rows of the matrix product that one sample has."""
        return self.out_height * self.out_width

    @property
    def reduction(self) -> int:
        """K, values in one row of stored codes."""
        return self.kernel[0] * self.kernel[1] * self.channels

    @property
    def segment_runs(self) -> list[tuple[int, int]]:
        """(first, count) of the runs of equal segments that one loop computes."""
        if len(self.segments) <= FEW_SEGMENTS:
            return [(j, 1) for j in range(len(self.segments))]
        runs, first = [], 0
        for _, equal in itertools.groupby(self.segments):
            runs.append((first, len(list(equal))))
            first += runs[-1][1]
        return runs

    @property
    def entries(self) -> int:
        """Entries of a look-up table."""
        return 2 ** max(self.widths, default=self.bits)

    @property
    def has_tables(self) -> bool:
        """Whether stored codes number the entries of tables."""
        return self.bits < 8 or bool(self.widths)

    @property
    def pointwise(self) -> bool:
        """Whether row m of the product is pixel m of the input."""
        return self.kernel == self.stride == (1, 1) and not any(self.padding)

    @property
    def late_zeros(self) -> bool:
        """Whether the zero points of dynamic rows count once for all segments, behind their sum."""
        return self.dynamic and len(self.segments) > FEW_SEGMENTS

    @property
    def row_classes(self) -> int:
        """Blocks of 16 output rows that choose a look-up table."""
        return -(-self.outputs // 16)

    def input_shape(self) -> Shape:
        return ("B", *(self.height, self.width)[: self.rank - 2], self.channels)

    def output_shape(self) -> Shape:
        """Of the result; that of the buffer it is written to is [B, into[0]] where `into` is given."""
        return ("B", *(self.out_height, self.out_width)[: self.rank - 2], self.outputs)


@dataclass(frozen=True)
class WeightLayout:
    """How weights lie in the memory of a kernel.

    Output channels come in blocks of `tile.vectors` registers of `isa.lanes` channels. Within a block
    the order is [step of k][vector][lane][kpack], so that a step reads whole registers in a row. The K
    axis is, for each segment, [vertical tap][horizontal tap][channel], channels padded to a multiple of
    kpack (activations are zero there, so the codes do not matter).

    Below 8 bits, `pack` successive steps of one vector share bytes: byte e of the group holds the code of
    element e of step d at bit ``bits * d``; 3 bits are a plane of 2 bits (two byte vectors, the first for
    steps 0 to 3) and, behind it, one of 1 bit.

    isa: as given, or `narrowed`: then lane and kpack are those of several lanes together
    """

    problem: QuantMatmul
    isa: Isa

    def __post_init__(self) -> None:
        p = self.problem
        if len(p.segments) <= FEW_SEGMENTS:
            object.__setattr__(self, "isa", self.isa.narrowed(p.outputs, min(p.segments)))

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
        return tuple(-(-c // self.isa.kpack) * self.isa.kpack for c in self.problem.segments)

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

    def buffers(self) -> list[Argument]:
        """What `prepare` makes and `gemm` reads.

        tiles   the codes (int8 for 8 bits, else packed bytes)
        lut     the table of each register of output channels, repeated over its bytes
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


def vectors(problem: QuantMatmul, outputs: int, behind: int = 0) -> list[Argument]:
    """What `prepare` makes beside codes and tables, for so many output channels, padded.

    behind: more numbers in each row of start values
    """
    p, n = problem, outputs
    named = [Argument("start", (len(p.segments), 1 if p.dynamic else p.groups, n + behind), "int32")]
    named.append(Argument("weight_scale", (len(p.segments), n), "float32"))
    if p.late_zeros:
        named.append(Argument("sums", (n,), "float32"))
    if p.has_offset:
        named.append(Argument("offset", (n,), "float32"))
    if p.has_bias:
        named.append(Argument("bias", (n,), "float32"))
    return named


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
        least = max(1, tile.rows - 2, -(-8 // (tile.vectors * isa.parts)))
        heights = range(tile.rows, min(least, tile.rows) - 1, -isa.unit)
        few = problem.rows < heights[-1]  # then it does not matter
        others += [replace(tile, rows=rows) for rows in ([isa.fitted(tile, problem.rows).rows] if few else heights)]
    found = [(t.vectors, t.rows) for t in others if work(t) <= WORTH_TRYING * work(chosen)]
    return list(dict.fromkeys([(chosen.vectors, chosen.rows), *found]))
