"""Quantized linear layers and convolutions on CPU: one integer GEMM template for all formats and targets.

Arithmetic (exact, the same bits on every target): ``A_j = sum_k (q - z_j[g]) * w`` over segment j in int32;

    y = bias or 0
    for j ascending:                                y = fma(f32(A_j), f32(act_scale[j,g] * scale[i,j]), y)
    where weights have offsets, for j ascending:    y = fma(f32(S_j), f32(act_scale[j,g] * offset[i]), y)

with ``S_j = sum_k (q - z_j[g])``; then the epilogue. Of dynamic activations the scale and the zero point are
those of the row m, the same for all segments; of more than two segments they count once for all, so that each costs one
multiply-add (with ``W_j = sum_k w``):

    t = 0; c = 0
    for j ascending:                                t = fma(f32(sum_k q * w), f32(scale[i,j]), t)
                                                    c = fma(f32(W_j), f32(scale[i,j]), c)         (once, at load)
    y = fma(act_scale[m], fma(-f32(z[m]), c, t), bias or 0)

Structure. The rows m = (sample, y, x) of the product are cut into chunks that are independent of each other:

    for each chunk of rows                     # its activations stay in the L2 cache
        gather the activations                 # not where the kernel can read the input as it is
        for each block of output channels      # tile.vectors registers wide
            for each tile of rows              # accumulators in registers, then the epilogue
                the first one unpacks the weights of the block for the others
                                               # below 8 bits: codes -> int8 through the look-up table

The three loops are one over pieces of work, some tiles each, which threads share. A thread gathers and unpacks what it
has not at hand yet: one that begins amid a chunk or a block does again what another has done for the tiles before.

Convolutions gather a copy of the image that is padded with zero points, and in channels, up to whole steps
of k, with zeros. It is not an expanded im2col matrix: a row of the product starts at an offset in that copy,
and the taps of one kernel row are neighbours in it. Each segment has its own copy. Where fewer rows remain
than a tile has, the last tile starts earlier and computes some rows twice. For dot products of two rows
a second copy holds each pixel beside that of the next row, a step of k of one, then of the other.

Weights come from memory, more of them than caches hold. So every tile of rows asks for some lines of those that come
next, and all of them are there when the block is done. With few tiles a block takes as long to arrive as to be used:
then k is cut into slices that stay in the L1 cache, unpacked there, and the sums of all tiles wait in memory. A chunk
of a tile at most keeps none: weights are unpacked in registers, for all rows of a sample at once, or for two samples.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import apply
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Registers,
    Shared,
    each_vector,
    fold,
    folds,
    primfunc,
    scratch,
    share,
    shared,
    span,
    store,
)
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa, Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment, WeightLayout
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import FEW_SEGMENTS, QuantMatmul, calling

PANEL_BYTES = 256 * 1024
"""Gathered activations of a chunk, about: a quarter to a half of the L2 cache of a core."""
MOST_ROWS, LEAST_ROWS = 512, 96
"""Rows of a chunk, where there are that many: enough to make up for unpacking the weights."""
SLICE_BYTES = 24 * 1024
"""Weights of a slice, with room for activations and sums beside them in an L1 cache of 32 KiB or more."""
FEW_AHEAD = 8 * 1024
"""Bytes of weights that are prefetched ahead of their use where rows are fewer than a tile's."""
SLICED_ROWS = 36
"""Up to so many rows weights are read slice by slice."""
STACK_BYTES = 1024
"""TVM leaves scratch memory below this on the stack, and takes larger one from its pool."""

PIECES = 16
"""Pieces of work, at least, where there are so many tiles: then threads get equal parts, nearly."""

Load = Callable[[int, Any], Expr]
Save = Callable[[Expr, int, Any], None]


@dataclass(frozen=True)
class Weights:
    """The weights of a tile. Register v of step k of them is

    ``decoded(k - d, d, v)`` from the stored codes, where `fresh` is true, and then `keep` stores it for tiles to come;
    ``ready(k, v)`` where it is not. first: all are to be stored before the first is used.
    by_packs: k - d has to be a multiple of the steps that share bytes.
    """

    fresh: Any
    first: bool
    by_packs: bool
    decoded: Callable[[Any, int, int], Expr]
    ready: Callable[[Any, Any], Expr]
    keep: Callable[[Expr, Any, int], None]


def arguments(problem: QuantMatmul, isa: Isa) -> list[Argument]:
    """The buffers of the kernel in calling order (`calling`)."""
    return calling(problem, WeightLayout(problem, isa).buffers())


def build(problem: QuantMatmul, isa: Isa, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem, isa))``; the batch is the only symbolic size."""

    def body(batch: Any, buffers: Buffers) -> None:
        flat = {key: _flat(buffer) for key, buffer in buffers.items()}
        _Kernel(problem, isa, flat).emit(batch)

    return primfunc(name, arguments(problem, isa), body)


def _flat(buffer: Buffer) -> Buffer:
    size = buffer.shape[0]
    for extent in buffer.shape[1:]:
        size = size * extent
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def _when(condition: Any, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """``if condition: body() else: otherwise()``, decided now where the condition is a Python bool."""
    if isinstance(condition, bool):
        chosen = body if condition else otherwise
        if chosen:
            chosen()
        return
    with T.If(condition):
        with T.Then():
            body()
        if otherwise:
            with T.Else():
                otherwise()


def _loop(extent: Any, body: Callable[[Any], None]) -> None:
    """``for i in range(extent): body(i)``, without a loop where there is one pass."""
    if isinstance(extent, int) and extent == 1:
        body(0)
        return
    with T.serial(0, extent) as i:
        body(i)


def _quotient(a: Any, b: Any) -> Any:
    """a // b for a >= 0 and b > 0, without the corrections for signs that TVM would add."""
    return a if isinstance(b, int) and b == 1 else tirx.truncdiv(a, b)


def _opaque(value: Any) -> Any:
    """A name for an int32, behind a load, so that TVM does not substitute its definition into every index.

    That would change no result, but compiling would take several times as long.
    """
    cell = scratch(1, "int32")
    store(cell, value, 0)
    return T.bind(cell[0])


