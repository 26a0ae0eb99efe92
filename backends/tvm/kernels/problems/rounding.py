"""Values to bfloat16, for what reads them so and cannot have them from where they are made; GPUs alone."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, ROUNDED, Argument


@dataclass(frozen=True)
class Rounding:
    """y [B, rows, pitch] = x [B, rows, width] * factor in bfloat16.

    pitch:  values from row to row of y, the width or more: zeros behind it
    factor: float32, 1 where None
    """

    rows: int
    width: int
    pitch: int
    factor: float | None = None


def arguments(problem: Rounding) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    rows = (BATCH, problem.rows)
    return [Argument("x", (*rows, problem.width)), Argument("y", (*rows, problem.pitch), ROUNDED)]
