"""Weights in FP8, as float32: `mpq::dequantize_float8`, once, when an artifact is loaded."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import Argument


@dataclass(frozen=True)
class DequantizeFloat8:
    """``scale[i] * float8(codes[i, k])`` for codes u8 [rows, columns] and scale f16 [rows].

    exponent:  bits of the exponent: 2 (E2M5) to 5 (E5M2)
    """

    rows: int
    columns: int
    exponent: int = 4

    def __post_init__(self) -> None:
        if not 2 <= self.exponent <= 5:
            raise ValueError(f"FP8 has 2 to 5 bits of exponent, not {self.exponent}")


def arguments(problem: DequantizeFloat8) -> list[Argument]:
    """The buffers in calling order, the output last."""
    shape = (problem.rows, problem.columns)
    return [Argument("codes", shape, "uint8"), Argument("scale", (problem.rows,), "float16"), Argument("y", shape)]
