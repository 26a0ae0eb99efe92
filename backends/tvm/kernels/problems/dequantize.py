"""Weights in tables, as float32: `mpq::dequantize_weight`, once, when an artifact is loaded.

Layers on simulated activations compute in float; all others multiply codes (`quant_matmul`).
"""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.float_gemm import Conv2d, Linear

TILE_ROWS = 16
"""Rows that share a row class."""


@dataclass(frozen=True)
class DequantizeTable:
    """``scale[i, j(k)] * table[class(i), code[i, k]] + offset[i]`` of packed codes [rows, columns].

    segments:  channel counts with a scale of their own; columns are taps times channels
    classes:   tables; rows of 16 have a class where there are several
    offset:    the type in which offsets are stored, None without
    widths:    the bits of a code by class of row, where rows differ in them; the stream then has `code_bytes`
    integers:  codes of 4 bits number integers without a gap, in each table, which `WeightOnly` decodes without it
    """

    rows: int
    columns: int
    segments: tuple[int, ...]
    bits: int
    classes: int = 1
    offset: str | None = None
    widths: tuple[int, ...] = ()
    code_bytes: int = 0
    integers: bool = False

    def __post_init__(self) -> None:
        if self.integers and (self.bits != 4 or self.widths):
            raise ValueError(f"codes of {self.widths or self.bits} bits are looked up, those of 4 may be integers")


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
