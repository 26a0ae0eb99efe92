"""Group, layer and RMS normalization, with an epilogue. Two passes: the mean, then the squares about it.

Group norm takes two grids, for its groups are columns of what is written in rows: one for mean and factor of each
group, one that applies them.
"""

from __future__ import annotations

from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, mul
from mpq_compiler.backends.tvm.kernels.cuda.rows import Rows
from mpq_compiler.backends.tvm.kernels.cuda.threads import (
    THREADS,
    combined,
    each,
    grid,
    local,
    power,
    primfunc,
    strided,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard
from mpq_compiler.backends.tvm.kernels.problems.hadamard import arguments as hadamard_arguments
from mpq_compiler.backends.tvm.kernels.problems.norms import GroupNorm, LayerNorm, Norm, RmsNorm, arguments


def workspaces(problem: Norm) -> list[Argument]:
    """The memory between the grids of group norm: mean and rstd [B, groups]; none for other norms."""
    if not isinstance(problem, GroupNorm):
        return []
    return [Argument(name, (BATCH, problem.groups)) for name in ("mean", "rstd")]


def build(problem: Norm, name: str) -> PrimFunc:
    """The kernel ``name(*problems.norms.arguments(problem), *workspaces(problem))``."""

    def body(batch: Any, buffers: Buffers) -> None:
        if isinstance(problem, GroupNorm):
            _group_norm(problem, batch, buffers)
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
            rows.write(lambda c: x[sample, row, c], sample, row, problem.channels, thread, threads)

    return primfunc(name, hadamard_arguments(problem), body)


def _sum(thread: Any, threads: int, count: Any, add: Any) -> Expr:
    """The sum over a block of ``add(i, total)`` for ``range(count)``."""
    total = local(1)
    store(total, f32(0.0, 1), 0)
    with strided(thread, count, threads) as i:
        store(total, add(i, total[0]), 0)
    return combined([total[0]], thread, threads)[0]


def _row_norm(problem: LayerNorm | RmsNorm, batch: Any, buffers: Buffers) -> None:
    channels, x, threads = problem.channels, buffers["x"], power(problem.channels)
    rows = Rows(problem.epilogue, buffers, problem.block, problem.into)
    inverse = f32(1.0 / channels, 1)
    with grid(batch * problem.positions, threads) as (number, thread):
        sample, row = unravel(number, problem.positions)
        mean = None
        if isinstance(problem, LayerNorm):
            total = _sum(thread, threads, channels, lambda c, total: total + x[sample, row, c])
            mean = keep(mul(total, inverse))

        def centred(c: Any) -> Expr:
            return x[sample, row, c] if mean is None else x[sample, row, c] - mean

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

        rows.write(value, sample, row, channels, thread, threads)


def _group_norm(problem: GroupNorm, batch: Any, buffers: Buffers) -> None:
    channels, positions, size = problem.channels, problem.positions, problem.channels // problem.groups
    count = positions * size
    mean_of, rstd_of = flat(buffers["mean"]), flat(buffers["rstd"])
    names = [(f"x{i}", n) for i, n in enumerate(problem.parts)] or [("x", channels)]

    def read(sample: Any, row: Any, channel: Any) -> Expr:
        """The value of a channel of the tensors side by side."""
        parts = {name: (flat(buffers[name]), n) for name, n in names}
        value: Any = None
        before = channels
        for name, n in reversed(names):
            before -= n
            own, width = parts[name]
            inside = T.max(T.min(channel - before, n - 1), 0)
            found = own[(sample * positions + row) * width + inside]
            value = found if value is None else tirx.Select(channel < before + n, found, value)
        return value

    with grid(batch * problem.groups, THREADS) as (number, thread):
        sample, group = unravel(number, problem.groups)

        def element(i: Any) -> Expr:
            row, channel = unravel(i, size)
            return keep(read(sample, row, group * size + channel))

        inverse = f32(1.0 / count, 1)
        mean = keep(mul(_sum(thread, THREADS, count, lambda i, total: total + element(i)), inverse))

        def square(i: Any, total: Expr) -> Expr:
            own = keep(element(i) - mean)
            return fma(own, own, total)

        squares = _sum(thread, THREADS, count, square)
        with T.If(thread == 0), T.Then():
            store(mean_of, mean, number)
            store(rstd_of, vmath.rsqrt(mul(squares, inverse) + f32(problem.eps, 1)), number)

    rows = Rows(problem.epilogue, buffers, problem.block, None)

    def value(sample: Any, row: Any, c: Any) -> Expr:
        own = keep(read(sample, row, c))
        if problem.raw is not None:
            group = T.bind(T.cast(buffers["group"][sample], "int32"))
            scale, zero = vmath.reciprocal(buffers["raw_scale"][group]), buffers["raw_zero"][group]
            store(buffers["raw"], vmath.quantize(own, scale, zero, problem.raw), sample, row, c)
        of = T.bind(sample * problem.groups + tirx.truncdiv(c, size))
        factor = mul(buffers["gamma"][c], rstd_of[of]) if problem.affine else rstd_of[of]
        return fma(own - mean_of[of], factor, buffers["beta"][c] if problem.affine else f32(0.0, 1))

    if not problem.block:
        with each(batch * (positions * channels)) as i:
            sample, row, c = unravel(i, positions, channels)
            rows.put(keep(value(sample, row, c)), sample, row, c)
        return
    threads = power(channels)
    with grid(batch * positions, threads) as (number, thread):
        sample, row = unravel(number, positions)
        rows.write(lambda c: value(sample, row, c), sample, row, channels, thread, threads)
