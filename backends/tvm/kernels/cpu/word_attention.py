"""Attention with products of words in registers, bfloat16 or 8 bits: the bodies of `fast_attention`.

Everything but the products is as in `attention`. Keys and values are made ready by a kernel of their own (`Ready`),
so that those of a text are made once: in words of 32 bits that a dot product takes, two values of bfloat16 or four of
8 bits, of neighbouring dimensions for keys and of neighbouring keys for values.

8 bits (after SageAttention, arXiv 2410.02367): from the keys their mean is taken off, which changes no softmax; codes
of queries are s8 with a scale for each query, of keys u8 = s8 + 128 with a scale for each block of keys, of weights u8
with a scale for each query and block, of values s8 with a scale for each dimension. The sums of the codes of a query
times -128 are what the accumulators start with. Where a dot product takes two signed operands, codes that are u8 are
multiplied less 128: then scores start with nothing, and weighted values with 128 times the sums of the values' codes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import log2

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    Index,
    Registers,
    each_vector,
    fold,
    scratch,
    shares,
    span,
    store,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import (
    MAGIC,
    as_float,
    as_int,
    f32,
    fma,
    i32,
    keep,
    lanes,
    mul,
    splat,
)
from mpq_compiler.backends.tvm.kernels.cpu import bfloat16
from mpq_compiler.backends.tvm.kernels.cpu.attention import Body
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa
from mpq_compiler.backends.tvm.kernels.problems.attention import LOWEST
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets import numerics as targets_numerics
from mpq_compiler.targets.numerics import KEY_BLOCK, PACKED

Start = Callable[[Index, int], Expr]
Pack = Callable[[Index, int], Expr]


# ------------------------------------------------------------------------------------------------- expressions

def _four(codes: list[Expr]) -> Expr:
    """The low bytes of up to four int32 as one."""
    count = lanes(codes[0])
    word = tirx.bitwise_and(codes[0], i32(255, count))
    for place, code in enumerate(codes[1:], 1):
        word = tirx.bitwise_or(word, tirx.shift_left(tirx.bitwise_and(code, i32(255, count)), i32(8 * place, count)))
    return word


_MAGIC_BITS = 0x4B400000


def _int32(value: int) -> int:
    """The value modulo 2^32, as signed."""
    return (value + 2**31) % 2**32 - 2**31


def _magnitude(x: Expr) -> Expr:
    """|x| as an integer that is ordered as the floats are, NaN above all."""
    return tirx.bitwise_and(as_int(x), i32(0x7FFFFFFF, lanes(x)))


def larger(a: Expr, b: Expr) -> Expr:
    """The larger of two; b where one is NaN."""
    return tirx.Select(a > b, a, b)


def _least(count: int) -> Expr:
    """The value that the search for a largest magnitude starts from."""
    return as_int(f32(targets_numerics.SMALLEST, count))


def _code(x: Expr, inverse: Expr) -> Expr:
    """rint(x * inverse) in the low bits."""
    return as_int(mul(x, splat(inverse, lanes(x))) + f32(MAGIC, lanes(x)))


def _power(x: Expr) -> Expr:
    """2^x for x <= 126, coarse: next to nothing below -126. NaN gives NaN where its lowest bits are 0."""
    x = keep(vmath.at_least(x, f32(-126.0, lanes(x))))
    return vmath.exp2_unchecked(x, coefficients=targets_numerics.EXP2_COARSE)


# ------------------------------------------------------------------------------------------- keys and values


class _Ready:
    """Makes keys and values of each sample and head ready."""

    def __init__(self, isa: Isa, problem: Ready, buffers: Buffers):
        self.isa, self.problem, self.buffers = isa, problem, buffers

    def emit(self, batch: Index) -> None:
        p = self.problem
        with shares(batch, p.heads, p.keys * p.channels / 4) as (b, first, end), T.serial(first, end) as h:
            self._emit_keys(b, h)
            self._emit_values(b, h)

    def _emit_keys(self, b: Index, h: Index) -> None:
        raise NotImplementedError

    def _emit_values(self, b: Index, h: Index) -> None:
        raise NotImplementedError

    def _row(self, name: str, b: Index, h: Index, key: Index, d: Index, count: int) -> Expr:
        """`count` values of a key from dimension `d` on."""
        return self.buffers[name][b, key, span(h * self.problem.dim + d, count)]

    def _words(self, b: Index, h: Index, key: Index, pack: Pack, tail: Pack) -> None:
        """Words of a key: ``pack(d, words)`` of those whose values are all there, ``tail(d, values)`` of the last."""
        packed = PACKED[self.problem.numerics]
        whole, rest = divmod(self.problem.dim, packed)
        target = self.buffers["packed_k"]
        if whole:
            each_vector(whole, lambda w, n: store(target, pack(w * packed, n), b, h, key, span(w, n)))
        if rest:
            store(target, tail(whole * packed, rest), b, h, key, whole)

    def _columns(
        self, b: Index, h: Index, value: Callable[[Index, Index, int], Expr], join: Callable[[list[Expr]], Expr]
    ) -> None:
        """Words of values: ``join`` of ``value(key, d, lanes)`` for the keys of a word."""
        p, packed = self.problem, PACKED[self.problem.numerics]
        whole, rest = divmod(p.keys, packed)

        def words(word: Index, keys: int) -> None:
            def column(d: Index, count: int) -> None:
                joined = join([value(word * packed + i, d, count) for i in range(keys)])
                store(self.buffers["packed_v"], joined, b, h, word, span(d, count))

            each_vector(p.dim, column)

        if whole:
            with T.serial(0, whole) as word:
                words(word, packed)
        if rest:
            words(whole, rest)


class Bfloat16Ready(_Ready):
    """Makes keys and values ready in bfloat16, two to a word."""

    def emit(self, batch: Index) -> None:
        with bfloat16.instructions(self.isa.name):
            super().emit(batch)

    def _emit_keys(self, b: Index, h: Index) -> None:
        with T.serial(0, self.problem.keys) as key:

            def pack(d: Index, count: int) -> Expr:
                return bfloat16.words(self.buffers["k"], (b, key), h * self.problem.dim + d, count)

            self._words(b, h, key, pack, lambda d, _: self._join([bfloat16.rounded(self._row("k", b, h, key, d, 1))]))

    def _emit_values(self, b: Index, h: Index) -> None:
        self._columns(b, h, lambda key, d, count: bfloat16.rounded(self._row("v", b, h, key, d, count)), self._join)

    @staticmethod
    def _join(values: list[Expr]) -> Expr:
        return bfloat16.pair(values[0], values[1] if len(values) > 1 else i32(0, lanes(values[0])))


class CodesReady(_Ready):
    """Makes keys and values ready as codes of 8 bits, four to a word, with their scales."""

    def _emit_keys(self, b: Index, h: Index) -> None:
        p = self.problem
        center = scratch(p.dim)

        def mean(d: Index, count: int) -> None:
            total = scratch(count)
            store(total, f32(0.0, count), span(0, count))
            with T.serial(0, p.keys) as key:
                store(total, total[span(0, count)] + self._row("k", b, h, key, d, count), span(0, count))
            store(center, mul(total[span(0, count)], f32(1.0 / p.keys, count)), span(d, count))

        each_vector(p.dim, mean)

        def smoothed(key: Index, d: Index, count: int) -> Expr:
            return self._row("k", b, h, key, d, count) - center[span(d, count)]

        def block(start: Index, keys: int, index: Index) -> None:
            width = min(LANES, 1 << (p.dim.bit_length() - 1))
            most = scratch(width, "int32")
            store(most, _least(width), span(0, width))
            with T.serial(0, keys) as i:
                each_vector(
                    p.dim,
                    lambda d, n: store(
                        most, larger(most[span(0, n)], _magnitude(smoothed(start + i, d, n))), span(0, n)
                    ),
                )
            largest = keep(as_float(fold(most[span(0, width)], larger)))
            store(self.buffers["k_scale"], mul(largest, f32(1 / 127, 1)), b, h, index)
            inverse = keep(vmath.div(f32(127.0, 1), largest))
            with T.serial(0, keys) as i:
                key = start + i

                def code(d: Index, n: int) -> Expr:
                    return _code(smoothed(key, d, n), inverse) + i32(128, n)

                def pack(d: Index, count: int) -> Expr:
                    codes = vmath.cast(code(d, 4 * count), "uint8")
                    return tirx.reinterpret("int32" if count == 1 else f"int32x{count}", codes)

                self._words(b, h, key, pack, lambda d, n: _four([code(d + j, 1) for j in range(n)]))

        whole, rest = divmod(p.keys, KEY_BLOCK)
        if whole:
            with T.serial(0, whole) as index:
                block(index * KEY_BLOCK, KEY_BLOCK, index)
        if rest:
            block(whole * KEY_BLOCK, rest, whole)

    def _emit_values(self, b: Index, h: Index) -> None:
        p = self.problem
        inverse = scratch(p.dim)

        def scale(d: Index, count: int) -> None:
            most, whole = scratch(count, "int32"), span(0, count)
            store(most, _least(count), whole)
            with T.serial(0, p.keys) as key:
                store(most, larger(most[whole], _magnitude(self._row("v", b, h, key, d, count))), whole)
            largest = keep(as_float(most[whole]))
            store(self.buffers["v_scale"], mul(largest, f32(1 / 127, count)), b, h, span(d, count))
            store(inverse, vmath.div(f32(127.0, count), largest), span(d, count))

        each_vector(p.dim, scale)
        self._columns(
            b, h, lambda key, d, n: _code(self._row("v", b, h, key, d, n), inverse[span(d, n)]), _four
        )


# ------------------------------------------------------------------------------------------------- attention


class Words(Body):
    """Queries in words (`factors`), products of words."""

    problem: FastAttention

    def __init__(self, isa: Isa, *given: Expr) -> None:
        super().__init__(*given)
        self.isa = isa

    @property
    def _packed(self) -> int:
        return PACKED[self.problem.numerics]

    @property
    def _steps(self) -> int:
        return -(-self.problem.dim // self._packed)

    @property
    def _granule(self) -> int:
        return self._packed

    def _key(self, b: Index, h: Index, key: Index, step: Index) -> Expr:
        return self.buffers["packed_k"][b, h, key, step]

    def _query_words(self, value: Callable[[Index, int], Expr], join: Callable[[list[Expr]], Expr]) -> None:
        """`factors` from ``value(d, j)``, vector j of the queries' dimension d."""
        self.factors = scratch((self._steps + 1) // 2 * 2 * self.width, "int32")
        whole, rest = divmod(self.problem.dim, self._packed)

        def words(word: Index, values: int) -> None:
            for j in range(self.vectors):
                joined = join([value(word * self._packed + i, j) for i in range(values)])
                store(self.factors, joined, self._at(word, j))

        if whole:
            with T.serial(0, whole) as word:
                words(word, self._packed)
        if rest:
            words(whole, rest)

    def _key_block(self, b: Index, h: Index, first: Index, key: Index, size: Index) -> None:
        self._make_room()
        super()._key_block(b, h, first, key, size)

    def _make_room(self) -> None:
        """Makes the buffers for what is of a block of keys alone."""
        self.words = scratch(self._block // self._packed * self.width, "int32")

    def _weights(self, size: Index, new: Buffer) -> None:
        every = range(self.vectors)
        self._begin_weights(new, every)
        self._some_weights(0, size, every)
        self._end_weights(size, every)

    def _begin_weights(self, new: Buffer, some: range) -> None:
        """Makes all ready for the weights of a block of keys and some vectors, whose maximum is ``new``."""
        raise NotImplementedError

    def _some_weights(self, start: Index, size: Index, some: range) -> None:
        """Words of the weights of so many keys of the block, from one on that begins a word, and of some vectors."""
        raise NotImplementedError

    def _end_weights(self, size: Index, some: range) -> None:
        """What is left to do when all weights of a block and some vectors are there."""

    def _weight_words(
        self,
        start: Index,
        size: Index,
        some: range,
        weight: Callable[[Index], Expr],
        join: Callable[[list[Expr]], Expr],
    ) -> None:
        """`words` of so many keys from ``start`` on from ``weight(key)``, the weights of some vectors for a key."""
        whole, rest = divmod(size, self._packed) if isinstance(size, int) else (T.floordiv(size, self._packed), 0)
        first = start // self._packed

        def words(word: Index, keys: int) -> None:
            joined = join([weight(word * self._packed + i) for i in range(keys)])
            store(self.words, joined, self._those(word, some))

        if not isinstance(whole, int) or whole:
            with T.serial(0, whole) as word:
                words(first + word, self._packed)
        if rest:
            words(first + whole, rest)

    def _those(self, row: Index, some: range) -> Expr:
        """Where some vectors that follow one another lie in a row of queries."""
        return span(row * self.width + some.start * LANES, len(some) * LANES)

    def _products(
        self, b: Index, h: Index, key: Index, size: Index, d: Index, dims: int, start: Start, kind: str
    ) -> tuple[Registers | list[Expr], list[tuple[int, int]]]:
        """Sums over the block's keys of weight times value for `dims` dimensions, and their places."""
        pairs = [(i, j) for i in range(dims) for j in range(self.vectors)]
        sums = Registers(len(pairs), LANES, kind)
        for n, (i, j) in enumerate(pairs):
            sums[n] = start(i, j)
        with T.serial(0, T.floordiv(size + self._packed - 1, self._packed)) as word:
            for n, (i, j) in enumerate(pairs):
                value = splat(self.buffers["packed_v"][b, h, key // self._packed + word, d + i], LANES)
                sums[n] = self._weigh(sums[n], self.words[self._at(word, j)], value)
        return sums, pairs

    def _weigh(self, total: Expr, weights: Expr, values: Expr) -> Expr:
        raise NotImplementedError


class Bfloat16(Words):
    """Attention whose products are of pairs of bfloat16, with sums in float32."""

    def emit(self, batch: Index) -> None:
        with bfloat16.instructions(self.isa.name):
            super().emit(batch)

    def _load_queries(self, b: Index, h: Index, first: Index) -> None:
        super()._load_queries(b, h, first)
        self._query_words(lambda d, j: bfloat16.rounded(self.query[self._at(d, j)]), Bfloat16Ready._join)

    def _dot(self, key: Index, query: Expr, total: Expr) -> Expr:
        return bfloat16.dot(total, key, query)

    def _power(self, x: Expr) -> Expr:
        """2^x as `_power`, with fewer instructions where there are some for it."""
        if not self.isa.scales:
            return _power(x)
        x = keep(x)
        part = keep(self.isa.fraction(x))
        return self.isa.scaled(vmath.polynomial(part, targets_numerics.EXP2_ABOVE), x)

    def _begin_weights(self, new: Buffer, some: range) -> None:
        self._rescale(new, some)
        these = self._those(0, some)
        store(self.total, mul(self.total[these], self.rescale[these]), these)

    def _some_weights(self, start: Index, size: Index, some: range) -> None:
        these, count = self._those(0, some), len(some) * LANES

        def weight(key: Index) -> Expr:
            value = keep(self._power(self.score[self._those(key, some)] - self.highest[these]))
            store(self.total, self.total[these] + value, these)
            return as_int(value) + i32(0x8000, count)  # to nearest: of ties, which are rare, all go up

        def join(values: list[Expr]) -> Expr:
            low = tirx.shift_right(values[0], i32(16, count))  # weights are positive
            high = [tirx.bitwise_and(value, i32(-0x10000, count)) for value in values[1:]]
            return tirx.bitwise_or(low, high[0]) if high else low

        self._weight_words(start, size, some, weight, join)

    def _weigh(self, total: Expr, weights: Expr, values: Expr) -> Expr:
        return bfloat16.dot(total, weights, values)

    def _values(self, b: Index, h: Index, key: Index, size: Index, d: Index, dims: int) -> None:
        def start(i: Index, j: int) -> Expr:
            return mul(self.out[self._at(d + i, j)], self.rescale[self._at(0, j)])

        sums, pairs = self._products(b, h, key, size, d, dims, start, "float32")
        for n, (i, j) in enumerate(pairs):
            store(self.out, sums[n], self._at(d + i, j))


class Codes(Words):
    """Attention whose products are of codes of 8 bits, with exact sums."""

    sums = "int32"

    def __init__(self, isa: Isa, *given: Expr) -> None:
        super().__init__(isa, *given)
        self.signed = isa.unsigned_excess > 0
        """Whether codes that are u8 are multiplied less 128."""

    def _gathered(self, word: Index) -> Expr:
        """Four u8 codes as they are multiplied."""
        flip = i32(_int32(0x80808080), lanes(word))
        return tirx.bitwise_xor(word, flip) if self.signed else word

    def _load_queries(self, b: Index, h: Index, first: Index) -> None:
        super()._load_queries(b, h, first)
        self.query_scale, self.offset, inverse = scratch(self.width), scratch(self.width, "int32"), scratch(self.width)
        most = scratch(self.width, "int32")
        for j in range(self.vectors):
            at = self._at(0, j)
            store(most, _least(LANES), at)
            store(self.offset, i32(0, LANES), at)
        with T.serial(0, self.problem.dim) as d:
            for j in range(self.vectors):
                at = self._at(0, j)
                store(most, larger(most[at], _magnitude(self.query[self._at(d, j)])), at)
        for j in range(self.vectors):
            at = self._at(0, j)
            largest = keep(as_float(most[at]))
            store(self.query_scale, mul(largest, f32(1 / 127, LANES)), at)
            store(inverse, vmath.div(f32(127.0, LANES), largest), at)

        def value(d: Index, j: int) -> Expr:
            at = self._at(0, j)
            code = keep(_code(self.query[self._at(d, j)], inverse[at]))
            store(self.offset, self.offset[at] + code - i32(_MAGIC_BITS, LANES), at)
            return code

        self._query_words(value, _four)
        for j in range(self.vectors):
            at = self._at(0, j)
            store(self.offset, self.offset[at] * i32(-128, LANES), at)

    def _make_room(self) -> None:
        super()._make_room()
        self.scale, self.merge, self.shifted = (scratch(self.width) for _ in range(3))

    def _key_block(self, b: Index, h: Index, first: Index, key: Index, size: Index) -> None:
        self._make_room()
        self._scale_block(b, h, key, range(self.vectors))
        if self.signed:
            self._sum_values(b, h, key, size)
        Body._key_block(self, b, h, first, key, size)

    def _scale_block(self, b: Index, h: Index, key: Index, some: range) -> None:
        """The scales of the scores of the block that begins with a key, of some vectors of queries."""
        for j in some:
            at = self._at(0, j)
            block = splat(self.buffers["k_scale"][b, h, key // KEY_BLOCK], LANES)
            store(self.scale, mul(self.query_scale[at], block), at)

    def _sum_values(self, b: Index, h: Index, key: Index, size: Index) -> None:
        """The sums of the codes of the block's values times 128, of each dimension."""
        self.value_sums = scratch(self.problem.dim, "int32")

        def some(d: Index, count: int) -> None:
            total, whole = scratch(count, "int32"), span(0, count)
            store(total, i32(0, count), whole)
            with T.serial(0, T.floordiv(size + self._packed - 1, self._packed)) as word:
                codes = self.buffers["packed_v"][b, h, key // self._packed + word, span(d, count)]
                store(total, self._sum(total[whole], codes), whole)
            store(self.value_sums, total[whole] * i32(128, count), span(d, count))

        each_vector(self.problem.dim, some)

    def _sum(self, total: Expr, signed: Expr) -> Expr:
        """Adds the four s8 in each int32 to `total`."""
        count = lanes(total)
        if count % self.isa.words == 0:
            return self.isa.dot_words(total, i32(0x01010101, count), signed)
        for place in (24, 16, 8, 0):
            total = total + tirx.shift_right(tirx.shift_left(signed, i32(place, count)), i32(24, count))
        return total

    def _first_maximum(self, j: int) -> Expr:
        return f32(LOWEST, LANES)  # the block's own: its weights use all codes

    def _key(self, b: Index, h: Index, key: Index, step: Index) -> Expr:
        return self._gathered(super()._key(b, h, key, step))

    def _start(self, j: int) -> Expr:
        return i32(0, LANES) if self.signed else self.offset[self._at(0, j)]

    def _dot(self, key: Index, query: Expr, total: Expr) -> Expr:
        return self.isa.dot_words(total, key, query)

    def _logit(self, total: Expr, j: int) -> Expr:
        return mul(vmath.cast(total, "float32"), self.scale[self._at(0, j)])

    def _rescale(self, new: Buffer, some: range) -> None:
        for j in some:
            at = self._at(0, j)
            highest = keep(larger(self.highest[at], new[at]))
            store(self.rescale, vmath.exp2_nonpositive(self.highest[at] - highest), at)
            store(self.merge, vmath.exp2_nonpositive(new[at] - highest), at)
            store(self.highest, highest, at)

    def _begin_weights(self, new: Buffer, some: range) -> None:
        self._rescale(new, some)
        these = self._those(0, some)
        store(self.shifted, new[these] - f32(log2(255), len(some) * LANES), these)

    def _some_weights(self, start: Index, size: Index, some: range) -> None:
        these, width = self._those(0, some), len(some) * LANES

        def weight(key: Index) -> Expr:
            score = self._scores_at(self._those(key, some))
            return as_int(_power(score - self.shifted[these]) + f32(MAGIC, width))

        def join(codes: list[Expr]) -> Expr:
            """The codes, 0 to 255 above the bits of MAGIC, shifted into place and added: none carries."""
            places = range(len(codes))
            total = sum((tirx.shift_left(codes[i], i32(8 * i, width)) for i in places[1:]), codes[0])
            return self._gathered(total - i32(_int32(sum(_MAGIC_BITS << 8 * i for i in places)), width))

        self._weight_words(start, size, some, weight, join)

    def _scores_at(self, at: Expr) -> Expr:
        return self.score[at]

    def _end_weights(self, size: Index, some: range) -> None:
        """Adds their sums to the totals."""
        part, these, width = scratch(self.width, "int32"), self._those(0, some), len(some) * LANES
        count = (size + self._packed - 1) // self._packed
        lacking = count * (self._packed * self.isa.unsigned_excess)
        store(part, splat(T.cast(lacking, "int32") if self.signed else T.int32(0), width), these)
        with T.serial(0, count) as word:
            for j in some:
                ones = i32(0x01010101, LANES)
                total = self.isa.dot_words(part[self._at(0, j)], self.words[self._at(word, j)], ones)
                store(part, total, self._at(0, j))
        summed = vmath.cast(part[these], "float32")
        store(self.total, fma(summed, self.merge[these], mul(self.total[these], self.rescale[these])), these)

    def _weigh(self, total: Expr, weights: Expr, values: Expr) -> Expr:
        return self.isa.dot_words(total, weights, values)

    def _values(self, b: Index, h: Index, key: Index, size: Index, d: Index, dims: int) -> None:
        def start(i: Index, j: int) -> Expr:
            return splat(self.value_sums[d + i], LANES) if self.signed else i32(0, LANES)

        sums, pairs = self._products(b, h, key, size, d, dims, start, "int32")
        for n, (i, j) in enumerate(pairs):
            self._merge(sums[n], self._at(d + i, j), j)

    def _merge(self, total: Expr, at: Expr, j: int) -> None:
        """Adds a block's sums of vector j to a row of the output, each by its factor."""
        common = self._at(0, j)
        part = mul(vmath.cast(total, "float32"), self.merge[common])
        store(self.out, fma(self.out[at], self.rescale[common], part), at)

    def _result(self, value: Expr, b: Index, h: Index, d: Index) -> Expr:
        return mul(value, self.buffers["v_scale"][b, h, span(d, lanes(value))])


class _Squares(Words):
    """Products of two rows of two words and two others, four sums.

    Words lie in pairs, those of neighbouring queries beside each other: [pair of words][query][word]. Scores come as
    [pair of queries][key][query] for two keys, weighted values as [pair of queries][query][dimension] for two.
    """

    def _square(self, total: Expr, left: Expr, right: Expr) -> Expr:
        """Adds the products of both rows on the left with both on the right, first those of the left's first row."""
        raise NotImplementedError

    @property
    def _granule(self) -> int:
        return 2 * self._packed

    def _pair_words(self, words: Expr, count: Index) -> None:
        """Brings so many words of all queries, in rows of them, into pairs; a row of zeros makes up for a last one."""
        if isinstance(count, int) and count % 2:
            store(words, i32(0, LANES), self._at(count, 0))
        with T.serial(0, (count + 1) // 2) as pair:
            rows = [keep(words[self._at(2 * pair + i, 0)]) for i in range(2)]
            order = [i + n * LANES for i in range(LANES) for n in range(2)]
            store(words, _shuffled(rows, order), span(pair * (2 * LANES), 2 * LANES))

    def _query_words(self, value: Callable[[Index, int], Expr], join: Callable[[list[Expr]], Expr]) -> None:
        super()._query_words(value, join)
        self._pair_words(self.factors, self._steps)

    def _score_sums(self, b: Index, h: Index, first: Index, keys: int) -> list[Expr]:
        pairs = -(-keys // 2)
        sums = self._zeros(pairs)

        def step(step: Index, word: Callable[[Index], Expr]) -> None:
            """Adds the products of two words, ``word(key)`` those of a key."""
            rows = []
            for n in range(pairs):
                both = (first + min(2 * n + i, keys - 1) for i in range(2))
                rows.append(keep(_shuffled([word(key) for key in both], range(4))))
            for m in range(LANES // 2):
                queries = self.factors[span(step * (2 * LANES) + 4 * m, 4)]
                for n, row in enumerate(rows):
                    at = n * (LANES // 2) + m
                    sums[at] = self._square(sums[at], row, queries)

        if self._steps // 2:
            with T.serial(0, self._steps // 2) as k:
                step(k, lambda key: self.buffers["packed_k"][b, h, key, span(2 * k, 2)])
        if self._steps % 2:  # beside a word of the queries that is zero
            step(self._steps // 2, lambda key: splat(self.buffers["packed_k"][b, h, key, self._steps - 1], 2))
        found = []
        for i in range(keys):
            order = [4 * m + 2 * (i % 2) + q for m in range(LANES // 2) for q in range(2)]
            found.append(self._every(sums, i // 2, order) + self._start(0))
        return found

    def _zeros(self, pairs: int) -> Registers:
        """Sums of two rows and all queries, for so many pairs of rows: zeros."""
        zero = i32(0, 4) if self.sums == "int32" else f32(0.0, 4)
        sums = Registers(pairs * (LANES // 2), 4, self.sums)
        for at in range(pairs * (LANES // 2)):
            sums[at] = zero
        return sums

    @staticmethod
    def _every(sums: Registers, pair: int, order: list[int]) -> Expr:
        """One row of a pair, a lane for each query: these of its sums."""
        return _shuffled([sums[pair * (LANES // 2) + m] for m in range(LANES // 2)], order)

    def _products(
        self, b: Index, h: Index, key: Index, size: Index, d: Index, dims: int, start: Start, kind: str
    ) -> tuple[list[Expr], list[tuple[int, int]]]:
        pairs, first = -(-dims // 2), key // self._packed
        rows_of_words = int(self.buffers["packed_v"].shape[2])
        sums = self._zeros(pairs)
        with T.serial(0, (size + 2 * self._packed - 1) // (2 * self._packed)) as step:
            values = []
            for n in range(pairs):
                here = span(d + 2 * n, 2 if 2 * n + 1 < dims else 1)
                places = [first + 2 * step, first + 2 * step + 1]
                if rows_of_words % 2:  # the last beside weights that are zero
                    places[1] = T.min(places[1], rows_of_words - 1)
                rows = [self.buffers["packed_v"][b, h, place, here] for place in places]
                if 2 * n + 1 == dims:
                    rows = [splat(row, 2) for row in rows]
                values.append(keep(_shuffled(rows, (0, 2, 1, 3))))
            for m in range(LANES // 2):
                weights = self.words[span(step * (2 * LANES) + 4 * m, 4)]
                for n, value in enumerate(values):
                    at = n * (LANES // 2) + m
                    sums[at] = self._square(sums[at], weights, value)
        found = []
        for i in range(dims):
            order = [4 * m + 2 * q + i % 2 for m in range(LANES // 2) for q in range(2)]
            found.append(self._every(sums, i // 2, order) + start(i, 0))
        return found, [(i, 0) for i in range(dims)]

    def _end_weights(self, size: Index, some: range) -> None:
        super()._end_weights(size, some)
        self._pair_words(self.words, (size + self._packed - 1) // self._packed)


class SquareCodes(_Squares, Codes):
    """The numerics of `Codes`, by usmmla: its sums are exact, so that results are the same."""

    def _square(self, total: Expr, left: Expr, right: Expr) -> Expr:
        return self.isa.square(total, left, right)


class SquareBfloat16(_Squares, Bfloat16):
    """The numerics of `Bfloat16`, by bfmmla, which rounds a sum once for two pairs."""

    def _square(self, total: Expr, left: Expr, right: Expr) -> Expr:
        return bfloat16.square(total, left, right)


def _shuffled(vectors: list[Expr], order: Iterable[int]) -> Expr:
    """The lanes of some vectors, one behind the other, in an order."""
    return tirx.Shuffle(vectors, [tirx.IntImm("int32", i) for i in order])
