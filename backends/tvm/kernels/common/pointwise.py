"""Pointwise programs as expressions."""

from __future__ import annotations

from typing import Any

from tvm.ir import Expr

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.problems.pointwise import Input, PointwiseProgram, Ref, Result


def evaluate(
    program: PointwiseProgram, load: Any, quant: tuple[Expr, Expr] | None, lanes: int, partner: Any = None
) -> Expr:
    """The value of the last step in `lanes` lanes; every input and every step is computed once.

    partner: what an input with its sign holds where `rotate` takes it from, for single lanes
    """
    inputs: dict[int, Expr] = {}
    results: list[Expr] = []

    def value_of(ref: Ref) -> Expr:
        if isinstance(ref, Input):
            if ref.index not in inputs:
                inputs[ref.index] = vmath.keep(load(ref.index))
            return inputs[ref.index]
        return results[ref.index] if isinstance(ref, Result) else vmath.f32(float(ref), lanes)

    for step in program.steps:
        args = [value_of(ref) for ref in step.args]
        if step.op == "quantize":
            if quant is None:
                raise ValueError("the program quantizes, but nothing to quantize by was given")
            return vmath.quantize(args[0], *quant, int(step.value or 0))
        if step.op == "cast":
            value = args[0]
        elif step.op == "rotate":
            value = partner(step.args[0]) if partner else vmath.rotate_pairs(args[0])
        elif step.op in vmath.UNARY:
            value = vmath.UNARY[step.op](*args)
        elif step.op in vmath.BINARY:
            value = vmath.BINARY[step.op](*args)
        elif step.op in vmath.TERNARY:
            value = vmath.TERNARY[step.op](*args)
        else:
            raise ValueError(f"unknown pointwise operation '{step.op}'")
        results.append(vmath.keep(value))
    return results[-1]
