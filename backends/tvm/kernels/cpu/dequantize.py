"""The `mpq::dequantize_weight` kernel: a table's codes to float32, once, when an artifact is loaded.

Layers on simulated activations compute in float; all others multiply codes (`gemm`).
"""

from __future__ import annotations

from typing import Any

from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.dequantize import dequantize_row, stored_rows
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, primfunc
from mpq_compiler.backends.tvm.kernels.problems.dequantize import DequantizeTable, arguments


def build(problem: DequantizeTable, isa: str, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``, plain loops for all targets."""
    del isa

    def body(_: Any, b: Buffers) -> None:
        rows = stored_rows(problem, b, 0)
        with T.serial(0, problem.rows) as i:
            dequantize_row(problem, b, rows, i)

    return primfunc(name, arguments(problem), body)
