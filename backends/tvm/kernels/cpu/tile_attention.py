"""Attention in bfloat16 with both products on tiles of AMX; all else is as in `word_attention`.

Scores, transposed, are keys times queries: rows of `packed_k` times `factors`, both as they are. Weighted values,
transposed, are values times `words`, whose tiles hold 16 dimensions of 32 keys each: another order of the same words
than that of registers.
"""

from __future__ import annotations

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, scratch, span, store, transpose
from mpq_compiler.backends.tvm.kernels.common.vmath import LOG2_E, at_least, f32, fma, keep, mul, splat
from mpq_compiler.backends.tvm.kernels.cpu import amx, bfloat16
from mpq_compiler.backends.tvm.kernels.cpu.isa import TILE_BYTES, TILE_ROWS, Isa
from mpq_compiler.backends.tvm.kernels.cpu.word_attention import Bfloat16, Bfloat16Ready
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.numerics import KEY_BLOCK

VALUES, WORDS = TILE_BYTES // 2, TILE_BYTES // 4
"""Values, and words of two of them, in a row of a tile."""
TREE = 8
"""Keys whose scores are compared in pairs: a chain would wait for each maximum."""


def fits(problem: FastAttention | Ready, isa: Isa) -> bool:
    """Whether keys and dimensions are whole tiles. What is made ready depends on it: no other property may."""
    return isa.engine and not any(count % VALUES for count in (problem.keys, problem.dim, KEY_BLOCK))


def _flat(buffer: Buffer) -> Buffer:
    size = buffer.shape[0]
    for extent in buffer.shape[1:]:
        size = size * extent
    return T.decl_buffer((size,), buffer.dtype, data=buffer.data)


