"""Kernels made from records: the objects that they describe, their buffers, their functions.

Imports TVM: for workers and tests.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.cpu import templates as cpu
from mpq_compiler.backends.tvm.kernels.cpu.isa import isa
from mpq_compiler.backends.tvm.kernels.cuda import half
from mpq_compiler.backends.tvm.kernels.cuda import templates as cuda
from mpq_compiler.backends.tvm.kernels.problems import (
    attention,
    dequantize,
    epilogue,
    fast_attention,
    float8,
    float_gemm,
    hadamard,
    matmul,
    movement,
    norms,
    pointwise,
    quant_matmul,
    quantize,
    rans,
    rounding,
)
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from mpq_compiler.backends.tvm.plan.calls import Kernel, Record
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.table import Target

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
    "rans": rans,
    "rounding": rounding,
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
    if target.is_cuda:
        on_gpu = _on_gpu(kernel)
        with half.arguments(kernel.halves):
            buffers = half.stored(on_gpu.arguments(problem))
        count, workspaces = on_gpu.outputs(problem), on_gpu.workspaces(problem)
    else:
        on_cpu, lanes = cpu.TEMPLATES[kernel.template], isa(target.name)
        buffers, count, workspaces = on_cpu.arguments(problem, lanes), on_cpu.outputs(problem, lanes), []
    return buffers[: len(buffers) - count], [*buffers[len(buffers) - count :], *workspaces]


def build(kernel: Kernel, target: Target) -> PrimFunc:
    """The kernel's function, under its name."""
    problem = resolve(kernel.problem)
    if not target.is_cuda:
        return cpu.TEMPLATES[kernel.template].build(problem, isa(target.name), kernel.name)
    own = _on_gpu(kernel)
    with half.arguments(kernel.halves):
        hopper = own.hopper(problem, kernel.name) if target.levels == [nvidia.HOPPER] else None
        return hopper or own.build(problem, kernel.name)


def _on_gpu(kernel: Kernel) -> cuda.Template:
    """UserError: no GPU computes it."""
    if kernel.template not in cuda.TEMPLATES:
        raise UserError(f"no CUDA kernel computes {kernel}; compile it for a CPU")
    return cuda.TEMPLATES[kernel.template]
