"""The kernel of integer products: what a block of threads copies, multiplies and stores."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import quantizer
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.cuda.gemm.lookup import looked_up
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import BLOCKS, Tile, most_splits, tile
from mpq_compiler.backends.tvm.kernels.cuda.rows import finished
from mpq_compiler.backends.tvm.kernels.cuda.threads import (
    barrier,
    each,
    grid,
    local,
    part,
    primfunc,
    put_values,
    rolled,
    shared_bytes,
    strided,
    values_of,
)
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, CHUNK, STEP, UNIT, Fragments
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import GATED, QuantMatmul, calling, of_sibling

MMA = "mma.sync.aligned.m16n8k32.row.col.s32.u8.s8.s32"
LDMATRIX = "ldmatrix.sync.aligned.m8n8.x4.shared.b16"
ONES = 0x01010101
COPY_OR_FILL = """
__forceinline__ __device__ void {name}(void* target, const void* source, unsigned word, int inside, unsigned count) {{
  unsigned address = (unsigned)__cvta_generic_to_shared(target);
  asm volatile("{{\\n .reg .pred p;\\n setp.ne.b32 p, %4, 0;\\n"
               " @p cp.async.{cache}.shared.global [%0], [%1], {size}, %2;\\n"
               " @!p st.shared.{kind} [%0], {words};\\n}}"
               : : "r"(address), "l"(source), "r"(count), "r"(word), "r"(inside) : "memory");
}}
"""
"""A copy, or a word over and over, without a branch. What all pixels of a border have is not read from memory each
time: one place there serves one at a time."""


def arguments(problem: QuantMatmul) -> list[Argument]:
    """The buffers of `cpu.gemm` in calling order, with the weights of `weights.Fragments`."""
    return calling(problem, Fragments(problem).buffers())


def workspaces(problem: QuantMatmul) -> list[Argument]:
    """Sums of blocks that share the k axis: parts [B, most splits x rows x outputs]; row_parts, of rows' codes."""
    if (most := most_splits(problem)) == 1:
        return []
    parts = Argument("parts", (BATCH, most * problem.rows * problem.outputs), "int32")
    return [parts, *([Argument("row_parts", (BATCH, most * problem.rows), "int32")] if problem.has_offset else [])]


def parameters(problem: QuantMatmul) -> list[Argument]:
    """All that the kernel is called with."""
    return [*arguments(problem), *workspaces(problem)]


def build(problem: QuantMatmul, name: str) -> PrimFunc:
    """The kernel ``name(*parameters(problem))``; the batch is the only symbolic size."""

    def body(batch: Any, buffers: Buffers) -> None:
        Kernel(problem, tile(problem), buffers, most_splits(problem)).emit(batch)

    return primfunc(name, parameters(problem), body)


