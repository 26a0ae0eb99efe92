"""The kernel templates of CPUs, by name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.cpu import (
    attention,
    dequantize,
    fast_attention,
    float8,
    float_gemm,
    gemm,
    hadamard,
    matmul,
    movement,
    norms,
    pointwise,
    prepare,
    quantize,
    rans,
)
from mpq_compiler.backends.tvm.kernels.cpu.isa import Isa
from mpq_compiler.backends.tvm.kernels.problems import quant_matmul
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.kernels.problems.signatures import SIGNATURES


@dataclass(frozen=True)
class Template:
    """The functions that make the kernels of a family, for one CPU target.

    arguments: (problem, isa) -> buffers in calling order, the outputs last
    build:     (problem, isa, name) -> the kernel
    outputs:   (problem, isa) -> how many outputs there are
    """

    arguments: Callable[[Any, Isa], list[Argument]]
    build: Callable[[Any, Isa, str], PrimFunc]
    outputs: Callable[[Any, Isa], int]


def _portable(name: str, build: Callable[[Any, str, str], PrimFunc]) -> Template:
    """A template whose kernels have the signature of every device.

    build: (problem, name of the ISA, name) -> the kernel
    """
    signature = SIGNATURES[name]
    return Template(
        lambda problem, isa: signature.arguments(problem),
        lambda problem, isa, name: build(problem, isa.name, name),
        lambda problem, isa: signature.outputs(problem),
    )


TEMPLATES: dict[str, Template] = {
    "gemm": Template(gemm.arguments, gemm.build, lambda problem, isa: quant_matmul.outputs(problem)),
    "prepare": Template(
        lambda problem, isa: [*quant_matmul.stored_arguments(problem), *prepare.outputs(problem, isa)],
        prepare.build,
        lambda problem, isa: len(prepare.outputs(problem, isa)),
    ),
    "pack": _portable("pack", lambda problem, isa, name: float_gemm.build_pack(problem, name)),
    "quantize": _portable("quantize", lambda problem, isa, name: quantize.build(problem, name)),
    "norms": _portable("norms", norms.build),
    "hadamard": _portable("hadamard", hadamard.build),
    "attention": _portable("attention", attention.build),
    "fast_attention": _portable("fast_attention", fast_attention.build),
    "pointwise": _portable("pointwise", pointwise.build),
    "movement": _portable("movement", movement.build),
    "float_gemm": _portable("float_gemm", float_gemm.build),
    "matmul": _portable("matmul", matmul.build),
    "float8": _portable("float8", float8.build),
    "dequantize": _portable("dequantize", dequantize.build),
    "rans": _portable("rans", rans.build),
}
