"""Linear and convolution in floats, for what a plan leaves unquantized: any shape, with an epilogue.

Two forms, chosen by the problem alone (never by the target):

- *panel*: lanes are output channels; the sum of an output runs over its terms (kernel row, kernel column,
  channel) in order, one fused multiply-add each. Weights are read from panels [vectors, terms, lanes], which
  the kernel packs on every call, or which arrive packed once (`packed`: by `pack_weight` in NumPy, or by the
  kernel of `build_pack`).
- *dot*: for few outputs or few rows; lanes are neighbouring terms of the sum (16 virtual lanes, folded by
  halves) and weights are read where they are.

Convolutions read the image from a copy with its zero border, where there is a border.

In bfloat16 (`numerics`) the input is rounded to words of two neighbouring channels on every call, the weight once, when
it is packed; sums are in float32. Terms are words then, a last odd channel paired with zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import (
    SHARES,
    Buffer,
    Buffers,
    Registers,
    each_vector,
    fold,
    partial,
    primfunc,
    register_file,
    sample_view,
    scratch,
    share,
    shares,
    span,
    store,
    unravel,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, i32, keep, splat
from mpq_compiler.backends.tvm.kernels.cpu import bfloat16
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import (
    Conv2d,
    Linear,
    Plan,
    arguments,
    element_type,
    pack_arguments,
    panel_shape,
    plan_of,
)
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.numerics import BF16

# of a panel tile: accumulators and, at most, vectors; of a dot tile: rows and outputs
PANEL_TILES = {"wide": (24, 4), "narrow": (6, 1)}
DOT_TILES = {"wide": (4, 4), "narrow": (2, 2)}
NEAR = 1 << 19
"""Bytes that the second cache holds beside what streams through it."""


def build(problem: Linear | Conv2d, isa: str = "avx512vnni", name: str = "float_gemm") -> PrimFunc:
    """The kernel; `isa` chooses the tiles and no bit of the result."""
    plan = plan_of(problem)

    def body(batch: Any, buffers: Buffers) -> None:
        with bfloat16.instructions(isa) if problem.numerics == BF16 else nullcontext():
            _Body(problem, plan, isa, buffers).emit(batch)

    return primfunc(name, arguments(problem), body)


def build_pack(problem: Linear | Conv2d, name: str = "pack_weight") -> PrimFunc:
    """A kernel (weight, panel) that packs as `pack_weight` does."""
    plan, buffers = plan_of(problem), pack_arguments(problem)

    def body(batch: Any, bufs: Buffers) -> None:
        del batch
        weight, panel = (_flat(bufs[argument.name], argument) for argument in buffers)
        if problem.numerics != BF16:
            _pack(plan, lambda row, term: weight[row * plan.terms + term], panel)
            return
        words, depth = plan.group_inputs, int(buffers[0].shape[-1])

        def word(row: Any, term: Any) -> Any:
            tap, w = T.floordiv(term, words), T.floormod(term, words)
            at = (row * (plan.terms // words) + tap) * depth + 2 * w
            high = bfloat16.rounded(weight[T.min(at + 1, plan.outputs * plan.terms // words * depth - 1)])
            if depth % 2:
                high = tirx.Select(2 * w + 1 < depth, high, i32(0, 1))
            return bfloat16.pair(bfloat16.rounded(weight[at]), high)

        _pack(plan, word, panel)

    return primfunc(name, buffers, body)


def _flat(buffer: Buffer, argument: Argument) -> Buffer:
    return T.decl_buffer((math.prod(int(n) for n in argument.shape),), argument.dtype, data=buffer.data)


def _pack(plan: Plan, weight: Callable[[Any, Any], Any], panel: Buffer) -> None:
    """``weight(row, term)`` into panel [vectors * terms * lanes]; vectors of all groups in one row."""
    size = plan.outputs if plan.form == "depthwise" else plan.group_outputs
    groups = 1 if plan.form == "depthwise" else plan.groups
    with T.serial(0, groups) as g, T.serial(0, plan.vectors) as v:
        first = T.bind(g * size + T.min(v * plan.lanes, size - plan.lanes))
        with T.serial(0, plan.terms) as k:
            for lane in range(plan.lanes):
                target = ((g * plan.vectors + v) * plan.terms + k) * plan.lanes + lane
                store(panel, weight(first + lane, k), target)


@dataclass(frozen=True)
class _Block:
    """Some vectors of outputs, for all rows.

    It holds sample, image and where that starts, quantizer, rows of a tile, and of each vector its first output and
    place in the packed weight.
    """

    b: Any
    x: Buffer
    start: Any
    quant: Any
    rows: int
    columns: list[Any]
    panels: list[Any]


class _Body:
    """The kernel's body."""

    def __init__(self, problem: Linear | Conv2d, plan: Plan, isa: str, buffers: Buffers):
        self.problem, self.plan, self.buffers = problem, plan, buffers
        self.registers = register_file(isa)
        self.finish = Finish(problem.epilogue, buffers)
        self.in_words = problem.numerics == BF16

    def emit(self, batch: Any) -> None:
        problem, plan = self.problem, self.plan
        argument = next(a for a in arguments(problem) if a.name == "weight")
        self.weight = _flat(self.buffers["weight"], argument)
        if not problem.packed and plan.form != "dot":
            vectors, terms, lanes = panel_shape(problem)
            weight, panel = self.weight, scratch(vectors * terms * lanes, heap=True)
            _pack(plan, lambda row, term: weight[row * terms + term], panel)
            self.weight = panel
        over_samples = plan.form == "dot" and isinstance(problem, Linear) and problem.positions == 1
        self._prepare_image(DOT_TILES[self.registers][0] if over_samples else 1)
        if over_samples:
            self._dot_over_samples(batch)
            return
        with T.serial(0, batch) as b:
            x, start = self._image(b)
            (self._dot if plan.form == "dot" else self._panels)(b, x, start)

    def _multiply(self, a: Any, b: Any, total: Any) -> Any:
        """Add a * b to `total`; of two words, all products."""
        return bfloat16.dot(total, a, b) if self.in_words else fma(a, b, total)

    # ---------------------------------------------------------------------------------------- the image

    def _prepare_image(self, images: int) -> None:
        """Scratch for `images` samples where they are not read as they are: zeroed where they have a border, in words.

        The border stays zero; the interior is written for every sample.
        """
        problem, kind = self.problem, element_type(self.problem)
        if isinstance(problem, Linear):
            self.lines, self.pixels, self.channels, padding = problem.positions, 1, problem.inputs, (0, 0, 0, 0)
        else:
            self.lines, self.pixels, self.channels = problem.height, problem.width, problem.channels
            padding = problem.padding
        top, bottom, left, right = padding
        depth = self.plan.groups * self.plan.group_inputs
        self.row = (self.pixels + left + right) * depth
        self.corner = top * self.row + left * depth
        self.size = (self.lines + top + bottom) * self.row
        self.own = None
        if any(padding) or (self.in_words and not self.by_part):
            self.own = own = scratch(images * self.size, kind, heap=True)
            if any(padding):
                zero = i32 if self.in_words else f32
                each_vector(images * self.size, lambda i, n: store(own, zero(0, n), span(i, n)))

    def _image(self, b: Any, place: int = 0) -> tuple[Buffer, Any]:
        """A flat buffer that holds sample b as it is multiplied, from the index returned; `place` in the scratch."""
        x, own = self.buffers["x"], self.own
        flat, start = sample_view(x, (BATCH, self.lines, self.pixels * self.channels), b)
        if own is None:
            return flat, start
        length, corner = self.pixels * self.channels, place * self.size + self.corner
        with shares(1, self.lines, self.lines * length / 16) as (_, begin, end), T.serial(begin, end) as line:
            source, target = start + line * length, corner + line * self.row
            if not self.in_words:
                each_vector(length, lambda i, n: store(own, flat[span(source + i, n)], span(target + i, n)))
            elif self.channels % 2 == 0:
                self._to_words(flat, source, own, target, length)
            else:
                with T.serial(0, self.pixels) as pixel:
                    words = target + pixel * self.plan.group_inputs
                    self._to_words(flat, source + pixel * self.channels, own, words, self.channels)
        return own, place * self.size

    @staticmethod
    def _to_words(x: Buffer, source: Any, own: Buffer, target: Any, count: int) -> None:
        """`count` neighbours of x as words into `own`."""
        whole, odd = divmod(count, 2)
        if whole:
            each_vector(whole, lambda w, n: store(own, bfloat16.words(x, (), source + 2 * w, n), span(target + w, n)))
        if odd:
            store(own, bfloat16.pair(bfloat16.rounded(x[source + count - 1]), i32(0, 1)), target + whole)

    def _origin(self, row: Any) -> Any:
        """Where the terms of output row `row` start within the image."""
        problem = self.problem
        if isinstance(problem, Linear):
            return row * self.plan.group_inputs
        line, channels = self.plan.tap_steps
        oh, ow = T.floordiv(row, problem.out_width), T.floormod(row, problem.out_width)
        return oh * (problem.stride[0] * line) + ow * (problem.stride[1] * channels)

    def _where(self, row: Any) -> tuple[Any, ...]:
        """Output row as the output's indices."""
        if isinstance(self.problem, Linear):
            return (row,)
        return T.floordiv(row, self.problem.out_width), T.floormod(row, self.problem.out_width)

    # ----------------------------------------------------------------------------------------------- panels

    def _panels(self, b: Any, x: Buffer, start: Any) -> None:
        plan = self.plan
        accumulators, most = PANEL_TILES[self.registers]
        blocks = -(-plan.vectors // most)
        per_block = -(-plan.vectors // blocks)
        depthwise = plan.form == "depthwise"
        size = plan.outputs if depthwise else plan.group_outputs
        groups = 1 if depthwise else plan.groups

        def blocks_of(base: int, number: int, count: int) -> None:
            """`number` blocks of `count` vectors, in every group, from vector `base` on."""
            rows = min(plan.rows, accumulators // count, 12)
            tiles = -(-plan.rows // rows)
            split = min(tiles, max(-(-SHARES // (1 if self.by_part else groups * number)), self.row_parts))
            nanoseconds = plan.rows * plan.terms * groups * number * count * plan.lanes / 32
            most = -(-tiles // split)

            def run(i: Any, part: Any, x: Buffer, start: Any, quant: Any) -> None:
                """Block `i` of the rows of a part."""
                g, index = unravel(i, number)
                first = base + index * count
                columns = [g * size + T.min((first + j) * plan.lanes, size - plan.lanes) for j in range(count)]
                panels = [(g * plan.vectors + first + j) * (plan.terms * plan.lanes) for j in range(count)]
                block = _Block(b, x, start + g * plan.group_inputs, quant, rows, columns, panels)
                self._block(block, *share(tiles, part, split), most)

            if not self.by_part:
                with shares(1, split * groups * number, nanoseconds) as (_, begin, end):
                    quant = self.finish.quantizer(b)
                    with T.serial(begin, end) as i:
                        part, block = unravel(i, groups * number)
                        run(block, part, x, start, quant)
                return
            with shares(1, split, nanoseconds) as (_, begin, end):
                quant, own = self.finish.quantizer(b), scratch(most * rows * plan.group_inputs, "int32", heap=True)
                with T.serial(begin, end) as part:
                    low, high = share(tiles, part, split)
                    low = T.bind(T.min(low * rows, plan.rows - rows))
                    with T.serial(low, T.min(high * rows, plan.rows)) as row:
                        self._to_words(
                            x, start + row * self.channels, own, (row - low) * plan.group_inputs, self.channels
                        )
                    with T.serial(0, number) as block:
                        run(block, part, own, -low * plan.group_inputs, quant)

        full, rest = divmod(plan.vectors, per_block)
        if full:
            blocks_of(0, full, per_block)
        if rest:
            blocks_of(full * per_block, 1, rest)

    @property
    def row_parts(self) -> int:
        """Parts of the rows that all blocks of outputs take one after another, so that the cache holds their inputs.

        One where the weights are what the cache would have to hold.
        """
        plan = self.plan
        inputs = 4 * plan.rows * plan.groups * plan.group_inputs
        weights = 4 * plan.outputs * plan.terms
        worth = plan.form == "panel" and weights <= 2 * NEAR and inputs >= 4 * NEAR
        return -(-inputs // NEAR) if worth else 1

    @property
    def by_part(self) -> bool:
        """Whether such a part is rounded to words just before."""
        return self.in_words and isinstance(self.problem, Linear) and self.row_parts > 1

    def _block(self, block: _Block, begin: Any, end: Any, most: int) -> None:
        """Tiles `begin` to `end`, at most `most`, of a block of outputs.

        A panel that the cache does not hold is taken in pieces, each by all rows: their sums wait in memory meanwhile.
        No bit depends on it.
        """
        plan, lanes = self.plan, self.plan.lanes
        taps = plan.taps[0] * plan.taps[1]
        steps = plan.group_inputs if taps == 1 else taps  # of the sum that pieces consist of
        pieces = min(steps, -(-4 * plan.terms * len(block.columns) * lanes // NEAR)) if most > 1 else 1
        cells = [(i, j) for i in range(block.rows) for j in range(len(block.columns))]
        sums = Registers(len(cells), lanes)

        def row_of(tile: Any) -> Any:
            return T.bind(T.min(tile * block.rows, plan.rows - block.rows))

        def bias(j: int) -> Any:
            found = self.buffers["bias"][span(block.columns[j], lanes)] if self.problem.bias else None
            return f32(0.0, lanes) if found is None else found

        if pieces == 1:
            with T.serial(begin, end) as tile:
                row = row_of(tile)
                for n, (_, j) in enumerate(cells):
                    sums[n] = bias(j)
                self._add_terms(block, row, cells, sums)
                self._finish_tile(block, row, cells, sums.__getitem__)
            return
        waiting = scratch(most * len(cells) * lanes, heap=True)

        def place(tile: Any, n: int) -> Any:
            return span(((tile - begin) * len(cells) + n) * lanes, lanes)

        with T.serial(begin, end) as tile:
            for n, (_, j) in enumerate(cells):
                store(waiting, bias(j), place(tile, n))
        each = -(-steps // pieces)
        with T.serial(0, -(-steps // each)) as piece, T.serial(begin, end) as tile:
            for n in range(len(cells)):
                sums[n] = waiting[place(tile, n)]
            self._add_terms(block, row_of(tile), cells, sums, (piece * each, T.min((piece + 1) * each, steps)))
            for n in range(len(cells)):
                store(waiting, sums[n], place(tile, n))
        with T.serial(begin, end) as tile:
            self._finish_tile(block, row_of(tile), cells, lambda n: waiting[place(tile, n)])

    def _add_terms(
        self, block: _Block, row: Any, cells: list[tuple[int, int]], sums: Registers, steps: Any = None
    ) -> None:
        """Adds the products of a tile to its sums: all, or those of some taps (of some inputs, where there is one)."""
        plan, lanes = self.plan, self.plan.lanes
        origins = [T.bind(block.start + self._origin(row + i)) for i in range(block.rows)]
        depthwise = plan.form == "depthwise"
        inner = 1 if depthwise else plan.group_inputs

        def add(kh: Any, kw: Any, c: Any) -> None:
            tap = kh * plan.tap_steps[0] + kw * plan.tap_steps[1] + c
            term = (kh * plan.taps[1] + kw) * inner + c
            for n, (i, j) in enumerate(cells):
                where = origins[i] + tap
                x = block.x[span(where + block.columns[j], lanes)] if depthwise else splat(block.x[where], lanes)
                weight = self.weight[span(block.panels[j] + term * lanes, lanes)]
                sums[n] = self._multiply(x, weight, sums[n])

        if steps is None:
            with T.serial(0, plan.taps[0]) as kh, T.serial(0, plan.taps[1]) as kw, T.serial(0, inner) as c:
                add(kh, kw, c)
        elif plan.taps == (1, 1):
            with T.serial(*steps) as c:
                add(0, 0, c)
        else:
            with T.serial(*steps) as tap, T.serial(0, inner) as c:
                add(T.floordiv(tap, plan.taps[1]), T.floormod(tap, plan.taps[1]), c)

    def _finish_tile(self, block: _Block, row: Any, cells: list[tuple[int, int]], sums: Callable[[int], Any]) -> None:
        """Stores the rows of a tile."""
        for n, (i, j) in enumerate(cells):
            where, column = self._where(row + i), block.columns[j]
            value = self.finish(sums(n), block.b, where, column, block.quant)
            store(self.buffers["y"], value, block.b, *where, span(column, self.plan.lanes))

    # -------------------------------------------------------------------------------------------------- dot

    def _dot(self, b: Any, x: Buffer, start: Any) -> None:
        plan = self.plan
        rows = min(DOT_TILES[self.registers][0], plan.rows)
        tiles = -(-plan.rows // rows)
        with shares(1, tiles, self._nanoseconds) as (_, begin, end):
            quant = self.finish.quantizer(b)
            with T.serial(begin, end) as tile:
                row = T.bind(T.min(tile * rows, plan.rows - rows))
                where = [(b, start + self._origin(row + i), self._where(row + i), quant) for i in range(rows)]
                self._dot_rows(x, where, share_outputs=tiles == 1)

    @property
    def _nanoseconds(self) -> float:
        """How long a sample takes, at the rate of multiplication or of reading weights from memory."""
        return max(self.plan.rows / 16, 1 / 4) * self.plan.outputs * self.plan.terms

    def _dot_over_samples(self, batch: Any) -> None:
        """One row for each sample: tiles of samples, so that a batch reads the weights fewer times."""
        rows = DOT_TILES[self.registers][0]
        with T.serial(0, T.floordiv(batch, rows)) as tile:
            self._dot_samples([tile * rows + i for i in range(rows)])
        with T.serial(0, T.floormod(batch, rows)) as i:
            self._dot_samples([batch - T.floormod(batch, rows) + i])

    def _dot_samples(self, samples: list[Any]) -> None:
        images = [self._image(sample, place) for place, sample in enumerate(samples)]
        rows = [(b, start, (0,), self.finish.quantizer(b)) for b, (_, start) in zip(samples, images, strict=True)]
        self._dot_rows(images[0][0], rows, share_outputs=True)

    def _dot_rows(self, x: Buffer, rows: list[tuple[Any, Any, tuple[Any, ...], Any]], share_outputs: bool) -> None:
        """Output rows (sample, origin, where in the output, quantizer) through all outputs, which threads may share."""
        plan = self.plan
        outputs = min(DOT_TILES[self.registers][1], plan.outputs)
        results = scratch(len(rows) * plan.outputs, heap=plan.outputs > 4096)
        origins = [T.bind(origin) for _, origin, _, _ in rows]
        cost = self._nanoseconds if share_outputs else 0
        with shares(1, -(-plan.outputs // outputs), cost) as (_, begin, end), T.serial(begin, end) as part:
            first = T.bind(T.min(part * outputs, plan.outputs - outputs))
            self._dot_tile(x, origins, first, outputs, results)
        for i, (b, _, where, quant) in enumerate(rows):

            def finish(c: Any, lanes: int, i: int = i, b: Any = b, where: Any = where, quant: Any = quant) -> None:
                value = results[span(i * plan.outputs + c, lanes)]
                if self.problem.bias:
                    value = value + self.buffers["bias"][span(c, lanes)]
                store(self.buffers["y"], self.finish(value, b, where, c, quant), b, *where, span(c, lanes))

            each_vector(plan.outputs, finish)

    def _dot_tile(self, x: Buffer, origins: list[Any], first: Any, outputs: int, results: Buffer) -> None:
        """Sums of rows x outputs into `results` [rows, all outputs], without bias."""
        plan = self.plan
        run = plan.taps[1] * plan.group_inputs  # the columns of a kernel row and their channels are neighbours
        cells = [(i, j) for i in range(len(origins)) for j in range(outputs)]
        sums = Registers(len(cells), LANES)
        for n in range(len(cells)):
            sums[n] = f32(0.0, LANES)

        def add(kh: Any, load: Any) -> None:
            images = [keep(load(x, origin + kh * plan.tap_steps[0])) for origin in origins]
            weights = [keep(load(self.weight, (first + j) * plan.terms + kh * run)) for j in range(outputs)]
            for n, (i, j) in enumerate(cells):
                sums[n] = self._multiply(images[i], weights[j], sums[n])

        with T.serial(0, plan.taps[0]) as kh:
            if run >= LANES:
                with T.serial(0, run // LANES) as v:
                    add(kh, lambda buffer, at: buffer[span(at + v * LANES, LANES)])
            if run % LANES:
                tail = run - run % LANES
                add(kh, lambda buffer, at: partial(buffer, (), at + tail, run % LANES)[0])
        for n, (i, j) in enumerate(cells):
            store(results, fold(sums[n]), i * plan.outputs + first + j)
