"""The schedule of one kernel: chunks of rows, slices of k, and how the input is read. It emits nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.common.template import Index
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import quotient
from mpq_compiler.backends.tvm.kernels.cpu.isa import SME, TILE_ROWS, Isa
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment, WeightLayout
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import FEW_SEGMENTS, QuantMatmul

PANEL_BYTES = 256 * 1024
"""Gathered activations of a chunk, about: a quarter to a half of the L2 cache of a core."""
WIDE_PANEL_BYTES = 768 * 1024
"""Gathered activations of a chunk where tiles of AMX multiply: all CPUs that have them have 2 MiB of L2."""
MOST_ROWS, LEAST_ROWS = 512, 96
"""Rows of a chunk, where there are that many: enough to make up for unpacking the weights."""
SLICE_BYTES = 24 * 1024
"""Weights of a slice, with room for activations and sums beside them in an L1 cache of 32 KiB or more."""
SLICED_ROWS = 36
"""Up to so many rows weights are read slice by slice."""
RING_STEPS, NEAR_PANEL_BYTES = 4, 32 * 1024
"""Steps of tiles whose weights are unpacked where each tile of rows unpacks its own: where one is all that there is, or
two would read a panel that fills the first cache twice.
"""
FIRST_CACHE_BYTES = 48 * 1024
"""Bytes of the first cache of CPUs that have tiles of AMX: a larger block of weights leaves nothing of itself there."""
ASKED_RESULTS = 32 * 1024
"""Results of a sample from which on kernels in registers ask for the memory of a tile while they multiply the one
before: in a step other kernels have pushed it out of the second cache. Where it is near, asking takes a hundredth.
"""
PIECES = 16
"""Pieces of work, at least, where there are so many tiles: then threads get equal parts, nearly."""


@dataclass(frozen=True)
class Runs:
    """Runs of neighbouring activations, which the values of k are.

    count:  how many there are
    steps:  of each
    offset: number of a run -> its distance from the first, in activations
    """

    count: int
    steps: int
    offset: Callable[[Index], Index]


class Schedule:
    """All that is decided before code is emitted.

    p, isa, w:   the problem; the ISA as its layout of weights takes it; that layout
    tile:        the micro-kernel
    direct:      dot products read the input itself, not a gathered copy
    unpacks:     weights are unpacked, or made wider, before they are multiplied
    paired:      units of two rows lie together in memory (`copies` of each pixel, `together` rows in a unit)
    image_height, image_width: extent of the padded image that the kernel reaches, of a convolution
    shifted:     whether it lies in memory once for each horizontal tap, in lines of the output's width (`Rows`)
    planes:      dot products read the values of a step of all pixels side by side, not all steps of a pixel
    plane_pixels: from one step to the next
    sample_pixels, phase_lines: of a sample in the gathered copy; its lines that are a stride apart
    most_rows, least_rows: of a chunk
    pixels:      of the gathered copy
    samples, bands, band, band_height: of a convolution: samples of a chunk, or bands of a sample; their rows of outputs
                 and of inputs
    parts:       that the tiles of a chunk and block are shared in
    slices:      how many a run of k is cut into, for each segment; none where all of k is one
    most_tiles, usual_tiles: of a chunk
    aligned:     steps that share bytes are always neighbours in a run
    waits:       a tile is finished while the next one is multiplied (`Spread`); of K-groups sums are scaled one by one
    asks:        tiles in registers ask for the memory that the next one is written to (measured on x86 alone)
    adds_starts: first values are added where sums are finished, for which vector units have the time
    passing:     the weights of a block pass the first cache and are not to stay in it
    ring:        steps of registers that the panel of unpacked weights has, which are used again and again; 0 where it
                 has all of a block
    """

    def __init__(self, problem: QuantMatmul, isa: Isa) -> None:
        self.p, self.w = problem, WeightLayout(problem, isa)
        self.isa = isa = self.w.isa
        self.tile = self.w.tile if self.w.tile.rows and problem.tile else self.w.fitted()
        # Where channels are whole steps of k and codes are used as they are, the input needs no copy.
        self.direct = problem.pointwise and isa.reads_codes and self.w.channels == problem.segments
        self.unpacks = (problem.bits < 8 and not self.w.looked_up) or isa.weight != "int8"
        # Units of two rows lie together in memory where the second is always the next pixel of a line. Each row is in
        # one of them, or in two: where the first may be any pixel.
        self.paired = isa.unit == 2 and problem.rows > 1 and (problem.pointwise or problem.out_width % 2 == 0)
        self.together = 2 if self.paired else 1
        self.copies = 2 if self.paired and (not problem.pointwise or problem.rows % 2) else 1
        if not problem.pointwise:
            # Extent of the padded image that the kernel reaches.
            self.image_height = (problem.out_height - 1) * problem.stride[0] + problem.kernel[0]
            self.image_width = (problem.out_width - 1) * problem.stride[1] + problem.kernel[1]
        # Rows of a tile are to be equally far apart: neighbours in a line, or all rows of a sample.
        self.planes = bool(isa.depth) and isa.engine == SME
        near = problem.out_width % TILE_ROWS == 0 and not (self.planes and problem.stride[1] > 1)
        self.shifted = bool(isa.depth) and not problem.pointwise and not near
        self._size_chunks()
        self._size_slices()
        self.waits = self.isa.amx and len(problem.segments) <= FEW_SEGMENTS
        self.asks = self.isa.name.startswith("x86") and problem.rows * problem.outputs >= ASKED_RESULTS
        self.adds_starts = self.waits and not (problem.late_zeros or problem.dynamic or problem.groups > 1)
        self.ring = 0
        panel = self.w.steps * self.tile.vectors * self.isa.vector
        few = self.usual_tiles == 1 or (self.usual_tiles == 2 and panel > NEAR_PANEL_BYTES)
        if self.isa.amx and self.unpacks and few:
            self.ring = RING_STEPS * self.isa.tile_steps
        self.passing = self.isa.amx and not self.ring and panel > FIRST_CACHE_BYTES

    def _size_chunks(self) -> None:
        """Sets most_rows, least_rows, pixels, parts and, for images, samples and bands of a chunk."""
        p = self.p
        panel = WIDE_PANEL_BYTES if self.isa.amx else PANEL_BYTES
        pixel = sum(self.w.channels) * (2 if self.isa.activation == "int16" else self.copies)
        if p.pointwise:
            rows = max(min(panel // pixel, MOST_ROWS), LEAST_ROWS)
            self.most_rows = self.pixels = rows // self.tile.rows * self.tile.rows
            self.least_rows = p.rows  # or more than a tile has
            chunks = -(-p.rows // self.most_rows)
        else:
            self._size_bands(p.out_height)
            image = self.sample_pixels * pixel
            self.samples = max(1, min(panel // image, -(-MOST_ROWS // p.rows)))
            if self.shifted and p.rows % TILE_ROWS:  # no tile's rows are of two samples
                self.samples = 1
            bands = min(-(-image // panel), max(1, p.rows // LEAST_ROWS), p.out_height)
            self._size_bands(-(-p.out_height // bands))
            if self.isa.depth and self.least_rows < self.tile.rows:
                self._size_bands(p.out_height)
            chunks = self.bands
            self.most_rows = self.samples * self.band * p.out_width
            self.pixels = self.samples * self.sample_pixels
        # Steps are an odd number of cache lines apart, or they would share sets. Pixels are written in fours.
        self.plane_pixels = (self.pixels + 3 + 15) // 32 * 32 + 16
        rows = min(self.most_rows, p.rows)
        self.parts = max(1, min(-(-PIECES // (chunks * self.w.blocks)), rows // (2 * self.tile.rows)))

    def _size_bands(self, lines: int) -> None:
        """Sets what follows from the lines of outputs of a band."""
        p = self.p
        self.band, self.bands = lines, -(-p.out_height // lines)
        self.band_height = (lines - 1) * p.stride[0] + p.kernel[0]
        self.least_rows = (p.out_height - (self.bands - 1) * lines) * p.out_width
        self.sample_pixels = self.band_height * self.image_width
        if self.shifted:
            self.phase_lines = -(-self.band_height // p.stride[0])
            self.sample_pixels = p.kernel[1] * p.stride[0] * self.phase_lines * p.out_width

    def _size_slices(self) -> None:
        """Sets slices, most_tiles, usual_tiles and aligned."""
        p, w, tile = self.p, self.w, self.tile
        self.most_tiles, self.usual_tiles = (-(-n // tile.rows) for n in (self.most_rows, min(p.rows, self.most_rows)))
        runs = [self.runs(Segment(j)).steps for j in range(len(p.segments))]
        begins = [sum(w.segment_steps[:j]) for j in range(len(p.segments))]
        self.aligned = not any(n % w.pack for n in (*runs, *begins))
        self.slices: list[int] = []
        few = self.usual_tiles * tile.rows <= SLICED_ROWS and not self.isa.depth
        if few and len(p.segments) <= FEW_SEGMENTS:
            most = SLICE_BYTES // (tile.vectors * self.isa.vector)
            for run in runs:
                fitting = (n for n in range(1, run + 1) if run % n == 0 and run // n <= most)
                self.slices.append(next(fitting, 1))
            if sum(self.slices) * p.kernel[0] == 1:
                self.slices = []
        if self.slices:
            self.parts = 1  # or each of them would read all weights

    @property
    def nanoseconds(self) -> float:
        """Time of a sample, at the rate of dot products of a core or of reading weights from memory."""
        p = self.p
        products = 8 * self.isa.vector / self.isa.parts
        return max(p.rows * p.reduction * p.outputs / products, p.reduction * p.outputs * p.bits / 160)

    def runs(self, j: Segment) -> Runs:
        """The runs of k of segment j: one for each vertical tap, or for each tap of a shifted image or of planes."""
        c, (down, across) = self.w.channels[j.first], self.p.kernel
        if self.p.pointwise:
            return Runs(1, c // self.isa.kpack, lambda _: 0)
        if not self.shifted and not self.planes:
            return Runs(down, across * c // self.isa.kpack, lambda tap: self.seen(0, tap) * c)

        def offset(tap: Index) -> Index:
            """The distance of a tap."""
            y = quotient(tap, across)
            return self.seen(tap - y * across, y) * (self.isa.kpack if self.planes else c)

        return Runs(down * across, c // self.isa.kpack, offset)

    def seen(self, side: Index, line: Index) -> Index:
        """How many pixels behind a row's first is the one that it sees by a horizontal tap, so many lines below."""
        return self.shifted_line(side, line) if self.shifted else line * self.image_width + side

    def shifted_line(self, side: Index, line: Index) -> Index:
        """The first pixel of a line of a shifted image, in its copy for a horizontal tap, from a sample's first on.

        Of lines that are a stride apart each begins where the one before ends.
        """
        down, width = self.p.stride[0], self.p.out_width
        if down == 1:
            return (side * self.phase_lines + line) * width
        whole = quotient(line, down)
        return ((side * down + (line - whole * down)) * self.phase_lines + whole) * width

    def plane(self, j: Segment) -> Index:
        """Where segment j begins in the gathered activations."""
        return self.pixels * j.before(self.w.channels)

    def entry(self, j: Segment, m: Index, group: Index) -> Index:
        """Where row m, of a sample of that time group, finds segment j's scale and zero point."""
        return m if self.p.dynamic else j.index * self.p.groups + group
