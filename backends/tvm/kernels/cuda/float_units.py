"""Float products, on the float units: what a plan leaves unquantized, and products of activations.

A block of threads makes a tile of 64 x 64 outputs from 16 terms at a time in shared memory; a thread makes 4 x 4 of
them. The sum of an output runs over its terms in order, one fused multiply-add each.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.panels import panel_column
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, flat, store, unravel
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, each, grid, local, primfunc, put_values, shared
from mpq_compiler.backends.tvm.kernels.problems import float_gemm, matmul
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear

TILE, TERMS, THREADS, OWN = 64, 16, 256, 4
"""Rows and columns of a tile, terms of a step; threads of a block, rows and columns of each."""

Element = Callable[[Any, Any], Expr]


def build(problem: Linear | Conv2d, name: str) -> PrimFunc:
    """The kernel ``name(*problems.float_gemm.arguments(problem))``."""
    return primfunc(name, float_gemm.arguments(problem), lambda batch, buffers: _body(problem, batch, buffers))


def build_matmul(problem: matmul.Matmul, name: str) -> PrimFunc:
    """The kernel ``name(*problems.matmul.arguments(problem))``."""
    return primfunc(name, matmul.arguments(problem), lambda batch, buffers: _matmul(problem, batch, buffers))


def _body(problem: Linear | Conv2d, batch: Any, buffers: Buffers) -> None:
    weight, finish = flat(buffers["weight"]), Finish(problem.epilogue, buffers)
    x, y = flat(buffers["x"]), flat(buffers["y"])
    if isinstance(problem, Linear):
        rows, outputs, terms, groups = problem.positions, problem.outputs, problem.inputs, 1
    else:
        rows, outputs, groups = problem.out_height * problem.out_width, problem.outputs, problem.groups
        terms = math.prod(problem.kernel) * problem.channels // groups

    def of_weight(output: Any, term: Any) -> Expr:
        if not problem.packed:
            return weight[output * terms + term]
        lanes = float_gemm.panel_shape(problem)[2]
        vector, lane = panel_column(problem, output)
        return weight[(vector * terms + term) * lanes + lane]

    def of_input(row: Any, term: Any, group: Any = 0) -> Expr:
        if isinstance(problem, Linear):
            return x[row * terms + term]
        p, depth = problem, problem.channels // groups
        sample, i, j = unravel(row, p.out_height, p.out_width)
        dy, dx, c = unravel(term, p.kernel[1], depth)
        top, left = i * p.stride[0] + dy - p.padding[0], j * p.stride[1] + dx - p.padding[2]
        inside = tirx.all(top >= 0, top < p.height, left >= 0, left < p.width)
        at = ((sample * p.height + top) * p.width + left) * p.channels + group * depth + c
        return T.if_then_else(inside, x[T.if_then_else(inside, at, 0)], f32(0.0, 1))

    def write(total: Expr, row: Any, output: Any) -> None:
        sample = T.bind(tirx.truncdiv(row, rows))
        own = [row - sample * rows]
        if not isinstance(problem, Linear):
            own = unravel(own[0], problem.out_width)
        done = finish(vmath.keep(total), sample, own, output, finish.quantizer(sample))
        put_values(y, [done], row * outputs + output)

    def start(output: Any) -> Expr:
        return buffers["bias"][output] if problem.bias else f32(0.0, 1)

    if groups == 1:
        _tiled(batch * rows, outputs, terms, of_input, of_weight, start, write)
        return
    with each(batch * (rows * outputs)) as i:
        row, output = unravel(i, outputs)
        total = local(1)
        store(total, start(output), 0)
        with T.serial(0, terms) as term:
            group = output // (outputs // groups)
            store(total, fma(of_input(row, term, group), of_weight(output, term), total[0]), 0)
        write(total[0], row, output)


def _tiled(
    rows: Any, columns: int, terms: int, left: Element, right: Element, start: Callable[[Any], Expr],
    write: Callable[[Expr, Any, Any], None],
) -> None:  # fmt: skip
    """``write(start(n) + sum_k left(m, k) * right(n, k), m, n)`` for all m and n."""
    across = -(-columns // TILE)
    with grid((rows + (TILE - 1)) // TILE * across, THREADS) as (block, thread):
        first_row, first_column = T.bind(block // across * TILE), T.bind(block % across * TILE)
        a, b = shared(TERMS * TILE), shared(TERMS * TILE)
        sums = local(OWN * OWN)
        row, column = T.bind(thread // (TILE // OWN)), T.bind(thread % (TILE // OWN))

        def own_column(j: int) -> Any:
            return first_column + column + j * (TILE // OWN)

        def own_row(i: int) -> Any:
            return first_row + row * OWN + i

        for i in range(OWN):
            for j in range(OWN):
                store(sums, start(T.min(own_column(j), columns - 1)), i * OWN + j)
        with T.serial(0, -(-terms // TERMS)) as step:
            for part in range(TILE * TERMS // THREADS):
                k = T.bind(thread % TERMS)
                place = T.bind(thread // TERMS + part * (THREADS // TERMS))
                term = T.bind(step * TERMS + k)
                m, n = T.bind(first_row + place), T.bind(first_column + place)
                _copied(a, k * TILE + place, tirx.all(m < rows, term < terms), partial(left, m, term))
                _copied(b, k * TILE + place, tirx.all(n < columns, term < terms), partial(right, n, term))
            barrier()
            with T.serial(0, TERMS) as k:
                for i in range(OWN):
                    for j in range(OWN):
                        value = fma(
                            a[k * TILE + row * OWN + i], b[k * TILE + column + j * (TILE // OWN)], sums[i * OWN + j]
                        )
                        store(sums, value, i * OWN + j)
            barrier()
        for i in range(OWN):
            for j in range(OWN):
                with T.If(tirx.all(own_row(i) < rows, own_column(j) < columns)), T.Then():
                    write(sums[i * OWN + j], T.bind(own_row(i)), T.bind(own_column(j)))


def _copied(target: Any, place: Any, there: Any, value: Callable[[], Expr]) -> None:
    """The value where there is one, else zero."""
    with T.If(there):
        with T.Then():
            store(target, value(), place)
        with T.Else():
            store(target, f32(0.0, 1), place)


def _matmul(problem: matmul.Matmul, batch: Any, buffers: Buffers) -> None:
    """A thread for each output: sums over blocks of terms, then over the blocks, as on the CPU."""
    p = problem
    left, right, y = (flat(buffers[name]) for name in ("left", "right", "y"))
    samples = batch if p.result.batched else 1
    with each(samples * (math.prod(p.heads) * p.rows * p.columns)) as i:
        sample, *place = unravel(i, *p.heads, p.rows, p.columns)
        *head, row, column = place

        def at(access: matmul.Access, first: Any, second: Any) -> Any:
            start = access.offset + (sample * access.size if access.batched else 0)
            steps = zip((*head, first, second), access.strides, strict=True)
            return start + sum(index * step for index, step in steps)

        whole, total = local(1), local(1)
        store(whole, f32(0.0, 1), 0)
        with T.serial(0, -(-p.terms // matmul.TERMS)) as block:
            store(total, f32(0.0, 1), 0)
            with T.serial(0, T.min(p.terms - block * matmul.TERMS, matmul.TERMS)) as k:
                term = block * matmul.TERMS + k
                product = left[at(p.left, row, term)], right[at(p.right, term, column)]
                store(total, fma(*product, total[0]), 0)
            store(whole, whole[0] + total[0], 0)
        store(y, whole[0], at(p.result, row, column))
