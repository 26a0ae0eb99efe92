"""The stand-alone operators `mpq::quantize`, `mpq::dynamic_quantize` and `mpq::time_group`."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import quantizer_arguments


@dataclass(frozen=True)
class Quantize:
    """``quantize(x [B, *shape]) -> u8``, scale and zero point by the time group of the sample.

    shape:   of one sample
    bits:    of a code
    groups:  G, number of time groups
    parts:   channels (of the last dimension) of x0, x1, ... where x is those tensors side by side
    """

    shape: tuple[int, ...]
    bits: int = 8
    groups: int = 1
    parts: tuple[int, ...] = ()


@dataclass(frozen=True)
class DynamicQuantize:
    """``dynamic_quantize(x [B, rows, width]) -> u8, scale f32 [B, rows], zero point u8 [B, rows]``.

    rows:   of one sample
    width:  of a row
    bits:   of a code
    """

    rows: int
    width: int
    bits: int = 8


@dataclass(frozen=True)
class TimeGroup:
    """``time_group(timestep [B], boundaries f32 [G-1]) -> i64 [B]``: how many boundaries are <= the timestep.

    groups:  G, at least 2
    dtype:   of the timestep, int64 or float32; compared as float32, as torch does
    """

    groups: int
    dtype: str = "int64"

    def __post_init__(self) -> None:
        if self.groups < 2:
            raise ValueError("a single time group needs no kernel")


Problem = Quantize | DynamicQuantize | TimeGroup


def outputs(problem: Problem) -> int:
    """How many of the `arguments` are outputs."""
    return 3 if isinstance(problem, DynamicQuantize) else 1


def arguments(problem: Problem) -> list[Argument]:
    """The buffers in calling order, the outputs last."""
    if isinstance(problem, TimeGroup):
        return [
            Argument("timestep", (BATCH,), problem.dtype),
            Argument("boundaries", (problem.groups - 1,)),
            Argument("out", (BATCH,), "int64"),
        ]
    if isinstance(problem, DynamicQuantize):
        rows: Shape = (BATCH, problem.rows)
        return [
            Argument("x", (*rows, problem.width)),
            Argument("out", (*rows, problem.width), "uint8"),
            Argument("scale", rows),
            Argument("zero", rows, "uint8"),
        ]
    shape: Shape = (BATCH, *problem.shape)
    parts = [Argument(f"x{i}", (*shape[:-1], count)) for i, count in enumerate(problem.parts)]
    return [
        *(parts or [Argument("x", shape)]),
        *quantizer_arguments(problem.bits, problem.groups),
        Argument("out", shape, "uint8"),
    ]
