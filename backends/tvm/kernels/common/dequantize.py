"""Rows of a stored weight as float32."""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.stored import StoredRows
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, store
from mpq_compiler.backends.tvm.kernels.problems.dequantize import TILE_ROWS, DequantizeTable


def stored_rows(problem: DequantizeTable, b: Buffers, begin: Any) -> StoredRows:
    """Make the reader of codes, from row `begin` on."""
    return StoredRows(b, (problem.rows, problem.columns), problem.bits, problem.widths, begin)


def dequantize_row(problem: DequantizeTable, b: Buffers, rows: StoredRows, i: Any) -> None:
    """Row i of the result; rows in order."""
    p, channels = problem, sum(problem.segments)
    with rows.row(i) as codes:
        offset = None if p.offset is None else T.bind(T.cast(b["offset"][i], "float32"))
        table = 0
        if p.widths:
            table = T.bind(rows.class_of(i))
        elif p.classes > 1:
            table = T.bind(T.cast(b["row_class"][i // TILE_ROWS], "int32"))
        with T.serial(0, p.columns // channels) as tap:
            first = 0
            for j, size in enumerate(p.segments):
                scale = T.bind(T.cast(b["scale"][i, j], "float32"))
                with T.serial(0, size) as k:
                    column = T.bind(tap * channels + first + k)
                    code = T.bind(codes(column))
                    entry = code if p.bits == 8 else T.cast(b["tables"][table, code], "int32")
                    value = vmath.mul(T.cast(entry, "float32"), scale)
                    store(b["y"], value if offset is None else value + offset, i, column)
                first += size
