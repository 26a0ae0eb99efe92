"""The activations of a chunk of rows: gathered, padded, paired, and summed where weights have offsets."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Index,
    Shared,
    each_vector,
    scratch,
    span,
    store,
    transpose,
)
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import each_segment, loop, opaque, quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.sums import sum_each, zeros
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment


class Rows:
    """The rows of a chunk, as dot products read them.

    first_row:   number of the first one in the product
    activations: the gathered copy, or the input itself
    units:       what dot products read: that, or pairs of its rows
    sums:        of the activations of each row, by segment, where weights have offsets
    """

    def __init__(self, schedule: Schedule, buffers: Buffers) -> None:
        self.s, self.p, self.isa, self.w, self.b = schedule, schedule.p, schedule.isa, schedule.w, buffers
        self.first_row: Any = 0

    def allocate(self, team: Shared) -> None:
        """The working memory of a thread."""
        self.activations = self.b["x"]
        if not self.s.direct:
            size = self.s.pixels * sum(self.w.channels) + 16 * self.isa.vector  # loads may run over the end
            self.activations = team.workspace(size, self.isa.activation)
        self.units = self.activations  # what dot products read
        if self.s.paired:
            self.units = team.workspace(self.s.copies * self.s.pixels * sum(self.w.channels), self.isa.activation)
        elif self.s.planes:
            self.units = team.workspace(self.s.plane_pixels * sum(self.w.channels), self.isa.activation)
        if not self.p.pointwise:
            self.starts = team.workspace(self.s.most_rows, "int32")
        if self.p.has_offset:
            self.sums = team.workspace(len(self.p.segments) * self.s.most_rows, "int32")
            if not self.p.pointwise:
                self.pixel_sums = team.workspace(self.s.pixels, "int32")

    def chunk_of_rows(self, row: Any, rows: Any) -> tuple[Any, Callable[[], None]]:
        """(rows, what gathers them) of a chunk."""
        self.first_row = row
        self._know_group(T.bind(quotient(row, self.p.rows)), quotient(row + rows - 1, self.p.rows))

        def gather() -> None:
            """Copies, sums and pairs, as far as is needed."""
            if not self.s.direct:
                with T.serial(0, rows) as r:
                    each_segment(self.p, lambda j: self._gather_pixels(j, 1, (row + r) * self.p.channels, r))
            if self.p.has_offset:
                self._sum_rows(rows)
            if self.s.paired:
                self._pair_pixels(rows, 1)
            elif self.s.planes:
                self._lay_planes(rows)

        return rows, gather

    def chunk_of_images(self, sample: Any, samples: Any, band: Any) -> tuple[Any, Callable[[], None]]:
        """(rows, what gathers them) of a band of some samples (of one sample, where that is not all rows)."""
        p = self.p
        top, height = 0, p.out_height
        if self.s.bands > 1:
            top = T.bind(band * self.s.band)
            height = self.s.band if p.out_height % self.s.band == 0 else T.min(self.s.band, p.out_height - top)
        self.first_row = opaque(sample * p.rows + top * p.out_width)
        self._know_group(sample, sample + samples - 1)

        def gather() -> None:
            """Copies lines, notes where rows start, sums and pairs, as far as is needed."""
            reach = (height - 1) * p.stride[0] + p.kernel[0]  # image rows that these output rows see
            with T.serial(0, samples) as s, T.serial(0, reach) as y:
                seen = top * p.stride[0] + y - p.padding[0]
                for side in range(p.kernel[1]) if self.s.shifted else (None,):
                    first = y * self.s.image_width if side is None else self.s.shifted_line(side, y)
                    self._gather_line(sample + s, seen, T.bind(s * self.s.sample_pixels + first), side)
            with T.serial(0, samples) as s, T.serial(0, height) as y, T.serial(0, p.out_width) as x:
                pixel = y * p.out_width + x
                if not self.s.shifted:
                    pixel = y * p.stride[0] * self.s.image_width + x * p.stride[1]
                store(self.starts, s * self.s.sample_pixels + pixel, (s * height + y) * p.out_width + x)
            if p.has_offset:
                self._sum_windows(samples, height)
            if self.s.paired:
                lines = (samples - 1) * self.s.band_height + reach
                self._pair_pixels(lines * self.s.image_width, p.stride[1])
            elif self.s.planes:
                last = self.s.sample_pixels if self.s.shifted else reach * self.s.image_width
                self._lay_planes((samples - 1) * self.s.sample_pixels + last)

        return samples * height * p.out_width, gather

    def _group(self, sample: Any) -> Any:
        """Time group of a sample; where there is one group only, nothing is read."""
        return T.bind(T.cast(self.b["group"][sample], "int32")) if self.p.groups > 1 else 0

    def _know_group(self, first: Any, last: Any) -> None:
        """Reads the time group of a chunk, samples first to last of the batch, for `group_of`."""
        if self.p.groups > 1:
            self.alone, self.group = T.bind(first == last), self._group(first)

    def group_of(self, r: Any) -> Any:
        """Time group of row r of the chunk: a tile of rows need not wait for it where there is one sample."""
        if self.p.groups == 1:
            return 0
        sample = quotient(self.first_row + r, self.p.rows)
        return T.if_then_else(self.alone, self.group, T.cast(self.b["group"][sample], "int32"))

    def _gather_line(self, sample: Index, y: Index, line: Index, side: int | None) -> None:
        """One row of the padded image: row y of the input, or zero points where it lies outside.

        side: number of a horizontal tap; then only the pixels that it sees, those of each output side by side
        """
        p = self.p
        width, apart = (self.s.image_width, 1) if side is None else (p.out_width, p.stride[1])
        before = p.padding[2] - (side or 0)
        left = min(-(-max(0, before) // apart), width)
        first = left * apart - before  # pixel of the input
        inside = max(0, min(-(-(p.width - first) // apart), width - left))
        right = width - left - inside
        group = self._group(sample) if any(p.padding) else 0

        def copy() -> None:
            """The row of the input, between zero points."""
            source = T.bind((sample * p.height + y) * p.width * p.channels)

            def segment(j: Segment) -> None:
                """Segment j of the line."""
                self._fill_pixels(j, left, group, line)
                if apart == 1:
                    self._gather_pixels(j, inside, source + first * p.channels, line + left)
                elif inside:
                    with T.serial(0, inside) as x:
                        self._gather_pixels(j, 1, source + (first + x * apart) * p.channels, line + left + x)
                self._fill_pixels(j, right, group, line + (left + inside))

            each_segment(self.p, segment)

        def fill() -> None:
            """Zero points."""
            each_segment(self.p, lambda j: self._fill_pixels(j, width, group, line))

        within = True
        if p.padding[0]:
            within = y >= 0
        if self.s.image_height > p.padding[0] + p.height:
            within = tirx.all(within, y < p.height) if p.padding[0] else y < p.height
        when(within, copy, fill)

    def _gather_pixels(self, j: Segment, count: int, source: Any, pixel: Any) -> None:
        """Copies segment j of `count` neighbouring pixels of the input to `pixel` of the gathered copy."""
        p, padded, own = self.p, self.w.channels[j.first], self.p.segments[j.first]
        offset = j.before(p.segments)

        def value(at: Any, lanes: int) -> Expr:
            """Values of the input behind the first."""
            return self.isa.gathered(self.b["x"][span(source + offset + at, lanes)], lanes)

        if count and own == padded and len(p.segments) == 1:
            self._write(self.s.plane(j) + pixel * padded, own * count, value)
        elif count:

            def one(i: Any) -> None:
                """Pixel i, padded to whole steps of k."""
                to = self.s.plane(j) + (pixel + i) * padded
                self._write(to, own, lambda at, lanes: value(i * p.channels + at, lanes))
                self._write(to + own, padded - own, self._zeros)

            loop(count, one)

    def _fill_pixels(self, j: Segment, count: int, group: Any, pixel: Any) -> None:
        """Zero points in segment j of `count` neighbouring pixels of the gathered copy."""
        if not count:
            return
        padded, own = self.w.channels[j.first], self.p.segments[j.first]
        zero = T.bind(self.isa.gathered(self.b["act_zero"][j.index * self.p.groups + group], 1))

        def value(_: Any, lanes: int) -> Expr:
            """The zero point."""
            return vmath.splat(zero, lanes)

        if own == padded:
            self._write(self.s.plane(j) + pixel * padded, own * count, value)
            return

        def one(i: Any) -> None:
            """Pixel i, padded to whole steps of k."""
            to = self.s.plane(j) + (pixel + i) * padded
            self._write(to, own, value)
            self._write(to + own, padded - own, self._zeros)

        loop(count, one)

    def _write(self, to: Any, count: int, value: Callable[[Any, int], Expr]) -> None:
        """``activations[to + i] = value(i)`` for i < count, in vectors; the last two may overlap."""
        if not count:
            return
        lanes = min(4 * self.isa.words, 1 << (count.bit_length() - 1))

        def vector(at: Any) -> None:
            """One vector."""
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
        """Pair the first `count` pixels into `units`: each step of one, then that of the pixel `apart` behind it."""
        size, every = self.isa.kpack, 2 // self.s.copies

        def segment(j: Segment) -> None:
            """Segment j of all of them."""
            width, plane = self.w.channels[j.first], self.s.plane(j) * self.s.copies
            lanes = size * (2 if width % (2 * size) == 0 else 1)
            order = [n * lanes + k + i for k in range(0, lanes, size) for n in range(2) for i in range(size)]
            with T.serial(0, quotient(count + (every - 1), every)) as i:
                pixels = (i * every, T.min(i * every + apart, count - 1))
                starts = [T.bind(self._pixel_start(j, pixel)) for pixel in pixels]
                to = T.bind(plane + i * (2 * width))
                with T.serial(0, width // lanes) as k:
                    steps = [self.activations[span(start + k * lanes, lanes)] for start in starts]
                    both = tirx.Shuffle(steps, [tirx.IntImm("int32", n) for n in order])
                    store(self.units, both, span(to + k * (2 * lanes), 2 * lanes))

        each_segment(self.p, segment)

    def _lay_planes(self, count: Index) -> None:
        """Copies the first `count` pixels to `units`, step by step: `kpack` values of all pixels lie side by side."""
        size = self.isa.kpack

        def segment(j: Segment) -> None:
            """Segment j of all of them, four pixels at a time."""
            steps = self.w.channels[j.first] // size
            plane = self._plane(j)
            with T.serial(0, quotient(count + 3, 4)) as i:
                starts = [T.bind(self._pixel_start(j, T.min(i * 4 + n, count - 1))) for n in range(4)]
                to = T.bind(plane + i * (4 * size))

                def put(k: Index, words: Expr) -> None:
                    """Stores step k of the four."""
                    store(self.units, tirx.reinterpret("uint8x16", words), span(to + k * self.plane_apart, 4 * size))

                with T.serial(0, steps // 4) as k:
                    rows = [T.bind(self._words(start + k * (4 * size), 4)) for start in starts]
                    for d, words in enumerate(transpose(rows)):
                        put(k * 4 + d, words)
                for k in range(steps // 4 * 4, steps):
                    words = [self._words(start + k * size, 1) for start in starts]
                    put(k, tirx.Shuffle(words, [tirx.IntImm("int32", n) for n in range(4)]))

        each_segment(self.p, segment)

    def _words(self, at: Index, count: int) -> Expr:
        """Neighbouring activations as int32, `kpack` in each."""
        kind = "int32" if count == 1 else f"int32x{count}"
        return tirx.reinterpret(kind, self.activations[span(at, count * self.isa.kpack)])

    def _plane(self, j: Segment) -> Index:
        """Where segment j begins in planes."""
        return self.s.plane_pixels * j.before(self.w.channels)

    @property
    def plane_apart(self) -> int:
        """Activations from a step of planes to the next."""
        return self.s.plane_pixels * self.isa.kpack

    def _pixel_start(self, j: Segment, pixel: Any) -> Any:
        """Where a pixel of the chunk starts in the activations of segment j."""
        if self.s.direct:
            return (self.first_row + pixel) * self.p.channels + j.before(self.p.segments)
        return self.s.plane(j) + pixel * self.w.channels[j.first]

    def row_start(self, j: Segment, r: Any, i: Any, in_line: bool) -> Any:
        """Where dot products find row r + i of the chunk in segment j, or the pair that it is the first of.

        in_line: rows r .. r + i are pixels of one line; then addresses share a base, and registers are left for sums
        """
        pixel = r + i
        if not self.p.pointwise:
            pixel = self.starts[r] + i * self.p.stride[1] if in_line else self.starts[pixel]
        if self.s.planes:
            return self._plane(j) + pixel * self.isa.kpack
        if self.s.paired:
            return (self.s.plane(j) + pixel * self.w.channels[j.first]) * self.s.copies
        return self._pixel_start(j, pixel)

    def apart(self, j: Segment) -> int:
        """Activations from a row of a tile of AMX to the next, in segment j."""
        width = self.p.channels if self.s.direct else self.w.channels[j.first]
        return width if self.p.pointwise or self.s.shifted else width * self.p.stride[1]

    def word(self, starts: Buffer, offset: Any, i: Any) -> Expr:
        """The activations of row i of a tile, and of those beside it, at an offset from its start, as int32."""
        return self.isa.load_word(self.units, starts[i] + offset, self.s.together)

    def _sum_rows(self, rows: Any) -> None:
        """sums[j, r] = the sum of segment j of row r of a linear layer, zero points and all."""

        def segment(j: Segment) -> None:
            """Segment j of all rows."""
            width, start = self.w.channels[j.first], self._pixel_start(j, 0)
            stride = self.p.channels if self.s.direct else width
            self._sum_each(self.sums, j.index * self.s.most_rows, rows, self.s.least_rows, start, stride, width)

        each_segment(self.p, segment)

    def _sum_windows(self, samples: Index, height: Index) -> None:
        """sums[j, r] of a convolution, whose rows see neighbouring pixels: each of them is summed once."""
        p, line_size = self.p, self.s.image_width
        apart = 1 if self.s.shifted else p.stride[1]

        def segment(j: Segment) -> None:
            """Segment j of all rows: sums of pixels, then of those that a row sees."""
            width = self.w.channels[j.first]
            if self.s.shifted:
                count, least = samples * self.s.sample_pixels, self.s.sample_pixels
            else:
                lines = (samples - 1) * self.s.band_height + (height - 1) * p.stride[0] + p.kernel[0]
                count, least = lines * line_size, p.kernel[0] * line_size
            self._sum_each(self.pixel_sums, 0, count, least, self.s.plane(j), width, width)
            with T.serial(0, samples) as s, T.serial(0, height) as y:
                first = T.bind((s * height + y) * p.out_width)
                line, row = T.bind(self.starts[first]), T.bind(j.index * self.s.most_rows + first)

                def some(x: Index, lanes: int) -> None:
                    """The sums of neighbouring rows from x on."""
                    total = scratch(lanes, "int32")
                    store(total, vmath.i32(0, lanes), span(0, lanes))
                    with T.serial(0, p.kernel[0]) as tap:
                        for side in range(p.kernel[1]):
                            at = line + x * apart + self.s.seen(side, tap)
                            seen = self.pixel_sums[at if lanes == 1 else T.ramp(at, apart, lanes)]
                            store(total, total[span(0, lanes)] + seen, span(0, lanes))
                    store(self.sums, total[span(0, lanes)], span(row + x, lanes))

                each_vector(p.out_width, some, self.isa.words)

        each_segment(self.p, segment)

    def _sum_each(self, sums: Buffer, to: Any, count: Any, least: int, start: Any, stride: int, width: int) -> None:
        """`sum_each` of the gathered activations."""
        sum_each(self.isa.name, self.activations, sums, to, count, least, start, stride, width)

    def _zeros(self, _: Any, lanes: int) -> Expr:
        """The value that pads channels."""
        return zeros(self.isa, lanes)

    def zeros_of(self, j: Segment, m: Any, group: Any) -> Expr:
        """The sum of the activations of segment j if all of row m were zero points."""
        p = self.p
        zero = T.cast(self.b["act_zero"][self.s.entry(j, m, group)], "int32")
        return (zero - self.isa.unsigned_excess) * (p.kernel[0] * p.kernel[1] * p.segments[j.first])
