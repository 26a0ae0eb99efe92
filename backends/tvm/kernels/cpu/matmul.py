"""Products of two activations in float32, each read where it lies: any order of dimensions, any number of heads.

Lanes are columns of the product. A right operand whose columns are no neighbours is packed once for each head. The
sum of an output runs over blocks of 256 terms, in order, one fused multiply-add each; then over the blocks.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import (
    SHARES,
    Buffer,
    Buffers,
    Registers,
    primfunc,
    register_file,
    scratch,
    share,
    shares,
    span,
    store,
    unravel,
)
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, splat
from mpq_compiler.backends.tvm.kernels.cpu.float_gemm import PANEL_TILES
from mpq_compiler.backends.tvm.kernels.problems.lanes import width
from mpq_compiler.backends.tvm.kernels.problems.matmul import TERMS, Access, Matmul, arguments

MOST_ROWS = 12
"""Rows of the largest tile."""
STACK = 4096
"""Elements of a packed operand that still lie on the stack."""


def build(problem: Matmul, isa: str = "avx512vnni", name: str = "matmul") -> PrimFunc:
    """The kernel; `isa` chooses the tiles and no bit of the result."""
    return primfunc(name, arguments(problem), lambda batch, buffers: _Body(problem, isa, buffers).emit(batch))


class _Body:
    """The kernel's body."""

    def __init__(self, problem: Matmul, isa: str, buffers: Buffers) -> None:
        self.problem, self.buffers = problem, buffers
        self.accumulators, self.most = PANEL_TILES[register_file(isa)]
        self.lanes = width(problem.columns)
        self.vectors = -(-problem.columns // self.lanes)

    def emit(self, batch: Any) -> None:
        p = self.problem
        heads, packs = math.prod(p.heads), p.right.strides[-1] != 1 and p.columns > 1
        # A packed operand serves all rows of its head.
        self.split = 1 if packs else min(-(-SHARES // heads), -(-p.rows // MOST_ROWS))
        with shares(batch, heads * self.split, heads * p.rows * p.terms * p.columns / 64) as (sample, begin, end):
            self.panel = scratch(p.terms * p.columns, heap=p.terms * p.columns > STACK) if packs else None
            names = ("left", "right", "y")
            flat = [self._flat(name, access, sample) for name, access in zip(names, self._all, strict=True)]
            left, right, y = (buffer for buffer, _ in flat)
            with T.serial(begin, end) as i:
                *head, part = unravel(i, *p.heads[1:], self.split)
                a, b, c = (
                    T.bind(at + sum(h * step for h, step in zip(head, access.strides, strict=False)))
                    for (_, at), access in zip(flat, self._all, strict=True)
                )
                self._matrix(left, right, y, a, b, c, part)

    @property
    def _all(self) -> tuple[Access, Access, Access]:
        return self.problem.left, self.problem.right, self.problem.result

    def _flat(self, name: str, access: Access, sample: Any) -> tuple[Buffer, Any]:
        """The operand as a flat buffer, and where the sample's matrix starts in it."""
        buffer = self.buffers[name]
        size = buffer.shape[0] * access.size if access.batched else access.size
        flat = T.decl_buffer((size,), "float32", data=buffer.data)
        return flat, (sample * access.size if access.batched else 0) + access.offset

    def _matrix(self, left: Buffer, right: Buffer, y: Buffer, a: Any, b: Any, c: Any, part: Any) -> None:
        """Part number `part` of `split` of the rows of a product."""
        p, lanes = self.problem, self.lanes
        step = p.right.strides[-2]
        if self.panel is not None:
            apart = p.right.strides[-1]
            with T.serial(0, p.terms) as k, T.serial(0, p.columns) as n:
                store(self.panel, right[b + k * step + n * apart], k * p.columns + n)
            right, b, step = self.panel, 0, p.columns
        blocks = -(-self.vectors // self.most)
        each = -(-self.vectors // blocks)

        def block(first: Any, count: int) -> None:
            rows = min(p.rows, self.accumulators // count, MOST_ROWS)
            columns = [T.min((first + j) * lanes, p.columns - lanes) for j in range(count)]
            begin, end = share(-(-p.rows // rows), part, self.split)
            with T.serial(begin, end) as tile:
                row = T.bind(T.min(tile * rows, p.rows - rows))
                self._tile(left, right, y, a, b, c, step, row, rows, columns)

        full, rest = divmod(self.vectors, each)
        with T.serial(0, full) as i:
            block(i * each, each)
        if rest:
            block(full * each, rest)

    def _tile(
        self, left: Buffer, right: Buffer, y: Buffer, a: Any, b: Any, c: Any, step: int, row: Any, rows: int,
        columns: list[Any],
    ) -> None:  # fmt: skip
        """`rows` rows from `row` on of the vectors of `columns`."""
        p, lanes = self.problem, self.lanes
        cells = [(i, j) for i in range(rows) for j in range(len(columns))]
        sums = Registers(len(cells), lanes)
        down, along = p.left.strides[-2:]

        def terms(first: Any, count: int) -> None:
            for n in range(len(cells)):
                sums[n] = f32(0.0, lanes)
            with T.serial(0, count) as k:
                for n, (i, j) in enumerate(cells):
                    element = splat(left[a + (row + i) * down + (first + k) * along], lanes)
                    sums[n] = fma(element, right[span(b + (first + k) * step + columns[j], lanes)], sums[n])

        full, rest = divmod(p.terms, TERMS)
        if full + bool(rest) == 1:
            terms(0, p.terms)
            total = sums
        else:
            total = Registers(len(cells), lanes)
            for n in range(len(cells)):
                total[n] = f32(0.0, lanes)
            with T.serial(0, full) as block:
                terms(block * TERMS, TERMS)
                for n in range(len(cells)):
                    total[n] = total[n] + sums[n]
            if rest:
                terms(full * TERMS, rest)
                for n in range(len(cells)):
                    total[n] = total[n] + sums[n]
        for n, (i, j) in enumerate(cells):
            store(y, total[n], span(c + (row + i) * p.result.strides[-2] + columns[j], lanes))


