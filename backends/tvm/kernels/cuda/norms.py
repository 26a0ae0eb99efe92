"""Group, layer and RMS normalization, with an epilogue. Two passes: the mean, then the squares about it.

A row is a warp's, which holds it in registers. Group norm takes three grids, for its groups are columns of what is
written in rows: one of blocks that share the rows of a sample, each with mean and squares of its own; one that brings
these together (Chan, Golub and LeVeque, "Updating formulae and a pairwise algorithm for computing sample variances",
1979); and one that applies them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, Index, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul
from mpq_compiler.backends.tvm.kernels.cuda.rows import Rows
from mpq_compiler.backends.tvm.kernels.cuda.threads import (
    THREADS,
    WARP,
    barrier,
    combined,
    each,
    grid,
    local,
    of_warp,
    power,
    primfunc,
    put_values,
    shared,
    strided,
    value_of,
    values_of,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard
from mpq_compiler.backends.tvm.kernels.problems.hadamard import arguments as hadamard_arguments
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, Norm, RmsNorm, arguments

Read = Callable[[Index, Index, Index, int], list[Expr]]
ROWS, CHUNKS = 4, 256
"""Rows, at least, of a block that sums groups, and blocks, at most, that share those of a sample."""
HELD = 64
"""Values of a row, at most, that a lane holds in registers."""


def workspaces(problem: Norm) -> list[Argument]:
    """The memory between the grids of group norm, none for other norms.

    mean, rstd [B, groups]; means and squares of the blocks that share a sample [B, blocks, groups]
    """
    if not isinstance(problem, GroupNorm):
        return []
    whole = [Argument(name, (BATCH, problem.groups)) for name in ("mean", "rstd")]
    return whole + [Argument(name, (BATCH, _chunks(problem), problem.groups)) for name in ("means", "squares")]


def _chunk(problem: GroupNorm) -> int:
    """Rows of a block that sums groups; the last of a sample may have fewer."""
    return max(ROWS, -(-problem.positions // CHUNKS))


def _chunks(problem: GroupNorm) -> int:
    return -(-problem.positions // _chunk(problem))


def build(problem: Norm, name: str) -> PrimFunc:
    """The kernel ``name(*problems.norms.arguments(problem), *workspaces(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        if isinstance(problem, GroupNorm):
            _group_norm(problem, batch, buffers)
        elif problem.block or problem.channels > WARP * HELD:
            _long_row_norm(problem, batch, buffers)
        else:
            _row_norm(problem, batch, buffers)

    return primfunc(name, [*arguments(problem), *workspaces(problem)], body)


def build_hadamard(problem: Hadamard, name: str) -> PrimFunc:
    """The kernel ``name(*problems.hadamard.arguments(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        rows, x = Rows(problem.epilogue, buffers, problem.block, None, late=True), buffers["x"]
        threads = power(problem.channels)
        with grid(batch * problem.positions, threads) as (number, thread):
            sample, row = unravel(number, problem.positions)
            rows.write(
                lambda c: value_of(x, sample, row, c), sample, row, problem.positions, problem.channels, thread, threads
            )

    return primfunc(name, hadamard_arguments(problem), body)


def _sum(thread: Any, threads: int, count: Any, add: Any) -> Expr:
    """The sum over a block of ``add(i, total)`` for ``range(count)``."""
    total = local(1)
    store(total, f32(0.0, 1), 0)
    with strided(thread, count, threads) as i:
        store(total, add(i, total[0]), 0)
    return combined([total[0]], thread, threads)[0]


def _row_norm(problem: LayerNorm | RmsNorm, batch: Any, buffers: Buffers) -> None:
    """By a warp for each row, several in a block of threads."""
    channels, positions = problem.channels, problem.positions
    rows = Rows(problem.epilogue, buffers, 0, problem.into)
    v = rows.together(4, channels)
    steps = -(-channels // (WARP * v))
    x, inverse = flat(buffers["x"]), f32(1.0 / channels, 1)
    with grid((batch * positions + (THREADS // WARP - 1)) // (THREADS // WARP)) as (number, thread):
        # behind the last row that again, to the same values: all lanes of a warp have to sum
        of_all = T.bind(T.min(number * (THREADS // WARP) + thread // WARP, batch * positions - 1))
        sample, row = unravel(of_all, positions)
        lane = T.bind(thread % WARP)
        held = local(steps * v)

        def each_held() -> Iterator[tuple[int, Index, Index]]:
            """Yields place and channel of neighbours that a lane holds, and whether there is such a channel."""
            for step in range(steps):
                channel = T.bind((step * WARP + lane) * v)
                yield step * v, channel, None if (step + 1) * WARP * v <= channels else channel < channels

        for first, channel, there in each_held():
            inside = channel if there is None else T.bind(T.min(channel, channels - v))
            for e, value in enumerate(values_of(x, of_all * channels + inside, v)):
                store(held, value, first + e)

        def total(term: Callable[[Index, Expr], Expr]) -> Expr:
            found = local(1)
            store(found, f32(0.0, 1), 0)
            for first, _, there in each_held():
                for e in range(v):
                    added = keep(term(held[first + e], found[0]))
                    store(found, added if there is None else tirx.Select(there, added, found[0]), 0)
            return of_warp(found[0])

        mean = None
        if isinstance(problem, LayerNorm):
            mean = keep(mul(total(lambda value, so_far: so_far + value), inverse))

        def square(value: Index, so_far: Expr) -> Expr:
            own = value if mean is None else keep(value - mean)
            return fma(own, own, so_far)

        rstd = keep(vmath.rsqrt(mul(total(square), inverse) + f32(problem.eps, 1)))
        for first, channel, there in each_held():
            with nullcontext() if there is None else T.If(there), nullcontext() if there is None else T.Then():
                has_beta = isinstance(problem, LayerNorm) and problem.shift
                gammas = values_of(buffers["gamma"], channel, v) if problem.scale else None
                betas = values_of(buffers["beta"], channel, v) if has_beta else None
                done = []
                for e in range(v):
                    value, gamma = held[first + e], gammas and gammas[e]
                    if isinstance(problem, RmsNorm):
                        found = mul(value, rstd)
                        done.append(keep(mul(found, gamma) if gammas else found))
                    else:
                        factor = mul(rstd, gamma) if gammas else rstd
                        done.append(keep(fma(value - mean, factor, betas[e] if betas else f32(0.0, 1))))
                rows.put(done, sample, row, channel, positions, channels)


def _long_row_norm(problem: LayerNorm | RmsNorm, batch: Index, buffers: Buffers) -> None:
    """By a block of threads for each row: one that is rotated, or too long for registers."""
    channels, x, threads = problem.channels, buffers["x"], power(problem.channels)
    rows = Rows(problem.epilogue, buffers, problem.block, problem.into)
    inverse = f32(1.0 / channels, 1)
    with grid(batch * problem.positions, threads) as (number, thread):
        sample, row = unravel(number, problem.positions)
        mean = None
        if isinstance(problem, LayerNorm):
            total = _sum(thread, threads, channels, lambda c, total: total + value_of(x, sample, row, c))
            mean = keep(mul(total, inverse))

        def centred(c: Any) -> Expr:
            return value_of(x, sample, row, c) if mean is None else value_of(x, sample, row, c) - mean

        def square(c: Any, total: Expr) -> Expr:
            own = keep(centred(c))
            return fma(own, own, total)

        squares = _sum(thread, threads, channels, square)
        rstd = keep(vmath.rsqrt(mul(squares, inverse) + f32(problem.eps, 1)))

        def value(c: Any) -> Expr:
            if isinstance(problem, RmsNorm):
                found = mul(centred(c), rstd)
                return mul(found, buffers["gamma"][c]) if problem.scale else found
            factor = mul(rstd, buffers["gamma"][c]) if problem.scale else rstd
            return fma(centred(c), factor, buffers["beta"][c] if problem.shift else f32(0.0, 1))

        rows.write(value, sample, row, problem.positions, channels, thread, threads)


def _group_norm(problem: GroupNorm, batch: Any, buffers: Buffers) -> None:
    channels, positions, size = problem.channels, problem.positions, problem.channels // problem.groups
    mean_of, rstd_of = flat(buffers["mean"]), flat(buffers["rstd"])
    names = [(f"x{i}", n) for i, n in enumerate(problem.parts)] or [("x", channels)]

    def read(sample: Index, row: Index, channel: Index, count: int) -> list[Expr]:
        """Neighbouring values of the tensors side by side, of one group."""
        parts = {name: (flat(buffers[name]), n) for name, n in names}
        found: list[Any] = []
        before = channels
        for name, n in reversed(names):
            before -= n
            own, width = parts[name]
            inside = T.max(T.min(channel - before, n - count), 0)
            values = values_of(own, (sample * positions + row) * width + inside, count)
            here = channel < before + n
            found = [tirx.Select(here, a, b) for a, b in zip(values, found, strict=True)] if found else values
        return [keep(value) for value in found]

    v = math.gcd(4, size, *(n for _, n in names))
    _sum_groups(problem, batch, buffers, read, v)
    _join_groups(problem, batch, buffers)
    rows = Rows(problem.epilogue, buffers, problem.block, None)

    def values(sample: Index, row: Index, c: Index, count: int) -> list[Expr]:
        own = read(sample, row, c, count)
        if problem.raw is not None:
            group = T.bind(T.cast(buffers["group"][sample], "int32"))
            scale, zero = vmath.reciprocal(buffers["raw_scale"][group]), buffers["raw_zero"][group]
            raw = [vmath.quantize(value, scale, zero, problem.raw) for value in own]
            put_values(flat(buffers["raw"]), raw, (sample * positions + row) * channels + c)
        of = T.bind(sample * problem.groups + tirx.truncdiv(c, size))
        mean, rstd = keep(mean_of[of]), keep(rstd_of[of])
        gammas, betas = (values_of(buffers[n], c, count) if problem.affine else None for n in ("gamma", "beta"))
        return [
            keep(fma(value - mean, mul(gammas[e], rstd) if gammas else rstd, betas[e] if betas else f32(0.0, 1)))
            for e, value in enumerate(own)
        ]

    if not problem.block:
        with each(batch * (positions * channels // v)) as i:
            sample, row, unit = unravel(i, positions, channels // v)
            c = T.bind(unit * v)
            rows.put(values(sample, row, c, v), sample, row, c, positions, channels)
        return
    threads = power(channels)
    with grid(batch * positions, threads) as (number, thread):
        sample, row = unravel(number, positions)
        rows.write(lambda c: values(sample, row, c, 1)[0], sample, row, positions, channels, thread, threads)


def _sum_groups(problem: GroupNorm, batch: Index, buffers: Buffers, read: Read, v: int) -> None:
    """Mean of each group, and the sum of the squares about it, of the rows of a block.

    Its threads have a place in the row each, of `v` channels of one group, in every so many rows.
    """
    channels, positions, groups = problem.channels, problem.positions, problem.groups
    units, chunk, chunks = channels // v, _chunk(problem), _chunks(problem)
    across = min(units, THREADS)
    down = THREADS // across
    places = -(-units // across)  # of a thread in a row
    of_group = units // groups
    means, squares = flat(buffers["means"]), flat(buffers["squares"])
    with grid(batch * chunks) as (number, thread):
        sample, own = unravel(number, chunks)
        first = T.bind(own * chunk)
        count = T.bind(T.min(positions - first, chunk))
        sums = shared(down * units)
        joined = shared(groups)
        start, place = T.bind(thread // across), T.bind(thread % across)

        def summed(term: Callable[[Expr, Index, Expr], Expr]) -> Index:
            """Yields each group that falls to a thread, with its sum over the block."""
            with T.If(start < down), T.Then(), T.serial(0, places) as step:
                unit = T.bind(step * across + place)
                with T.If(unit < units), T.Then():
                    total = local(1)
                    store(total, f32(0.0, 1), 0)
                    with T.serial(0, (count - start + (down - 1)) // down) as turn:
                        row = T.bind(first + start + turn * down)
                        for value in read(sample, row, unit * v, v):
                            store(total, term(value, tirx.truncdiv(unit, of_group), total[0]), 0)
                    store(sums, total[0], start * units + unit)
            barrier()
            found = local(1)
            store(found, f32(0.0, 1), 0)
            with strided(thread, groups, THREADS) as group:
                store(found, f32(0.0, 1), 0)
                with T.serial(0, down) as row, T.serial(0, of_group) as unit:
                    store(found, found[0] + sums[row * units + group * of_group + unit], 0)
                yield group, found[0]

        size = T.cast(count * (channels // groups), "float32")
        for group, total in summed(lambda value, _, so_far: so_far + value):
            mean = keep(vmath.div(total, size))
            store(joined, mean, group)
            store(means, mean, number * groups + group)
        barrier()

        def square(value: Expr, group: Index, so_far: Expr) -> Expr:
            own_ = keep(value - joined[group])
            return fma(own_, own_, so_far)

        for group, total in summed(square):
            store(squares, total, number * groups + group)


def _join_groups(problem: GroupNorm, batch: Index, buffers: Buffers) -> None:
    """Mean and factor of each group, by a warp, of what the blocks that share a sample have found."""
    positions, groups, chunk, chunks = problem.positions, problem.groups, _chunk(problem), _chunks(problem)
    size = problem.channels // groups
    mean_of, rstd_of, means, squares = (flat(buffers[name]) for name in ("mean", "rstd", "means", "squares"))
    with grid(batch * groups, WARP) as (number, lane):
        sample, group = unravel(number, groups)

        def total(term: Callable[[Index, Expr, Expr], Expr]) -> Expr:
            found = local(1)
            store(found, f32(0.0, 1), 0)
            with strided(lane, chunks, WARP) as own:
                count = T.cast(T.min(positions - own * chunk, chunk) * size, "float32")
                store(found, term((sample * chunks + own) * groups + group, count, found[0]), 0)
            return of_warp(found[0])

        inverse = f32(1.0 / (positions * size), 1)
        mean = keep(mul(total(lambda at, count, so_far: fma(means[at], count, so_far)), inverse))

        def square(at: Index, count: Expr, so_far: Expr) -> Expr:
            off = keep(means[at] - mean)
            return fma(mul(off, off), count, so_far + squares[at])

        variance = mul(total(square), inverse)
        with T.If(tirx.EQ(lane, 0)), T.Then():
            store(mean_of, mean, number)
            store(rstd_of, vmath.rsqrt(variance + f32(problem.eps, 1)), number)
