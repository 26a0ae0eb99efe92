"""The kernel templates by name, and kernels made from records. Imports TVM: for workers and tests."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType
from typing import Any

from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.common.template import Argument
from mpq_compiler.backends.tvm.kernels.cpu import (
    attention,
    dequantize,
    epilogue,
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
)
from mpq_compiler.backends.tvm.kernels.cpu.isa import ISAS, Isa, isa
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems import quant_matmul
from mpq_compiler.backends.tvm.plan.calls import Kernel, Record
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.table import Target

HOST = ISAS["x86-64-avx2"]
"""Stands where arguments are asked for that no instruction set changes."""


@dataclass(frozen=True)
class Template:
    """How to make the kernels of a family, for one CPU target.

    arguments: (problem, isa) -> buffers in calling order, the outputs last
    build:     (problem, isa, name) -> the kernel
    outputs:   (problem, isa) -> how many outputs there are
    """

    arguments: Callable[[Any, Isa], list[Argument]]
    build: Callable[[Any, Isa, str], PrimFunc]
    outputs: Callable[[Any, Isa], int] = lambda problem, isa: 1


def _portable(module: Any) -> Template:
    """A module whose kernels are described without the ISA."""
    return Template(
        lambda problem, isa: module.arguments(problem),
        lambda problem, isa, name: module.build(problem, isa.name, name),
    )


TEMPLATES: dict[str, Template] = {
    "gemm": Template(
        gemm.arguments,
        gemm.build,
        lambda problem, isa: 2 if problem.epilogue is not None and problem.epilogue.keeps else 1,
    ),
    "prepare": Template(
        lambda problem, isa: [*prepare.inputs(problem), *prepare.outputs(problem, isa)],
        prepare.build,
        lambda problem, isa: len(prepare.outputs(problem, isa)),
    ),
    "pack": Template(
        lambda problem, isa: float_gemm.pack_arguments(problem),
        lambda problem, isa, name: float_gemm.build_pack(problem, name),
    ),
    "quantize": Template(
        lambda problem, isa: quantize.arguments(problem),
        lambda problem, isa, name: quantize.build(problem, name),
        lambda problem, isa: quantize.outputs(problem),
    ),
    "norms": replace(_portable(norms), outputs=lambda problem, isa: norms.outputs(problem)),
    "hadamard": _portable(hadamard),
    "attention": _portable(attention),
    "fast_attention": Template(
        lambda problem, isa: fast_attention.arguments(problem),
        lambda problem, isa, name: fast_attention.build(problem, isa.name, name),
        lambda problem, isa: fast_attention.results(problem),
    ),
    "pointwise": _portable(pointwise),
    "movement": _portable(movement),
    "float_gemm": _portable(float_gemm),
    "matmul": _portable(matmul),
    "float8": _portable(float8),
    "dequantize": _portable(dequantize),
}


PROBLEMS: dict[str, ModuleType] = {
    "attention": attention,
    "dequantize": dequantize,
    "epilogue": epilogue,
    "fast_attention": fast_attention,
    "float8": float8,
    "float_gemm": float_gemm,
    "hadamard": hadamard,
    "matmul": matmul,
    "movement": movement,
    "norms": norms,
    "pointwise": pointwise,
    "problem": quant_matmul,
    "quantize": quantize,
}
"""The modules that records name, such as ``norms.GroupNorm``."""


def resolve(value: Any) -> Any:
    """A record as the object that it describes; tuples of records likewise."""
    if isinstance(value, tuple):
        return tuple(resolve(v) for v in value)
    if not isinstance(value, Record):
        return value
    module, name = value.type.split(".")
    factory = getattr(PROBLEMS[module], name)
    return factory(**{key: resolve(field) for key, field in value.fields})


def arguments(kernel: Kernel, target: Target) -> tuple[list[Argument], list[Argument]]:
    """(inputs, outputs) of a kernel in calling order; workspaces are outputs that no one reads."""
    problem = resolve(kernel.problem)
    lanes = HOST if target.is_cuda else isa(target.name)
    own = _cuda(kernel) if target.is_cuda else None  # GPUs have templates besides, which say it all themselves
    arguments_, outputs = own and own.arguments, own and own.outputs
    buffers = arguments_(problem) if arguments_ else TEMPLATES[kernel.template].arguments(problem, lanes)
    count = outputs(problem) if outputs else TEMPLATES[kernel.template].outputs(problem, lanes)
    workspaces = own.workspaces(problem) if own else []
    return buffers[: len(buffers) - count], [*buffers[len(buffers) - count :], *workspaces]


def build(kernel: Kernel, target: Target) -> PrimFunc:
    """The kernel's function, under its name."""
    problem = resolve(kernel.problem)
    if target.is_cuda:
        own = _cuda(kernel)
        hopper = own.hopper(problem, kernel.name) if target.levels == [nvidia.HOPPER] else None
        return hopper or own.build(problem, kernel.name)
    return TEMPLATES[kernel.template].build(problem, isa(target.name), kernel.name)


def _cuda(kernel: Kernel) -> cuda.Template:
    """UserError: no GPU computes it."""
    if kernel.template not in cuda.TEMPLATES:
        raise UserError(f"no CUDA kernel computes {kernel}; compile it for a CPU")
    return cuda.TEMPLATES[kernel.template]