def _values_at(problem: FastAttention | Ready, b: Index, h: Index, keys: Index, dims: Index) -> Index:
    """Where the tile of so many keys' and dimensions' blocks before lies in flat `packed_v`."""
    head = (b * problem.heads + h) * (problem.keys // 2 * problem.dim)
    return head + (keys * (problem.dim // TILE_ROWS) + dims) * (TILE_ROWS * WORDS)


class TileReady(Bfloat16Ready):
    """Makes keys ready as for registers, and values in tiles: [32 keys][16 dimensions], of each [dimension][word]."""

    def _emit_values(self, b: Index, h: Index) -> None:
        p, tiles = self.problem, _flat(self.buffers["packed_v"])
        with T.serial(0, p.keys // VALUES) as keys, T.serial(0, p.dim // TILE_ROWS) as dims:
            at = T.bind(_values_at(p, b, h, keys, dims))

            def word(i: int, keys: Index = keys, dims: Index = dims) -> Expr:
                """Word i of the tile, of all its dimensions."""
                rows = (self._row("v", b, h, keys * VALUES + 2 * i + n, dims * TILE_ROWS, LANES) for n in range(2))
                return keep(bfloat16.pair(*map(bfloat16.rounded, rows)))

            for d, words in enumerate(transpose([word(i) for i in range(WORDS)])):
                store(tiles, words, span(at + d * WORDS, WORDS))


class TileBfloat16(Bfloat16):
    """Attention of a tile of queries, whose vectors are taken two at a time: four tiles of sums."""

    def _load_queries(self, b: Index, h: Index, first: Index) -> None:
        amx.configure(scratch(amx.CONFIGURATION, "int32"))
        self.values = _flat(self.buffers["packed_v"])
        super()._load_queries(b, h, first)

    def _store(self, b: Index, h: Index, first: Index, quant: tuple[Expr, Expr] | None) -> None:
        super()._store(b, h, first, quant)
        amx.release()

    def _key_block(self, b: Index, h: Index, first: Index, key: Index, size: Index) -> None:
        p = self.problem
        if self._full_mask:
            self._load_mask(b, h, first, key, size)
        keys = T.floordiv(size, VALUES)
        with T.serial(0, keys) as block:
            for pair in self._pairs():
                self._score_tiles(b, h, key, block, pair)
        new = scratch(self.width)
        for j in range(self.vectors):
            store(new, self._first_maximum(j), self._at(0, j))
        with T.serial(0, T.floordiv(size, TREE)) as some:
            for j in range(self.vectors):
                self._compare(b, h, key, some * TREE, j, new)
        self._weights(size, new)
        with T.serial(0, p.dim) as d:
            for j in range(self.vectors):
                at = self._at(d, j)
                store(self.out, mul(self.out[at], self.rescale[self._at(0, j)]), at)
        with T.serial(0, p.dim // VALUES) as dims:
            for pair in self._pairs():
                self._value_tiles(b, h, key, keys, dims, pair)

    def _pairs(self) -> list[list[int]]:
        """The numbers of the vectors of queries, two at a time."""
        return [[*range(j, min(j + 2, self.vectors))] for j in range(0, self.vectors, 2)]

    def _each_sum(self, pair: list[int], row: Index) -> list[tuple[int, Index]]:
        """The tiles of sums, and where each lies in a buffer of rows of queries, whose first row that is."""
        cells = [(i, n) for i in range(2) for n in range(len(pair))]
        return [(2 * i + n, (row + i * TILE_ROWS) * self.width + pair[n] * LANES) for i, n in cells]

    def _multiply(self, pair: list[int], rows: tuple[Buffer, list[Index], int], words: Buffer, step: Index) -> None:
        """Adds two tiles of rows (buffer, where, bytes apart) times those of a pair of vectors in a step of words."""
        buffer, starts, apart = rows
        for i in range(2):
            amx.load(4 + i, buffer, starts[i], apart)
            for n, j in enumerate(pair):
                if i == 0:
                    amx.load(6 + n, words, step * (TILE_ROWS * self.width) + j * LANES, 4 * self.width)
                amx.dot_bfloat16(2 * i + n, 4 + i, 6 + n)

    def _score_tiles(self, b: Index, h: Index, key: Index, block: Index, pair: list[int]) -> None:
        """Scores of 32 keys, a block of those from ``key`` on."""
        p, keys = self.problem, _flat(self.buffers["packed_k"])
        sums = self._each_sum(pair, block * VALUES)
        for t, _ in sums:
            amx.zero(t)
        row = T.bind((b * p.heads + h) * p.keys + key + block * VALUES)
        with T.serial(0, p.dim // VALUES) as step:
            starts = [(row + i * TILE_ROWS) * (p.dim // 2) + step * WORDS for i in range(2)]
            self._multiply(pair, (keys, starts, 2 * p.dim), self.factors, step)
        for t, at in sums:
            amx.save(t, self.score, at, 4 * self.width)

    def _compare(self, b: Index, h: Index, key: Index, first: Index, j: int, new: Buffer) -> None:
        """Masks the scores of some keys and raises ``new`` to their maximum, for vector j."""
        seen = []
        for i in range(TREE):
            at = self._at(first + i, j)
            value = self.score[at]
            if self.problem.mask is not None:
                mask = self.mask_tile[at] if self._full_mask else splat(self._mask(b, h, 0, key + first + i), LANES)
                value = keep(at_least(fma(mask, f32(LOG2_E, LANES), value), f32(LOWEST, LANES)))
                store(self.score, value, at)
            seen.append(keep(value))
        while len(seen) > 1:
            seen = [keep(_larger(x, y)) for x, y in zip(seen[::2], seen[1::2], strict=True)]
        store(new, _larger(new[self._at(0, j)], seen[0]), self._at(0, j))

    def _value_tiles(self, b: Index, h: Index, key: Index, keys: Index, dims: Index, pair: list[int]) -> None:
        """Adds the weighted values of a block's keys to 32 rows of the output."""
        p, sums = self.problem, self._each_sum(pair, dims * VALUES)
        for t, at in sums:
            amx.load(t, self.out, at, 4 * self.width)
        with T.serial(0, keys) as step:
            block = T.floordiv(key, VALUES) + step
            starts = [_values_at(p, b, h, block, dims * 2 + i) for i in range(2)]
            self._multiply(pair, (self.values, starts, TILE_BYTES), self.words, step)
        for t, at in sums:
            amx.save(t, self.out, at, 4 * self.width)


def _larger(a: Expr, b: Expr) -> Expr:
    return tirx.Select(a > b, a, b)
