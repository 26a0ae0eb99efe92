"""Attention over token-major float32, in one pass over the keys (Dao et al. 2022, "FlashAttention").

Lanes are queries: scores and outputs of a tile of queries stand transposed in L1, so neither softmax nor the
two products need a horizontal reduction, a mask or padding of the head's dimension, and keys and values are
read where they are, one broadcast element at a time. Keys are taken in blocks; their order is the order
of all sums, so the result does not depend on the tiles, which `isa` chooses to fit the registers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Index,
    Registers,
    each_vector,
    partial,
    primfunc,
    register_file,
    scratch,
    shares,
    span,
    store,
    transpose,
    unravel,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul, splat
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST, Attention, arguments
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.numerics import KEY_BLOCK as KEYS

# (vectors of queries, keys of a score tile, dimensions of an output tile): accumulators fill the registers
TILES = {"wide": (4, 6, 6), "narrow": (1, 6, 6)}


def build(problem: Attention, isa: str = "avx512vnni", name: str = "attention") -> PrimFunc:
    """The kernel; `isa` chooses the tiles and no bit of the result."""
    return tiled(problem, arguments(problem), Body, isa, name)


def tiled(problem: Attention, made: Sequence[Argument], body: Callable[..., Body], isa: str, name: str) -> PrimFunc:
    """The kernel with that body, in tiles that fit the registers."""
    vectors, key_tile, dim_tile = TILES[register_file(isa)]
    tiles = -(-problem.queries // (vectors * LANES))
    vectors = -(-problem.queries // (tiles * LANES))
    return primfunc(name, made, lambda batch, buffers: body(problem, buffers, vectors, key_tile, dim_tile).emit(batch))


def each_tile(extent: int, tile: int, body: Callable[[Any, int], None]) -> None:
    """Calls ``body(start, size)`` for tiles that partition range(extent)."""
    full, rest = divmod(extent, tile)
    if full:
        with T.serial(0, full) as i:
            body(i * tile, tile)
    if rest:
        body(full * tile, rest)


class Body:
    """The kernel's body for one choice of tiles; `_at(row, j)` indexes vector j of a row of queries.

    `fast_attention` has other products (`_start` to `_logit`, `_values`) and weights.
    """

    sums = "float32"  # type of the accumulators of scores

    def __init__(self, problem: Attention, buffers: Buffers, vectors: int, key_tile: int, dim_tile: int):
        self.problem, self.buffers = problem, buffers
        self.vectors, self.key_tile, self.dim_tile = vectors, key_tile, dim_tile
        self.width = vectors * LANES
        self.finish = Finish(problem.epilogue, buffers)

    def _at(self, row: Any, j: int) -> Any:
        return span(row * self.width + j * LANES, LANES)

    def emit(self, batch: Any) -> None:
        p, width = self.problem, self.width
        tiles = -(-p.queries // width)
        with shares(batch, p.heads * tiles, p.queries * p.keys * p.channels / 32) as (b, begin, end):
            self.query = self.factors = scratch(p.dim * width)
            self.score = scratch(self._block * width)
            self.out = scratch(p.dim * width)
            self.highest, self.total, self.rescale = (scratch(width) for _ in range(3))
            self.square = scratch(LANES * LANES)  # for transposition
            if self._full_mask:
                self.mask_tile = scratch(self._block * width)
            quant = self.finish.quantizer(b)
            with T.serial(begin, end) as i:
                h, tile = unravel(i, tiles)
                # the last tile ends at the last query and overlaps the one before; lanes beyond repeat it
                first = T.bind(T.max(T.min(tile * width, p.queries - width), 0))
                self._load_queries(b, h, first)
                self._clear()
                self._key_blocks(b, h, first)
                self._store(b, h, first, quant)

    def _key_blocks(self, b: Index, h: Index, first: Index) -> None:
        """Scores, weights and weighted values of all keys, for queries from the first on."""
        self._each_key_block(lambda key, size: self._key_block(b, h, first, key, size))

    def _each_key_block(self, body: Callable[[Any, Any], None]) -> None:
        """Calls ``body(key, size)`` for blocks of keys: where it can, once, with a variable as size, for all of them.

        That is half of the code to compile; a last block smaller than a tile, or with words in part, has code of its
        own.
        """
        full, rest = divmod(self.problem.keys, KEYS)
        if not full or rest < self.key_tile or rest % self._granule:
            each_tile(self.problem.keys, KEYS, body)
            return
        with T.serial(0, full + 1) as i:
            key = i * KEYS
            body(key, T.bind(T.min(self.problem.keys - key, KEYS)))

    @property
    def _block(self) -> int:
        """Keys of a block."""
        return KEYS

    @property
    def _granule(self) -> int:
        """Keys that are taken together."""
        return 1

    @property
    def _full_mask(self) -> bool:
        return self.problem.mask is not None and self.problem.mask[2] != 1

    def _query_row(self, first: Any, lane: Any) -> Any:
        last = self.problem.queries - 1
        return first + lane if self.problem.queries >= self.width else T.min(first + lane, last)

    def _load_queries(self, b: Any, h: Any, first: Any) -> None:
        p = self.problem
        scale = p.scale if p.scale is not None else 1.0 / math.sqrt(p.dim)
        factor = f32(scale * vmath.LOG2_E, LANES)  # softmax in powers of two

        def block(j: Any, d: Any, dims: int) -> None:
            with T.serial(0, LANES) as i:
                where, start = (b, self._query_row(first, j * LANES + i)), h * p.dim + d
                q = self.buffers["q"]
                row = q[(*where, span(start, LANES))] if dims == LANES else partial(q, where, start, dims)[0]
                store(self.square, row, span(i * LANES, LANES))
            rows = [self.square[span(i * LANES, LANES)] for i in range(LANES)]
            for i, value in enumerate(transpose(rows)[:dims]):
                store(self.query, mul(value, factor), span((d + i) * self.width + j * LANES, LANES))

        with T.serial(0, self.vectors) as j:
            each_tile(p.dim, LANES, lambda d, dims: block(j, d, dims))

    def _clear(self) -> None:
        with T.serial(0, self.problem.dim) as d:
            for j in range(self.vectors):
                store(self.out, f32(0.0, LANES), self._at(d, j))
        for j in range(self.vectors):
            store(self.highest, f32(LOWEST, LANES), self._at(0, j))
            store(self.total, f32(0.0, LANES), self._at(0, j))

    def _key_block(self, b: Any, h: Any, first: Any, key: Any, size: Any) -> None:
        new = scratch(self.width)
        for j in range(self.vectors):
            store(new, self._first_maximum(j), self._at(0, j))
        if self._full_mask:
            self._load_mask(b, h, first, key, size, range(self.vectors))
        self._all_scores(b, h, key, size, new)
        self._weights(size, new)
        self._all_values(b, h, key, size)

    def _all_scores(self, b: Index, h: Index, key: Index, size: Index, new: Buffer) -> None:
        """Scores of a block of keys, and the maximum of what ``new`` holds and of them."""
        tile = min(self.key_tile, size) if isinstance(size, int) else self.key_tile
        with T.serial(0, T.floordiv(size + tile - 1, tile)) as t:
            start = T.min(t * tile, size - tile)  # scores of an overlap are computed twice, alike
            self._scores(b, h, key, start, tile, new)

    def _all_values(self, b: Index, h: Index, key: Index, size: Index) -> None:
        """Adds the weighted values of a block of keys to the output."""
        each_tile(self.problem.dim, self.dim_tile, lambda d, dims: self._values(b, h, key, size, d, dims))

    def _load_mask(self, b: Any, h: Any, first: Any, key: Any, size: Any, some: range) -> None:
        """The mask of a block of keys for some vectors of queries, as scores lie."""
        with T.serial(some.start * LANES, some.stop * LANES) as i:
            row = T.bind(self._query_row(first, i))
            with T.serial(0, size) as k:
                store(self.mask_tile, self._mask(b, h, row, key + k), k * self.width + i)

    def _mask(self, b: Any, h: Any, row: Any, key: Any) -> Any:
        shape = self.problem.mask
        assert shape is not None
        where = (b if shape[0] == BATCH else 0, h if shape[1] != 1 else 0, row if shape[2] != 1 else 0, key)
        return self.buffers["mask"][where]

    def _scores(self, b: Any, h: Any, key: Any, start: Any, keys: int, new: Buffer) -> None:
        """Scores of `keys` keys (times log2 e) into `score`, their maximum into `new`."""
        pairs = [(i, j) for i in range(keys) for j in range(self.vectors)]
        sums = self._score_sums(b, h, key + start, keys)
        for n, (i, j) in enumerate(pairs):
            value = keep(self._masked(self._logit(sums[n], j), b, h, key, start + i, j))
            store(self.score, value, self._at(start + i, j))
            at = self._at(0, j)
            store(new, tirx.Select(new[at] > value, new[at], value), at)

    def _masked(self, value: Expr, b: Index, h: Index, key: Index, at: Index, j: int) -> Expr:
        """Vector j of the scores of key ``at`` of the block that begins with ``key``, with the mask on them."""
        if self.problem.mask is None:
            return value
        mask = self.mask_tile[self._at(at, j)] if self._full_mask else splat(self._mask(b, h, 0, key + at), LANES)
        return vmath.at_least(fma(mask, f32(vmath.LOG2_E, LANES), value), f32(LOWEST, LANES))

    def _score_sums(self, b: Any, h: Any, first: Any, keys: int) -> Registers | Sequence[Any]:
        """Products of queries and `keys` keys from the first on: vector j of key i is number ``i * vectors + j``."""
        pairs = [(i, j) for i in range(keys) for j in range(self.vectors)]
        sums = Registers(len(pairs), LANES, self.sums)
        for n, (_, j) in enumerate(pairs):
            sums[n] = self._start(j)
        with T.serial(0, self._steps) as d:
            for n, (i, j) in enumerate(pairs):
                element = splat(self._key(b, h, first + i, d), LANES)
                sums[n] = self._dot(element, self.factors[self._at(d, j)], sums[n])
        return sums

    @property
    def _steps(self) -> int:
        """How many terms the sum of a score has."""
        return self.problem.dim

    def _first_maximum(self, j: int) -> Any:
        """The value that the maximum of a block's scores starts from."""
        return self.highest[self._at(0, j)]

    def _start(self, j: int) -> Any:
        return f32(0.0, LANES)

    def _key(self, b: Any, h: Any, key: Any, step: Any) -> Any:
        return self.buffers["k"][b, key, h * self.problem.dim + step]

    def _dot(self, key: Any, query: Any, total: Any) -> Any:
        return fma(key, query, total)

    def _logit(self, total: Any, j: int) -> Any:
        return total

    def _rescale(self, new: Buffer, some: range) -> None:
        """The factor that sums of some vectors so far are multiplied by, as their maximum moves to `new`."""
        for j in some:
            at = self._at(0, j)
            store(self.rescale, vmath.exp2_nonpositive(self.highest[at] - new[at]), at)
            store(self.highest, new[at], at)

    def _weights(self, size: Any, new: Buffer) -> None:
        """Scores to 2^(score - maximum), and their sum."""
        self._rescale(new, range(self.vectors))
        wide = span(0, self.width)
        total = scratch(self.width)
        store(total, mul(self.total[wide], self.rescale[wide]), wide)
        with T.serial(0, size) as i:
            at = span(i * self.width, self.width)
            weight = keep(vmath.exp2_nonpositive(self.score[at] - new[wide]))
            store(self.score, weight, at)
            store(total, total[wide] + weight, wide)
        store(self.total, total[wide], wide)

    def _values(self, b: Any, h: Any, key: Any, size: Any, d: Any, dims: int) -> None:
        """Adds the block's weighted values to `dims` rows of the output."""
        pairs = [(i, j) for i in range(dims) for j in range(self.vectors)]
        sums = Registers(len(pairs), LANES)
        for n, (i, j) in enumerate(pairs):
            sums[n] = mul(self.out[self._at(d + i, j)], self.rescale[self._at(0, j)])
        with T.serial(0, size) as k:
            for n, (i, j) in enumerate(pairs):
                element = splat(self.buffers["v"][b, key + k, h * self.problem.dim + d + i], LANES)
                sums[n] = fma(element, self.score[self._at(k, j)], sums[n])
        for n, (i, j) in enumerate(pairs):
            store(self.out, sums[n], self._at(d + i, j))

    def _result(self, value: Any, b: Any, h: Any, d: Any) -> Any:
        """The output from the weighted mean, lanes of neighbouring dimensions from `d` on."""
        return value

    def _store(self, b: Any, h: Any, first: Any, quant: Any) -> None:
        p, wide = self.problem, span(0, self.width)
        store(self.total, vmath.reciprocal(self.total[wide]), wide)

        def block(j: Any, d: Any, dims: int) -> None:
            queries = span(j * LANES, LANES)
            columns = [
                keep(mul(self.out[span((d + i) * self.width + j * LANES, LANES)], self.total[queries]))
                for i in range(dims)
            ]
            columns += [f32(0.0, LANES)] * (LANES - dims)
            for i, value in enumerate(transpose(columns)):
                store(self.square, value, span(i * LANES, LANES))
            with T.serial(0, LANES) as i:
                row = T.bind(self._query_row(first, j * LANES + i))

                def finish(c: Any, lanes: int) -> None:
                    at = h * p.dim + d + c
                    value = self._result(self.square[span(i * LANES + c, lanes)], b, h, d + c)
                    value = self.finish(value, b, (row,), at, quant)
                    store(self.buffers["y"], value, b, row, span(at, lanes))

                each_vector(dims, finish)

        with T.serial(0, self.vectors) as j:
            each_tile(p.dim, LANES, lambda d, dims: block(j, d, dims))
