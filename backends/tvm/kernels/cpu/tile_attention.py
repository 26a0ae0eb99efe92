"""Attention in bfloat16 or 8 bits with both products on tiles of AMX; all else is as in `word_attention`.

Scores, transposed, are keys times queries: rows of `packed_k` times `factors`, both as they are. Weighted values,
transposed, are values times `words`, and values lie transposed too: those of a block of keys in rows of dimensions, 16
of which are a tile. A row of a tile has 64 bytes, and a last one of a block or of a head may have 32.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Index, flat, head, scratch, span, store, transpose
from mpq_compiler.backends.tvm.kernels.common.vmath import i32, keep, mul
from mpq_compiler.backends.tvm.kernels.cpu import amx
from mpq_compiler.backends.tvm.kernels.cpu.attention import each_tile
from mpq_compiler.backends.tvm.kernels.cpu.isa import AMX, TILE_BYTES, TILE_ROWS, Isa
from mpq_compiler.backends.tvm.kernels.cpu.word_attention import (
    Bfloat16,
    Bfloat16Ready,
    Codes,
    CodesReady,
    Words,
    larger,
)
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.numerics import KEY_BLOCK, PACKED

WORDS = TILE_BYTES // 4
"""Words in a row of a whole tile, and rows of words in the other operand."""
(ROWS, HALF_ROWS), (COLUMNS, HALF_COLUMNS) = amx.LEFT, amx.RIGHT
"""The tiles of both operands: whole ones, and those of 32 bytes or 8 words."""
SHAPES = {HALF_ROWS: (TILE_ROWS, TILE_BYTES // 2), HALF_COLUMNS: (WORDS // 2, TILE_BYTES)}
TREE = 8
"""Keys whose scores are compared in pairs: a chain would wait for each maximum."""


def fits(problem: FastAttention | Ready, isa: Isa) -> bool:
    """Whether keys and dimensions are whole rows of tiles, and whole words in halves of them.

    What is made ready depends on it, so that both kernels have to decide alike: by this and nothing else.
    """
    whole = max(TILE_ROWS, PACKED[problem.numerics] * WORDS // 2)
    return isa.engine == AMX and not any(count % whole for count in (problem.keys, problem.dim, KEY_BLOCK))


def _values_at(problem: FastAttention | Ready, b: Index, h: Index, key: Index) -> Index:
    """Where the values of the block that begins with a key lie in flat `packed_v`."""
    words = problem.dim // PACKED[problem.numerics]  # of a key, if they lay along dimensions
    return (b * problem.heads + h) * (problem.keys * words) + key * words


class _TilesReady:
    """Makes keys ready as for registers, and values by blocks of keys: of each [dimension][word]."""

    problem: Ready
    buffers: dict[str, Buffer]

    def _columns(
        self, b: Index, h: Index, value: Callable[[Index, Index, int], Expr], join: Callable[[list[Expr]], Expr]
    ) -> None:
        p, packed, made = self.problem, PACKED[self.problem.numerics], flat(self.buffers["packed_v"])

        def block(key: Index, keys: int) -> None:
            """The values of a block of keys."""
            row = keys // packed
            with T.serial(0, p.dim // LANES) as dims:
                first = T.bind(_values_at(p, b, h, key) + dims * (LANES * row))

                def some(word: Index, count: int) -> None:
                    """Some words of 16 dimensions."""
                    found = []
                    for i in range(count):
                        each = (value(key + (word + i) * packed + n, dims * LANES, LANES) for n in range(packed))
                        found.append(keep(join(list(each))))
                    found += [i32(0, LANES)] * (LANES - count)
                    for d, words in enumerate(transpose(found)):
                        store(made, head(words, count), span(first + d * row + word, count))

                each_tile(row, WORDS, some)

        each_tile(p.keys, KEY_BLOCK, block)


class TileBfloat16Ready(_TilesReady, Bfloat16Ready):
    """The numerics of `Bfloat16Ready`."""


class TileCodesReady(_TilesReady, CodesReady):
    """The numerics of `CodesReady`."""


class _Tiles(Words):
    """Attention of some queries, whose vectors are taken two at a time: with two tiles of rows, four of sums."""

    def _load_queries(self, b: Index, h: Index, first: Index) -> None:
        amx.configure(scratch(amx.CONFIGURATION, "int32"), SHAPES)
        super()._load_queries(b, h, first)

    def _store(self, b: Index, h: Index, first: Index, quant: tuple[Expr, Expr] | None) -> None:
        super()._store(b, h, first, quant)
        amx.release()

    def _each_key_block(self, body: Callable[[Index, Index], None]) -> None:
        each_tile(self.problem.keys, KEY_BLOCK, body)  # how many keys a block has is known

    def _all_scores(self, b: Index, h: Index, key: Index, size: Index, new: Buffer) -> None:
        p, keys, words = self.problem, flat(self.buffers["packed_k"]), self.problem.dim // self._packed
        sums, row = self._sums_of_scores(), T.bind((b * p.heads + h) * p.keys + key)

        def some(start: Index, count: int) -> None:
            """The sums of some keys."""
            for pair in self._pairs():
                cells = self._cells(pair, start, count)
                for t, _, j in cells:
                    self._begin_score(t, j)
                self._multiply(pair, count, keys, (row + start) * words, words, self.factors, self._dot_scores)
                for t, at, _ in cells:
                    amx.save(t, sums, at, 4 * self.width)

        each_tile(size, 2 * TILE_ROWS, some)
        with T.serial(0, size // TREE) as start:
            for j in range(self.vectors):
                seen = []
                for i in range(TREE):
                    at = self._at(start * TREE + i, j)
                    value = self._logit(sums[at], j)
                    seen.append(keep(self._masked(value, b, h, key, start * TREE + i, j)))
                    store(self.score, seen[-1], at)
                while len(seen) > 1:
                    seen = [keep(larger(x, y)) for x, y in zip(seen[::2], seen[1::2], strict=True)]
                store(new, larger(new[self._at(0, j)], seen[0]), self._at(0, j))

    def _all_values(self, b: Index, h: Index, key: Index, size: Index) -> None:
        p, values, row = self.problem, flat(self.buffers["packed_v"]), size // self._packed
        first = T.bind(_values_at(p, b, h, key))
        self._begin_values()

        def some(start: Index, count: int) -> None:
            """The sums of some dimensions."""
            for pair in self._pairs():
                rows = (values, first + start * row, row)
                add = partial(self._multiply, pair, count, *rows, self.words, self._dot_values)
                self._values_of(self._cells(pair, start, count), add)

        each_tile(p.dim, 2 * TILE_ROWS, some)

    def _pairs(self) -> list[list[int]]:
        """The numbers of the vectors of queries, two at a time."""
        return [[*range(j, min(j + 2, self.vectors))] for j in range(0, self.vectors, 2)]

    def _cells(self, pair: list[int], start: Index, count: int) -> list[tuple[int, Index, int]]:
        """The tiles of sums: the number of each, where it lies in a buffer of rows of queries, and its vector."""
        return [
            (amx.sums(i, n), (start + i * TILE_ROWS) * self.width + j * LANES, j)
            for i in range(count // TILE_ROWS)
            for n, j in enumerate(pair)
        ]

    def _multiply(
        self,
        pair: list[int],
        count: int,
        buffer: Buffer,
        first: Index,
        row: int,
        words: Buffer,
        dot: Callable[[int, int, int], None],
    ) -> None:
        """Adds the products of so many rows and a pair of vectors to the tiles of sums.

        Args:
            pair: numbers of the vectors.
            count: of rows, 16 or 32.
            buffer: has the rows, the first from ``first`` on, of so many words each.
            row: words of a row, whole tiles and perhaps half of one.
            words: has as many rows of words of all queries.
            dot: adds the products of two tiles.
        """
        first = T.bind(first)

        def step(at: Index, left: int, right: int) -> None:
            """The products of some words, from one on."""
            for i in range(count // TILE_ROWS):
                amx.load(left, buffer, first + i * TILE_ROWS * row + at, 4 * row)
                for n, j in enumerate(pair):
                    amx.load(right, words, at * self.width + j * LANES, 4 * self.width)
                    dot(amx.sums(i, n), left, right)

        whole, rest = divmod(row, WORDS)
        if whole:
            with T.serial(0, whole) as n:
                step(n * WORDS, ROWS, COLUMNS)
        if rest:
            step(whole * WORDS, HALF_ROWS, HALF_COLUMNS)

    def _sums_of_scores(self) -> Buffer:
        """What tiles of scores are stored to."""
        raise NotImplementedError

    def _begin_score(self, t: int, j: int) -> None:
        """Sets a tile of sums to what scores of vector j begin with."""
        raise NotImplementedError

    def _begin_values(self) -> None:
        """Makes the output ready for the values of a block."""
        raise NotImplementedError

    def _values_of(self, cells: list[tuple[int, Index, int]], multiply: Callable[[], None]) -> None:
        """Adds weighted values, which ``multiply`` sums, to some rows of the output."""
        raise NotImplementedError

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        raise NotImplementedError

    def _dot_values(self, sums: int, left: int, right: int) -> None:
        raise NotImplementedError


class TileBfloat16(_Tiles, Bfloat16):
    """The numerics of `Bfloat16`, whose sums are the output itself."""

    def _sums_of_scores(self) -> Buffer:
        return self.score

    def _begin_score(self, t: int, j: int) -> None:
        amx.zero(t)

    def _begin_values(self) -> None:
        with T.serial(0, self.problem.dim) as d:
            for j in range(self.vectors):
                at = self._at(d, j)
                store(self.out, mul(self.out[at], self.rescale[self._at(0, j)]), at)

    def _values_of(self, cells: list[tuple[int, Index, int]], multiply: Callable[[], None]) -> None:
        for t, at, _ in cells:
            amx.load(t, self.out, at, 4 * self.width)
        multiply()
        for t, at, _ in cells:
            amx.save(t, self.out, at, 4 * self.width)

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        amx.dot_bfloat16(sums, left, right)

    _dot_values = _dot_scores


class TileCodes(_Tiles, Codes):
    """The numerics of `Codes`: its sums are exact, so that results are the same."""

    def _sums_of_scores(self) -> Buffer:
        return scratch(KEY_BLOCK * self.width, "int32")

    def _begin_score(self, t: int, j: int) -> None:
        amx.load(t, self.offset, j * LANES, 0)

    def _begin_values(self) -> None:
        self.weighted = scratch(self.problem.dim * self.width, "int32")

    def _values_of(self, cells: list[tuple[int, Index, int]], multiply: Callable[[], None]) -> None:
        for t, _, _ in cells:
            amx.zero(t)
        multiply()
        for t, at, j in cells:
            amx.save(t, self.weighted, at, 4 * self.width)
            with T.serial(0, TILE_ROWS) as d:
                here = span(at + d * self.width, LANES)
                self._merge(self.weighted[here], here, j)

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        amx.dot(sums, left, right)

    def _dot_values(self, sums: int, left: int, right: int) -> None:
        amx.dot_signed(sums, left, right)
