"""Products of two activations in float32, each read where it lies: any order of dimensions, any number of heads."""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument

TERMS = 256
"""Terms of a block of the sum. It is part of the arithmetic, and therefore equal on every target."""


@dataclass(frozen=True)
class Access:
    """How an operand lies in its buffer.

    shape:    of a sample in the buffer; the batch comes before it where `batched`
    strides:  of the heads, then of the two dimensions of the matrix, in elements
    offset:   of the first element of the matrix
    """

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int = 0
    batched: bool = True

    @property
    def size(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Matmul:
    """y[b, h, m, n] = sum_k left[b, h, m, k] * right[b, h, k, n] for every sample b and all `heads` h.

    heads:  extents of the dimensions that both operands and the result have
    left:   strides of (heads, rows, terms); right: (heads, terms, columns); result: (heads, rows, columns), the last 1

    Arguments: left, right, y.
    """

    heads: tuple[int, ...]
    rows: int
    terms: int
    columns: int
    left: Access
    right: Access
    result: Access

    def __post_init__(self) -> None:
        if self.result.strides[-1] != 1 and self.columns > 1:
            raise ValueError(f"columns of the result must be neighbours, not {self.result.strides[-1]} elements apart")


def arguments(problem: Matmul) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    operands = {"left": problem.left, "right": problem.right, "y": problem.result}
    return [Argument(name, (*([BATCH] if a.batched else []), *a.shape)) for name, a in operands.items()]
