"""Attention over token-major tensors: float32 in, float32 or codes out."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, epilogue_arguments

LOWEST = -1e30
"""The least score, and the maximum before the first key: a row of which all keys are masked gives their mean."""


@dataclass(frozen=True)
class Attention:
    """y = epilogue(softmax(q k^T * scale + mask) v) per head.

    queries, keys: tokens. dim: of a head. scale: 1/sqrt(dim) where None. mask: shape of the additive mask,
    (B or 1, heads or 1, queries or 1, keys), or None.

    Arguments: q [B, queries, heads*dim], k and v [B, keys, heads*dim], mask, the epilogue's, y like q.
    """

    queries: int
    keys: int
    heads: int
    dim: int
    scale: float | None = None
    mask: Shape | None = None
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1

    def __post_init__(self) -> None:
        if self.mask is not None:
            whole = (BATCH, self.heads, self.queries, self.keys)
            fits = len(self.mask) == 4 and self.mask[3] == self.keys
            if not fits or any(m not in (1, w) for m, w in zip(self.mask, whole, strict=True)):
                raise ValueError(f"mask {self.mask} does not broadcast to {whole}, or not over the keys")

    @property
    def channels(self) -> int:
        return self.heads * self.dim


def arguments(problem: Attention) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    channels, rows = problem.channels, (BATCH, problem.queries)
    return [
        Argument("q", (*rows, channels)),
        Argument("k", (BATCH, problem.keys, channels)),
        Argument("v", (BATCH, problem.keys, channels)),
        *([Argument("mask", problem.mask)] if problem.mask is not None else []),
        *epilogue_arguments(problem.epilogue, rows, channels, problem.time_groups),
        Argument("y", (*rows, channels), problem.epilogue.out_dtype),
    ]