class Kernel:
    """A product in a tile. The one in bfloat16 (`float_products`) has others where it says so.

    instruction: of the tensor cores; sum_type: of its results' registers; x_align: bytes, of activations where it reads
    asynchronous: whether products of a step may still read its stage when the next begins; all are done behind `_wait`
    together: neighbouring results, so many at most, that wait side by side (`_staged`)
    most_splits: `most_splits` of a product of integers; sums of floats have an order
    """

    instruction, sum_type, x_align, asynchronous, together = MMA, "uint32", 64, False, 1

    def __init__(self, problem: QuantMatmul, tile: Tile, buffers: Buffers, most_splits: int = 1) -> None:
        self.p, self.t, self.w = problem, tile, Fragments(problem)
        self.epilogue = problem.epilogue or Epilogue()
        self.b = {name: flat(buffer) for name, buffer in buffers.items()}
        self.buffers = buffers
        sizes = [problem.channels, *problem.segments, *self.w.first_channels]
        self.copied = math.gcd(CHUNK, *sizes)
        """Bytes that are copied at once: addresses are multiples of this."""
        self.several = len(problem.segments) > 1
        self.tables: tuple[Buffer, Buffer] | None = None
        """Scales and zero points of the tile's rows, where there are several."""
        self.sample: Index | None = None
        """That of all rows of the tile, where there are groups of time and it has one."""
        self.most_splits = most_splits
        self.step: Index = 0
        """That is multiplied."""
        self.first_step: Index = 0

    def emit(self, batch: Any) -> None:
        t, p = self.t, self.p
        self.total = T.bind(batch * p.rows)
        down = (self.total + (t.rows - 1)) // t.rows
        across = self.w.outputs // t.columns
        self.splits: Any = 1
        if self.most_splits > 1:
            self.splits = self._shared_by(down * across)
        with grid(down * across * self.splits, t.threads, t.together) as (number, thread):
            self.thread = thread
            self.split: Any = T.bind(number // (down * across)) if self.most_splits > 1 else 0
            block = T.bind(number - self.split * (down * across))
            self.first_row = T.bind(block // across * t.rows)
            self.first_column = T.bind(block % across * t.columns)
            if p.groups > 1 and p.rows % t.rows == 0:
                self.sample = T.bind(tirx.truncdiv(self.first_row, p.rows))
            self.lane, warp = T.bind(thread % 32), T.bind(thread // 32)
            self.warp_row = T.bind(warp // t.across * (t.row_fragments * 16))
            self.warp_column = T.bind(warp % t.across * (t.column_fragments * CHANNELS))
            self._allocate()
            self._rows()
            self._clear()
            self._products()
            if self.most_splits > 1:
                with T.If(self.splits > 1):
                    with T.Then():
                        self._store_parts()
                    with T.Else():
                        self._store()
            else:
                self._store()
            self.tables = self.sample = None
        if self.most_splits > 1:
            self._add_parts()

    def _shared_by(self, tiles: Index) -> Index:
        """How many blocks share the k axis of each of so many tiles: integers add up to the same in any order."""
        return T.bind(T.max(1, T.min(BLOCKS // tiles, self.most_splits)))

    @property
    def fragment(self) -> int:
        """Words of a fragment of weights, of a step."""
        return 32 * self.w.words

    def _allocate(self) -> None:
        t = self.t
        size, words = t.stages * t.rows * STEP, t.stages * (t.columns // CHANNELS) * self.fragment
        self.behind = size + 4 * words
        """Bytes of activations and weights: what is kept beside them begins there."""
        self.x = shared_bytes(self.behind + self._kept, self.x_align)
        """Activations of all stages, bytes; then weights."""
        self.x_words, self.weights = part(self.x, 0, size // 4, "uint32"), part(self.x, size, words, "uint32")
        tiles = 2 * t.row_fragments * t.column_fragments
        self.sums = local(tiles * 4, self.sum_type)
        self.row_sums: Any = local(t.row_fragments * 4, "uint32") if self.p.has_offset else None
        self.own_rows = t.row_fragments * 2
        self.activations: Any = local(self.own_rows * len(self.p.segments), "int32") if self.p.has_offset else None
        """Sums of the activations of a segment, of each row of a thread: offsets count behind all segments."""
        self.y: Any = local(tiles * 4) if self.several else None
        self.a = local(t.row_fragments * 4, "uint32")
        self.decoded = local(t.column_fragments * 4, "uint32")
        if self.w.looked_up:
            words = 2**self.p.bits // 4
            self.table = local(t.column_fragments * words, "uint32")
            for j in range(t.column_fragments):
                fragment = self.first_column // CHANNELS + self._fragment(j)
                for word in range(words):
                    store(self.table, self.b["lut"][fragment * words + word], j * words + word)

    @property
    def _kept(self) -> int:
        """Bytes of shared memory that are kept from segment to segment."""
        return 0

    def _fragment(self, j: int) -> Any:
        """Number j of the fragments of weights that a warp reads, of those of the tile."""
        return self.warp_column // CHANNELS + j

    # --------------------------------------------------------------------------------------------- activations

    @property
    def _whole(self) -> bool:
        """Whether every step reads as many bytes, all of one tap: it then goes on from where the one before was."""
        return len(self.p.segments) == 1 and self.p.channels % STEP == 0 and self.w.taps <= 32

    def _rows(self) -> None:
        """Find the rows and the chunk that a thread copies in every step: one chunk of some rows."""
        p, t = self.p, self.t
        self.copies = -(-t.rows * (STEP // CHUNK) // t.threads)
        self.chunk = T.bind(self.thread % (STEP // CHUNK))
        if p.pointwise and self._whole:
            self.pixel, self.inside = local(self.copies, "int32"), local(self.copies, "uint32")
            for i in range(self.copies):
                row = T.bind(self._copied_row(i))
                store(self.pixel, T.Select(row < self.total, row, 0) * p.channels, i)
                store(self.inside, T.cast(row < self.total, "uint32"), i)
        if not p.pointwise:
            self.pixel = local(self.copies, "int32")
            self.inside = local(self.copies * -(-self.w.taps // 32), "uint32")
            """Of a row which taps meet a pixel of the image, a bit each."""
        if not p.pointwise and self._has_border:
            self.row_group = local(self.copies, "int32")
            self.border = local(self.copies, "uint32")
        for i in range(self.copies) if not p.pointwise else ():
            row = T.bind(self._copied_row(i))
            sample = T.bind(tirx.truncdiv(T.min(row, self.total - 1), p.rows))
            own = T.bind(T.min(row, self.total - 1) - sample * p.rows)
            top = T.bind(own // p.out_width * p.stride[0] - p.padding[0])
            left = T.bind(own % p.out_width * p.stride[1] - p.padding[2])
            store(self.pixel, ((sample * p.height + top) * p.width + left) * p.channels, i)
            self._find_inside(i, top, left, row < self.total)
            if self._has_border:
                group = T.cast(self.b["group"][sample], "int32") if p.groups > 1 else tirx.IntImm("int32", 0)
                store(self.row_group, group, i)
                store(self.border, self._zero_points(i, 0), i)

    def _zero_points(self, i: int, segment: Index) -> Expr:
        """The zero point of a row's activations in a segment, four times: what pixels of the border are."""
        return T.cast(self.b["act_zero"][segment * self.p.groups + self.row_group[i]], "uint32") * T.uint32(ONES)

    def _find_inside(self, i: int, top: Index, left: Index, there: Index) -> None:
        """Finds which taps of a row meet the image. there: whether the row is one of the product's."""
        p, words = self.p, -(-self.w.taps // 32)

        def within(first: Index, size: int, count: int) -> list[Expr]:
            """Finds for each line of taps, or column, whether it is one of the image: 1, else 0."""
            each_ = (tirx.all(there, first + d >= 0, first + d < size) for d in range(count))
            return [vmath.keep(T.cast(is_it, "uint32")) for is_it in each_]

        down, across = within(top, p.height, p.kernel[0]), within(left, p.width, p.kernel[1])
        for word in range(words):
            bits: Any = T.uint32(0)
            for tap in range(32 * word, min(32 * (word + 1), self.w.taps)):
                dy, dx = divmod(tap, p.kernel[1])
                bits = bits | T.bitwise_and(down[dy], across[dx]) << T.uint32(tap % 32)
            store(self.inside, bits, i * words + word)

    def _is_inside(self, i: int, tap: Index) -> Index:
        """Whether a tap of the row meets a pixel of the image: 1 or 0; 0 of taps that do not exist."""
        words = -(-self.w.taps // 32)
        if words == 1:
            bits, place = self.inside[i], T.min(tap, 31)
        else:
            bits, place = self.inside[i * words + T.min(tap // 32, words - 1)], tap % 32
        return vmath.keep(T.bitwise_and(tirx.reinterpret("int32", bits) >> place, 1))

    @property
    def _has_border(self) -> bool:
        return any(self.p.padding)

    def _copied_row(self, i: int) -> Any:
        return self.first_row + self.thread // (STEP // CHUNK) + i * (self.t.threads // (STEP // CHUNK))

    def _target(self, row: Index, stage: Index) -> Index:
        """Where in shared memory the chunk of a row lies."""
        local_row = T.bind(row - self.first_row)
        swapped = T.bitwise_xor(self.chunk, local_row // 2 % 4)
        return T.bind(stage * (self.t.rows * STEP) + local_row * STEP + swapped * CHUNK)

    def _seek(self, begin: Index) -> None:
        """Find where the first step reads, of those that are whole."""
        p, steps = self.p, self.p.channels // STEP
        self.moved = local(1, "int32")
        """From the first pixel of a row to what a step reads of it."""
        tap = T.bind(tirx.truncdiv(begin, steps) if self.w.taps > 1 else tirx.IntImm("int32", 0))
        within = T.bind(begin - tap * steps)
        dy, dx = T.bind(tirx.truncdiv(tap, p.kernel[1])), T.bind(tirx.truncmod(tap, p.kernel[1]))
        first = (dy * p.width + dx) * p.channels + within * STEP
        store(self.moved, first + self.chunk * CHUNK, 0)
        if self.w.taps == 1:
            return
        self.left = local(2, "int32")
        """Steps of the tap, and taps of its line, from this one on."""
        store(self.left, steps - within, 0)
        store(self.left, p.kernel[1] - dx, 1)
        for i in range(self.copies):
            store(self.inside, self.inside[i] >> T.cast(tap, "uint32"), i)

    def _load_whole(self, stage: Index) -> None:
        """A whole step, and where the next one reads: taps of a line are neighbours, those of the next a line away."""
        p = self.p

        def copy(i: int) -> None:
            target = self._target(T.bind(self._copied_row(i)), stage)
            inside = vmath.keep(tirx.reinterpret("int32", self.inside[i] & T.uint32(1)))
            source = self.pixel[i] + self.moved[0]
            if not p.pointwise and self._has_border:
                self._copy(target, self.b["x"], source, tirx.IntImm("int32", CHUNK), (inside, self.border[i]))
            else:
                self._copy(target, self.b["x"], source, inside * CHUNK)

        self._each_copy(copy)
        store(self.moved, self.moved[0] + STEP, 0)
        if self.w.taps == 1:
            return
        store(self.left, self.left[0] - 1, 0)
        with T.If(tirx.EQ(self.left[0], 0)), T.Then():
            store(self.left, tirx.IntImm("int32", p.channels // STEP), 0)
            for i in range(self.copies):
                store(self.inside, self.inside[i] >> T.uint32(1), i)
            store(self.left, self.left[1] - 1, 1)
            with T.If(tirx.EQ(self.left[1], 0)), T.Then():
                store(self.left, tirx.IntImm("int32", p.kernel[1]), 1)
                store(self.moved, self.moved[0] + (p.width - p.kernel[1]) * p.channels, 0)

    def _each_copy(self, copy: Callable[[int], None]) -> None:
        """Makes the copies of a thread; of the last rows not every thread has one."""
        whole = self.t.rows * (STEP // CHUNK) // self.t.threads
        for i in range(self.copies):
            if i < whole:
                copy(i)
                continue
            with T.If(self._copied_row(i) < self.first_row + self.t.rows), T.Then():
                copy(i)

    def _load_activations(self, step: Index, stage: Index) -> None:
        if self._whole:
            self._load_whole(stage)
            return
        p, w = self.p, self.w
        unit = T.bind(step * (STEP // UNIT) + self.chunk // 2)
        number = T.bind(step * (STEP // CHUNK) + self.chunk)  # of the chunk
        if w.even:
            segment: Any = 0 if len(p.segments) == 1 else T.bind(tirx.truncdiv(unit, w.units[0]))
            own = number - segment * (2 * w.units[0])
            tap, channel = self._split(own, w.chunks[0])
            size, before = p.segments[0], segment * p.segments[0]
        else:
            segment = T.bind(w.of_unit(unit, range(len(p.segments))))
            places = [self._split(number - 2 * w.first_units[j], w.chunks[j]) for j in range(len(p.segments))]
            tap = T.bind(w.of_unit(unit, [tap for tap, _ in places]))
            channel = T.bind(w.of_unit(unit, [channel for _, channel in places]))
            size = T.bind(w.of_unit(unit, p.segments))
            before = T.bind(w.of_unit(unit, w.first_channels))
        here = tirx.all(tap < w.taps, unit < sum(w.units))
        # Where chunks are whole, one behind the last of a segment has a tap that is none, or a channel.
        whole = w.taps > 1 and all(channels % CHUNK == 0 for channels in p.segments)
        count = T.bind(T.Select(here, CHUNK if whole else T.max(T.min(size - channel, CHUNK), 0), 0))
        if not p.pointwise:
            dy, dx = (vmath.keep(part) for part in (tirx.truncdiv(tap, p.kernel[1]), tirx.truncmod(tap, p.kernel[1])))
            moved = vmath.keep((dy * p.width + dx) * p.channels + before + channel)
        count = vmath.keep(count)

        def copy(i: int) -> None:
            row = T.bind(self._copied_row(i))
            target = self._target(row, stage)
            if p.pointwise:
                there = T.bind(T.Select(row < self.total, count, 0))
                self._copy(target, self.b["x"], T.Select(there > 0, row * p.channels + before + channel, 0), there)
                return
            inside = self._is_inside(i, tap)
            source = T.Select(T.bitwise_and(inside, T.cast(count > 0, "int32")) > 0, self.pixel[i] + moved, 0)
            if not self._has_border:
                self._copy(target, self.b["x"], source, T.Select(inside > 0, count, 0))
                return
            border = self._zero_points(i, segment) if self.several else self.border[i]
            self._copy(target, self.b["x"], source, count, (inside, border))

        self._each_copy(copy)

    def _split(self, number: Any, chunks: int) -> tuple[Any, Any]:
        """(tap, first channel) of a chunk of a segment."""
        if self.w.taps == 1:
            return tirx.IntImm("int32", 0), T.bind(number * CHUNK)
        tap = T.bind(tirx.truncdiv(number, chunks))
        return tap, T.bind((number - tap * chunks) * CHUNK)

    def _copy(self, target: Any, x: Any, source: Any, count: Any, border: tuple[Any, Any] | None = None) -> None:
        """`count` of 16 values to shared memory, then zeros.

        border: (1 where they come from there, the word of four that are taken otherwise)
        """
        size = self.copied
        source, count = vmath.keep(source), vmath.keep(count)

        if size >= 4:
            cache = "cg" if size == CHUNK else "ca"
            for first in range(0, CHUNK, size):
                at = source + first if first == 0 else T.Select(count > first, source + first, 0)
                given = T.cast(T.max(T.min(count - first, size), 0), "uint32")
                places = self.x.ptr_to([target + first]), x.ptr_to([at])
                if border is None:
                    T.evaluate(T.ptx[f"cp.async.{cache}.shared.global"](*places, size, given))
                    continue
                inside, zeros = border
                arguments = (*places, T.Select(given > T.uint32(0), zeros, T.uint32(0)), inside, given)
                name, words = f"mpq_copy_or_fill_{size}", size // 4
                kind, text = {1: "u32", 2: "v2.u32", 4: "v4.u32"}[words], ", ".join(["%3"] * words)
                text = COPY_OR_FILL.format(
                    name=name, cache=cache, size=size, kind=kind, words=text if words == 1 else f"{{{text}}}"
                )
                T.evaluate(T.cuda.func_call(name, *arguments, source_code=text, return_type="void"))
            return
        for k in range(CHUNK // 4):
            word: Any = T.uint32(0)
            for e in range(4):
                value = self._value(x, source + 4 * k + e, border)
                value = T.if_then_else(count > 4 * k + e, value, T.uint32(0))
                word = word | value << T.uint32(8 * e)
            store(self.x_words, word, target // 4 + k)

    def _value(self, x: Any, at: Any, border: tuple[Any, Any] | None) -> Expr:
        """One value, as `_copy` takes it."""
        value = T.cast(x[at], "uint32")
        if border is None:
            return value
        return T.if_then_else(border[0] > 0, value, border[1] & T.uint32(0xFF))

    def _load_weights(self, step: Index, stage: Index) -> None:
        """The fragments of a step: 128 bits a word of code."""
        t, w = self.t, self.w
        per_fragment = self.fragment // 4  # copies of 4 words
        total = t.columns // CHANNELS * per_fragment
        for first in range(0, total, t.threads):
            i = T.bind(first + self.thread)
            fragment = tirx.truncdiv(i, per_fragment)
            source = ((self.first_column // CHANNELS + fragment) * w.steps + step) * per_fragment
            source = T.bind((source + tirx.truncmod(i, per_fragment)) * 4)
            target = stage * (total * 4) + i * 4

            def copy(source: Any = source, target: Any = target) -> None:
                pointers = self.weights.ptr_to([target]), self.b["tiles"].ptr_to([source])
                T.evaluate(T.ptx["cp.async.cg.shared.global"](*pointers, 16))

            if total - first >= t.threads:
                copy()
            else:
                with T.If(i < total), T.Then():
                    copy()

    # ------------------------------------------------------------------------------------------------ products

    def _clear(self) -> None:
        self._clear_sums(0)
        if self.y is not None:
            self._each_output(lambda at, row, column: store(self.y, self._first(column), at))

    def _clear_sums(self, segment: Index) -> None:
        """Sums of a segment of several start from what the zero points of its activations come to, less than nothing.

        So this is taken off by the tensor cores.
        """
        starts = self.several and not self.p.late_zeros
        for buffer in (self.row_sums,) if starts else (self.sums, self.row_sums):
            if buffer is not None:
                for i in range(int(buffer.shape[0])):
                    store(buffer, tirx.const(0, buffer.dtype), i)
        if starts:
            own = T.bind(T.min(segment, len(self.p.segments) - 1))
            factor = -16 if self.p.integers else -1

            def start(at: int, row: Index, column: Index) -> None:
                value = self._zero(T.min(row, self.total - 1), own) * self.b["start"][own * self.w.outputs + column]
                store(self.sums, tirx.reinterpret("uint32", value * factor), at)

            self._each_output(start)

    def _first(self, column: Any) -> Expr:
        """The value that the float sum of an output starts from."""
        late = self.p.late_zeros
        return self.b["bias"][column] if self.p.has_bias and not late else vmath.f32(0.0, 1)

    def _products(self) -> None:
        w, t = self.w, self.t

        def load(step: Any, stage: Any) -> None:
            self._load_activations(step, stage)
            self._load_weights(step, stage)

        begin, steps = self._steps()
        self.first_step = begin
        if self._whole:
            self._seek(begin)
        ahead_by = t.stages - 1 - self.asynchronous
        for step in range(ahead_by):
            if step < w.steps // self.most_splits:
                load(begin + step, step)
            T.evaluate(T.ptx.cp.async_.commit_group())
        turn = local(1, "int32")
        store(turn, tirx.IntImm("int32", 0), 0)
        with rolled(steps) if self.asynchronous else T.serial(0, steps) as step:
            stage = vmath.keep(turn[0])  # step % t.stages
            store(turn, T.Select(stage < t.stages - 1, stage + 1, 0), 0)
            self._land(ahead_by - 1)
            barrier()

            def load_ahead() -> None:
                if w.steps > ahead_by:
                    ahead, behind = T.bind(step + ahead_by), t.stages - ahead_by
                    with T.If(ahead < steps), T.Then():
                        load(begin + ahead, vmath.keep(T.Select(stage >= behind, stage - behind, stage + ahead_by)))
                T.evaluate(T.ptx.cp.async_.commit_group())

            self.step = begin + step

            def multiply() -> None:
                self._begin_step(stage)
                for ks in range(STEP // UNIT):
                    self._unit(stage, ks)
                    self._end_of_segment(T.bind(step * (STEP // UNIT) + ks), ks)

            if self.asynchronous:
                multiply()
                load_ahead()
            else:
                load_ahead()
                multiply()
        self._wait()

    def _land(self, stages: int) -> None:
        """The thread's copies are there, but for those of the last stages asked for."""
        T.evaluate(T.ptx.cp.async_.wait_group(stages))

    def _begin_step(self, stage: Index) -> None:
        """Does what a step begins with, before products of the last one are waited for."""

    def _wait(self) -> None:
        """Waits for products that are asynchronous."""

    def _steps(self) -> tuple[Any, Any]:
        """(first, number) of those of the block."""
        if self.most_splits == 1:
            return 0, self.w.steps
        begin = T.bind(self.split * self.w.steps // self.splits)
        return begin, T.bind((self.split + 1) * self.w.steps // self.splits - begin)

    def _unit(self, stage: Index, ks: int) -> None:
        """32 values of k."""
        t, lane = self.t, self.lane
        for i in range(t.row_fragments):
            row = T.bind(self.warp_row + i * 16 + lane % 16)
            chunk = T.bitwise_xor(ks * 2 + lane // 16, row // 2 % 4)
            at = stage * (t.rows * STEP) + row * STEP + chunk * CHUNK
            registers = [self.a[i * 4 + r] for r in range(4)]
            T.evaluate(T.ptx[LDMATRIX](*registers, self.x.ptr_to([at])))
        for j in range(t.column_fragments):
            self._decode(stage, ks, j)
            for i in range(t.row_fragments):
                for h in range(2):
                    self._multiply(self.sums, ((i * t.column_fragments + j) * 2 + h) * 4, i, [
                        self.decoded[j * 4 + 2 * h], self.decoded[j * 4 + 2 * h + 1],
                    ])  # fmt: skip
        if self.row_sums is not None:
            for i in range(t.row_fragments):
                self._multiply(self.row_sums, i * 4, i, [T.uint32(ONES)] * 2)

    def _multiply(self, sums: Any, at: int, i: int, weights: list[Any]) -> None:
        results = [sums[at + e] for e in range(4)]
        T.evaluate(T.ptx[self.instruction](*results, *(self.a[i * 4 + r] for r in range(4)), *weights, *results))

    def _decode(self, stage: Index, ks: int, j: int, first: int = 0) -> None:
        """The weights of 16 channels for 32 values of k into 4 registers, (h, kk), from the first + 4 j on."""
        w, bits, lane = self.w, self.p.bits, self.lane
        fragment = T.bind(stage * (self.t.columns // CHANNELS) + self._fragment(j))

        def word(number: int) -> Any:
            return self.weights[fragment * self.fragment + w.place(number, lane)]

        for h in range(2):
            for kk in range(2):
                at = first + j * 4 + 2 * h + kk
                if bits == 8:
                    store(self.decoded, word(4 * ks + 2 * kk + h), at)
                    continue
                if self.p.integers:
                    found = word(2 * ks + h)
                    found = (found if kk else found << T.uint32(4)) & T.uint32(0xF0F0F0F0)
                    store(self.decoded, found, at)
                    continue
                words = 2**bits // 4
                table = [self.table[j * words + i] for i in range(words)]
                store(self.decoded, looked_up(table, _selector(bits, word, ks, h, kk)), at)

    # ---------------------------------------------------------------------------------------------- conclusions

    def _each_output(self, body: Callable[[int, Any, Any], None], fragment: int | None = None) -> None:
        """``body(register, row, column)`` for what a thread holds, rows and columns of the whole product.

        fragment: of rows, that alone
        """
        t, lane = self.t, self.lane
        for i in range(t.row_fragments) if fragment is None else (fragment,):
            for half in range(2):
                row = T.bind(self._own_row(2 * i + half))
                for j in range(t.column_fragments):
                    for h in range(2):
                        for e in range(2):
                            first = self.first_column + self.warp_column + j * CHANNELS + h * 8
                            column = T.bind(first + lane % 4 * 2 + e)
                            body(((i * t.column_fragments + j) * 2 + h) * 4 + half * 2 + e, row, column)

    def _own_row(self, i: int) -> Any:
        """Number i of the rows that a thread holds sums of."""
        return self.first_row + self.warp_row + i * 8 + self.lane // 4

    def _end_of_segment(self, unit: Any, ks: int) -> None:
        """Behind the last unit of a segment its sums go to the float ones; of a single one at the end of it all."""
        w = self.w
        if not self.several:
            return
        last = [first + units - 1 for first, units in zip(w.first_units, w.units, strict=True)]
        halves = {end % (STEP // UNIT) for end in last}
        if self.asynchronous and ks == 1 and 0 in halves:
            # Only where each way through a step has waited at its end can ptxas see which registers products still
            # write; it lets every product wait for the one before otherwise (its complaint C7513).
            self._wait()
        if ks not in halves:
            return  # no segment ends here
        if w.even:
            ends = tirx.all(tirx.EQ(tirx.truncmod(unit + 1, w.units[0]), 0), unit < sum(w.units))
            segment = tirx.truncdiv(unit, w.units[0])
        else:
            ends = tirx.any(*(tirx.EQ(unit, end) for end in last))
            segment = w.of_unit(unit, range(len(w.units)))
        with T.If(ends), T.Then():
            self._wait()
            own = T.bind(segment)
            self._each_output(
                lambda at, row, column: store(self.y, self._added(self.y[at], self._sum(at), row, column, own), at)
            )
            self._sum_activations(own)
            self._clear_sums(own + 1)

    def _sum(self, at: int) -> Expr:
        """A sum of products. Integers of 4 bits are multiplied as 16 times what they are (`_added`)."""
        found = tirx.reinterpret("int32", self.sums[at])
        return found >> 4 if self.p.integers and not self.several else found

    def _added(self, y: Expr, total: Expr, row: Any, column: Any, segment: Any) -> Expr:
        """Add a segment to y, whose products come to `total`: its scales and zero points applied."""
        b, n = self.b, self.w.outputs
        scale = b["weight_scale"][segment * n + column]
        if self.p.integers and self.several:
            scale = vmath.mul(scale, vmath.f32(1 / 16, 1))
        inside = T.min(row, self.total - 1)
        if self.p.late_zeros:
            return vmath.fma(T.cast(total, "float32"), scale, y)
        if not self.several:
            total = total - self._zero(inside, segment) * b["start"][segment * n + column]
        return vmath.fma(T.cast(total, "float32"), vmath.mul(self._scale(inside, segment), scale), y)

    def _scale(self, row: Index, segment: Index) -> Expr:
        """The scale of the activations of a row."""
        if self.tables is not None:
            return self.tables[0][row - self.first_row]
        return self.b["act_scale"][row if self.p.dynamic else segment * self.p.groups + self._group(row)]

    def _zero(self, row: Index, segment: Index) -> Expr:
        """The zero point of the activations of a row, int32."""
        if self.tables is not None:
            return self.tables[1][row - self.first_row]
        at = row if self.p.dynamic else segment * self.p.groups + self._group(row)
        return T.cast(self.b["act_zero"][at], "int32")

    def _sum_activations(self, segment: Index) -> None:
        """Keeps the sum of q - z of every row of the thread, for offsets."""
        if self.row_sums is None:
            return
        for i in range(self.own_rows):
            value = self._above_zero(self._row_sum(i), T.min(self._own_row(i), self.total - 1), segment)
            store(self.activations, value, segment * self.own_rows + i)

    def _row_sum(self, i: int) -> Expr:
        """The sum of the codes of a row: number i of those that the thread holds sums of."""
        return tirx.reinterpret("int32", self.row_sums[i // 2 * 4 + i % 2 * 2])

    def _above_zero(self, codes: Expr, row: Any, segment: Any) -> Expr:
        """The sum of q - z of a row, given that of its codes."""
        return codes - self._zero(row, segment) * self._values(segment)

    def _with_offsets(self, y: Expr, activations: Callable[[Any], Expr], row: Any, column: Any) -> Expr:
        """Add to y what the offset of its channel makes of the activations, sums by segment."""
        if not self.p.has_offset:
            return y
        total = local(1)
        store(total, y, 0)
        with T.serial(0, len(self.p.segments)) as j:
            factor = vmath.mul(self._scale(row, j), self.b["offset"][column])
            store(total, vmath.fma(T.cast(activations(j), "float32"), factor, total[0]), 0)
        return total[0]

    def _values(self, segment: Any) -> Any:
        """How many values of k a segment has."""
        p = self.p
        if self.w.even:
            return p.segments[0] * self.w.taps
        return self.w.of_segment(segment, [channels * self.w.taps for channels in p.segments])

    def _group(self, row: Index) -> Index:
        if self.p.groups == 1:
            return 0
        sample = tirx.truncdiv(row, self.p.rows) if self.sample is None else self.sample
        return T.cast(self.b["group"][sample], "int32")

    def _store(self) -> None:
        """Results go to shared memory as the lanes hold them, 16 rows of each warp at once, and from there by rows.

        So neighbouring threads read and write what lies side by side, and the code of the epilogue stands there once.
        """
        t, p = self.t, self.p
        if not self.several:
            self._sum_activations(0)
            self.tables = self._row_tables()
        rows = 16 * t.down
        staged = part(self.x, 0, rows * t.columns, "float32")
        assert rows * t.columns * 4 <= t.stages * t.rows * STEP

        for fragment in range(t.row_fragments):

            def keep(at: int, row: Any, column: Any, fragment: int = fragment) -> None:
                own = row - self.first_row - fragment * 16
                own = own - self.warp_row + self.warp_row // t.row_fragments
                inside = T.bind(T.min(row, self.total - 1))
                channel = column if self.w.outputs == p.outputs else T.bind(T.min(column, p.outputs - 1))
                store(staged, self._result(at, inside, channel), self._staged(T.bind(own), column - self.first_column))

            barrier()
            self._each_output(keep, fragment)
            barrier()
            n = self._together
            columns = t.columns if p.gate is None else t.columns // 2
            with strided(self.thread, rows * columns // n, t.threads) as number:
                own, across = unravel(number, columns // n)
                down = own // 16 * (t.row_fragments * 16) + fragment * 16 + own % 16
                first = self.first_column if p.gate is None else self.first_column // 2
                row, column = T.bind(self.first_row + down), T.bind(first + across * n)
                with T.If(tirx.all(row < self.total, column < p.results * p.products)), T.Then():
                    self._finish(self._waiting(staged, own, across * n, n), row, column)

    def _waiting(self, staged: Buffer, row: Index, column: Index, count: int) -> list[Expr]:
        """Neighbouring results that wait; of a gate the products of what lies `GATED` apart."""
        gate = self.p.gate
        if gate is None:
            return values_of(staged, self._staged(row, column), count)
        at = T.bind(column // GATED * (2 * GATED) + column % GATED)
        first, second = (values_of(staged, self._staged(row, at + half), count) for half in (0, GATED))
        if gate.first:
            first, second = second, first
        return [vmath.keep(vmath.mul(a, vmath.UNARY[gate.op](b))) for a, b in zip(first, second, strict=True)]

    def _row_tables(self) -> tuple[Buffer, Buffer] | None:
        """Scales and zero points of rows in shared memory, where nobody reads weights any more.

        Every output of a row else reads the group of its sample, and then what the group has.
        """
        t = self.t
        if not self.p.dynamic and self.p.groups == 1:
            return None
        first = t.stages * t.rows * STEP + 4 * t.rows  # behind the sums of activations (`wgmma`)
        scales, zeros = part(self.x, first, t.rows, "float32"), part(self.x, first + 4 * t.rows, t.rows, "int32")
        barrier()
        with strided(self.thread, t.rows, t.threads) as i:
            row = T.bind(T.min(self.first_row + i, self.total - 1))
            store(scales, self._scale(row, 0), i)
            store(zeros, self._zero(row, 0), i)  # another barrier comes before they are read
        return scales, zeros

    @property
    def _together(self) -> int:
        """Neighbouring results that a thread finishes at once, as far as they are neighbours wherever they lie."""
        p = self.p
        return math.gcd(self.together, p.results, *(p.into or ()))

    def _staged(self, row: Index, column: Index) -> Index:
        """Where a result waits, such that neither the lanes of a fragment nor those of a row meet a bank twice."""
        return row * self.t.columns + T.bitwise_xor(column, row % 4 * 8 + row // 4 % 2)

    def _result(self, at: int, row: Any, column: Any) -> Expr:
        """The result in register `at` after all steps: scales, zero points and bias applied, before the epilogue."""
        p = self.p
        if self.y is None:
            y = self._added(self._first(column), self._sum(at), row, column, 0)
        elif p.late_zeros:
            zero = vmath.neg(T.cast(self.b["act_zero"][row], "float32"))
            start = self.b["bias"][column] if p.has_bias else vmath.f32(0.0, 1)
            own = vmath.fma(zero, self.b["sums"][column], self.y[at])
            y = vmath.fma(self.b["act_scale"][row], own, start)
        else:
            y = self.y[at]
        return self._with_offsets(y, lambda j: self._activations(at, j), row, column)

    def _activations(self, at: int, segment: Any) -> Expr:
        """The sum of the activations of a register's row in a segment (`_sum_activations`)."""
        i = at // (self.t.column_fragments * 8) * 2 + at % 4 // 2  # of the thread's own rows
        return self.activations[segment * self.own_rows + i]

    def _store_parts(self) -> None:
        """Store the sums of a block to memory."""
        outputs = self.p.outputs

        def keep(at: int, row: Any, column: Any) -> None:
            with T.If(tirx.all(row < self.total, column < outputs)), T.Then():
                store(self.b["parts"], self._sum(at), (self.split * self.total + row) * outputs + column)

        self._each_output(keep)
        if self.row_sums is None:
            return
        for i in range(self.own_rows):
            row = T.bind(self._own_row(i))
            # all columns have the same
            with T.If(tirx.all(row < self.total, tirx.EQ(self.first_column, 0), self._first_of_row())), T.Then():
                store(self.b["row_parts"], self._row_sum(i), self.split * self.total + row)

    def _first_of_row(self) -> Any:
        """Whether the thread is the first of those that know the sums of its rows' codes."""
        return tirx.EQ(self.warp_column + self.lane % 4, 0)

    def _add_parts(self) -> None:
        """A thread for each output; none has anything to do where no block shared an axis."""
        count = T.Select(self.splits > 1, self.total * self.p.outputs, 1)  # a grid has a block
        with each(count) as number, T.If(self.splits > 1), T.Then():
            row, column = unravel(number, self.p.outputs)

            def summed(parts: Any, step: Any, at: Any) -> Expr:
                total = local(1, parts.dtype)
                store(total, parts[at], 0)
                with T.serial(1, self.splits) as split:
                    store(total, total[0] + parts[split * step + at], 0)
                return total[0]

            total = summed(self.b["parts"], self.total * self.p.outputs, number)
            y = self._added(self._first(column), total, row, column, 0)
            if self.p.has_offset:
                activations = vmath.keep(self._above_zero(summed(self.b["row_parts"], self.total, row), row, 0))
                y = self._with_offsets(y, lambda _: activations, row, column)
            self._finish([vmath.keep(y)], row, column)

    def _finish(self, values: Sequence[Expr], row: Index, column: Index) -> None:
        """The epilogue of neighbouring results, and where they go: to the result of their product, of several."""
        p = self.p
        if not p.siblings:
            self._put(values, row, column, self.epilogue, self.b["out"])
            return
        product = T.bind(tirx.truncdiv(column, p.results))
        own = T.bind(column - product * p.results)
        for i, epilogue in enumerate(p.epilogues):
            with T.If(tirx.EQ(product, i)), T.Then():
                self._put(values, row, own, epilogue, self.b[of_sibling("out", i)])

    def _put(self, values: Sequence[Expr], row: Index, column: Index, epilogue: Epilogue, out: Buffer) -> None:
        """An epilogue of neighbouring results, and where they go in one tensor."""
        p = self.p
        sample = T.bind(tirx.truncdiv(row, p.rows))
        full: Index = row * p.results + column
        places = full, sample * p.results + column, column
        quant = quantizer(self.buffers, sample) if epilogue.bits is not None else None
        if epilogue.keeps:
            before = Epilogue(epilogue.steps[:-1], epilogue.operands)
            values = [vmath.keep(y) for y in finished(before, self.b, values, None, *places)]
            put_values(self.b["full"], values, full)
            epilogue = Epilogue(epilogue.steps[-1:])
        at = full
        if p.into is not None:
            size, offset, step = p.into
            at = sample * size + offset + (row - sample * p.rows) * step + column
        put_values(out, finished(epilogue, self.b, values, quant, *places), at)


def _selector(bits: int, word: Callable[[int], Any], ks: int, h: int, kk: int) -> Any:
    """The codes of 4 weights as nibbles (`weights`)."""
    if bits == 4:
        found = word(2 * ks + h)
        return found >> T.uint32(16) if kk else found
    shift = 16 * h + 2 * kk
    found = word(ks)
    low = (found >> T.uint32(shift) if shift else found) & T.uint32(0x3333)
    if bits == 2:
        return low
    plane = word(2) >> T.uint32(16) if ks else word(2)
    place = 2 * h + kk
    moved = plane << T.uint32(2 - place) if place < 2 else plane >> T.uint32(place - 2)
    return low | moved & T.uint32(0x4444)
