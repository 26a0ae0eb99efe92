"""Pointwise programs: a thread for each element of the result."""

from __future__ import annotations

import math
from typing import Any

from tvm import tirx
from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import quantizer
from mpq_compiler.backends.tvm.kernels.common.pointwise import evaluate
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, sample_view, unravel
from mpq_compiler.backends.tvm.kernels.cuda.threads import PAIRED, each, primfunc, put_values
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, arguments
from mpq_compiler.backends.tvm.kernels.problems.strides import merge_dimensions


def build(program: PointwiseProgram, name: str) -> PrimFunc:
    """The kernel ``name(*problems.pointwise.arguments(program))``."""
    return primfunc(name, arguments(program), lambda batch, buffers: _body(program, batch, buffers))


def _body(program: PointwiseProgram, batch: Any, buffers: Buffers) -> None:
    accesses = program.accesses
    inner = [1 if extent == BATCH else int(extent) for extent in program.shape]
    sizes, strides = merge_dimensions(inner, [access.strides for access in accesses])
    samples = batch if program.shape[:1] == (BATCH,) else 1
    names = [*(f"x{i}" for i in range(len(program.inputs))), "y"]
    with each(samples * math.prod(sizes)) as i:
        sample, *place = unravel(i, *sizes)
        views = [sample_view(buffers[n], access.shape, sample) for n, access in zip(names, accesses, strict=True)]
        quant = quantizer(buffers, sample) if program.bits is not None else None

        def at(number: int, place: list[Any]) -> Any:
            start = views[number][1] + accesses[number].offset
            return start + sum(p * step for p, step in zip(place, strides[number], strict=True))

        def load(number: int) -> Expr:
            return vmath.cast(views[number][0][at(number, place)], "float32")

        def partner(read: Input) -> Expr:
            odd = place[-1] % 2
            value = views[read.index][0][at(read.index, [*place[:-1], place[-1] + 1 - 2 * odd])]
            sign = tirx.Select(tirx.EQ(odd, 0), vmath.f32(-1.0, 1), vmath.f32(1.0, 1))
            return vmath.mul(vmath.cast(value, "float32"), sign)

        value = evaluate(program, load, quant, 1, partner)
        y = views[-1][0]
        put_values(y, [value if y.dtype in PAIRED else vmath.cast(value, program.out_dtype)], T.bind(at(-1, place)))
