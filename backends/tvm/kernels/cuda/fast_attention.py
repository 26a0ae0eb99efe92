"""Attention in bfloat16 on tensor cores: `ops.attention` with those numerics.

In one pass over the keys (Dao, "FlashAttention-2", arXiv 2307.08691). A warp has 16 or 32 queries of one head, a block
of threads four warps; keys and values come by blocks to shared memory, one block ahead (`cp.async`). Scores, weights
and outputs stay in registers: as the tensor core leaves the scores of 16 keys, it takes their weights as a factor of
the second product.

Queries, keys and values come in bfloat16, queries multiplied by `query_factor`. Values turn where they leave shared
memory (`ldmatrix.trans`), whose rows are so far apart that no bank is met twice.

Where registers or shared memory do not suffice for all dimensions of the output, several blocks of threads share them,
and each computes the scores.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul
from mpq_compiler.backends.tvm.kernels.cuda import bfloat16
from mpq_compiler.backends.tvm.kernels.cuda.attention import mask_at
from mpq_compiler.backends.tvm.kernels.cuda.gemm.kernel import LDMATRIX
from mpq_compiler.backends.tvm.kernels.cuda.threads import (
    ROOM,
    any_lane,
    barrier,
    grid,
    in_units,
    local,
    of_lane,
    part,
    primfunc,
    put_values,
    rolled,
    shared_bytes,
    strided,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import ROUNDED, Argument
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST
from mpq_compiler.backends.tvm.kernels.problems.attention import arguments as of_floats
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.numerics import BF16, PACKED

WARPS, STAGES = 4, 2
THREADS = 32 * WARPS
GROUP = 4
"""Words of 8 dimensions, a row of what `ldmatrix` reads and of an operand in shared memory."""
QKV = ("q", "k", "v")
TURNED = "ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16"
FEW = 128
"""Keys that blocks of 64 would fill badly."""
REGISTERS = 216
"""Registers of a thread for what `Tile.registers` counts; the others hold addresses and intermediate values."""
EXP2 = """
__forceinline__ __device__ float mpq_exp2(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
"""


@dataclass(frozen=True)
class Tile:
    """How a block of threads shares an attention.

    dim:       dimensions of a head
    fragments: of 16 queries, of a warp
    keys:      of a step
    columns:   dimensions of the output that a block computes
    """

    dim: int
    fragments: int
    keys: int
    columns: int

    @property
    def steps(self) -> int:
        """Steps, of 16 dimensions each, of the sum of a score."""
        return -(-self.dim // 16)

    @property
    def queries(self) -> int:
        """Queries of a block of threads."""
        return WARPS * 16 * self.fragments

    @property
    def key_pitch(self) -> int:
        """Words from key to key: 8 rows of 4 words meet all banks."""
        return 8 * self.steps + 4

    @property
    def value_pitch(self) -> int:
        """Words from the value of a key to the next: an odd number of fours, as of keys."""
        return (-(-self.columns // 8) | 1) * GROUP

    @property
    def key_words(self) -> int:
        """Words of shared memory for the keys of a stage."""
        return self.keys * self.key_pitch

    @property
    def value_words(self) -> int:
        """Words of shared memory for the values of a stage."""
        return self.keys * self.value_pitch

    @property
    def words(self) -> int:
        """Words of shared memory, for keys and values of all stages."""
        return STAGES * (self.key_words + self.value_words)

    @property
    def registers(self) -> int:
        """Registers of a thread for queries, outputs, scores, and what is kept of each row."""
        return self.fragments * (4 * self.steps + -(-self.columns // 8) * 4 + self.keys // 2 + 16)


def tile(problem: FastAttention) -> Tile:
    """The first that fits: all columns before some, and what an H200 does fastest of most shapes before the rest.

    UserError: heads have too many dimensions
    """
    dim = problem.dim
    for parts in range(1, dim + 1):
        columns = dim if parts == 1 else -(-dim // parts // 16) * 16
        sizes = ((1, 64), (2, 32), (1, 32), (1, 16))
        for fragments, keys in sizes if problem.keys > FEW else sizes[1:]:
            found = Tile(dim, fragments, keys, columns)
            fits = found.words * 4 <= ROOM and found.registers <= REGISTERS
            if fits and (fragments == 1 or problem.queries > found.queries):
                return found
    raise UserError(f"no CUDA kernel computes attention in bfloat16 of heads with {dim} dimensions")


def arguments(problem: FastAttention) -> list[Argument]:
    """The buffers of `problems.attention`: q, k and v rounded, a zero behind each head of an odd dimension."""
    words = problem.heads * (problem.dim + problem.dim % 2)
    return [
        replace(a, shape=(*a.shape[:-1], words), dtype=ROUNDED) if a.name in QKV else a for a in of_floats(problem)
    ]


def build(problem: FastAttention, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``.

    UserError: numerics or dimensions that no GPU's kernel has
    """
    if problem.numerics != BF16:
        raise UserError(f"no CUDA kernel computes attention in {problem.numerics}")
    own = tile(problem)
    return primfunc(name, arguments(problem), lambda batch, buffers: Kernel(problem, own, buffers).emit(batch))


class Kernel:
    """An attention in a tile. Four warps together have other products, in `wgmma_attention`."""

    align = 64

    @property
    def threads(self) -> int:
        return THREADS

    def __init__(self, problem: FastAttention, tile: Tile, buffers: Buffers) -> None:
        self.p, self.t, self.buffers = problem, tile, buffers
        self.b = {name: flat(buffer) for name, buffer in buffers.items()}
        self.b |= {name: in_units(self.b[name], "uint32", PACKED[BF16]) for name in QKV}
        self.column_tiles = -(-tile.columns // 8)
        self.key_tiles = tile.keys // 8

    def emit(self, batch: Any) -> None:
        p, t = self.p, self.t
        parts, blocks = -(-p.dim // t.columns), -(-p.queries // t.queries)
        with grid(batch * (p.heads * parts * blocks), self.threads) as (number, self.thread):
            self.sample, self.head, share, block = unravel(number, p.heads, parts, blocks)
            self.first_column = T.bind(share * t.columns) if parts > 1 else 0
            self.lane = T.bind(self.thread % 32)
            self.group, self.place = T.bind(self.lane // 4), T.bind(self.lane % 4)
            self.first_row = T.bind(block * t.queries + self.thread // 32 * (16 * t.fragments) + self.group)
            waiting, first = shared_bytes(4 * t.words, self.align), STAGES * t.value_words
            self.values = part(waiting, 0, first, "uint32")
            self.keys = part(waiting, 4 * first, t.words - first, "uint32")
            self.query = local(t.fragments * t.steps * 4, "uint32")
            self.scores = local(t.fragments * self.key_tiles * 4)
            self.out = local(t.fragments * self.column_tiles * 4)
            self.highest, self.total = local(2 * t.fragments), local(2 * t.fragments)
            self._queries()
            self._clear()
            self._products()
            self._store()

    def _row(self, i: int) -> Index:
        """Number i of the rows that a thread has a part of: two of each fragment."""
        return self.first_row + i * 8

    # ---------------------------------------------------------------------------------------------------- loading

    @property
    def _words(self) -> int:
        """Words of a head."""
        return -(-self.p.dim // PACKED[BF16])

    def _of_head(self, rows: int, row: Index) -> Index:
        """The first word of the head in a row of queries, keys or values."""
        return ((self.sample * rows + row) * self.p.heads + self.head) * self._words

    def _queries(self) -> None:
        p, t, words = self.p, self.t, self._words
        for i in range(2 * t.fragments):
            start = T.bind(self._of_head(p.queries, T.min(self._row(i), p.queries - 1)))
            for step in range(t.steps):
                for half in range(2):
                    first = 8 * step + 4 * half
                    at = T.bind(self.place + first)
                    word = self.b["q"][start + (at if first + 4 <= words else T.min(at, words - 1))]
                    if first + 4 > words:
                        word = T.if_then_else(at < words, word, T.uint32(0))
                    store(self.query, word, (i // 2 * t.steps + step) * 4 + 2 * half + i % 2)

    def _clear(self) -> None:
        for buffer, value in ((self.out, 0.0), (self.highest, LOWEST), (self.total, 0.0)):
            for i in range(int(buffer.shape[0])):
                store(buffer, f32(value, 1), i)

    def _load(self, step: Index, stage: Index) -> None:
        self._load_keys(step, stage)
        self._load_values(step, stage)

    def _load_keys(self, step: Index, stage: Index) -> None:
        self._load_rows("k", step, 8 * self.t.steps, 0, lambda row, word: self._key_place(stage, row, word))

    def _load_values(self, step: Index, stage: Index) -> None:
        count = -(-self.t.columns // 8) * GROUP
        first = self.first_column // PACKED[BF16]
        self._load_rows("v", step, count, first, lambda row, word: self._value_place(stage, row, word))

    def _load_rows(
        self, name: str, step: Index, count: int, first: Index, place: Callable[[Index, Index], Index]
    ) -> None:
        """So many words, from a first one on, of the keys of a step, the last again behind the last; zeros behind them.

        What stands behind the last key has no weight.
        """
        p, t, words = self.p, self.t, self._words
        size, target = math.gcd(words, GROUP), {"k": self.keys, "v": self.values}[name]
        with self._rows_of_step(count // size) as (row, chunk):
            key, word = step * t.keys + row, T.bind(chunk * size)
            own, there = first + word, True
            if count != words:
                own, there = T.min(first + word, words - size), first + word < words
            source = self._of_head(p.keys, T.min(key, p.keys - 1) if p.keys % t.keys else key) + own
            _copy(target, place(row, word), self.b[name], source, size, there)

    @contextmanager
    def _rows_of_step(self, chunks: int) -> Iterator[tuple[Index, Index]]:
        """The parts of rows of a step that fall to a thread: where it can have the same of each row, it has."""
        keys, together = self.t.keys, self.threads // chunks
        if self.threads % chunks == 0 and keys % together == 0:
            first, chunk = unravel(self.thread, chunks)
            with T.serial(0, keys // together) as i:
                yield T.bind(first + i * together), chunk
            return
        with strided(self.thread, keys * chunks, self.threads) as i:
            row, chunk = unravel(i, chunks)
            yield row, chunk

    def _key_place(self, stage: Index, row: Index, word: Index) -> Index:
        """Where in shared memory a word of a key is."""
        return (stage * self.t.keys + row) * self.t.key_pitch + word

    def _value_place(self, stage: Index, row: Index, word: Index) -> Index:
        """Where in shared memory a word of a value is."""
        return (stage * self.t.keys + row) * self.t.value_pitch + word

    # --------------------------------------------------------------------------------------------------- products

    def _products(self) -> None:
        p, t = self.p, self.t
        steps = -(-p.keys // t.keys)
        self._load(0, 0)
        T.evaluate(T.ptx.cp.async_.commit_group())
        with rolled(steps) as step:
            self._land()
            barrier()
            if steps > 1:
                with T.If(step + 1 < steps), T.Then():
                    self._load(step + 1, T.bind((step + 1) % STAGES))
                T.evaluate(T.ptx.cp.async_.commit_group())
            stage = T.bind(step % STAGES)
            self._score(stage)
            if p.mask is not None:
                self._add_mask(step)
            self._weigh(step)
            self._sum_values(stage)

    def _land(self) -> None:
        """The thread's copies are there."""
        T.evaluate(T.ptx.cp.async_.wait_group(0))

    def _at(self, row: int, key_tile: int, e: int) -> int:
        """Register of the score of a row (`_row`) and key 8 key_tile + 2 place + e."""
        return (row // 2 * self.key_tiles + key_tile) * 4 + row % 2 * 2 + e

    def _score(self, stage: Index) -> None:
        t, lane = self.t, self.lane
        for i in range(int(self.scores.shape[0])):
            store(self.scores, f32(0.0, 1), i)
        words = local(self.key_tiles * 2, "uint32")
        start = T.bind((stage * t.keys + lane // 16 * 8 + lane % 8) * t.key_pitch + lane // 8 % 2 * 4)
        for step in range(t.steps):
            for tile in range(0, self.key_tiles, 2):  # two at a time: terms 0 to 7 and 8 to 15 of each
                registers = [words[2 * tile + r] for r in range(4)]
                at = start + (8 * tile * t.key_pitch + 8 * step)
                T.evaluate(T.ptx[LDMATRIX](*registers, self.keys.ptr_to([at])))
            for tile in range(self.key_tiles):
                for i in range(t.fragments):
                    query = [self.query[(i * t.steps + step) * 4 + r] for r in range(4)]
                    pair = [words[2 * tile + r] for r in range(2)]
                    bfloat16.multiply(self.scores, self._at(2 * i, tile, 0), query, pair)

    def _each_score(self, step: Index) -> Iterator[tuple[int, int, Any]]:
        """(row, register, key) of each of a thread's."""
        for row in range(2 * self.t.fragments):
            for tile in range(self.key_tiles):
                for e in range(2):
                    yield row, self._at(row, tile, e), step * self.t.keys + (8 * tile + e) + 2 * self.place

    def _add_mask(self, step: Index) -> None:
        p = self.p
        for row, at, key in self._each_score(step):
            query, inside = T.min(self._row(row), p.queries - 1), T.min(key, p.keys - 1)
            added = mask_at(p, self.buffers, self.sample, self.head, query, inside)
            masked = fma(added, f32(vmath.LOG2_E, 1), self.scores[at])
            store(self.scores, vmath.at_least(masked, f32(LOWEST, 1)), at)

    def _weigh(self, step: Index) -> None:
        """Scores to 2^(score - maximum); their sum; the outputs so far to the new maximum."""
        p, t = self.p, self.t
        new, rescale = local(2 * t.fragments), local(2 * t.fragments)
        for row in range(2 * t.fragments):
            store(new, self.highest[row], row)
        for row, at, _ in self._each_score(step):
            store(new, T.max(new[row], self.scores[at]), row)  # passes over NaN, whose weight is NaN all the same
        for row in range(2 * t.fragments):
            for distance in (1, 2):
                store(new, T.max(new[row], of_lane(new[row], distance)), row)
            store(rescale, _exp2(self.highest[row] - new[row]), row)
            store(self.highest, new[row], row)
            store(self.total, mul(self.total[row], rescale[row]), row)
        for row, at, _ in self._each_score(step):
            store(self.scores, _exp2(self.scores[at] - new[row]), at)
        if p.keys % t.keys:
            with T.If(tirx.EQ(step, p.keys // t.keys)), T.Then():
                for _, at, key in self._each_score(step):
                    store(self.scores, tirx.Select(key < p.keys, self.scores[at], f32(0.0, 1)), at)
        for row, at, _ in self._each_score(step):
            store(self.total, self.total[row] + self.scores[at], row)
        self._before_outputs()
        changed = [tirx.NE(rescale[row], f32(1.0, 1)) for row in range(2 * t.fragments)]
        with T.If(any_lane(tirx.any(*changed))), T.Then():
            for row in range(2 * t.fragments):
                for tile in range(self.column_tiles):
                    for e in range(2):
                        at = (row // 2 * self.column_tiles + tile) * 4 + row % 2 * 2 + e
                        store(self.out, mul(self.out[at], rescale[row]), at)

    def _before_outputs(self) -> None:
        """Waits for products that are asynchronous."""

    def _sum_values(self, stage: Index) -> None:
        t = self.t
        weights, words = local(t.fragments * 4, "uint32"), local(4, "uint32")
        matrix = T.bind(self.lane // 8)  # of four: 8 keys each, of 8 dimensions, then of the next 8
        start = T.bind((stage * t.keys + matrix % 2 * 8 + self.lane % 8) * t.value_pitch)
        for tile in range(0, self.key_tiles, 2):
            for row in range(2 * t.fragments):
                for half in range(2):
                    store(weights, self._weight(row, tile + half), row // 2 * 4 + 2 * half + row % 2)
            for column in range(0, self.column_tiles, 2):
                more = min(2, self.column_tiles - column)
                at = start + (8 * tile * t.value_pitch + GROUP * column) + matrix // 2 * ((more - 1) * GROUP)
                T.evaluate(T.ptx[TURNED](*(words[r] for r in range(4)), self.values.ptr_to([at])))
                for own in range(more):
                    for i in range(t.fragments):
                        left, right = [weights[i * 4 + r] for r in range(4)], [words[2 * own + r] for r in range(2)]
                        bfloat16.multiply(self.out, (i * self.column_tiles + column + own) * 4, left, right)

    def _weight(self, row: int, tile: int) -> Expr:
        """The weights of a row and two keys of 8 as a word."""
        low, high = (self.scores[self._at(row, tile, e)] for e in range(2))
        return bfloat16.pair(low, high)

    # ------------------------------------------------------------------------------------------------- conclusion

    def _store(self) -> None:
        p, t, finish = self.p, self.t, Finish(self.p.epilogue, self.buffers)
        quant = finish.quantizer(self.sample)
        for row in range(2 * t.fragments):
            for distance in (1, 2):
                store(self.total, self.total[row] + of_lane(self.total[row], distance), row)
            query = T.bind(self._row(row))
            with T.If(query < p.queries), T.Then():
                inverse = keep(vmath.reciprocal(self.total[row]))
                together = PACKED[BF16] if p.dim % PACKED[BF16] == 0 else 1
                for tile in range(self.column_tiles):
                    for e in range(0, PACKED[BF16], together):
                        at = (row // 2 * self.column_tiles + tile) * 4 + row % 2 * 2 + e
                        d = T.bind(self.first_column + 2 * self.place + (8 * tile + e))
                        with T.If(d < p.dim), T.Then():
                            channel = T.bind(self.head * p.dim + d)
                            done = [
                                finish(keep(mul(self.out[at + i], inverse)), self.sample, (query,), channel + i, quant)
                                for i in range(together)
                            ]
                            put_values(self.b["y"], done, (self.sample * p.queries + query) * p.channels + channel)


def _exp2(x: Expr) -> Expr:
    """2^x to 2 units in the last place, by the unit of a GPU that has nothing else to do here."""
    return T.cuda.func_call("mpq_exp2", x, source_code=EXP2, return_type="float32")


def _copy(target: Buffer, at: Index, source: Buffer, index: Index, size: int, there: Index) -> None:
    """`size` words to shared memory; zeros where they are not there."""
    operation = "cp.async.cg.shared.global" if size == 4 else "cp.async.ca.shared.global"
    given = () if there is True else (T.if_then_else(there, T.uint32(4 * size), T.uint32(0)),)
    T.evaluate(T.ptx[operation](target.ptr_to([at]), source.ptr_to([index]), 4 * size, *given))
