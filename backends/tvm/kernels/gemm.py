"""Quantized linear layers and convolutions on CPU: one integer GEMM template for all formats and targets.

Arithmetic (exact, the same bits on every target): ``A_j = sum_k (q - z_j[g]) * w`` over segment j in int32;

    y = bias or 0
    for j ascending:                                y = fma(f32(A_j), f32(act_scale[j,g] * scale[i,j]), y)
    where weights have offsets, for j ascending:    y = fma(f32(S_j), f32(act_scale[j,g] * offset[i]), y)

with ``S_j = sum_k (q - z_j[g])``; then the epilogue. Of dynamic activations the scale and the zero point are
those of the row m, the same for all segments.

Structure. The rows m = (sample, y, x) of the product are cut into chunks that are independent of each other:

    for each chunk of rows                     # its activations stay in the L2 cache
        gather the activations                 # not where the kernel can read the input as it is
        for each block of output channels      # tile.vectors registers wide
            unpack the weights of the block    # below 8 bits: codes -> int8 through the look-up table
            for each tile of rows              # accumulators in registers, then the epilogue

The three loops are one over pieces of work, some tiles each, which threads share. A thread gathers and unpacks what it
has not at hand yet: one that begins amid a chunk or a block does again what another has done for the tiles before.

Convolutions gather a copy of the image that is padded with zero points, and in channels, up to whole steps
of k, with zeros. It is not an expanded im2col matrix: a row of the product starts at an offset in that copy,
and the taps of one kernel row are neighbours in it. Each segment has its own copy. Where fewer rows remain
than a tile has, the last tile starts earlier and computes some rows twice; a chunk smaller than a tile goes
row by row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels import vmath
from mpq_compiler.backends.tvm.kernels.epilogue import Epilogue, apply
from mpq_compiler.backends.tvm.kernels.isa import Isa, Tile
from mpq_compiler.backends.tvm.kernels.problem import FEW_SEGMENTS, QuantMatmul, Segment, WeightLayout
from mpq_compiler.backends.tvm.kernels.template import (
    BATCH,
    Argument,
    Buffer,
    Buffers,
    Shared,
    epilogue_arguments,
    primfunc,
    scratch,
    share,
    shared,
    span,
    store,
)

__all__ = ["QuantMatmul", "arguments", "build"]

PANEL_BYTES = 256 * 1024
"""Gathered activations of a chunk, about: a quarter to a half of the L2 cache of a core."""
MOST_ROWS, LEAST_ROWS = 512, 96
"""Rows of a chunk, where there are that many: enough to make up for unpacking the weights."""
PIECES = 16
"""Pieces of work, at least, where there are so many tiles: then threads get equal parts, nearly."""


def arguments(problem: QuantMatmul, isa: Isa) -> list[Argument]:
    """The buffers of the kernel in calling order, the output last.

    ``x`` and ``group``; ``act_scale``, ``act_zero``; then what `prepare` makes, by its names; the epilogue's
    operands, ``qscale`` and ``qzero`` where it quantizes; ``out``, and ``full``, what the quantizer reads, where the
    epilogue keeps it. Dynamic activations have no ``group``, but their epilogue may.
    """
    tables = (BATCH, problem.rows) if problem.dynamic else (len(problem.segments), problem.groups)
    own = [
        Argument("x", problem.input_shape(), "uint8"),
        *([] if problem.dynamic else [Argument("group", (BATCH,), "int64")]),
        Argument("act_scale", tables, "float32"),
        Argument("act_zero", tables, "uint8"),
        *WeightLayout(problem, isa).buffers(),
    ]
    epilogue, shape = problem.epilogue or Epilogue(), problem.output_shape()
    theirs = epilogue_arguments(epilogue, shape[:-1], problem.outputs, problem.groups)
    own += [argument for argument in theirs if problem.dynamic or argument.name != "group"]
    kept = [Argument("full", shape)] if epilogue.keeps else []
    written = shape if problem.into is None else (BATCH, problem.into[0])
    return [*own, Argument("out", written, epilogue.out_dtype), *kept]


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
        self.p, self.isa, self.b = problem, isa, buffers
        self.w = WeightLayout(problem, isa)
        self.tile = self.w.tile
        self.epilogue = problem.epilogue or Epilogue()
        # Where channels are whole steps of k and codes are used as they are, the input needs no copy.
        self.direct = problem.pointwise and isa.reads_codes and self.w.channels == problem.segments
        self.unpacks = problem.bits < 8 or isa.weight != "int8"
        if not problem.pointwise:
            # Extent of the padded image that the kernel reaches.
            self.image_height = (problem.out_height - 1) * problem.stride[0] + problem.kernel[0]
            self.image_width = (problem.out_width - 1) * problem.stride[1] + problem.kernel[1]
        self._size_chunks()

    # -------------------------------------------------------------------------------------- chunks of rows

    def _size_chunks(self) -> None:
        """Sets most_rows, pixels (of the gathered copy) and, for images, samples and bands of a chunk."""
        p = self.p
        pixel = sum(self.w.channels) * (2 if self.isa.activation == "int16" else 1)
        if p.pointwise:
            rows = max(min(PANEL_BYTES // pixel, MOST_ROWS), LEAST_ROWS)
            self.most_rows = self.pixels = rows // self.tile.rows * self.tile.rows
            self.least_rows = 1  # of a chunk
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

    @property
    def _nanoseconds(self) -> float:
        """Of a sample, at the rate of dot products of a core or of reading weights from memory."""
        p = self.p
        return max(p.rows * p.reduction * p.outputs / (8 * self.isa.vector), p.reduction * p.outputs * p.bits / 160)

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
                if not self.direct or p.has_offset:
                    self._once(0, band, blocks * self.parts, gather)
                self.block = T.bind(block - band * blocks) if blocks > 1 else 0
                if self.unpacks:
                    self._once(1, block, self.parts, self._unpack)
                self._multiply(here, piece - block * self.parts)

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

        def gather() -> None:
            if not self.direct:
                with T.serial(0, rows) as r:
                    self._segments(lambda j: self._gather_pixels(j, 1, (row + r) * self.p.channels, r))
            if self.p.has_offset:
                self._sum_rows(rows)

        return rows, gather

    def _chunk_of_images(self, sample: Any, samples: Any, band: Any) -> tuple[Any, Callable[[], None]]:
        """(rows, what gathers them) of a band of some samples (of one sample, where that is not all rows)."""
        p = self.p
        top, height = 0, p.out_height
        if self.bands > 1:
            top = T.bind(band * self.band)
            height = self.band if p.out_height % self.band == 0 else T.min(self.band, p.out_height - top)
        self.first_row = _opaque(sample * p.rows + top * p.out_width)

        def gather() -> None:
            reach = (height - 1) * p.stride[0] + p.kernel[0]  # image rows that these output rows see
            with T.serial(0, samples) as s, T.serial(0, reach) as y:
                line = (s * self.band_height + y) * self.image_width
                self._gather_line(sample + s, top * p.stride[0] + y - p.padding[0], T.bind(line))
            with T.serial(0, samples) as s, T.serial(0, height) as y, T.serial(0, p.out_width) as x:
                pixel = (s * self.band_height + y * p.stride[0]) * self.image_width + x * p.stride[1]
                store(self.starts, pixel, (s * height + y) * p.out_width + x)
            if p.has_offset:
                self._sum_rows(samples * height * p.out_width)

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
        if not p.pointwise:
            self.starts = team.workspace(self.most_rows, "int32")
        if p.has_offset:
            self.sums = team.workspace(segments * self.most_rows, "int32")
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
        lanes = min(4 * self.isa.lanes, 1 << (count.bit_length() - 1))

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

    def _row_start(self, j: Segment, r: Any) -> Any:
        """Where row r of the chunk starts in the activations of segment j."""
        if self.direct:
            return (self.first_row + r) * self.p.channels + j.before(self.p.segments)
        pixel = r if self.p.pointwise else self.starts[r]
        return self._plane(j) + pixel * self.w.channels[j.first]

    def _runs(self, j: Segment) -> tuple[int, int, int]:
        """Vertical taps, values in a row at each of them, and the distance from one to the next."""
        c = self.w.channels[j.first]
        return self.p.kernel[0], self.p.kernel[1] * c, 0 if self.p.pointwise else self.image_width * c

    def _sum_rows(self, rows: Any) -> None:
        """sums[j, r] = sum over segment j of (q - z_j[g]); pixels that are padding add nothing."""
        p, lanes = self.p, self.isa.lanes
        with T.serial(0, rows) as r:
            group = 0 if p.dynamic else self._group(_quotient(self.first_row + r, p.rows))

            def segment(j: Segment) -> None:
                taps, run, stride = self._runs(j)
                start = T.bind(self._row_start(j, r))
                partial_sums = scratch(lanes, "int32")
                store(partial_sums, vmath.i32(0, lanes), span(0, lanes))

                def add(at: Any, width: int, to: Buffer = partial_sums) -> None:
                    values = self.activations[span(at, width)]
                    wide = tirx.Cast("int32" if width == 1 else f"int32x{width}", values)
                    store(to, to[span(0, width)] + wide, span(0, width))

                with T.serial(0, taps) as tap:
                    line = T.bind(start + tap * stride)
                    if run >= lanes:
                        with T.serial(0, run // lanes) as k:
                            add(line + k * lanes, lanes)
                    for k in range(run // lanes * lanes, run):
                        add(line + k, 1)
                zero = T.cast(self.b["act_zero"][self._entry(j, self.first_row + r, group)], "int32")
                total = (self.isa.unsigned_excess - zero) * (p.kernel[0] * p.kernel[1] * p.segments[j.first])
                for lane in range(lanes):
                    total = total + partial_sums[lane]
                store(self.sums, total, j.index * self.most_rows + r)

            self._segments(segment)

    # -------------------------------------------------------------------------------------- multiplication

    def _multiply(self, rows: Any, part: Any) -> None:
        """A part of the tiles of the gathered rows times the block of weights."""
        tall = self.tile.rows

        def each(units: Any, body: Callable[[Any], None]) -> None:
            with T.serial(*share(units, part, self.parts)) as unit:
                body(unit)

        def tile(t: Any) -> None:
            self._tile(Tile(self.tile.vectors, tall), _opaque(T.min(t * tall, rows - tall)))

        def tiles() -> None:
            each(_quotient(rows + (tall - 1), tall), tile)

        def single() -> None:
            each(rows, lambda r: self._tile(Tile(self.tile.vectors, 1), r))

        _when(True if self.least_rows >= tall else rows >= tall, tiles, single)

    def _unpack(self) -> None:
        """panel = the weights of the block, int8 (int16), in the order of the micro-kernel."""
        w, isa, vectors = self.w, self.isa, self.tile.vectors
        tiles, size = self.b["tiles"], isa.vector

        def put(step: Any, v: int, weights: Expr) -> None:
            if isa.weight != "int8":
                weights = tirx.Cast(f"{isa.weight}x{size}", weights)
            store(self.panel, weights, span((step * vectors + v) * size, size))

        for v in range(vectors):
            table = None
            if self.p.bits < 8:
                table = T.bind(self.b["lut"][span((self.block * vectors + v) * size, size)])
            with T.serial(0, w.packs) as pack:
                base = T.bind(((self.block * w.packs + pack) * vectors + v) * w.pack_bytes)
                if table is None:
                    put(pack, v, tiles[span(base, size)])
                else:
                    for d in range(w.pack):
                        put(pack * w.pack + d, v, isa.look_up(table, self._codes(base, d)))

    def _codes(self, base: Any, d: int) -> Expr:
        """Codes of step d of a group, one in each byte."""
        size = self.isa.vector

        def field(plane: int, shift: int, width: int) -> Expr:
            value = self.b["tiles"][span(base + plane * size, size)]
            if shift:
                value = value >> vmath.splat(tirx.IntImm("uint8", shift), size)
            return value & vmath.splat(tirx.IntImm("uint8", (1 << width) - 1), size)

        if self.p.bits != 3:
            return field(0, d * self.p.bits, self.p.bits)
        return field(d // 4, d % 4 * 2, 2) | (field(2, d, 1) << vmath.splat(tirx.IntImm("uint8", 2), size))

    def _tile(self, tile: Tile, r: Any) -> None:
        """Rows r .. r + tile.rows of the chunk times one block of weights, to the output."""
        p, segments = self.p, len(self.p.segments)
        groups = scratch(tile.rows, "int32")
        with T.unroll(0, tile.rows) as i:
            store(groups, self._group(_quotient(self.first_row + r + i, p.rows)), i)
        size = tile.rows * tile.vectors * self.isa.lanes
        products: list[Buffer] = []
        scaled = None
        if segments > FEW_SEGMENTS:
            scaled = scratch(size)
            self._scale_groups(tile, r, groups, scaled)
        else:
            for j in range(segments):
                products.append(scratch(size, "int32"))
                self._accumulate(tile, Segment(j), r, groups, products[j])
        # One body for all rows keeps the code small where epilogues are long.
        _loop(tile.rows, lambda i: self._finish_row(tile, products, scaled, i, r + i, T.bind(groups[i])))

    def _scale_groups(self, tile: Tile, r: Any, groups: Buffer, scaled: Buffer) -> None:
        """scaled = bias + the products of all segments with their scales, in order, f32 [tile.rows, vectors, lanes].

        Of many segments each is scaled as soon as it is summed, so that one product is held at a time.
        """
        p, w, lanes = self.p, self.w, self.isa.lanes
        product = scratch(tile.rows * tile.vectors * lanes, "int32")

        def cell(i: Any, v: Any) -> Any:
            return span((i * tile.vectors + v) * lanes, lanes)

        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            at = span(self.block * w.block + v * lanes, lanes)
            bias = self.b["bias"][at] if p.has_bias else vmath.f32(0.0, lanes)
            store(scaled, bias, cell(i, v))

        def segment(j: Segment) -> None:
            self._accumulate(tile, j, r, groups, product)
            with T.unroll(0, tile.rows) as i:
                scale = T.bind(self.b["act_scale"][self._entry(j, self.first_row + r + i, groups[i])])
                with T.unroll(0, tile.vectors) as v:
                    own = self.b["weight_scale"][span(j.index * w.outputs + self.block * w.block + v * lanes, lanes)]
                    total = tirx.Cast(f"float32x{lanes}", product[cell(i, v)])
                    factor = vmath.mul(vmath.splat(scale, lanes), own)
                    store(scaled, vmath.fma(total, factor, scaled[cell(i, v)]), cell(i, v))

        self._segments(segment)

    def _accumulate(self, tile: Tile, j: Segment, r: Any, groups: Buffer, product: Buffer) -> None:
        """product = start + the sum over segment j, int32 [tile.rows, tile.vectors, lanes].

        Loops over the cells of the tile are unrolled late, so that TVM's passes see little code; LLVM then
        keeps the accumulators in registers.
        """
        isa, p, w = self.isa, self.p, self.w
        lanes, vector, cells = isa.lanes, isa.vector, tile.rows * tile.vectors
        # With few accumulators the latency of the dot product would show: some steps get their own.
        sets = max(1, 8 // cells)
        acc, starts = scratch(sets * cells * lanes, "int32"), scratch(tile.rows, "int32")

        def cell(s: int, i: Any, v: Any) -> Any:
            return span(((s * tile.rows + i) * tile.vectors + v) * lanes, lanes)

        with T.unroll(0, tile.rows) as i:
            store(starts, self._row_start(j, r + i), i)
            if p.dynamic:
                zero = T.cast(self.b["act_zero"][self.first_row + r + i], "int32")
                negated = T.bind(isa.unsigned_excess - zero)
            with T.unroll(0, tile.vectors) as v:
                table = j.index if p.dynamic else j.index * p.groups + groups[i]
                first = self.b["start"][span(table * w.outputs + self.block * w.block + v * lanes, lanes)]
                if p.dynamic:
                    first = first * vmath.splat(negated, lanes)
                store(acc, first, cell(0, i, v))
                for s in range(1, sets):
                    store(acc, vmath.i32(0, lanes), cell(s, i, v))
        weights = self.panel if self.unpacks else self.b["tiles"]
        begin = j.before(w.segment_steps) + (0 if self.unpacks else self.block * w.steps)
        taps, run, stride = self._runs(j)
        steps = run // isa.kpack

        def step(k: Any, s: int, tap: Any, word: Callable[[Any], Expr]) -> None:
            base = T.bind((begin + tap * steps + k) * (tile.vectors * vector))
            with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
                column = weights[span(base + v * vector, vector)]
                store(acc, isa.dot(acc[cell(s, i, v)], isa.spread(word(i)), column), cell(s, i, v))

        def several(k: Any, count: int, tap: Any) -> None:
            """`count` steps from step k on."""
            ahead = isa.load_steps
            if count % ahead or ahead == 1:
                for d in range(count):
                    offset = T.bind(tap * stride + (k + d) * isa.kpack)
                    step(k + d, d % sets, tap, partial(self._word, starts, offset))
                return
            words = scratch(tile.rows * ahead, "int32")
            for d in range(0, count, ahead):
                with T.unroll(0, tile.rows) as i:
                    at = starts[i] + tap * stride + (k + d) * isa.kpack
                    loaded = self.activations[span(at, ahead * isa.kpack)]
                    store(words, tirx.reinterpret(f"int32x{ahead}", loaded), span(i * ahead, ahead))
                for e in range(ahead):

                    def word(i: Any, e: int = e) -> Expr:
                        return words[i * ahead + e]

                    step(k + d + e, (d + e) % sets, tap, word)

        def along(tap: Any) -> None:
            each = max(sets, isa.load_steps)
            if steps >= each:
                with T.serial(0, steps // each) as k:
                    several(k * each, each, tap)
            if steps % each:
                several(steps // each * each, steps % each, tap)

        _loop(taps, along)
        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            total = acc[cell(0, i, v)]
            for s in range(1, sets):
                total = total + acc[cell(s, i, v)]
            store(product, total, cell(0, i, v))

    def _word(self, starts: Buffer, offset: Any, i: Any) -> Expr:
        """The activations of row i of a tile at an offset from the row's start, as one int32."""
        return self.isa.load_word(self.activations, starts[i] + offset)

    # --------------------------------------------------------------------------------------------- results

    def _finish_row(
        self, tile: Tile, products: list[Buffer], scaled: Buffer | None, i: Any, r: Any, group: Any
    ) -> None:
        """Scales, bias (where nothing is ``scaled`` yet), offsets, epilogue and store of row i of a tile, row r."""
        p, w, lanes = self.p, self.w, self.isa.lanes
        m = T.bind(self.first_row + r)
        scales = []
        if products or p.has_offset:
            scales = [T.bind(self.b["act_scale"][self._entry(Segment(j), m, group)]) for j in range(len(p.segments))]
        sums = []
        if p.has_offset:
            for j in range(len(p.segments)):
                sums.append(T.bind(T.cast(self.sums[j * self.most_rows + r], "float32")))
        quant = None
        if self.epilogue.bits is not None:
            quant = (T.bind(self.b["qscale"][group]), T.bind(self.b["qzero"][group]))

        def vector(v: int, live: int) -> None:
            """Registers v of the block; its first `live` lanes are channels of the output."""
            n = T.bind(self.block * w.block + v * lanes)
            if scaled is not None:
                y = scaled[span((i * tile.vectors + v) * lanes, lanes)]
            else:
                y = self.b["bias"][span(n, lanes)] if p.has_bias else vmath.f32(0.0, lanes)
            for j, product in enumerate(products):
                scale = self.b["weight_scale"][span(n + j * w.outputs, lanes)]
                total = tirx.Cast(f"float32x{lanes}", product[span((i * tile.vectors + v) * lanes, lanes)])
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
