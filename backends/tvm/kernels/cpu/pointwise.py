"""One kernel for any graph of pointwise operations with broadcasting, ended or not by quantization.

The emitter hands over a `PointwiseProgram`: input shapes, steps in order, output shape. The kernel loops over
samples and, inside, over the output's dimensions, merged wherever every input is either contiguous or
broadcast over both neighbours; the innermost runs in vectors.
"""

from __future__ import annotations

import math
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.epilogue import quantizer
from mpq_compiler.backends.tvm.kernels.common.pointwise import evaluate
from mpq_compiler.backends.tvm.kernels.common.template import (
    Buffers,
    primfunc,
    sample_view,
    shares,
    some_vectors,
    span,
    store,
    vectors,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH
from mpq_compiler.backends.tvm.kernels.problems.lanes import width
from mpq_compiler.backends.tvm.kernels.problems.pointwise import PointwiseProgram, arguments
from mpq_compiler.backends.tvm.kernels.problems.strides import merge_dimensions


def build(program: PointwiseProgram, isa: str = "avx512vnni", name: str = "pointwise") -> PrimFunc:
    """The kernel. All targets share one form; `isa` is accepted for uniformity."""
    del isa
    return primfunc(name, arguments(program), lambda batch, buffers: _body(program, batch, buffers))


def _body(program: PointwiseProgram, batch: Any, buffers: Buffers) -> None:
    inner = [1 if extent == BATCH else int(extent) for extent in program.shape]
    accesses = program.accesses
    sizes, strides = merge_dimensions(inner, [access.strides for access in accesses])

    def part(b: Any, first: Any, end: Any) -> None:
        names = [*(f"x{i}" for i in range(len(program.inputs))), "y"]
        views = [sample_view(buffers[n], access.shape, b) for n, access in zip(names, accesses, strict=True)]
        quant = quantizer(buffers, b) if program.bits is not None else None
        starts = [start + access.offset for (_, start), access in zip(views, accesses, strict=True)]
        nest(views, quant, 0, starts, first, end)

    def nest(views: Any, quant: Any, depth: int, starts: list[Any], first: Any, end: Any) -> None:
        if depth + 1 < len(sizes):
            with T.serial(first, end) as i:
                steps = [stride[depth] for stride in strides]
                moved = [start + i * step for start, step in zip(starts, steps, strict=True)]
                nest(views, quant, depth + 1, moved, 0, extents[depth + 1])
            return

        def vector(position: Any, lanes: int) -> None:
            def load(i: int) -> Expr:
                step, (flat, _) = strides[i][-1], views[i]
                value = flat[_apart(starts[i] + position * step, step, lanes)]
                return vmath.splat(vmath.cast(value, "float32"), lanes)

            value = vmath.cast(evaluate(program, load, quant, lanes), program.out_dtype)
            store(views[-1][0], value, span(starts[-1] + position, lanes))

        if extents[-1] == 1:
            vector(0, width(sizes[-1]))
        else:
            some_vectors(sizes[-1], first, end, vector)

    extents = [*sizes[:-1], vectors(sizes[-1])]  # of the loops, the innermost over vectors
    samples = batch if program.shape[:1] == (BATCH,) else 1
    with shares(samples, extents[0], math.prod(sizes) * (1 + len(program.steps)) / 16) as (b, begin, end):
        part(b, begin, end)


def _apart(start: Any, step: int, lanes: int) -> Any:
    """Index of `lanes` elements that are `step` apart; of one where it is 0."""
    return start if lanes == 1 or not step else T.ramp(start, step, lanes)
