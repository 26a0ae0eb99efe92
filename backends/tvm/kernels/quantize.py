"""The stand-alone `mpq::quantize` and `mpq::time_group` kernels."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels import vmath
from mpq_compiler.backends.tvm.kernels.template import (
    BATCH,
    Argument,
    Buffers,
    Shape,
    each_vector,
    primfunc,
    quantizer,
    quantizer_arguments,
    span,
    store,
)

LANES = 64
"""Wide expressions, which LLVM splits into independent chains of registers."""


@dataclass(frozen=True)
class Quantize:
    """``quantize(x [B, *shape]) -> u8``, scale and zero point by the time group of the sample.

    shape:   of one sample
    bits:    of a code
    groups:  G, number of time groups
    """

    shape: tuple[int, ...]
    bits: int = 8
    groups: int = 1


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


def arguments(problem: Quantize | TimeGroup) -> list[Argument]:
    """The buffers in calling order, the output last."""
    if isinstance(problem, TimeGroup):
        return [
            Argument("timestep", (BATCH,), problem.dtype),
            Argument("boundaries", (problem.groups - 1,)),
            Argument("out", (BATCH,), "int64"),
        ]
    shape: Shape = (BATCH, *problem.shape)
    return [
        Argument("x", shape),
        *quantizer_arguments(problem.bits, problem.groups),
        Argument("out", shape, "uint8"),
    ]


def build(problem: Quantize | TimeGroup, name: str) -> PrimFunc:
    """The kernel ``name(*arguments(problem))``; the same source for every CPU target."""
    if isinstance(problem, TimeGroup):
        return primfunc(name, arguments(problem), lambda batch, buffers: _time_group(problem, batch, buffers))
    return primfunc(name, arguments(problem), lambda batch, buffers: _quantize(problem, batch, buffers))


def _quantize(problem: Quantize, batch: Any, buffers: Buffers) -> None:
    size = math.prod(problem.shape)
    x = T.decl_buffer((batch * size,), "float32", data=buffers["x"].data)
    out = T.decl_buffer((batch * size,), "uint8", data=buffers["out"].data)
    with T.serial(0, batch) as sample:
        scale, zero = quantizer(buffers, sample)
        inverse = T.bind(vmath.reciprocal(scale))

        def vector(start: Any, lanes: int) -> None:
            at = span(sample * size + start, lanes)
            store(out, vmath.quantize(x[at], inverse, zero, problem.bits), at)

        each_vector(size, vector, LANES)


def _time_group(problem: TimeGroup, batch: Any, buffers: Buffers) -> None:
    with T.serial(0, batch) as sample:
        t = T.bind(T.cast(buffers["timestep"][sample], "float32"))
        group: Any = tirx.IntImm("int64", 0)
        for i in range(problem.groups - 1):
            group = group + T.cast(buffers["boundaries"][i] <= t, "int64")
        store(buffers["out"], group, sample)
