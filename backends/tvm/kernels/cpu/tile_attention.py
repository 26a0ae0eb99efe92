"""Attention in bfloat16 or 8 bits with both products on tiles of AMX; all else is as in `word_attention`.

Scores, transposed, are keys times queries: rows of `packed_k` times `factors`, both as they are. Weighted values,
transposed, are values times `words`, and values lie transposed too: those of a block of keys in rows of dimensions, 16
of which are a tile. A row of a tile has 64 bytes, and a last one of a block or of a head may have 32.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from itertools import groupby

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Index,
    flat,
    fold,
    head,
    scratch,
    span,
    store,
    transpose,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import as_float, as_int, exp2_nonpositive, f32, i32, keep, mul
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
from mpq_compiler.targets.numerics import INT8, KEY_BLOCK, PACKED

WORDS = TILE_BYTES // 4
"""Words in a row of a whole tile, and rows of words in the other operand."""
(ROWS, HALF_ROWS), (COLUMNS, HALF_COLUMNS) = amx.LEFT, amx.RIGHT
"""The tiles of both operands: whole ones, and those of 32 bytes or 8 words."""
SHAPES = {HALF_ROWS: (TILE_ROWS, TILE_BYTES // 2), HALF_COLUMNS: (WORDS // 2, TILE_BYTES)}
PAIR = 2 * TILE_ROWS
"""Rows that are multiplied at once: two tiles of them."""
SLACK = 8.0
"""How many powers of two scores may exceed the maximum that their weights are relative to."""
BLOCK = 64
"""Keys of a block in bfloat16: what it needs stays in the first cache, with the queries and their output."""
TREE = 8
"""Keys whose scores are compared in pairs: a chain would wait for each maximum."""


def fits(problem: FastAttention | Ready, isa: Isa) -> bool:
    """Whether keys and dimensions are whole rows of tiles, and whole words in halves of them.

    What is made ready depends on it, so that both kernels have to decide alike: by this and nothing else.
    """
    whole = max(TILE_ROWS, PACKED[problem.numerics] * WORDS // 2)
    return isa.engine == AMX and not any(count % whole for count in (problem.keys, problem.dim, block_of(problem)))


def block_of(problem: FastAttention | Ready) -> int:
    """Keys of a block, of which values lie together; in 8 bits its scores share a scale."""
    return KEY_BLOCK if problem.numerics == INT8 else BLOCK


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

        def some_keys(key: Index, keys: int) -> None:
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

        each_tile(p.keys, block_of(p), some_keys)


class TileBfloat16Ready(_TilesReady, Bfloat16Ready):
    """The numerics of `Bfloat16Ready`."""


class TileCodesReady(_TilesReady, CodesReady):
    """The numerics of `CodesReady`."""


Action = Callable[[], None]
"""What emits something."""
Work = tuple[Index, int, Callable[[Index, int], None]]
"""The number of its first unit, how many there are, and what emits so many from one on."""


@dataclass(frozen=True)
class _Rows:
    """Rows of a buffer for the left of products: the first, words of each, one behind the other, and how many."""

    buffer: Buffer
    first: Index
    words: int
    count: int


class _Beside:
    """What vectors do while tiles multiply: work of several kinds, dealt over the places where a call emits some.

    Between two products of tiles there has to be some: what stands behind many of them begins when they are done.
    """

    def __init__(self, places: int, works: Sequence[Work]):
        self.places, self.works, self.place = places, works, 0

    def __call__(self) -> None:
        for first, units, emit in self.works:
            begin, end = (min(n, self.places) * units // self.places for n in (self.place, self.place + 1))
            if end > begin:
                emit(first + begin, end - begin)
        self.place += 1


def _each_pair(extent: int, works: Sequence[Work], body: Callable[..., None]) -> None:
    """Calls ``body(start, count, works)`` for pairs of tiles that partition a range, each with its part of the work.

    What does not divide comes behind them.
    """
    whole, rest = divmod(extent, PAIR)
    parts = max(whole, 1)

    def part(n: Index) -> list[Work]:
        return [(first + n * (units // parts), units // parts, emit) for first, units, emit in works]

    if whole:
        with T.serial(0, whole) as n:
            body(n * PAIR, PAIR, part(n))
    if rest:
        body(whole * PAIR, rest, [] if whole else part(0))
    for first, units, emit in works:
        if units % parts:
            emit(first + units // parts * parts, units % parts)


class _Tiles(Words):
    """Attention of some queries, a pair of vectors at a time: with two tiles of rows, four of sums.

    Two pairs take turns: while vectors compute the weights of one, tiles multiply scores and weighted values of the
    other, which is a block of keys behind.
    """

    sums_of_scores: Buffer
    """What tiles of scores are stored to."""

    @property
    def _block(self) -> int:
        return block_of(self.problem)

    def _load_queries(self, b: Index, h: Index, first: Index) -> None:
        amx.configure(scratch(amx.CONFIGURATION, "int32"), SHAPES)
        super()._load_queries(b, h, first)

    def _store(self, b: Index, h: Index, first: Index, quant: tuple[Expr, Expr] | None) -> None:
        super()._store(b, h, first, quant)
        amx.release()

    def _make_room(self) -> None:
        super()._make_room()
        self.new = scratch(self.width)

    def _key_blocks(self, b: Index, h: Index, first: Index) -> None:
        block, pairs = self._block, [range(j, min(j + 2, self.vectors)) for j in range(0, self.vectors, 2)]
        whole, rest = divmod(self.problem.keys, block)
        sizes = [block] * whole + [rest] * (rest > 0)
        self._make_room()
        turn = partial(self._turn, b, h, first)
        turn(pairs[0], scores=(0, sizes[0]))

        def step(key: Index, before: int, size: int, after: int) -> None:
            """Weights of a block of keys: of one pair, while the other catches up with it, then the other way round."""
            following = T.bind(key + size)
            if len(pairs) == 1:
                turn(range(0), (pairs[0], size))
                turn(pairs[0], scores=(following, after), values=(key, size))
            else:
                turn(pairs[1], (pairs[0], size), (key, size), (key - before, before))
                turn(pairs[0], (pairs[1], size), (following, after), (key, size))

        done = 0
        for around, alike in groupby(zip([0, *sizes[:-1]], sizes, [*sizes[1:], 0], strict=True)):
            count = len(list(alike))
            with T.serial(0, count) as n:
                step((done + n) * block, *around)
            done += count
        if len(pairs) > 1:
            turn(pairs[1], values=(self.problem.keys - sizes[-1], sizes[-1]))

    def _turn(
        self,
        b: Index,
        h: Index,
        first: Index,
        pair: range,
        weights: tuple[range, int] = (range(0), 0),
        scores: tuple[Index, int] = (0, 0),
        values: tuple[Index, int] = (0, 0),
    ) -> None:
        """Scores and weighted values of a pair of vectors, beside the weights of another.

        Args:
            b: the sample; ``h`` the head, ``first`` the first query.
            pair: numbers of the vectors whose products tiles compute.
            weights: the other pair, and how many keys its scores are of.
            scores: the first key of a block and how many it has; 0: none.
            values: those of the block before.
        """
        (other, size), (scored, keys), (valued, before) = weights, scores, values
        words = size // self._packed
        if size:
            self._begin_weights(self.new, other)
        early = words * keys // (keys + before) if keys else 0

        def some_weights(start: Index, count: int) -> None:
            self._some_weights(start * self._packed, count * self._packed, other)

        def some_maxima(start: Index, count: int) -> None:
            for n in range(count):
                self._maxima(b, h, scored, start + n, pair)

        maxima: Work = (0, keys // TREE, some_maxima)
        if keys:
            self._scores_beside(b, h, scored, keys, pair, (0, early, some_weights))
            self._begin_maxima(b, h, first, scored, keys, pair)
        if before:
            self._values_beside(b, h, valued, before, pair, (early, words - early, some_weights), maxima)
        else:
            if words > early:
                some_weights(early, words - early)
            with T.serial(0, keys // TREE) as n:
                some_maxima(n, 1)
        if size:
            self._end_weights(size, other)

    def _scores_beside(self, b: Index, h: Index, key: Index, size: int, pair: range, *works: Work) -> None:
        """The sums of the scores of a block of keys, beside other work."""
        p, words = self.problem, self.problem.dim // self._packed
        row = T.bind((b * p.heads + h) * p.keys + key)

        def some(start: Index, count: int, works: Sequence[Work]) -> None:
            """The scores of some keys."""
            rows = _Rows(flat(self.buffers["packed_k"]), (row + start) * words, words, count)

            def finish(t: int, i: int, j: int) -> list[Action]:
                at = (start + i * TILE_ROWS) * self.width + j * LANES
                return [partial(amx.save, t, self.sums_of_scores, at, 4 * self.width)]

            self._multiply(pair, rows, self.factors, self._dot_scores, self._begin_score, finish, works)

        _each_pair(size, works, some)

    def _begin_maxima(self, b: Index, h: Index, first: Index, key: Index, size: int, pair: range) -> None:
        """Makes all ready for the largest scores of a block."""
        for j in pair:
            store(self.new, self._first_maximum(j), self._at(0, j))
        if self._full_mask:
            self._load_mask(b, h, first, key, size, pair)

    def _maxima(self, b: Index, h: Index, key: Index, unit: Index, pair: range) -> None:
        """The largest scores of `TREE` keys of a block, number ``unit`` of them; sums become scores."""
        for j in pair:
            seen = []
            for i in range(TREE):
                row, at = unit * TREE + i, self._at(unit * TREE + i, j)
                seen.append(keep(self._masked(self._logit(self.sums_of_scores[at], j), b, h, key, row, j)))
                self._store_score(seen[-1], at)
            while len(seen) > 1:
                seen = [keep(larger(x, y)) for x, y in zip(seen[::2], seen[1::2], strict=True)]
            store(self.new, larger(self.new[self._at(0, j)], seen[0]), self._at(0, j))

    def _values_beside(self, b: Index, h: Index, key: Index, size: int, pair: range, *works: Work) -> None:
        """Adds the weighted values of a block of keys to the output, beside other work."""
        p, row = self.problem, size // self._packed
        first = T.bind(_values_at(p, b, h, key))

        def some(start: Index, count: int, works: Sequence[Work]) -> None:
            """The values of some dimensions."""
            rows = _Rows(flat(self.buffers["packed_v"]), first + start * row, row, count)

            def at(i: int, j: int) -> Index:
                return (start + i * TILE_ROWS) * self.width + j * LANES

            def begin(t: int, i: int, j: int) -> None:
                self._begin_value(t, at(i, j))

            def finish(t: int, i: int, j: int) -> list[Action]:
                return self._end_value(t, at(i, j), j)

            self._multiply(pair, rows, self.words, self._dot_values, begin, finish, works)

        _each_pair(p.dim, works, some)

    def _multiply(
        self,
        pair: range,
        rows: _Rows,
        words: Buffer,
        dot: Callable[[int, int, int], None],
        begin: Callable[[int, int, int], None],
        finish: Callable[[int, int, int], list[Action]],
        works: Sequence[Work],
    ) -> None:
        """Sums of the products of some rows and a pair of vectors, 16 rows at a time, beside other work.

        What is to be done with the sums of 16 rows waits until tiles multiply for the next: they take a while.

        Args:
            pair: numbers of the vectors.
            rows: what is on the left.
            words: has as many rows of words of all queries as a row has words.
            dot: adds the products of two tiles to a third.
            begin: sets the tile of sums of tile i of rows and vector j, ``begin(tile, i, j)``.
            finish: what is to be done with it, ``finish(tile, i, j)``.
            works: what is done meanwhile.
        """
        first, (whole, rest) = T.bind(rows.first), divmod(rows.words, WORDS)
        steps = [(n * WORDS, ROWS, COLUMNS) for n in range(whole)]
        steps += [(whole * WORDS, HALF_ROWS, HALF_COLUMNS)] * (rest > 0)
        waiting: list[Action] = []
        beside = _Beside((rows.count // TILE_ROWS * len(steps) + 1) * len(pair), works)
        for i in range(rows.count // TILE_ROWS):
            tiles = [(amx.sums(i, n), j) for n, j in enumerate(pair)]
            for t, j in tiles:
                begin(t, i, j)
            for at, left, right in steps:
                amx.load(left, rows.buffer, first + i * TILE_ROWS * rows.words + at, 4 * rows.words, passing=True)
                for t, j in tiles:
                    amx.load(right, words, at * self.width + j * LANES, 4 * self.width)
                    dot(t, left, right)
                    beside()
                    if waiting:
                        waiting.pop(0)()
            waiting += [action for t, j in tiles for action in finish(t, i, j)]
        for action in waiting:
            action()
            beside()

    def _store_score(self, score: Expr, at: Expr) -> None:
        """Puts a score in the place of its sum."""
        raise NotImplementedError

    def _begin_score(self, t: int, i: int, j: int) -> None:
        """Sets a tile of sums to what scores of vector j begin with."""
        raise NotImplementedError

    def _begin_value(self, t: int, at: Index) -> None:
        """Sets a tile of sums to what weighted values begin with, that of the output from an index on."""
        raise NotImplementedError

    def _end_value(self, t: int, at: Index, j: int) -> list[Action]:
        """What brings a tile of weighted values of vector j into the output."""
        raise NotImplementedError

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        raise NotImplementedError

    def _dot_values(self, sums: int, left: int, right: int) -> None:
        raise NotImplementedError


class TileBfloat16(_Tiles, Bfloat16):
    """The numerics of `Bfloat16`, whose sums are the output itself."""

    def _make_room(self) -> None:
        super()._make_room()
        self.sums_of_scores = self.score

    def _store_score(self, score: Expr, at: Expr) -> None:
        if self.problem.mask is not None:
            store(self.score, score, at)

    def _begin_score(self, t: int, i: int, j: int) -> None:
        amx.zero(t)

    def _grew(self, new: Buffer, j: int, yes: Expr, no: Expr) -> Expr:
        """What of ``yes`` and ``no`` is for the queries of vector j: did their maximum grow by much? NaN did."""
        at = self._at(0, j)
        return tirx.Select(new[at] - self.highest[at] <= f32(SLACK, LANES), no, yes)

    def _begin_weights(self, new: Buffer, some: range) -> None:
        """Moves the maximum of queries where it grew by much: a weight may be 2^`SLACK`, and is as precise."""
        moving = [self._grew(new, j, i32(1, LANES), i32(0, LANES)) for j in some]
        with T.If(fold(keep(reduce(tirx.bitwise_or, moving)), tirx.bitwise_or) > 0), T.Then():
            super()._begin_weights(new, some)
            with T.serial(0, self.problem.dim) as d:
                for j in some:
                    at = self._at(d, j)
                    store(self.out, mul(self.out[at], self.rescale[self._at(0, j)]), at)

    def _rescale(self, new: Buffer, some: range) -> None:
        """The factor of queries whose maximum grew by much, else one: no query depends on those beside it."""
        for j in some:
            at = self._at(0, j)
            factor = keep(exp2_nonpositive(self.highest[at] - new[at]))
            store(self.rescale, self._grew(new, j, factor, f32(1.0, LANES)), at)
            store(self.highest, self._grew(new, j, new[at], self.highest[at]), at)

    def _begin_value(self, t: int, at: Index) -> None:
        amx.load(t, self.out, at, 4 * self.width)

    def _end_value(self, t: int, at: Index, j: int) -> list[Action]:
        return [partial(amx.save, t, self.out, at, 4 * self.width)]

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        amx.dot_bfloat16(sums, left, right)

    _dot_values = _dot_scores


class TileCodes(_Tiles, Codes):
    """The numerics of `Codes`: its sums are exact, so that results are the same."""

    def _make_room(self) -> None:
        super()._make_room()
        self.sums_of_scores = scratch(self._block * self.width, "int32")
        self.weighted = scratch(amx.LEFT[0] * TILE_ROWS * LANES, "int32")

    def _begin_maxima(self, b: Index, h: Index, first: Index, key: Index, size: int, pair: range) -> None:
        self._scale_block(b, h, key, pair)
        super()._begin_maxima(b, h, first, key, size, pair)

    def _store_score(self, score: Expr, at: Expr) -> None:
        store(self.sums_of_scores, as_int(score), at)

    def _scores_at(self, at: Expr) -> Expr:
        return as_float(self.sums_of_scores[at])

    def _begin_score(self, t: int, i: int, j: int) -> None:
        amx.load(t, self.offset, j * LANES, 0)

    def _begin_value(self, t: int, at: Index) -> None:
        amx.zero(t)

    def _end_value(self, t: int, at: Index, j: int) -> list[Action]:
        place = t * TILE_ROWS * LANES

        def merge() -> None:
            with T.serial(0, TILE_ROWS) as d:
                self._merge(self.weighted[span(place + d * LANES, LANES)], span(at + d * self.width, LANES), j)

        return [partial(amx.save, t, self.weighted, place, 4 * LANES), merge]

    def _dot_scores(self, sums: int, left: int, right: int) -> None:
        amx.dot(sums, left, right)

    def _dot_values(self, sums: int, left: int, right: int) -> None:
        amx.dot_signed(sums, left, right)
