"""Group, layer and RMS normalization over channels-last float32, with an epilogue (SiLU, quantization, ...).

Statistics are exact to rounding for any mean and scale of the data:

- group norm: per channel, blocks of 32 rows are summed about the block's first row, which bounds the
  cancellation by the length of the block, and merged by the formula of Chan, Golub and LeVeque (1979,
  "Updating formulae and a pairwise algorithm for computing sample variances"); channels of a group are
  merged in two passes over their means.
- layer norm: two passes over the row, each a sum over 16 virtual lanes folded by halves.
- RMS norm: one such pass over the squares.

The first two apply ``(x - mean) * (gamma * rstd) + beta`` with one fused multiply-add, RMS norm ``(x * rstd) * gamma``.

With ``block`` channels are rotated by Hadamard matrices of that size before the epilogue's quantizer (`hadamard`): the
other steps come first, a block at a time, and wait for each other in the nearest cache.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish, quantizer_of
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffer,
    Buffers,
    each_vector,
    fold,
    partial,
    primfunc,
    scratch,
    shared,
    shares,
    span,
    store,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul, splat
from mpq_compiler.backends.tvm.kernels.cpu.hadamard import rotated
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue
from mpq_compiler.backends.tvm.kernels.problems.hadamard import check_block
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES, width
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, Norm, RmsNorm, arguments, sources_of

ROWS = 32  # rows of a statistics block: part of the arithmetic, the same for every target
STEP = 4 * LANES  # channels that one pass over a block keeps in registers


def _store(problem: Norm, y: Buffer, value: Expr, b: Any, s: Any, c: Any) -> None:
    """Channels from c on of row s of sample b."""
    lanes = vmath.lanes(value)
    if isinstance(problem, GroupNorm) or problem.into is None:
        store(y, value, b, s, span(c, lanes))
    else:
        _, offset, row = problem.into
        store(y, value, b, span(s * row + (c + offset), lanes))


class _Rows:
    """Writes the rows of a thread's share: the epilogue, with the rotation before its quantizer."""

    def __init__(self, problem: Norm, buffers: Buffers, sample: Any) -> None:
        self.problem, self.y, self.sample = problem, buffers["y"], sample
        steps = problem.epilogue.steps
        last = steps[-1:] if problem.epilogue.bits is not None else ()
        self.finish = Finish(problem.epilogue, buffers)
        if problem.block:
            self.before = Finish(replace(problem.epilogue, steps=steps[: len(steps) - len(last)]), buffers)
            self.finish = Finish(Epilogue(last), buffers)
            self.waiting = scratch(problem.block)
        self.quant = self.finish.quantizer(sample)

    def write(self, count: int, value: Callable[[Any, int], Expr], row: Any, first: int = 0, step: int = LANES) -> None:
        """Channels from ``first`` on of a row: what ``value(c, lanes)`` gives of the vectors of ``range(count)``."""
        block, b = self.problem.block, self.sample

        def put(c: Any, lanes: int) -> None:
            done = self.finish(value(c, lanes), b, (row,), first + c, self.quant)
            _store(self.problem, self.y, done, b, row, first + c)

        if not block:
            each_vector(count, put, step)
            return
        check_block(count, block)
        places = [span(c, min(LANES, block)) for c in range(0, block, LANES)]
        with T.serial(0, count // block) as i:

            def wait(c: Any, lanes: int) -> None:
                own = i * block + c
                store(self.waiting, self.before(value(own, lanes), b, (row,), first + own, None), span(c, lanes))

            each_vector(block, wait)
            for k, turned in enumerate(rotated([self.waiting[place] for place in places])):
                c = first + i * block + k * LANES
                _store(self.problem, self.y, self.finish(turned, b, (row,), c, self.quant), b, row, c)


def build(problem: Norm, isa: str = "avx512vnni", name: str = "norm") -> PrimFunc:
    """The kernel. All targets share one form; `isa` is accepted for uniformity."""
    del isa

    def body(batch: Any, buffers: Buffers) -> None:
        if isinstance(problem, GroupNorm):
            _group_norm(problem, batch, buffers)
        elif isinstance(problem, LayerNorm):
            _layer_norm(problem, batch, buffers)
        else:
            _rms_norm(problem, batch, buffers)

    return primfunc(name, arguments(problem), body)


# ------------------------------------------------------------------------------------------------ group norm


def _group_norm(problem: GroupNorm, batch: Any, buffers: Buffers) -> None:
    """Moments of blocks of rows, merged in order; then each row by itself. Both are shared among threads."""
    channels, positions = problem.channels, problem.positions
    # per channel: mean and centred sum of squares; then mean of the group and factor of the application
    mean, factor = scratch(channels), scratch(channels)
    nanoseconds = positions * channels / 8
    with T.serial(0, batch) as b:
        _channel_moments(problem, b, buffers, mean, factor, nanoseconds)
        _merge_groups(problem, buffers, mean, factor)
        with shares(1, positions, nanoseconds) as (_, begin, end):
            rows, raw = _Rows(problem, buffers, b), None
            if problem.raw is not None:
                group = T.bind(T.cast(buffers["group"][b], "int32"))
                raw = quantizer_of(buffers, group, "raw_")
            with T.serial(begin, end) as s:
                for x, count, first in _parts(problem, buffers):

                    def value(c: Any, lanes: int, x: Buffer = x, first: int = first) -> Expr:
                        at = span(first + c, lanes)
                        shift = buffers["beta"][at] if problem.affine else f32(0.0, lanes)
                        read = keep(x[b, s, span(c, lanes)])
                        if raw is not None:
                            store(buffers["raw"], vmath.quantize(read, *raw, int(problem.raw or 0)), b, s, at)
                        return fma(read - mean[at], factor[at], shift)

                    rows.write(count, value, s, first, STEP)


def _parts(problem: GroupNorm, buffers: Buffers) -> list[tuple[Buffer, int, int]]:
    """(tensor, its channels, number of the first of them) of what is normalized."""
    sources = sources_of(problem)
    return [(buffers[n], count, sum(c for _, c in sources[:i])) for i, (n, count) in enumerate(sources)]


def _channel_moments(
    problem: GroupNorm, b: Any, buffers: Buffers, mean: Buffer, m2: Buffer, nanoseconds: float
) -> None:
    """Mean and centred sum of squares of every channel of sample b."""
    channels, (full, rest) = problem.channels, divmod(problem.positions, ROWS)
    blocks = full + bool(rest)
    means, squares_of = (scratch(blocks * channels, heap=True) for _ in range(2))

    def block(number: Any, rows: int) -> None:
        """Moments of a block of rows about its first row."""
        row = T.bind(number * ROWS)
        for x, count, first in _parts(problem, buffers):

            def moments(c: Any, lanes: int, x: Buffer = x, first: int = first) -> None:
                own, at = span(c, lanes), span(number * channels + (first + c), lanes)
                total, squares = scratch(lanes), scratch(lanes)
                local = span(0, lanes)
                store(total, f32(0.0, lanes), local)
                store(squares, f32(0.0, lanes), local)
                with T.serial(1, rows) as r:
                    distance = keep(x[b, row + r, own] - x[b, row, own])
                    store(total, total[local] + distance, local)
                    store(squares, fma(distance, distance, squares[local]), local)
                shift = keep(mul(total[local], f32(1.0 / rows, lanes)))
                store(means, x[b, row, own] + shift, at)
                store(squares_of, fma(vmath.neg(shift), total[local], squares[local]), at)

            each_vector(count, moments, STEP)

    if full:
        with shared(nanoseconds) as team, team.loop(0, full) as i:
            block(i, ROWS)
    if rest:
        block(full, rest)

    def merge(number: Any, rows: int, before: Expr) -> None:
        """Merges a block into those before, ``before`` rows."""
        weight = keep(vmath.div(f32(float(rows), 1), before + f32(float(rows), 1)))

        def each(c: Any, lanes: int) -> None:
            at, own = span(c, lanes), span(number * channels + c, lanes)
            delta = keep(means[own] - mean[at])
            store(mean, fma(delta, splat(weight, lanes), mean[at]), at)
            between = mul(delta, splat(mul(weight, before), lanes))
            store(m2, fma(delta, between, m2[at] + squares_of[own]), at)

        _each_part(channels, each)

    def begin(c: Any, lanes: int) -> None:
        store(mean, means[span(c, lanes)], span(c, lanes))
        store(m2, squares_of[span(c, lanes)], span(c, lanes))

    each_vector(channels, begin, STEP)
    if full > 1:
        with T.serial(1, full) as i:
            merge(i, ROWS, T.bind(T.cast(i * ROWS, "float32")))
    if full and rest:
        merge(full, rest, f32(float(full * ROWS), 1))


def _each_part(extent: int, body: Any) -> None:
    """Like `each_vector`, without overlap: for bodies that update in place."""
    start, lanes = 0, STEP
    while start < extent:
        lanes = width(extent - start, lanes)
        count = (extent - start) // lanes
        base = start
        with T.serial(0, count) as i:
            body(base + i * lanes, lanes)
        start += count * lanes


def _merge_groups(problem: GroupNorm, buffers: Buffers, mean: Buffer, m2: Buffer) -> None:
    """Turns moments of channels into, per channel, the mean of its group and gamma / sqrt(var + eps)."""
    size = problem.channels // problem.groups
    group_mean, group_rstd = scratch(problem.groups), scratch(problem.groups)

    def merge(g: Any, lanes: int) -> None:
        def of(buffer: Buffer, i: Any) -> Expr:
            return buffer[g * size + i] if lanes == 1 else buffer[T.ramp(g * size + i, size, lanes)]

        local = span(0, lanes)
        total, squares = scratch(lanes), scratch(lanes)
        store(total, f32(0.0, lanes), local)
        with T.serial(0, size) as i:
            store(total, total[local] + of(mean, i), local)
        centre = keep(mul(total[local], f32(1.0 / size, lanes)))
        store(total, f32(0.0, lanes), local)
        store(squares, f32(0.0, lanes), local)
        with T.serial(0, size) as i:
            distance = keep(of(mean, i) - centre)
            store(total, total[local] + of(m2, i), local)
            store(squares, fma(distance, distance, squares[local]), local)
        m2_group = fma(squares[local], f32(float(problem.positions), lanes), total[local])
        variance = mul(m2_group, f32(1.0 / (problem.positions * size), lanes))
        store(group_mean, centre, span(g, lanes))
        store(group_rstd, vmath.rsqrt(variance + f32(problem.eps, lanes)), span(g, lanes))

    each_vector(problem.groups, merge)
    with T.serial(0, problem.groups) as g, T.serial(0, size) as i:
        c = g * size + i
        store(mean, group_mean[g], c)
        gamma = buffers["gamma"][c] if problem.affine else f32(1.0, 1)
        store(m2, mul(gamma, group_rstd[g]), c)


# ------------------------------------------------------------------------------------------------ layer norm


def _layer_norm(problem: LayerNorm, batch: Any, buffers: Buffers) -> None:
    channels, x = problem.channels, buffers["x"]
    with shares(batch, problem.positions, problem.positions * channels / 4) as (b, first, end):
        rows = _Rows(problem, buffers, b)
        with T.serial(first, end) as s:
            inverse = f32(1.0 / channels, 1)
            total = _row_sum(channels, x, (b, s), lambda value, mask, total: total + value)
            mean = keep(mul(total, inverse))

            def add_square(value: Expr, mask: Expr | None, total: Expr) -> Expr:
                distance = value - splat(mean, LANES)
                if mask is not None:
                    distance = tirx.Select(mask, distance, f32(0.0, LANES))
                distance = keep(distance)
                return fma(distance, distance, total)

            squares = _row_sum(channels, x, (b, s), add_square)
            rstd = keep(vmath.rsqrt(mul(squares, inverse) + f32(problem.eps, 1)))

            def value(c: Any, lanes: int) -> Expr:
                at = span(c, lanes)
                factor = splat(rstd, lanes)
                if problem.scale:
                    factor = mul(factor, buffers["gamma"][at])
                shift = buffers["beta"][at] if problem.shift else f32(0.0, lanes)
                return fma(x[b, s, at] - splat(mean, lanes), factor, shift)

            rows.write(channels, value, s)


def _rms_norm(problem: RmsNorm, batch: Any, buffers: Buffers) -> None:
    channels, x = problem.channels, buffers["x"]
    with shares(batch, problem.positions, problem.positions * channels / 4) as (b, first, end):
        rows = _Rows(problem, buffers, b)
        with T.serial(first, end) as s:
            squares = _row_sum(channels, x, (b, s), lambda value, mask, total: fma(value, value, total))
            mean = mul(squares, f32(1.0 / channels, 1))
            rstd = keep(vmath.rsqrt(mean + f32(problem.eps, 1)))

            def value(c: Any, lanes: int) -> Expr:
                found = mul(x[b, s, span(c, lanes)], splat(rstd, lanes))
                return mul(found, buffers["gamma"][span(c, lanes)]) if problem.scale else found

            rows.write(channels, value, s)


def _row_sum(extent: int, x: Buffer, row: tuple[Any, ...], add: Any) -> Expr:
    """Folds a row into 4 x 16 virtual lanes (element i into lane i mod 64), then the lanes by halves.

    ``add(value, mask, total)`` adds a vector; the last one may be partial, with zeros where `mask` is false.
    """
    parts, total = STEP // LANES, scratch(STEP)
    places = [span(part * LANES, LANES) for part in range(parts)]
    for at in places:
        store(total, f32(0.0, LANES), at)
    count, rest = divmod(extent, STEP)
    if count:
        with T.serial(0, count) as i:
            for part, at in enumerate(places):
                store(total, add(x[(*row, span(i * STEP + part * LANES, LANES))], None, total[at]), at)
    for part in range(rest // LANES):
        value = x[(*row, span(count * STEP + part * LANES, LANES))]
        store(total, add(value, None, total[places[part]]), places[part])
    if rest % LANES:
        at = places[rest // LANES]
        value, mask = partial(x, row, extent - rest % LANES, rest % LANES)
        store(total, add(value, mask, total[at]), at)
    while parts > 1:
        parts //= 2
        for part in range(parts):
            store(total, total[places[part]] + total[places[part + parts]], places[part])
    return keep(fold(total[places[0]]))
