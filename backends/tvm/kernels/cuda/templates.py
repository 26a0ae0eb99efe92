"""The kernel templates of GPUs, by the names of those of CPUs and some more."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

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
    rounding,
    weight_only,
    weights,
    wgmma,
    wgmma_attention,
)
from mpq_compiler.backends.tvm.kernels.problems import quant_matmul
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.signatures import SIGNATURES
from mpq_compiler.targets.numerics import BF16


@dataclass(frozen=True)
class Template:
    """The functions that make the kernels of a family.

    build:      (problem, name) -> the kernel
    arguments:  problem -> buffers in calling order, the outputs last
    outputs:    problem -> how many outputs there are
    workspaces: problem -> memory for what one grid hands to the next, behind the arguments
    hopper:     instead of `build`, of artifacts for `nvidia.HOPPER` alone; None where there is nothing better
    """

    build: Callable[[Any, str], PrimFunc]
    arguments: Callable[[Any], list[Argument]]
    outputs: Callable[[Any], int] = lambda problem: 1
    workspaces: Callable[[Any], list[Argument]] = lambda problem: []
    hopper: Callable[[Any, str], PrimFunc | None] = lambda problem, name: None


def _portable(
    name: str, build: Callable[[Any, str], PrimFunc], workspaces: Callable[[Any], list[Argument]] = lambda problem: []
) -> Template:
    """A template whose kernels have the signature of every device."""
    return Template(build, SIGNATURES[name].arguments, SIGNATURES[name].outputs, workspaces)


def _by_numerics(f32: Callable[..., Any], bf16: Callable[..., Any]) -> Callable[..., Any]:
    """A function of a problem and more: `f32` for problems in float32, `bf16` for those in bfloat16."""
    return lambda problem, *name: (bf16 if problem.numerics == BF16 else f32)(problem, *name)


TEMPLATES: dict[str, Template] = {
    "gemm": Template(gemm.build, gemm.arguments, quant_matmul.outputs, gemm.workspaces, wgmma.build),
    "prepare": Template(
        weights.build,
        lambda problem: [argument for part in weights.arguments(problem) for argument in part],
        lambda problem: len(weights.arguments(problem)[1]),
    ),
    "pack": Template(
        _by_numerics(weights.build_pack, float_products.build_pack),
        _by_numerics(SIGNATURES["pack"].arguments, float_products.pack_arguments),
    ),
    "dequantize": _portable("dequantize", weights.build_dequantize),
    "float8": _portable("float8", weights.build_float8),
    "quantize": _portable("quantize", quantize.build),
    "rounding": _portable("rounding", rounding.build),
    "norms": _portable("norms", norms.build, norms.workspaces),
    "hadamard": _portable("hadamard", norms.build_hadamard),
    "attention": _portable("attention", attention.build),
    "fast_attention": Template(fast_attention.build, fast_attention.arguments, hopper=wgmma_attention.build),
    "pointwise": _portable("pointwise", pointwise.build),
    "movement": _portable("movement", movement.build),
    "float_gemm": Template(
        _by_numerics(float_units.build, float_products.build),
        _by_numerics(SIGNATURES["float_gemm"].arguments, float_products.arguments),
        workspaces=_by_numerics(lambda problem: [], float_products.workspaces),
        hopper=_by_numerics(lambda problem, name: None, float_products.build_on_hopper),
    ),
    "matmul": _portable("matmul", float_units.build_matmul),
    "pack_codes": Template(weight_only.build_pack, weight_only.pack_arguments),
    "weight_only": Template(
        weight_only.build,
        weight_only.arguments,
        workspaces=weight_only.workspaces,
        hopper=weight_only.build_on_hopper,
    ),
}
