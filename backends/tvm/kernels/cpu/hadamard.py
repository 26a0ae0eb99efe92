"""Rotation of channels by Hadamard matrices, with an epilogue: the quantizer of the layers that read them.

A block of channels lies in registers from its first addition to its codes. Halves of a vector meet by a shuffle and a
fused multiply-add by 1 or -1, which rounds as an addition does; vectors meet by an addition and a subtraction.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.epilogue import Finish
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, primfunc, shares, span, store
from mpq_compiler.backends.tvm.kernels.common.vmath import f32, fma, keep, lanes, mul
from mpq_compiler.backends.tvm.kernels.problems.hadamard import Hadamard, arguments
from mpq_compiler.backends.tvm.kernels.problems.lanes import LANES
from mpq_compiler.targets.numerics import rotation_sign


def build(problem: Hadamard, isa: str = "avx512vnni", name: str = "hadamard") -> PrimFunc:
    """The kernel. All targets share one form; `isa` is accepted for uniformity."""
    del isa
    return primfunc(name, arguments(problem), lambda batch, buffers: _body(problem, batch, buffers))


def _body(problem: Hadamard, batch: Any, buffers: Buffers) -> None:
    channels, block = problem.channels, problem.block
    finish, width = Finish(problem.epilogue, buffers), min(LANES, block)
    x, y = buffers["x"], buffers["y"]
    with shares(batch, problem.positions, problem.positions * channels / 6) as (b, first, end):
        quant = finish.quantizer(b)
        with T.serial(first, end) as s, T.serial(0, channels // block) as i:
            places = [i * block + k for k in range(0, block, width)]
            for place, value in zip(places, rotated([x[b, s, span(c, width)] for c in places]), strict=True):
                store(y, finish(value, b, (s,), place, quant), b, s, span(place, width))


def rotated(values: Sequence[Expr]) -> list[Expr]:
    """The vectors of a block, rotated, as `ops.hadamard` to the bit."""
    width, block = lanes(values[0]), lanes(values[0]) * len(values)
    signs = [rotation_sign(i) for i in range(block)]
    values = [keep(mul(v, _constant(signs[k * width : (k + 1) * width]))) for k, v in enumerate(values)]
    step = 1
    while step < width:
        turn = _constant([-1.0 if lane & step else 1.0 for lane in range(width)])
        order = [tirx.IntImm("int32", lane ^ step) for lane in range(width)]
        values = [keep(fma(v, turn, tirx.Shuffle([v], order))) for v in values]
        step *= 2
    step = 1
    while step < len(values):
        for low in (k for k in range(len(values)) if not k & step):
            a, b = values[low], values[low + step]
            values[low], values[low + step] = keep(a + b), keep(a - b)
        step *= 2
    return [keep(mul(v, f32(block**-0.5, width))) for v in values]


def _constant(values: Sequence[float]) -> Expr:
    """A vector of these lanes."""
    places = [tirx.IntImm("int32", lane) for lane in range(len(values))]
    return tirx.Shuffle([f32(value, 1) for value in values], places)
