"""The `mpq::dequantize_weight` kernel: a table's codes to float32, once, when an artifact is loaded.

Layers on simulated activations compute in float; all others multiply codes (`gemm`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Argument, Buffers, primfunc, store
from mpq_compiler.backends.tvm.kernels.cpu.float_gemm import Conv2d, Linear
from mpq_compiler.backends.tvm.kernels.cpu.prepare import StoredRows

TILE_ROWS = 16
"""Rows that share a row class."""


@dataclass(frozen=True)
class DequantizeTable:
    """``scale[i, j(k)] * table[class(i), code[i, k]] + offset[i]`` of packed codes [rows, columns].

    segments:  channel counts with a scale of their own; columns are taps times channels
    classes:   tables; rows of 16 have a class where there are several
    offset:    the type in which offsets are stored, None without
    widths:    the bits of a code by class of row, where rows differ in them; the stream then has `code_bytes`
    """

    rows: int
    columns: int
    segments: tuple[int, ...]
    bits: int
    classes: int = 1
    offset: str | None = None
    widths: tuple[int, ...] = ()
    code_bytes: int = 0


@dataclass(frozen=True)
class WeightOnly:
    """A product in bfloat16 whose weight stays in codes; CUDA only (`cuda.weight_only`).

    product: its `packed` weight is what this would be in floats
    table:   of the weight, to the bit as here
    """

    product: Linear | Conv2d
    table: DequantizeTable


def arguments(problem: DequantizeTable) -> list[Argument]:
    """The buffers in calling order, the output last."""
    p = problem
    found = [
        Argument("codes", (p.code_bytes or -(-p.rows * p.columns * p.bits // 8),), "uint8"),
        Argument("scale", (p.rows, len(p.segments)), "float16"),
    ]
    if p.offset is not None:
        found.append(Argument("offset", (p.rows,), p.offset))
    if p.bits < 8:
        found.append(Argument("tables", (p.classes, 2**p.bits), "int8"))
    if p.classes > 1:
        found.append(Argument("row_class", (-(-p.rows // (4 if p.widths else TILE_ROWS)),), "uint8"))
    return [*found, Argument("y", (p.rows, p.columns))]


def build(problem: DequantizeTable, isa: str, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``, plain loops for all targets."""
    del isa

    def body(_: Any, b: Buffers) -> None:
        rows = stored_rows(problem, b, 0)
        with T.serial(0, problem.rows) as i:
            dequantize_row(problem, b, rows, i)

    return primfunc(name, arguments(problem), body)


def stored_rows(problem: DequantizeTable, b: Buffers, begin: Any) -> StoredRows:
    """What reads the codes, from row `begin` on."""
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