class _Kernel:
    """Emits one kernel. The flat buffers of the arguments are in `self.b`, by name."""

    def __init__(self, problem: QuantMatmul, isa: Isa, buffers: Buffers) -> None:
        self.p, self.b, self.w = problem, buffers, WeightLayout(problem, isa)
        self.isa = isa = self.w.isa
        self.tile = self.w.tile if self.w.tile.rows and problem.tile else self.w.fitted()
        self.epilogue = problem.epilogue or Epilogue()
        # Where channels are whole steps of k and codes are used as they are, the input needs no copy.
        self.direct = problem.pointwise and isa.reads_codes and self.w.channels == problem.segments
        self.unpacks = problem.bits < 8 or isa.weight != "int8"
        # Units of two rows lie together in memory where the second is always the next pixel of a line. Each row is in
        # one of them, or in two: where the first may be any pixel.
        self.paired = isa.unit == 2 and problem.rows > 1 and (problem.pointwise or problem.out_width % 2 == 0)
        self.together = 2 if self.paired else 1
        self.copies = 2 if self.paired and (not problem.pointwise or problem.rows % 2) else 1
        if not problem.pointwise:
            # Extent of the padded image that the kernel reaches.
            self.image_height = (problem.out_height - 1) * problem.stride[0] + problem.kernel[0]
            self.image_width = (problem.out_width - 1) * problem.stride[1] + problem.kernel[1]
        self._size_chunks()
        self._size_slices()

    # -------------------------------------------------------------------------------------- chunks of rows

    def _size_chunks(self) -> None:
        """Sets most_rows, pixels (of the gathered copy) and, for images, samples and bands of a chunk."""
        p = self.p
        pixel = sum(self.w.channels) * (2 if self.isa.activation == "int16" else self.copies)
        if p.pointwise:
            rows = max(min(PANEL_BYTES // pixel, MOST_ROWS), LEAST_ROWS)
            self.most_rows = self.pixels = rows // self.tile.rows * self.tile.rows
            self.least_rows = p.rows  # of a chunk, or more than a tile has
            chunks = -(-p.rows // self.most_rows)
        else:
            image = self.image_height * self.image_width * pixel
            self.samples = max(1, min(PANEL_BYTES // image, -(-MOST_ROWS // p.rows)))
            bands = min(-(-image // PANEL_BYTES), max(1, p.rows // LEAST_ROWS), p.out_height)
            self.band = -(-p.out_height // bands)
            self.bands = chunks = -(-p.out_height // self.band)
            self.band_height = (self.band - 1) * p.stride[0] + p.kernel[0]
            self.most_rows = self.samples * self.band * p.out_width
            self.least_rows = (p.out_height - (self.bands - 1) * self.band) * p.out_width
            self.pixels = self.samples * self.band_height * self.image_width
        rows = min(self.most_rows, p.rows)
        self.parts = max(1, min(-(-PIECES // (chunks * self.w.blocks)), rows // (2 * self.tile.rows)))

    def _size_slices(self) -> None:
        """Sets slices: how many a run of k is cut into, for each segment; none where all of k is one."""
        p, w, tile = self.p, self.w, self.tile
        self.most_tiles, self.usual_tiles = (-(-n // tile.rows) for n in (self.most_rows, min(p.rows, self.most_rows)))
        runs = [self._runs(Segment(j))[1] // self.isa.kpack for j in range(len(p.segments))]
        begins = [sum(w.segment_steps[:j]) for j in range(len(p.segments))]
        # Whether steps that share bytes are always neighbours in a run.
        self.aligned = not any(n % w.pack for n in (*runs, *begins))
        self.slices: list[int] = []
        if len(p.segments) <= FEW_SEGMENTS and self.usual_tiles * tile.rows <= SLICED_ROWS:
            most = SLICE_BYTES // (tile.vectors * self.isa.vector)
            for run in runs:
                fitting = (n for n in range(1, run + 1) if run % n == 0 and run // n <= most)
                self.slices.append(next(fitting, 1))
            if sum(self.slices) * p.kernel[0] == 1:
                self.slices = []
        if self.slices:
            self.parts = 1  # or each of them would read all weights

    @property
    def _nanoseconds(self) -> float:
        """Of a sample, at the rate of dot products of a core or of reading weights from memory."""
        p = self.p
        products = 8 * self.isa.vector / self.isa.parts
        return max(p.rows * p.reduction * p.outputs / products, p.reduction * p.outputs * p.bits / 160)

    def emit(self, batch: Any) -> None:
        """The whole kernel: pieces of work, which write disjoint parts of the output."""
        p, blocks = self.p, self.w.blocks
        tall, rows = self.tile.rows, batch * p.rows
        if p.pointwise:  # chunks of whole tiles
            total, most, bands = T.bind(_quotient(rows + (tall - 1), tall)), self.most_rows // tall, 1
        else:
            total, most, bands = batch, self.samples, self.bands
        chunks = T.bind(_quotient(total + (most - 1), most))
        each = T.bind(_quotient(total, T.max(chunks, 1)))
        with shared(self._nanoseconds) as team:
            self._allocate(team)
            with team.loop(0, chunks * (bands * blocks * self.parts)) as piece:
                block = T.bind(_quotient(piece, self.parts))
                band = T.bind(_quotient(block, blocks))
                chunk = T.bind(_quotient(band, bands))
                # Without a product of rows and chunks, which might not fit 32 bits.
                start = _opaque(chunk * each + T.min(chunk, total - each * chunks))
                count = _opaque(T.Select(chunk < total - each * chunks, each + 1, each))
                if p.pointwise:
                    first = T.bind(start * tall)
                    here, gather = self._chunk_of_rows(first, _opaque(T.min(count * tall, rows - first)))
                else:
                    here, gather = self._chunk_of_images(start, count, band - chunk * bands)
                if not self.direct or p.has_offset or self.paired:
                    self._once(0, band, blocks * self.parts, gather)
                self.block = T.bind(block - band * blocks) if blocks > 1 else 0
                self._multiply(here, piece - block * self.parts, block)

    def _once(self, cell: int, number: Any, repeated: int, body: Callable[[], None]) -> None:
        """body(), where the thread has not done it for this number: so many pieces in a row have the same one."""
        if repeated == 1:
            body()
            return
        with T.If(self.done[cell] != number), T.Then():
            body()
            store(self.done, number, cell)

    def _chunk_of_rows(self, row: Any, rows: Any) -> tuple[Any, Callable[[], None]]:
        """(rows, what gathers them) of a chunk."""
        self.first_row = row
        self._know_group(T.bind(_quotient(row, self.p.rows)), _quotient(row + rows - 1, self.p.rows))

        def gather() -> None:
            if not self.direct:
                with T.serial(0, rows) as r:
                    self._segments(lambda j: self._gather_pixels(j, 1, (row + r) * self.p.channels, r))
            if self.p.has_offset:
                self._sum_rows(rows)
            if self.paired:
                self._pair_pixels(rows, 1)

        return rows, gather

    def _chunk_of_images(self, sample: Any, samples: Any, band: Any) -> tuple[Any, Callable[[], None]]:
        """(rows, what gathers them) of a band of some samples (of one sample, where that is not all rows)."""
        p = self.p
        top, height = 0, p.out_height
        if self.bands > 1:
            top = T.bind(band * self.band)
            height = self.band if p.out_height % self.band == 0 else T.min(self.band, p.out_height - top)
        self.first_row = _opaque(sample * p.rows + top * p.out_width)
        self._know_group(sample, sample + samples - 1)

        def gather() -> None:
            reach = (height - 1) * p.stride[0] + p.kernel[0]  # image rows that these output rows see
            with T.serial(0, samples) as s, T.serial(0, reach) as y:
                line = (s * self.band_height + y) * self.image_width
                self._gather_line(sample + s, top * p.stride[0] + y - p.padding[0], T.bind(line))
            with T.serial(0, samples) as s, T.serial(0, height) as y, T.serial(0, p.out_width) as x:
                pixel = (s * self.band_height + y * p.stride[0]) * self.image_width + x * p.stride[1]
                store(self.starts, pixel, (s * height + y) * p.out_width + x)
            if p.has_offset:
                self._sum_windows(samples, height)
            if self.paired:
                lines = (samples - 1) * self.band_height + reach
                self._pair_pixels(lines * self.image_width, p.stride[1])

        return samples * height * p.out_width, gather

    def _allocate(self, team: Shared) -> None:
        """The working memory of a thread."""
        p, segments = self.p, len(self.p.segments)
        self.done = team.workspace(2, "int32")  # the chunk that is gathered, the block that is unpacked
        for cell in range(2):
            store(self.done, T.int32(-1), cell)
        self.activations = self.b["x"]
        if not self.direct:
            size = self.pixels * sum(self.w.channels) + 16 * self.isa.vector  # loads may run over the end
            self.activations = team.workspace(size, self.isa.activation)
        self.units = self.activations  # what dot products read
        if self.paired:
            self.units = team.workspace(self.copies * self.pixels * sum(self.w.channels), self.isa.activation)
        if not p.pointwise:
            self.starts = team.workspace(self.most_rows, "int32")
        if p.has_offset:
            self.sums = team.workspace(segments * self.most_rows, "int32")
            if not p.pointwise:
                self.pixel_sums = team.workspace(self.pixels, "int32")
        self.products: Any = None
        if self.slices or segments == FEW_SEGMENTS or (segments == 1 and not team.serial and self.isa.unit == 1):
            size = self.tile.rows * self.tile.vectors * self.isa.words
            tiles = self.most_tiles if self.slices else 1
            self.products = team.workspace(segments * tiles * size, "int32")
        if self.unpacks:
            size = self.w.steps * self.tile.vectors * self.isa.vector
            self.panel = team.workspace(size, self.isa.weight)

    # ------------------------------------------------------------------------------------------- gathering

    def _segments(self, body: Callable[[Segment], None]) -> None:
        """Calls body for each segment, in a loop where several are equal."""
        for first, count in self.p.segment_runs:

            def at(i: Any, first: int = first) -> None:
                body(Segment(first, i))

            _loop(count, at)

    def _plane(self, j: Segment) -> Any:
        """Where segment j begins in the gathered activations."""
        return self.pixels * j.before(self.w.channels)

    def _group(self, sample: Any) -> Any:
        """Time group of a sample; where there is one group only, nothing is read."""
        return T.bind(T.cast(self.b["group"][sample], "int32")) if self.p.groups > 1 else 0

    def _know_group(self, first: Any, last: Any) -> None:
        """Reads the time group of a chunk, samples first to last of the batch, for `_group_of`."""
        if self.p.groups > 1:
            self.alone, self.group = T.bind(first == last), self._group(first)

    def _group_of(self, r: Any) -> Any:
        """Time group of row r of the chunk: a tile of rows need not wait for it where there is one sample."""
        if self.p.groups == 1:
            return 0
        sample = _quotient(self.first_row + r, self.p.rows)
        return T.if_then_else(self.alone, self.group, T.cast(self.b["group"][sample], "int32"))

    def _entry(self, j: Segment, m: Any, group: Any) -> Any:
        """Where row m, of a sample of that time group, finds segment j's scale and zero point."""
        return m if self.p.dynamic else j.index * self.p.groups + group

    def _gather_line(self, sample: Any, y: Any, line: Any) -> None:
        """One row of the padded image: row y of the input, or zero points where it lies outside."""
        p = self.p
        left = min(p.padding[2], self.image_width)
        inside = min(p.width, self.image_width - left)
        right = self.image_width - left - inside
        group = self._group(sample) if any(p.padding) else 0

        def copy() -> None:
            source = T.bind((sample * p.height + y) * p.width * p.channels)

            def segment(j: Segment) -> None:
                self._fill_pixels(j, left, group, line)
                self._gather_pixels(j, inside, source, line + left)
                self._fill_pixels(j, right, group, line + (left + inside))

            self._segments(segment)

        def fill() -> None:
            self._segments(lambda j: self._fill_pixels(j, self.image_width, group, line))

        within = True
        if p.padding[0]:
            within = y >= 0
        if self.image_height > p.padding[0] + p.height:
            within = tirx.all(within, y < p.height) if p.padding[0] else y < p.height
        _when(within, copy, fill)

    def _gather_pixels(self, j: Segment, count: int, source: Any, pixel: Any) -> None:
        """Copies segment j of `count` neighbouring pixels of the input to `pixel` of the gathered copy."""
        p, padded, own = self.p, self.w.channels[j.first], self.p.segments[j.first]
        offset = j.before(p.segments)

        def value(at: Any, lanes: int) -> Expr:
            return self.isa.gathered(self.b["x"][span(source + offset + at, lanes)], lanes)

        if count and own == padded and len(p.segments) == 1:
            self._write(self._plane(j) + pixel * padded, own * count, value)
        elif count:

            def one(i: Any) -> None:
                to = self._plane(j) + (pixel + i) * padded
                self._write(to, own, lambda at, lanes: value(i * p.channels + at, lanes))
                self._write(to + own, padded - own, self._zeros)

            _loop(count, one)

    def _fill_pixels(self, j: Segment, count: int, group: Any, pixel: Any) -> None:
        """Zero points in segment j of `count` neighbouring pixels of the gathered copy."""
        if not count:
            return
        padded, own = self.w.channels[j.first], self.p.segments[j.first]
        zero = T.bind(self.isa.gathered(self.b["act_zero"][j.index * self.p.groups + group], 1))

        def value(_: Any, lanes: int) -> Expr:
            return vmath.splat(zero, lanes)

        if own == padded:
            self._write(self._plane(j) + pixel * padded, own * count, value)
            return

        def one(i: Any) -> None:
            to = self._plane(j) + (pixel + i) * padded
            self._write(to, own, value)
            self._write(to + own, padded - own, self._zeros)

        _loop(count, one)

    def _zeros(self, _: Any, lanes: int) -> Expr:
        return vmath.splat(tirx.IntImm(self.isa.activation, 0), lanes)

    def _write(self, to: Any, count: int, value: Callable[[Any, int], Expr]) -> None:
        """``activations[to + i] = value(i)`` for i < count, in vectors; the last two may overlap."""
        if not count:
            return
        lanes = min(4 * self.isa.words, 1 << (count.bit_length() - 1))

        def vector(at: Any) -> None:
            store(self.activations, value(at, lanes), span(to + at, lanes))

        if count // lanes > 4:
            with T.serial(0, count // lanes) as i:
                vector(i * lanes)
        else:
            for i in range(count // lanes):
                vector(i * lanes)
        if count % lanes:
            vector(count - lanes)

    def _pair_pixels(self, count: Any, apart: int) -> None:
        """units = each step of a pixel and, behind it, that of the pixel so far `apart`, of the first `count` ones."""
        size, every = self.isa.kpack, 2 // self.copies

        def segment(j: Segment) -> None:
            width, plane = self.w.channels[j.first], self._plane(j) * self.copies
            lanes = size * (2 if width % (2 * size) == 0 else 1)
            order = [n * lanes + k + i for k in range(0, lanes, size) for n in range(2) for i in range(size)]
            with T.serial(0, _quotient(count + (every - 1), every)) as i:
                pixels = (i * every, T.min(i * every + apart, count - 1))
                starts = [T.bind(self._pixel_start(j, pixel)) for pixel in pixels]
                to = T.bind(plane + i * (2 * width))
                with T.serial(0, width // lanes) as k:
                    steps = [self.activations[span(start + k * lanes, lanes)] for start in starts]
                    both = tirx.Shuffle(steps, [tirx.IntImm("int32", n) for n in order])
                    store(self.units, both, span(to + k * (2 * lanes), 2 * lanes))

        self._segments(segment)

    def _pixel_start(self, j: Segment, pixel: Any) -> Any:
        """Where a pixel of the chunk starts in the activations of segment j."""
        if self.direct:
            return (self.first_row + pixel) * self.p.channels + j.before(self.p.segments)
        return self._plane(j) + pixel * self.w.channels[j.first]

    def _row_start(self, j: Segment, r: Any, i: Any, in_line: bool) -> Any:
        """Where dot products find row r + i of the chunk in segment j, or the pair that it is the first of.

        in_line: rows r .. r + i are pixels of one line; then addresses share a base, and registers are left for sums
        """
        pixel = r + i
        if not self.p.pointwise:
            pixel = self.starts[r] + i * self.p.stride[1] if in_line else self.starts[pixel]
        if self.paired:
            return (self._plane(j) + pixel * self.w.channels[j.first]) * self.copies
        return self._pixel_start(j, pixel)

    def _runs(self, j: Segment) -> tuple[int, int, int]:
        """Vertical taps, values in a row at each of them, and the distance from one to the next."""
        c = self.w.channels[j.first]
        return self.p.kernel[0], self.p.kernel[1] * c, 0 if self.p.pointwise else self.image_width * c

    def _sum_rows(self, rows: Any) -> None:
        """sums[j, r] = the sum of segment j of row r of a linear layer, zero points and all."""

        def segment(j: Segment) -> None:
            width, start = self.w.channels[j.first], self._pixel_start(j, 0)
            stride = self.p.channels if self.direct else width
            self._sum_each(self.sums, j.index * self.most_rows, rows, self.least_rows, start, stride, width)

        self._segments(segment)

    def _sum_windows(self, samples: Any, height: Any) -> None:
        """The same for a convolution, whose rows see neighbouring pixels: each of them is summed once."""
        p, (down, across), line_size = self.p, self.p.stride, self.image_width

        def segment(j: Segment) -> None:
            lines = (samples - 1) * self.band_height + (height - 1) * down + p.kernel[0]
            width, least = self.w.channels[j.first], p.kernel[0] * line_size
            self._sum_each(self.pixel_sums, 0, lines * line_size, least, self._plane(j), width, width)
            with T.serial(0, samples) as s, T.serial(0, height) as y:
                line = T.bind((s * self.band_height + y * down) * line_size)
                row = T.bind(j.index * self.most_rows + (s * height + y) * p.out_width)

                def some(x: Any, lanes: int) -> None:
                    total = scratch(lanes, "int32")
                    store(total, vmath.i32(0, lanes), span(0, lanes))
                    with T.serial(0, p.kernel[0]) as tap:
                        for side in range(p.kernel[1]):
                            at = line + tap * line_size + x * across + side
                            seen = self.pixel_sums[at if lanes == 1 else T.ramp(at, across, lanes)]
                            store(total, total[span(0, lanes)] + seen, span(0, lanes))
                    store(self.sums, total[span(0, lanes)], span(row + x, lanes))

                each_vector(p.out_width, some, self.isa.words)

        self._segments(segment)

    def _sum_each(self, sums: Buffer, to: Any, count: Any, least: int, start: Any, stride: int, width: int) -> None:
        """sums[to + i] = the sum of the activations [start + i * stride, + width), for i < count; count >= least.

        By dot products with ones. As many at once as a register has lanes: then their lanes are added up in a tree.
        """
        isa = ISAS[self.isa.name]  # however weights lie
        size, lanes = isa.vector, isa.words
        whole, left = width // size, width % size

        def counted(dtype: str, first: int, last: int) -> Expr:
            return tirx.Shuffle([tirx.const(int(first <= i < last), dtype) for i in range(size)], list(range(size)))

        def rows(i: Any, together: int) -> Expr:
            totals = Registers(together, lanes, "int32")
            begins = [T.bind(start + (i + r) * stride) for r in range(together)]

            def add(values: Callable[[Any], Expr], ones: Expr) -> None:
                for r, begin in enumerate(begins):
                    totals[r] = isa.sums(totals[r], values(begin), ones)

            def vector(k: Any) -> None:
                ones = tirx.Broadcast(tirx.const(1, isa.weight), size)
                add(lambda begin: self.activations[span(begin + k * size, size)], ones)

            def some(begin: Any) -> Expr:
                mask = counted("bool", 0, left)
                loaded = T.masked_load(f"{isa.activation}x{size}", self.activations, span(begin, size), mask)
                return tirx.Select(mask, loaded, self._zeros(0, size))  # lanes that are not loaded are undefined

            for r in range(together):
                totals[r] = vmath.i32(0, lanes)
            if whole:
                _loop(whole, vector)
            if left and whole:  # the last vector begins amid those that have been counted
                last = width - size
                add(lambda begin: self.activations[span(begin + last, size)], counted(isa.weight, size - left, size))
            elif left:
                add(some, counted(isa.weight, 0, left))
            return fold(totals[0]) if together == 1 else folds([totals[r] for r in range(together)])

        def vectors() -> None:
            with T.serial(0, _quotient(count + (lanes - 1), lanes)) as n:
                i = T.bind(T.min(n * lanes, count - lanes))
                store(sums, rows(i, lanes), span(to + i, lanes))

        def one_by_one() -> None:
            with T.serial(0, count) as i:
                store(sums, rows(i, 1), to + i)

        _when(least >= lanes or count >= lanes, vectors, one_by_one)

    def _zeros_of(self, j: Segment, m: Any, group: Any) -> Expr:
        """What the activations of segment j would add up to if all of row m were zero points."""
        p = self.p
        zero = T.cast(self.b["act_zero"][self._entry(j, m, group)], "int32")
        return (zero - self.isa.unsigned_excess) * (p.kernel[0] * p.kernel[1] * p.segments[j.first])

    # -------------------------------------------------------------------------------------- multiplication

    def _multiply(self, rows: Any, part: Any, number: Any) -> None:
        """A part of the tiles of the gathered rows times the block of weights, the kernel's block of that number."""
        tall = self.tile.rows

        def first_row(t: Any) -> Any:
            return _opaque(T.min(t * tall, rows - tall))

        def tiles() -> None:
            first, end = share(T.bind(_quotient(rows + (tall - 1), tall)), part, self.parts)
            if self.slices:
                self._multiply_slices(first, end, first_row)
                return
            with T.serial(first, end) as t:
                fresh: Any = False
                if self.unpacks:
                    fresh = T.bind(self.done[1] != number) if self.parts > 1 else t == 0
                self._tile(self.tile, first_row(t), t, fresh)
                if self.unpacks and self.parts > 1:
                    store(self.done, number, 1)

        own, isa = self.p.rows, self.isa  # rows of a sample
        # Whether registers hold the sums of that many beside what unpacking takes: more for int16 and for three bits.
        most = 12 if isa.weight == "int8" and self.p.bits != 3 else 8
        spacious = isa.words > 8 * isa.parts or own * self.tile.vectors * isa.parts <= most

        def few() -> None:
            some = own if spacious and 1 < own <= tall else 2
            count = T.bind(_quotient(rows, some))
            with T.serial(0, count) as n:
                self._tile(Tile(self.tile.vectors, some), _opaque(n * some), None, self.unpacks)
            if some != own:
                last = partial(self._tile, Tile(self.tile.vectors, 1))
                _when(rows > count * some, lambda: last(_opaque(rows - 1), None, self.unpacks))

        alone = spacious and own == tall
        if self.least_rows >= tall and not alone:
            tiles()
        else:
            enough = rows > tall if alone else rows >= tall
            _when(enough, tiles, few if self.parts == 1 else lambda: _when(part == 0, few))

    def _multiply_slices(self, first: Any, end: Any, first_row: Callable[[Any], Any]) -> None:
        """Tiles [first, end), slice by slice of k: each is read from memory once and stays in the L1 cache."""
        p, w, tile, lanes = self.p, self.w, self.tile, self.isa.words
        size = tile.rows * tile.vectors * lanes

        def product(j: int, t: Any) -> Any:
            return T.bind((t + j * self.most_tiles) * size)

        with T.serial(first, end) as t:
            r = first_row(t)
            groups = self._groups(tile, r)
            for j in range(len(p.segments)):
                self._start(tile, Segment(j), r, groups, self.products, product(j, t))
        for j, slices in enumerate(self.slices):
            taps, run, stride = self._runs(Segment(j))
            steps = run // self.isa.kpack // slices
            with T.serial(0, taps) as tap, T.serial(0, slices) as n:
                begin = T.bind(Segment(j).before(w.segment_steps) + (tap * slices + n) * steps)
                offset = T.bind(tap * stride + n * (steps * self.isa.kpack))
                with T.serial(first, end) as t:
                    r, at = first_row(t), product(j, t)

                    def initial(i: Any, v: Any, at: Any = at) -> Expr:
                        return self.products[span(at + (i * tile.vectors + v) * lanes, lanes)]

                    weights = self._weights(begin, 0, self.unpacks and t == first)
                    ahead = self._ahead(begin, steps, t)
                    runs = (1, steps, 0)
                    self._accumulate(tile, Segment(j), r, initial, runs, offset, weights, ahead, self.products, at)
        with T.serial(first, end) as t:
            r = first_row(t)
            groups = self._groups(tile, r)
            products = [(self.products, product(j, t)) for j in range(len(p.segments))]
            _loop(tile.rows, lambda i: self._finish_row(tile, products, None, i, r + i, T.bind(groups[i])))

    def _table(self, v: int) -> Expr | None:
        """The look-up table of register v of the block."""
        size = self.isa.vector
        if self.p.bits == 8:
            return None
        return T.bind(self.b["lut"][span((self.block * self.tile.vectors + v) * size, size)])

    def _weights(self, begin: Any, kept: Any, fresh: Any) -> Weights:
        """Those of the block from step ``begin`` on, which are in the panel from its step ``kept`` on.

        fresh: they are not, yet; without a panel (None) they never are
        """
        w, isa, vectors, size = self.w, self.isa, self.tile.vectors, self.isa.vector
        tables = [self._table(v) for v in range(vectors)] if self.unpacks else []
        first = kept is not None and isa.unit > 1  # sums leave no registers for unpacking
        by_packs = self.aligned and (kept is None or (first and not self.slices))

        def decoded(k: Any, d: int, v: int) -> Expr:
            pack: Any
            if by_packs:
                pack, d = _quotient(begin + k, w.pack) + d // w.pack, d % w.pack
            else:
                step = T.bind(begin + k + d)
                pack, d = (step, 0) if w.pack == 1 else (step >> (w.pack.bit_length() - 1), step & (w.pack - 1))
            base = T.bind(((self.block * w.packs + pack) * vectors + v) * w.pack_bytes)
            table = tables[v]
            codes = self.b["tiles"][span(base, size)] if table is None else self._codes(base, d)
            weights = codes if table is None else isa.look_up(table, codes)
            return weights if isa.weight == "int8" else tirx.Cast(f"{isa.weight}x{size}", weights)

        def ready(k: Any, v: Any) -> Expr:
            if self.unpacks:
                return self.panel[span(((kept + k) * vectors + v) * size, size)]
            return self.b["tiles"][span(((begin + self.block * w.steps + k) * vectors + v) * size, size)]

        def keep(weights: Expr, k: Any, v: int) -> None:
            if kept is not None:
                store(self.panel, weights, span(((kept + k) * vectors + v) * size, size))

        return Weights(fresh, first, by_packs, decoded, ready, keep)

    def _ahead(self, begin: Any, steps: int, t: Any) -> tuple[Any, int, Any]:
        """Where tile t of rows, in steps [begin, begin + steps), finds weights to prefetch; lines for each
        `Isa.load_steps` of them; and bytes from one to the next.

        All tiles together ask for the weights behind those steps, one tile after another; who comes when all are
        asked for stays at one line. Few rows (t is None) have no time for that much, and ask for what they need soon.
        """
        w, together = self.w, self.isa.load_steps
        bytes_ = w.pack_bytes * self.tile.vectors
        needed = -(-bytes_ * together // (w.pack * 64))
        if t is None:
            return T.bind(_quotient(self.block * w.steps + begin, w.pack) * bytes_ + FEW_AHEAD), needed, 64
        lines = -(-needed // self.usual_tiles)
        last = -(-needed // lines)
        here = _quotient((self.block * w.steps + begin + steps), w.pack) * bytes_
        size = -(-steps // together) * lines * 64
        if self.usual_tiles <= last:
            return T.bind(here + T.min(t, last) * size), lines, 64
        asks = T.bind(T.Select(t < last, 1, 0))
        return T.bind(here + asks * t * size), lines, _opaque(asks * 64)

    def _codes(self, base: Any, d: Any) -> Expr:
        """Codes of step d of a group, one in each byte."""
        bits, size = self.p.bits, self.isa.vector
        words = size // 4

        def field(plane: Any, shift: Any, width: int) -> Expr:
            value = tirx.reinterpret(f"uint32x{words}", self.b["tiles"][span(base + plane * size, size)])
            mask = tirx.const(0x01010101 * ((1 << width) - 1), "uint32")
            return value >> tirx.Broadcast(T.cast(shift, "uint32"), words) & tirx.Broadcast(mask, words)

        if bits == 3:
            high = field(2, d, 1) << tirx.Broadcast(tirx.const(2, "uint32"), words)
            return tirx.reinterpret(f"uint8x{size}", field(d >> 2, (d & 3) * 2, 2) | high)
        return tirx.reinterpret(f"uint8x{size}", field(0, d * bits, bits))

    def _groups(self, tile: Tile, r: Any) -> Buffer:
        """The time groups of the rows r .. r + tile.rows of the chunk."""
        groups = scratch(tile.rows, "int32")
        with T.unroll(0, tile.rows) as i:
            store(groups, self._group_of(r + i), i)
        return groups

    def _tile(self, tile: Tile, r: Any, t: Any, fresh: Any) -> None:
        """Rows r .. r + tile.rows of the chunk, tile t of it, times one block of weights, to the output.

        Few rows have no t; fresh: see `_weights`.
        """
        segments = len(self.p.segments)
        groups = self._groups(tile, r)
        size = tile.rows * tile.vectors * self.isa.words
        products: list[tuple[Buffer, Any]] = []
        scaled = None
        if segments > FEW_SEGMENTS:
            scaled = scratch(size)
            self._scale_groups(tile, r, groups, scaled, t, fresh)
        else:
            for j in range(segments):
                # Where LLVM does not see that nothing else writes them: or it keeps them in the registers of the next.
                products.append((scratch(size, "int32") if self.products is None else self.products, j * size))
                self._whole_segment(tile, Segment(j), r, groups, *products[j], t, fresh)
        # One body for all rows keeps the code small where epilogues are long.
        _loop(tile.rows, lambda i: self._finish_row(tile, products, scaled, i, r + i, T.bind(groups[i])))

    def _scale_groups(self, tile: Tile, r: Any, groups: Buffer, scaled: Buffer, t: Any, fresh: Any) -> None:
        """scaled = bias + the products of all segments with their scales, in order, f32 [tile.rows, vectors, lanes].

        Of many segments each is scaled as soon as it is summed, so that one product is held at a time. What dynamic
        rows have of their own, and the bias, is left to `_finish_row`.
        """
        p, w, lanes = self.p, self.w, self.isa.lanes
        product = scratch(tile.rows * tile.vectors * lanes, "int32")

        def cell(i: Any, v: Any) -> Any:
            return span((i * tile.vectors + v) * lanes, lanes)

        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            at = span(self.block * w.block + v * lanes, lanes)
            first = self.b["bias"][at] if p.has_bias and not p.dynamic else vmath.f32(0.0, lanes)
            store(scaled, first, cell(i, v))

        def segment(j: Segment) -> None:
            self._whole_segment(tile, j, r, groups, product, 0, t, fresh)
            with T.unroll(0, tile.rows) as i:
                rows = None
                if not p.dynamic:
                    rows = T.bind(self.b["act_scale"][self._entry(j, self.first_row + r + i, groups[i])])
                with T.unroll(0, tile.vectors) as v:
                    own = self.b["weight_scale"][span(j.index * w.outputs + self.block * w.block + v * lanes, lanes)]
                    total = tirx.Cast(f"float32x{lanes}", product[cell(i, v)])
                    factor = own if rows is None else vmath.mul(vmath.splat(rows, lanes), own)
                    store(scaled, vmath.fma(total, factor, scaled[cell(i, v)]), cell(i, v))

        self._segments(segment)

    def _start_value(self, j: Segment, m: Any, group: Any, v: Any) -> Expr:
        """The first value of the accumulator of row m, register v."""
        p, w, lanes = self.p, self.w, self.isa.lanes
        if self.p.late_zeros and not self.isa.unsigned_excess:
            return vmath.i32(0, self.isa.words)
        table = j.index if p.dynamic else j.index * p.groups + group
        first = self.b["start"][span(table * w.outputs + self.block * w.block + v * lanes, lanes)]
        if p.dynamic and not self.p.late_zeros:
            zero = T.cast(self.b["act_zero"][m], "int32")
            taps = p.kernel[0] * p.kernel[1] * p.segments[j.first]
            first = self.isa.product(first, T.bind(self.isa.unsigned_excess - zero), 127 * taps)
        return self.isa.unfolded(first)

    def _start(self, tile: Tile, j: Segment, r: Any, groups: Buffer, product: Buffer, at: Any) -> None:
        """product[at ..] = the first values of the accumulators of a tile."""
        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            first = self._start_value(j, self.first_row + r + i, groups[i], v)
            store(product, first, span(at + (i * tile.vectors + v) * self.isa.words, self.isa.words))

    def _whole_segment(
        self, tile: Tile, j: Segment, r: Any, groups: Buffer, product: Buffer, to: Any, t: Any, fresh: Any
    ) -> None:
        """product[to ..] = segment j of tile t of the chunk."""
        taps, run, stride = self._runs(j)
        steps, begin = run // self.isa.kpack, j.before(self.w.segment_steps)

        def initial(i: Any, v: Any) -> Expr:
            return self._start_value(j, self.first_row + r + i, groups[i], v)

        ahead = self._ahead(begin, self.w.segment_steps[j.first], t)
        weights = self._weights(begin, None if t is None else begin, fresh)
        self._accumulate(tile, j, r, initial, (taps, steps, stride), 0, weights, ahead, product, to)

    def _accumulate(
        self,
        tile: Tile,
        j: Segment,
        r: Any,
        initial: Callable[[Any, Any], Expr],
        runs: tuple[int, int, int],
        offset: Any,
        weights: Weights,
        ahead: tuple[Any, int, Any],
        product: Buffer,
        to: Any,
    ) -> None:
        """product[to ..] = initial + the sum over some steps of segment j, int32 [tile.rows, tile.vectors, words].

        runs: how many runs of neighbouring activations there are, steps of each, and the distance from one to the
        next; offset: of the first from a row's start; ahead: see `_ahead`

        Loops over the cells of the tile are unrolled late, so that TVM's passes see little code; LLVM then
        keeps the accumulators in registers.
        """
        isa = self.isa
        taps, steps, stride = runs
        stride, size = stride * self.together, isa.kpack * self.together  # of a step
        units = -(-tile.rows // isa.unit)
        lanes, cells = isa.words * isa.unit, units * tile.vectors
        # With few accumulators the latency of the dot product would show: some steps get their own.
        sets = max(1, 8 // (cells * isa.unit * isa.parts))
        starts = scratch(tile.rows, "int32")
        columns = scratch(tile.vectors * isa.vector, isa.weight)
        # In parts that are small enough for the stack, where a prefetch cannot touch them and LLVM sees it.
        unit_size = sets * tile.vectors * lanes
        most = max(1, (STACK_BYTES - 1) // (4 * unit_size))
        accumulators = [scratch(min(most, units - u) * unit_size, "int32") for u in range(0, units, most)]

        def rows_of(u: Any) -> list[Any]:
            """The rows of a unit; those behind the tile's last row are that row again."""
            rows = [u * isa.unit + n for n in range(isa.unit)]
            return rows if tile.rows % isa.unit == 0 else [T.min(row, tile.rows - 1) for row in rows]

        def each_unit(body: Callable[[Any, Load, Save], None]) -> None:
            """Calls body(unit, load(set, v), save(value, set, v)) for all units of rows."""
            for part, acc in enumerate(accumulators):
                with T.unroll(0, min(most, units - part * most)) as i:

                    def cell(s: int, v: Any, i: Any = i) -> Any:
                        return span(i * unit_size + (s * tile.vectors + v) * lanes, lanes)

                    def load(s: int, v: Any, acc: Buffer = acc, cell: Any = cell) -> Expr:
                        return acc[cell(s, v)]

                    def save(value: Expr, s: int, v: Any, acc: Buffer = acc, cell: Any = cell) -> None:
                        store(acc, value, cell(s, v))

                    body(part * most + i, load, save)

        in_line = self.paired and self.p.out_width % tile.rows == 0
        with T.unroll(0, tile.rows) as i:
            store(starts, self._row_start(j, r, i, in_line) + offset * self.together, i)

        def begin(u: Any, _: Load, save: Save) -> None:
            with T.unroll(0, tile.vectors) as v:
                save(isa.joined([initial(i, v) for i in rows_of(u)]), 0, v)
                for s in range(1, sets):
                    save(vmath.i32(0, lanes), s, v)

        each_unit(begin)

        def step(k: Any, d: int, s: int, word: Callable[[Any], Expr], fresh: bool) -> None:
            for line in range(ahead[1] if d % isa.load_steps == 0 else 0):
                at = _quotient(k + d, isa.load_steps) * ahead[1] + line
                self._prefetch(ahead[0] + at * ahead[2])
            for v in range(tile.vectors if fresh else 0):
                column = T.bind(weights.decoded(k, d, v))
                weights.keep(column, k + d, v)
                store(columns, column, span(v * isa.vector, isa.vector))

            def cell(v: Any, u: Any, load: Load, save: Save) -> None:
                words = [word(i) for i in rows_of(u)[:: self.together]]
                column = columns[span(v * isa.vector, isa.vector)] if fresh else weights.ready(k + d, v)
                save(isa.dot(load(s, v), isa.spread(words), column), s, v)

            def unit(u: Any, load: Load, save: Save) -> None:
                with T.unroll(0, tile.vectors) as v:
                    cell(v, u, load, save)

            if self.paired:  # sums leave no registers for all weights of a step
                with T.unroll(0, tile.vectors) as v:
                    each_unit(partial(cell, v))
            else:
                each_unit(unit)

        def several(k: Any, count: int, tap: Any, fresh: bool) -> None:
            """`count` steps from step k of a run on."""
            here = T.bind(tap * steps + k)
            group, lanes = isa.load_steps, isa.word_lanes
            if count % group or group == 1 or self.paired:
                for d in range(count):
                    at = T.bind(tap * stride + (k + d) * size)
                    step(here, d, d % sets, partial(self._word, starts, at), fresh)
                return
            words = scratch(tile.rows * group * lanes, "int32")
            for d in range(0, count, group):
                with T.unroll(0, tile.rows) as i:
                    at = starts[i] + tap * stride + (k + d) * size
                    loaded = self.units[span(at, group * size)]
                    loaded = tirx.reinterpret(f"int32x{group * lanes}", loaded)
                    store(words, loaded, span(i * group * lanes, group * lanes))
                for e in range(group):

                    def word(i: Any, e: int = e) -> Expr:
                        at = (i * group + e) * lanes
                        return words[at if lanes == 1 else span(at, lanes)]

                    step(here, d + e, (d + e) % sets, word, fresh)

        def along(fresh: bool, tap: Any) -> None:
            each = max(sets, isa.load_steps, self.w.pack if fresh and weights.by_packs else 1)
            if steps >= each:
                with T.serial(0, steps // each) as k:
                    several(k * each, each, tap, fresh)
            if steps % each:
                several(steps // each * each, steps % each, tap, fresh)

        def unpack() -> None:
            together = self.w.pack if weights.by_packs else 1
            with T.serial(0, taps * steps // together) as n:
                for d, v in itertools.product(range(together), range(tile.vectors)):
                    weights.keep(weights.decoded(n * together, d, v), n * together + d, v)

        if weights.first:
            _when(weights.fresh, unpack)
            _loop(taps, partial(along, False))
        else:
            _when(weights.fresh, lambda: _loop(taps, partial(along, True)), lambda: _loop(taps, partial(along, False)))

        def end(u: Any, load: Load, _: Save) -> None:
            with T.unroll(0, tile.vectors) as v:
                total = load(0, v)
                for s in range(1, sets):
                    total = total + load(s, v)
                for n, i in reversed([*enumerate(rows_of(u))]):  # what stands for a missing row first
                    store(product, isa.row(total, n), span(to + (i * tile.vectors + v) * isa.words, isa.words))

        each_unit(end)

    def _prefetch(self, at: Any) -> None:
        """Asks for the cache line of the stored weights that begins at a byte; it may lie behind the last."""
        address = T.address_of(self.b["tiles"][at])
        T.evaluate(tirx.call_llvm_intrin("void", "llvm.prefetch", address, T.int32(0), T.int32(3), T.int32(1)))

    def _word(self, starts: Buffer, offset: Any, i: Any) -> Expr:
        """The activations of row i of a tile, and of those beside it, at an offset from its start, as int32."""
        return self.isa.load_word(self.units, starts[i] + offset, self.together)

    # --------------------------------------------------------------------------------------------- results

    def _finish_row(
        self, tile: Tile, products: list[tuple[Buffer, Any]], scaled: Buffer | None, i: Any, r: Any, group: Any
    ) -> None:
        """Scales, bias (where nothing is ``scaled`` yet), offsets, epilogue and store of row i of a tile, row r."""
        p, w, lanes = self.p, self.w, self.isa.lanes
        m = T.bind(self.first_row + r)
        scales = []
        if products or p.has_offset or p.dynamic:
            scales = [T.bind(self.b["act_scale"][self._entry(Segment(j), m, group)]) for j in range(len(p.segments))]
        minus_zero = T.bind(0.0 - T.cast(self.b["act_zero"][m], "float32")) if self.p.late_zeros else None
        sums = []
        if p.has_offset:
            for j in range(len(p.segments)):
                total = self.sums[j * self.most_rows + r] - self._zeros_of(Segment(j), m, group)
                sums.append(T.bind(T.cast(total, "float32")))
        quant = None
        if self.epilogue.bits is not None:
            quant = (T.bind(self.b["qscale"][group]), T.bind(self.b["qzero"][group]))

        def vector(v: int, live: int) -> None:
            """Registers v of the block; its first `live` lanes are channels of the output."""
            n = T.bind(self.block * w.block + v * lanes)
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
                buffer, kind = self.b[f"operand{k}"], self.epilogue.operands[k].kind
                if kind == "scalar":
                    return buffer[0]
                row = {"full": m, "sample": _quotient(m, p.rows), "channel": 0}[kind]
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
                sample = T.bind(_quotient(m, p.rows))
                at = sample * size + (m - sample * p.rows) * row + (n + offset)
            self._store_live(self.b["out"], y, at, live)

        # In the last block, registers behind the output's last channel are not stored, one perhaps in part.
        inner = T.bool(True) if w.blocks == 1 else self.block < w.blocks - 1
        for v in range(tile.vectors):
            live = min(lanes, p.outputs - (w.blocks - 1) * w.block - v * lanes)
            if live == lanes:
                vector(v, lanes)
            elif w.blocks == 1:
                if live > 0:
                    vector(v, live)
            elif live > 0:
                _when(inner, partial(vector, v, lanes), partial(vector, v, live))
            else:
                _when(inner, partial(vector, v, lanes))

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
