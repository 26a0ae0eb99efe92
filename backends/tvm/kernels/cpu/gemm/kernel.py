"""The kernel: pieces of work, tiles of rows, and what a tile is multiplied by."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Index,
    Shared,
    flat,
    primfunc,
    scratch,
    share,
    shared,
    span,
    store,
    with_functions,
)
from mpq_compiler.backends.tvm.kernels.cpu import amx, sme
from mpq_compiler.backends.tvm.kernels.cpu.gemm.accumulate import Accumulation
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import each_segment, loop, opaque, quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.gemm.finish import Finish, Group, Summed
from mpq_compiler.backends.tvm.kernels.cpu.gemm.gather import Rows
from mpq_compiler.backends.tvm.kernels.cpu.gemm.outer import OuterAccumulation
from mpq_compiler.backends.tvm.kernels.cpu.gemm.schedule import Runs, Schedule
from mpq_compiler.backends.tvm.kernels.cpu.gemm.spread import Spread
from mpq_compiler.backends.tvm.kernels.cpu.gemm.tiles import TileAccumulation
from mpq_compiler.backends.tvm.kernels.cpu.gemm.weights import Block, Weights
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa, Tile
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment, WeightLayout
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import FEW_SEGMENTS, QuantMatmul, calling


def arguments(problem: QuantMatmul, isa: Isa) -> list[Argument]:
    """The buffers of the kernel in calling order (`calling`)."""
    return calling(problem, WeightLayout(problem, isa).buffers())


def build(problem: QuantMatmul, isa: Isa, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem, isa))``; the batch is the only symbolic size."""

    def body(batch: Any, buffers: Buffers) -> None:
        """The kernel on flat buffers."""
        Kernel(problem, isa, {key: flat(buffer) for key, buffer in buffers.items()}, functions).emit(batch)

    functions = sme.Functions(name)
    return with_functions(primfunc(name, arguments(problem, isa), body), functions.made)


