"""The CUDA templates by the names of `backends.tvm.templates`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common import template
from mpq_compiler.backends.tvm.kernels.cpu import float_gemm
from mpq_compiler.backends.tvm.kernels.cuda import (
    attention,
    fast_attention,
    float_products,
    float_units,
    gemm,
    movement,
    norms,
    pointwise,
    quantize,
    weight_only,
    weights,
    wgmma,
)
from mpq_compiler.targets.numerics import BF16


@dataclass(frozen=True)
class Template:
    """As of the CPU, without an instruction set: (problem, name) makes the kernel.

    arguments: of a problem, where they are others than on the CPU
    workspaces: memory for what one grid hands to the next, behind the arguments
    hopper: instead of `build`, of artifacts for `nvidia.HOPPER` alone; None where there is nothing better
    """

    build: Callable[[Any, str], PrimFunc]
    arguments: Callable[[Any], list[template.Argument]] | None = None
    outputs: Callable[[Any], int] | None = None
    workspaces: Callable[[Any], list[template.Argument]] = lambda problem: []
    hopper: Callable[[Any, str], PrimFunc | None] = lambda problem, name: None


def _by_numerics(f32: Callable[..., Any], bf16: Callable[..., Any]) -> Callable[..., Any]:
    """What is given a problem first, for those in float32 and for those in bfloat16."""
    return lambda problem, *name: (bf16 if problem.numerics == BF16 else f32)(problem, *name)


TEMPLATES: dict[str, Template] = {
    "gemm": Template(gemm.build, gemm.arguments, workspaces=gemm.workspaces, hopper=wgmma.build),
    "prepare": Template(
        weights.build,
        lambda problem: [argument for part in weights.arguments(problem) for argument in part],
        lambda problem: len(weights.arguments(problem)[1]),
    ),
    "pack": Template(
        _by_numerics(weights.build_pack, float_products.build_pack),
        _by_numerics(float_gemm.pack_arguments, float_products.pack_arguments),
    ),
    "dequantize": Template(weights.build_dequantize),
    "float8": Template(weights.build_float8),
    "quantize": Template(quantize.build),
    "norms": Template(norms.build, workspaces=norms.workspaces),
    "hadamard": Template(norms.build_hadamard),
    "attention": Template(attention.build),
    "fast_attention": Template(fast_attention.build),
    "pointwise": Template(pointwise.build),
    "movement": Template(movement.build),
    "float_gemm": Template(
        _by_numerics(float_units.build, float_products.build),
        _by_numerics(float_gemm.arguments, float_products.arguments),
    ),
    "matmul": Template(float_units.build_matmul),
    "pack_codes": Template(weight_only.build_pack, weight_only.pack_arguments, lambda problem: 1),
    "weight_only": Template(weight_only.build, weight_only.arguments, lambda problem: 1),
}
