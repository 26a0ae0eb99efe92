"""Attention with products in bfloat16 or in 8 bits: `ops.attention` with those numerics.

A kernel of their own (`Ready`) makes keys and values ready, so that those of a text are made once. GPUs read queries,
keys and values in bfloat16 as they lie (`plan.rounding`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.attention import Attention
from mpq_compiler.backends.tvm.kernels.problems.attention import arguments as of_floats
from mpq_compiler.targets import numerics as targets_numerics
from mpq_compiler.targets.numerics import BF16


@dataclass(frozen=True)
class FastAttention(Attention):
    """`Attention` with q [B, queries, heads*dim] and, for k and v, what `Ready` makes of them."""

    numerics: str = BF16


def query_factor(scale: float | None, dim: int) -> float:
    """What queries are multiplied by, so that scores are powers of two."""
    return (scale if scale is not None else 1.0 / math.sqrt(dim)) * math.log2(math.e)


@dataclass(frozen=True)
class Ready:
    """k and v [B, keys, heads*dim] as `FastAttention` reads them.

    Outputs: packed_k [B, heads, keys, words of a key], packed_v [B, heads, words of a column, dim], and in 8 bits
    k_scale [B, heads, blocks] and v_scale [B, heads, dim].
    """

    keys: int
    heads: int
    dim: int
    numerics: str

    @property
    def channels(self) -> int:
        return self.heads * self.dim


def outputs(problem: FastAttention | Ready) -> list[Argument]:
    """The buffers that a kernel of `Ready` writes."""
    made = targets_numerics.ready_shapes(problem.numerics, problem.keys, problem.heads, problem.dim)
    return [Argument(name, (BATCH, *shape), kind) for name, (shape, kind) in made.items()]


def results(problem: FastAttention | Ready) -> int:
    """How many of the arguments are outputs."""
    return len(outputs(problem)) if isinstance(problem, Ready) else 1


def arguments(problem: FastAttention | Ready) -> list[Argument]:
    """The kernel's buffers in calling order, outputs last."""
    if isinstance(problem, Ready):
        rows = (BATCH, problem.keys, problem.channels)
        return [Argument("k", rows), Argument("v", rows), *outputs(problem)]
    query, _, _, *rest = of_floats(problem)
    return [query, *outputs(problem), *rest]
