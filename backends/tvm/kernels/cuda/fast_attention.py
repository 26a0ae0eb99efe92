"""Attention in bfloat16 on tensor cores: `ops.attention` with those numerics.

In one pass over the keys (Dao, "FlashAttention-2", arXiv 2307.08691). A warp has 16 or 32 queries of one head, a block
of threads four warps; keys and values come by blocks to shared memory, one block ahead (`cp.async`). Scores, weights
and outputs stay in registers: as the tensor core leaves the scores of 16 keys, it takes their weights as a factor of
the second product.

Keys and values come from a kernel of their own (`Ready`), in words that are a tensor core's as they lie: pairs of
dimensions of a key, and pairs of keys of a dimension, of values up to four pairs side by side (`value_word`). In shared
memory no bank is met twice: rows of keys are so far apart, and 8 dimensions of 8 keys lie together.

Where registers or shared memory do not suffice for all dimensions of the output, several blocks of threads share them,
and each computes the scores.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
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
    each,
    grid,
    local,
    of_lane,
    part,
    primfunc,
    put_values,
    rolled,
    shared_bytes,
    strided,
    values_of,
)
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready, arguments
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.numerics import BF16, PACKED

WARPS, STAGES = 4, 2
THREADS = 32 * WARPS
GROUP = 4
"""Words of values that lie side by side: 8 keys, a row of what `ldmatrix` reads and of an operand in shared memory."""
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
        """Words from 8 keys to the next 8: whole matrices of 8 dimensions."""
        return -(-self.columns // 8) * 8 * GROUP

    @property
    def key_words(self) -> int:
        """Words of shared memory for the keys of a stage."""
        return self.keys * self.key_pitch

    @property
    def words(self) -> int:
        """Words of shared memory, for keys and values of all stages."""
        return STAGES * (self.key_words + self.keys // 8 * self.value_pitch)

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


def build(problem: FastAttention | Ready, name: str) -> PrimFunc:
    """The kernel ``name(*problems.fast_attention.arguments(problem))``.

    UserError: numerics or dimensions that no GPU's kernel has
    """
    if problem.numerics != BF16:
        raise UserError(f"no CUDA kernel computes attention in {problem.numerics}")
    if isinstance(problem, Ready):
        return primfunc(name, arguments(problem), lambda batch, buffers: _ready(problem, batch, buffers))
    own = tile(problem)
    return primfunc(name, arguments(problem), lambda batch, buffers: Kernel(problem, own, buffers).emit(batch))


def _ready(problem: Ready, batch: Any, buffers: Buffers) -> None:
    """A thread for 8 dimensions of a key, then for 8 values of a dimension: threads write side by side."""
    p, packed = problem, PACKED[BF16]
    words, pairs = -(-p.dim // packed), -(-p.keys // packed)

    def write(target: Buffer, at: Index, values: list[Expr]) -> None:
        pairs = [values[e : e + packed] for e in range(0, len(values), packed)]
        put_values(target, [tirx.reinterpret("int32", bfloat16.pair(*pair)) for pair in pairs], at)

    keys, values_ = flat(buffers["k"]), flat(buffers["v"])
    packed_k, packed_v = flat(buffers["packed_k"]), flat(buffers["packed_v"])
    together, read = 1 if p.dim % packed else math.gcd(words, GROUP), math.gcd(p.dim, 4)
    with each(batch * (p.heads * p.keys * (words // together))) as i:
        sample, head, key, chunk = unravel(i, p.heads, p.keys, words // together)
        source = T.bind((sample * p.keys + key) * (p.heads * p.dim) + head * p.dim + chunk * (together * packed))
        count = together * packed
        if p.dim % packed:  # a pair at a time, of which the last has one
            last = T.bind(p.dim - 1 - chunk * packed)
            found = [keys[source], keep(T.if_then_else(last > 0, keys[source + T.min(last, 1)], f32(0.0, 1)))]
        else:
            found = [v for first in range(0, count, read) for v in values_of(keys, source + first, min(read, count))]
        write(packed_k, (sample * p.heads + head) * (p.keys * words) + key * words + chunk * together, found)
    groups, whole = -(-pairs // GROUP), pairs % GROUP == 0
    with each(batch * (p.heads * groups * p.dim)) as i:
        sample, head, group, d = unravel(i, p.heads, groups, p.dim)

        def value(e: int) -> Expr:
            key = T.bind(group * (GROUP * packed) + e)
            found = values_[(sample * p.keys + T.min(key, p.keys - 1)) * (p.heads * p.dim) + head * p.dim + d]
            return keep(T.if_then_else(key < p.keys, found, f32(0.0, 1)))

        found = [value(e) for e in range(GROUP * packed)]
        start = T.bind((sample * p.heads + head) * (pairs * p.dim))
        if whole:
            write(packed_v, start + value_word(pairs, p.dim, group * GROUP, d), found)
            return
        for e in range(GROUP):
            pair = T.bind(group * GROUP + e)
            with T.If(pair < pairs), T.Then():
                at = start + value_word(pairs, p.dim, pair, d)
                write(packed_v, at, found[packed * e : packed * (e + 1)])


def value_word(pairs: int, dim: int, pair: Index, d: Index) -> Index:
    """Where the word of a pair of keys and a dimension lies, of so many of a head; the last group may be smaller."""
    group = T.bind(tirx.truncdiv(pair, GROUP))
    size = T.min(pairs - group * GROUP, GROUP)
    return group * (GROUP * dim) + d * size + (pair - group * GROUP)


class Kernel:
    """An attention in a tile. Four warps together have other products, in `wgmma_attention`."""

    align = 64

    @property
    def threads(self) -> int:
        return THREADS

    def __init__(self, problem: FastAttention, tile: Tile, buffers: Buffers) -> None:
        self.p, self.t, self.buffers = problem, tile, buffers
        self.b = {name: flat(buffer) for name, buffer in buffers.items()}
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
            waiting, first = shared_bytes(4 * t.words, self.align), STAGES * t.key_words
            self.keys = part(waiting, 0, first, "uint32")
            self.values = part(waiting, 4 * first, t.words - first, "uint32")
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

    def _queries(self) -> None:
        p, t = self.p, self.t
        scale = p.scale if p.scale is not None else 1.0 / math.sqrt(p.dim)
        factor = f32(scale * vmath.LOG2_E, 1)
        for i in range(2 * t.fragments):
            row = (self.sample * p.queries + T.min(self._row(i), p.queries - 1)) * p.channels
            start = T.bind(row + self.head * p.dim)

            def value(d: Index, whole: bool, start: Index = start) -> Expr:
                if whole:
                    return keep(mul(self.b["q"][start + d], factor))
                found = mul(self.b["q"][start + T.min(d, p.dim - 1)], factor)
                return keep(T.if_then_else(d < p.dim, found, f32(0.0, 1)))

            for step in range(t.steps):
                for half in range(2):
                    d = T.bind(16 * step + 8 * half + 2 * self.place)
                    whole = 16 * step + 8 * half + 8 <= p.dim
                    word = bfloat16.pair(value(d, whole), value(d + 1, whole))
                    store(self.query, word, (i // 2 * t.steps + step) * 4 + 2 * half + i % 2)

    def _clear(self) -> None:
        for buffer, value in ((self.out, 0.0), (self.highest, LOWEST), (self.total, 0.0)):
            for i in range(int(buffer.shape[0])):
                store(buffer, f32(value, 1), i)

    def _load(self, step: Index, stage: Index) -> None:
        self._load_keys(step, stage)
        self._load_values(step, stage)

    def _load_keys(self, step: Index, stage: Index) -> None:
        """Behind the last key stands that again; behind the last dimension, zero."""
        p, t = self.p, self.t
        head = T.bind(self.sample * p.heads + self.head)
        words = -(-p.dim // PACKED[BF16])
        size, stored = math.gcd(words, 4), 8 * t.steps
        with strided(self.thread, t.keys * (stored // size), self.threads) as i:
            row, chunk = unravel(i, stored // size)
            key, word = step * t.keys + row, T.bind(chunk * size)
            there: Index = True
            if p.keys % t.keys:
                key = T.min(key, p.keys - 1)
            source = (head * p.keys + key) * words + word
            if stored > words:
                there, source = word < words, (head * p.keys + key) * words + T.min(word, words - size)
            _copy(self.keys, self._key_place(stage, row, word), self.b["packed_k"], source, size, there)

    def _key_place(self, stage: Index, row: Index, word: Index) -> Index:
        """Where in shared memory a word of a key is."""
        return (stage * self.t.keys + row) * self.t.key_pitch + word

    def _load_values(self, step: Index, stage: Index) -> None:
        """Behind the last value and the last dimension stands zero."""
        p, t = self.p, self.t
        pairs = -(-p.keys // PACKED[BF16])
        own = T.bind((self.sample * p.heads + self.head) * (pairs * p.dim))
        if p.keys % t.keys == 0 and t.columns == p.dim and p.dim % 8 == 0:  # a step is one block here and there
            count = t.keys // 8 * p.dim
            with strided(self.thread, count, self.threads) as i:
                source = own + (step * count + i) * GROUP
                _copy(self.values, (stage * count + i) * GROUP, self.b["packed_v"], source, GROUP, True)
            return
        columns = t.value_pitch // GROUP
        with strided(self.thread, t.keys // 8 * columns, self.threads) as i:
            group, column = unravel(i, columns)
            d, number = T.bind(self.first_column + column), T.bind(step * (t.keys // 8) + group)
            target = T.bind((stage * (t.keys // 8) + group) * t.value_pitch + column * GROUP)
            if pairs % GROUP == 0:
                there = tirx.all(number < pairs // GROUP, d < p.dim)
                source = own + T.min(number, pairs // GROUP - 1) * (GROUP * p.dim) + T.min(d, p.dim - 1) * GROUP
                _copy(self.values, target, self.b["packed_v"], source, GROUP, there)
                return
            for e in range(GROUP):
                pair = T.bind(number * GROUP + e)
                source = own + value_word(pairs, p.dim, T.min(pair, pairs - 1), T.min(d, p.dim - 1))
                _copy(self.values, target + e, self.b["packed_v"], source, 1, tirx.all(pair < pairs, d < p.dim))

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
        start = T.bind((stage * (t.keys // 8) + matrix % 2) * t.value_pitch + self.lane % 8 * GROUP)
        for tile in range(0, self.key_tiles, 2):
            for row in range(2 * t.fragments):
                for half in range(2):
                    store(weights, self._weight(row, tile + half), row // 2 * 4 + 2 * half + row % 2)
            for column in range(0, self.column_tiles, 2):
                more = min(2, self.column_tiles - column)
                at = start + (tile * t.value_pitch + 8 * GROUP * column) + matrix // 2 * ((more - 1) * 8 * GROUP)
                T.evaluate(T.ptx[LDMATRIX](*(words[r] for r in range(4)), self.values.ptr_to([at])))
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
                for tile in range(self.column_tiles):
                    for e in range(2):
                        at = (row // 2 * self.column_tiles + tile) * 4 + row % 2 * 2 + e
                        d = T.bind(self.first_column + 2 * self.place + (8 * tile + e))
                        with T.If(d < p.dim), T.Then():
                            value = keep(mul(self.out[at], inverse))
                            channel = T.bind(self.head * p.dim + d)
                            done = finish(value, self.sample, (query,), channel, quant)
                            store(self.b["y"], done, (self.sample * p.queries + query) * p.channels + channel)


def _exp2(x: Expr) -> Expr:
    """2^x to 2 units in the last place, by the unit of a GPU that has nothing else to do here."""
    return T.cuda.func_call("mpq_exp2", x, source_code=EXP2, return_type="float32")


def _copy(target: Buffer, at: Index, source: Buffer, index: Index, size: int, there: Index) -> None:
    """`size` words to shared memory; zeros where they are not there."""
    operation = "cp.async.cg.shared.global" if size == 4 else "cp.async.ca.shared.global"
    given = () if there is True else (T.if_then_else(there, T.uint32(4 * size), T.uint32(0)),)
    T.evaluate(T.ptx[operation](target.ptr_to([at]), source.ptr_to([index]), 4 * size, *given))
