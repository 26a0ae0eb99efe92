"""Inputs of attentions with other numerics than float32, and what they mean."""

from __future__ import annotations

import numpy as np
import torch

from mpq_compiler.backends.tvm.kernels.problems import attention
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import FastAttention, Ready
from mpq_compiler.ir import ops
from tests.harness.float_kernels import random_inputs

BATCH = 2


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


def ready(problem: FastAttention) -> Ready:
    """What makes its keys and values ready."""
    return Ready(problem.keys, problem.heads, problem.dim, problem.numerics)
