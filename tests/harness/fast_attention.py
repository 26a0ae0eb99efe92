"""Inputs of attentions with other numerics than float32, and what they mean."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np
import torch
import tvm
from tvm.tirx import PrimFunc

from mpq_compiler.backends.tvm.kernels.cpu import fast_attention as cpu
from mpq_compiler.backends.tvm.kernels.problems import attention
from mpq_compiler.backends.tvm.kernels.problems import fast_attention as problems
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready, query_factor
from mpq_compiler.backends.tvm.kernels.problems.rounding import Rounding
from mpq_compiler.ir import ops
from tests.harness import qemu
from tests.harness.float_kernels import random_inputs, shape_of

BATCH = 2
Call = Callable[[str, list[np.ndarray]], list[np.ndarray]]
"""Calls a kernel by its name; gives the arrays as they are afterwards."""


def inputs_of(problem: FastAttention) -> list[np.ndarray]:
    """q, k, v and what else it reads; keys have a mean, as those of models do."""
    shapes = attention.arguments(problem)
    inputs = random_inputs(shapes, BATCH, problem.queries)
    inputs[1] += 3 * np.random.default_rng(1).standard_normal(inputs[1].shape[-1]).astype(np.float32)
    if problem.mask is not None:
        hidden = np.random.default_rng(2).random(inputs[3].shape) < 0.3
        hidden[..., 0] = False  # at least one key for everyone
        inputs[3][hidden] = -np.inf
    return inputs


def meaning(problem: FastAttention, inputs: list[np.ndarray], kind: str) -> np.ndarray:
    q, k, v, *rest = (torch.from_numpy(x) for x in inputs)
    mask = rest.pop(0) if problem.mask is not None else None
    y = ops.attention(q, k, v, problem.heads, problem.scale, mask, kind)
    return (y + rest[0] if problem.epilogue.operands else y).numpy()


def functions(problems: Iterable[FastAttention], isa: str) -> dict[str, PrimFunc]:
    """The kernels of some problems, ``attention_0`` and ``ready_0`` those of the first."""
    found = {}
    for i, problem in enumerate(problems):
        found[f"attention_{i}"] = cpu.build(problem, isa, f"attention_{i}")
        found[f"ready_{i}"] = cpu.build(ready(problem), isa, f"ready_{i}")
    return found


def here(kernels: dict[str, PrimFunc], target: dict) -> Call:
    """Kernels that this machine runs."""
    module = tvm.compile(tvm.IRModule(kernels), target=tvm.target.Target(target))

    def call(name: str, arrays: list[np.ndarray]) -> list[np.ndarray]:
        tensors = [tvm.runtime.tensor(array) for array in arrays]
        module[name](*tensors)
        return [tensor.numpy() for tensor in tensors]

    return call


def emulated(kernels: dict[str, PrimFunc], target: dict) -> Call:
    """Kernels for AArch64 under qemu."""
    library = qemu.Aarch64Library(kernels, target)
    return lambda name, arrays: library.run([(name, arrays)])[0]


def result(call: Call, index: int, problem: FastAttention, inputs: list[np.ndarray]) -> np.ndarray:
    """What problem number ``index`` of `functions` gives: keys and values are made ready first."""
    *arguments, last = problems.arguments(problem)
    arrays = {a.name: np.full(shape_of(a, BATCH), 77, a.dtype) for a in (*arguments, last)}
    arrays |= dict(zip((a.name for a in attention.arguments(problem)), inputs, strict=False))
    of_ready = problems.arguments(ready(problem))
    for name, of in ((f"ready_{index}", of_ready), (f"attention_{index}", [*arguments, last])):
        arrays |= dict(zip((a.name for a in of), call(name, [arrays[a.name] for a in of]), strict=True))
    return arrays[last.name]


def roundings(problem: FastAttention) -> dict[str, Rounding]:
    """What rounds its queries, keys and values for a GPU, by the names of the arguments."""
    p, pitch = problem, problem.dim + problem.dim % 2
    keys = Rounding(p.keys * p.heads, p.dim, pitch)
    return {"q": Rounding(p.queries * p.heads, p.dim, pitch, query_factor(p.scale, p.dim)), "k": keys, "v": keys}


def ready(problem: FastAttention) -> Ready:
    """What makes its keys and values ready."""
    return Ready(problem.keys, problem.heads, problem.dim, problem.numerics)
