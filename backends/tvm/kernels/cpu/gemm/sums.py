"""Sums of activations, which weights with offsets ask for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffer, Registers, fold, folds, span, store
from mpq_compiler.backends.tvm.kernels.cpu.gemm.control import loop, quotient, when
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa


def sum_each(
    name: str, activations: Buffer, sums: Buffer, to: Any, count: Any, least: int, start: Any, stride: int, width: int
) -> None:
    """sums[to + i] = the sum of the activations [start + i * stride, + width), for i < count; count >= least.

    By dot products with ones, of the ISA of that name. As many at once as a register has lanes: then their lanes are
    added up in a tree.
    """
    isa = ISAS[name]  # however weights lie
    size, lanes = isa.vector, isa.words
    whole, left = width // size, width % size

    def counted(dtype: str, first: int, last: int) -> Expr:
        """Ones in lanes [first, last), zeros in the others."""
        return tirx.Shuffle([tirx.const(int(first <= i < last), dtype) for i in range(size)], list(range(size)))

    def rows(i: Any, together: int) -> Expr:
        """The sums number i and on, so many."""
        totals = Registers(together, lanes, "int32")
        begins = [T.bind(start + (i + r) * stride) for r in range(together)]

        def add(values: Callable[[Any], Expr], ones: Expr) -> None:
            """Adds what ``values(begin)`` gives of each row, where `ones` has ones."""
            for r, begin in enumerate(begins):
                totals[r] = isa.sums(totals[r], values(begin), ones)

        def vector(k: Any) -> None:
            """Adds whole vector k."""
            ones = tirx.Broadcast(tirx.const(1, isa.weight), size)
            add(lambda begin: activations[span(begin + k * size, size)], ones)

        def some(begin: Any) -> Expr:
            """The first values of a row that has fewer than a vector."""
            mask = counted("bool", 0, left)
            loaded = T.masked_load(f"{isa.activation}x{size}", activations, span(begin, size), mask)
            return tirx.Select(mask, loaded, zeros(isa, size))  # lanes that are not loaded are undefined

        for r in range(together):
            totals[r] = vmath.i32(0, lanes)
        if whole:
            loop(whole, vector)
        if left and whole:  # the last vector begins amid those that have been counted
            last = width - size
            add(lambda begin: activations[span(begin + last, size)], counted(isa.weight, size - left, size))
        elif left:
            add(some, counted(isa.weight, 0, left))
        return fold(totals[0]) if together == 1 else folds([totals[r] for r in range(together)])

    def vectors() -> None:
        """Sums as many rows at once as a register has lanes; the last ones may overlap."""
        with T.serial(0, quotient(count + (lanes - 1), lanes)) as n:
            i = T.bind(T.min(n * lanes, count - lanes))
            store(sums, rows(i, lanes), span(to + i, lanes))

    def one_by_one() -> None:
        """Each sum by itself."""
        with T.serial(0, count) as i:
            store(sums, rows(i, 1), to + i)

    when(least >= lanes or count >= lanes, vectors, one_by_one)


def zeros(isa: Isa, lanes: int) -> Expr:
    """Gathered activations that are zero."""
    return vmath.splat(tirx.IntImm(isa.activation, 0), lanes)