class Kernel:
    """Emits one kernel. The flat buffers of the arguments are in `self.b`, by name."""

    def __init__(self, problem: QuantMatmul, isa: Isa, buffers: Buffers, functions: sme.Functions) -> None:
        self.s = schedule = Schedule(problem, isa)
        self.p, self.isa, self.w, self.b = schedule.p, schedule.isa, schedule.w, buffers
        self.rows, self.block = Rows(schedule, buffers), Block(schedule, buffers)
        self.finish = Finish(schedule, buffers, self.rows, self.block)
        self.functions = functions

    def emit(self, batch: Any) -> None:
        """The whole kernel: pieces of work, which write disjoint parts of the output."""
        p, blocks = self.p, self.w.blocks
        tall, rows = self.s.tile.rows, batch * p.rows
        if p.pointwise:  # chunks of whole tiles
            total, most, bands = T.bind(quotient(rows + (tall - 1), tall)), self.s.most_rows // tall, 1
        else:
            total, most, bands = batch, self.s.samples, self.s.bands
        chunks = T.bind(quotient(total + (most - 1), most))
        each = T.bind(quotient(total, T.max(chunks, 1)))
        with shared(self.s.nanoseconds) as team:
            self._allocate(team)
            with team.loop(0, chunks * (bands * blocks * self.s.parts)) as piece:
                block = T.bind(quotient(piece, self.s.parts))
                band = T.bind(quotient(block, blocks))
                chunk = T.bind(quotient(band, bands))
                # Without a product of rows and chunks, which might not fit 32 bits.
                start = opaque(chunk * each + T.min(chunk, total - each * chunks))
                count = opaque(T.Select(chunk < total - each * chunks, each + 1, each))
                if p.pointwise:
                    first = T.bind(start * tall)
                    here, gather = self.rows.chunk_of_rows(first, opaque(T.min(count * tall, rows - first)))
                else:
                    here, gather = self.rows.chunk_of_images(start, count, band - chunk * bands)
                if not self.s.direct or p.has_offset or self.s.paired or self.s.planes:
                    self._once(0, band, blocks * self.s.parts, partial(self._gather, gather))
                self.block.number = T.bind(block - band * blocks) if blocks > 1 else 0
                self._multiply(here, piece - block * self.s.parts, block)
            if self.spread:
                self.spread.flush()
            if self.isa.amx:
                amx.release()

    def _gather(self, gather: Callable[[], None]) -> None:
        """Gathers a chunk, once nothing waits for the sums of the activations of the one before."""
        if self.spread and self.p.has_offset:
            self.spread.flush()
        gather()

    def _once(self, cell: int, number: Any, repeated: int, body: Callable[[], None]) -> None:
        """body(), where the thread has not done it for this number: so many pieces in a row have the same one."""
        if repeated == 1:
            body()
            return
        with T.If(self.done[cell] != number), T.Then():
            body()
            store(self.done, number, cell)

    def _allocate(self, team: Shared) -> None:
        """The working memory of a thread."""
        segments = len(self.p.segments)
        self.done = team.workspace(2, "int32")  # the chunk that is gathered, the block that is unpacked
        for cell in range(2):
            store(self.done, T.int32(-1), cell)
        self.rows.allocate(team)
        self.products: Any = None
        self.spread: Spread | None = None
        size = self.s.tile.rows * self.s.tile.vectors * self.isa.words
        if self.isa.depth:
            if not self.s.waits or self._starts_differ:  # sums, or first values
                self.products = team.workspace((segments if segments <= FEW_SEGMENTS else 1) * size, "int32")
            if self.s.waits:
                self.spread = Spread(self.s, team, self.finish)
            if self.isa.amx:
                amx.configure(team.workspace(amx.CONFIGURATION, "int32"))
            else:
                sme.require_length()
        elif self.s.slices or segments == FEW_SEGMENTS or (segments == 1 and not team.serial and self.isa.unit == 1):
            tiles = self.s.most_tiles if self.s.slices else 1
            self.products = team.workspace(segments * tiles * size, "int32")
        self.block.allocate(team)

    def _multiply(self, rows: Any, part: Any, number: Any) -> None:
        """A part of the tiles of the gathered rows times the block of weights, the kernel's block of that number."""
        tall = self.s.tile.rows

        def first_row(t: Any) -> Any:
            """Number of the first row of tile t; the last tile may overlap the one before."""
            return opaque(T.min(t * tall, rows - tall))

        def tiles() -> None:
            """Whole tiles, those of the part."""
            first, end = share(T.bind(quotient(rows + (tall - 1), tall)), part, self.s.parts)
            if self.s.slices:
                self._multiply_slices(first, end, first_row)
                return
            whole = self.s.unpacks and not self.s.ring  # blocks are unpacked before they are multiplied
            with T.serial(first, end) as t:
                fresh: Any = False
                if whole:
                    fresh = T.bind(self.done[1] != number) if self.s.parts > 1 else t == 0
                self._tile(self.s.tile, first_row(t), t, fresh)
                if whole and self.s.parts > 1:
                    store(self.done, number, 1)

        own, isa = self.p.rows, self.isa  # rows of a sample
        # Whether registers hold the sums of that many beside what unpacking takes: more for int16 and for three bits.
        most = 12 if isa.weight == "int8" and self.p.bits != 3 else 8
        spacious = isa.words > 8 * isa.parts or own * self.s.tile.vectors * isa.parts <= most

        def few() -> None:
            """Fewer rows than a tile has: some at once, then the last."""
            some = own if spacious and 1 < own <= tall else 2
            count = T.bind(quotient(rows, some))
            with T.serial(0, count) as n:
                self._tile(Tile(self.s.tile.vectors, some), opaque(n * some), None, self.s.unpacks)
            if some != own:
                last = partial(self._tile, Tile(self.s.tile.vectors, 1))
                when(rows > count * some, lambda: last(opaque(rows - 1), None, self.s.unpacks))

        alone = spacious and own == tall
        if self.isa.depth or (self.s.least_rows >= tall and not alone):
            tiles()
        else:
            enough = rows > tall if alone else rows >= tall
            when(enough, tiles, few if self.s.parts == 1 else lambda: when(part == 0, few))

    def _multiply_slices(self, first: Any, end: Any, first_row: Callable[[Any], Any]) -> None:
        """Tiles [first, end), slice by slice of k: each is read from memory once and stays in the L1 cache."""
        p, w, tile, lanes = self.p, self.w, self.s.tile, self.isa.words
        size = tile.rows * tile.vectors * lanes

        def product(j: int, t: Any) -> Any:
            """Where the sums of segment j of tile t wait."""
            return T.bind((t + j * self.s.most_tiles) * size)

        with T.serial(first, end) as t:
            r = first_row(t)
            groups = self._groups(tile, r)
            for j in range(len(p.segments)):
                self._start(tile, Segment(j), r, groups, self.products, product(j, t))
        for j, slices in enumerate(self.s.slices):
            runs = self.s.runs(Segment(j))
            steps = runs.steps // slices
            with T.serial(0, runs.count) as tap, T.serial(0, slices) as n:
                begin = T.bind(Segment(j).before(w.segment_steps) + (tap * slices + n) * steps)
                offset = T.bind(runs.offset(tap) + n * (steps * self.isa.kpack))
                with T.serial(first, end) as t:
                    r, at = first_row(t), product(j, t)

                    def initial(i: Any, v: Any, at: Any = at) -> Expr:
                        """The sums that the slices before have left."""
                        return self.products[span(at + (i * tile.vectors + v) * lanes, lanes)]

                    weights = self.block.weights(begin, 0, self.s.unpacks and t == first)
                    ahead = self.block.ahead(begin, steps, t)
                    sums = Accumulation(self.s, self.rows, self.block, tile, weights, ahead)
                    sums.begin(Segment(j), r, offset, initial)
                    sums.add(Runs(1, steps, lambda _: 0))
                    sums.end(self.products, at)
        with T.serial(first, end) as t:
            r = first_row(t)
            groups = self._groups(tile, r)
            products = [(self.products, product(j, t)) for j in range(len(p.segments))]
            loop(tile.rows, partial(self.finish.row, self._summed(tile, products, None, groups, r)))

    @property
    def _starts_differ(self) -> bool:
        """Whether each row of a tile of a matrix engine has first values of its own."""
        return not self.p.late_zeros and (self.p.groups > 1 or self.p.dynamic)

    def _groups(self, tile: Tile, r: Any) -> Group:
        """The time groups of the rows r .. r + tile.rows of the chunk, by their number in the tile."""
        if self.p.groups == 1:
            return lambda _: 0
        groups = scratch(tile.rows, "int32")
        with T.unroll(0, tile.rows) as i:
            store(groups, self.rows.group_of(r + i), i)
        return lambda i: T.bind(groups[i])

    def _summed(
        self, tile: Tile, products: list[tuple[Buffer, Any]], scaled: Buffer | None, groups: Group, r: Any
    ) -> Summed:
        """A tile of the block and chunk that are multiplied now."""
        return Summed(tile, products, scaled, groups, self.block.number, self.rows.first_row, r)

    def _tile(self, tile: Tile, r: Any, t: Any, fresh: Any) -> None:
        """Rows r .. r + tile.rows of the chunk, tile t of it, times one block of weights, to the output.

        Few rows have no t; fresh: see `Weights`.
        """
        segments = len(self.p.segments)
        if self.spread:
            self.spread.begin(self.block.number, self.rows.first_row, r)
        elif self.s.asks and t is not None:
            with T.unroll(0, tile.rows) as i:
                self.finish.ask(tile, self.block.number, self.rows.first_row, r + tile.rows, i)
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
                waits = self.products is not None or self.spread
                products.append((self.products if waits else scratch(size, "int32"), j * size))
                self._whole_segment(tile, Segment(j), r, groups, *products[j], t, fresh)
        if self.spread:
            self.spread.end(self.block.number, self.rows.first_row, r)
            return
        # One body for all rows keeps the code small where epilogues are long.
        loop(tile.rows, partial(self.finish.row, self._summed(tile, products, scaled, groups, r)))

    def _scale_groups(self, tile: Tile, r: Any, groups: Group, scaled: Buffer, t: Any, fresh: Any) -> None:
        """Sum the bias and the scaled products of all segments into `scaled`, in order.

        Its shape is [tile.rows, vectors, lanes], in float32.

        Of many segments each is scaled as soon as it is summed, so that one product is held at a time. What dynamic
        rows have of their own, and the bias, is left to `Finish.row`.
        """
        p, w, lanes = self.p, self.w, self.isa.lanes
        product = self.products if self.isa.depth else scratch(tile.rows * tile.vectors * lanes, "int32")

        def cell(i: Any, v: Any) -> Any:
            """Register v of row i."""
            return span((i * tile.vectors + v) * lanes, lanes)

        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            at = span(self.block.channel(v), lanes)
            first = self.b["bias"][at] if p.has_bias and not p.dynamic else vmath.f32(0.0, lanes)
            store(scaled, first, cell(i, v))

        def segment(j: Segment) -> None:
            """Adds segment j."""
            self._whole_segment(tile, j, r, groups, product, 0, t, fresh)
            with T.unroll(0, tile.rows) as i:
                rows = None
                if not p.dynamic:
                    rows = T.bind(self.b["act_scale"][self.s.entry(j, self.rows.first_row + r + i, groups(i))])
                with T.unroll(0, tile.vectors) as v:
                    at = j.index * w.outputs + self.block.number * w.block + v * lanes
                    own = self.b["weight_scale"][span(at, lanes)]
                    total = tirx.Cast(f"float32x{lanes}", product[cell(i, v)])
                    factor = own if rows is None else vmath.mul(vmath.splat(rows, lanes), own)
                    store(scaled, vmath.fma(total, factor, scaled[cell(i, v)]), cell(i, v))

        each_segment(self.p, segment)

    def _start_value(self, j: Segment, m: Any, group: Any, v: Any) -> Expr:
        """The first value of the accumulator of row m, register v."""
        p, w, lanes = self.p, self.w, self.isa.lanes
        if self.p.late_zeros and not self.isa.unsigned_excess:
            return vmath.i32(0, self.isa.words)
        table = j.index if p.dynamic else j.index * p.groups + group
        first = self.b["start"][span(table * w.outputs + self.block.number * w.block + v * lanes, lanes)]
        if p.dynamic and not self.p.late_zeros:
            zero = T.cast(self.b["act_zero"][m], "int32")
            taps = p.kernel[0] * p.kernel[1] * p.segments[j.first]
            first = self.isa.product(first, T.bind(self.isa.unsigned_excess - zero), 127 * taps)
        return self.isa.unfolded(first)

    def _start(self, tile: Tile, j: Segment, r: Any, groups: Group, product: Buffer, at: Any) -> None:
        """product[at ..] = the first values of the accumulators of a tile."""
        with T.unroll(0, tile.rows) as i, T.unroll(0, tile.vectors) as v:
            first = self._start_value(j, self.rows.first_row + r + i, groups(i), v)
            store(product, first, span(at + (i * tile.vectors + v) * self.isa.words, self.isa.words))

    def _in_tiles(
        self, tile: Tile, j: Segment, weights: Weights, ahead: tuple[Index, int, Index]
    ) -> TileAccumulation | OuterAccumulation:
        """The sums of a tile of rows and the block, by what the CPU has."""
        if self.isa.amx:
            before = self.spread.before(j.first) if self.spread else None
            beside = self.spread.step if self.spread and j.first == 0 else None
            return TileAccumulation(self.s, self.rows, self.block, tile, weights, ahead, before, beside)
        return OuterAccumulation(self.s, self.rows, self.block, tile, weights, ahead, self.functions)

    def _whole_segment(
        self, tile: Tile, j: Segment, r: Any, groups: Group, product: Buffer, to: Any, t: Any, fresh: Any
    ) -> None:
        """product[to ..] = segment j of tile t of the chunk; the sums of a tile that waits stay in tiles (`Spread`)."""
        p, w, begin = self.p, self.w, j.before(self.w.segment_steps)
        ahead = self.block.ahead(begin, self.w.segment_steps[j.first], t)
        weights = self.block.weights(begin, None if t is None else begin, fresh)
        if self.isa.depth:
            tiles = self._in_tiles(tile, j, weights, ahead)
            if p.late_zeros or self.s.adds_starts:
                tiles.begin(j, r, None)
            elif not self._starts_differ:
                tiles.begin(j, r, (self.b["start"], T.bind(j.index * w.outputs + self.block.channel(0)), 0))
            else:
                self._start(tile, j, r, groups, product, to)
                tiles.begin(j, r, (product, to, tile.vectors * self.isa.lanes))
            tiles.add(self.s.runs(j))
            tiles.end(product, to)
            return

        def initial(i: Any, v: Any) -> Expr:
            """The first value of a sum."""
            return self._start_value(j, self.rows.first_row + r + i, groups(i), v)

        sums = Accumulation(self.s, self.rows, self.block, tile, weights, ahead)
        sums.begin(j, r, 0, initial)
        sums.add(self.s.runs(j))
        sums.end(product, to)
