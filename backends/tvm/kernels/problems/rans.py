"""Weights whose codes are entropy-coded: decoded once, when an artifact is loaded (`support.rans`)."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import Argument


@dataclass(frozen=True)
class DecodeRans:
    """Integers int8 [count], as bytes, from ``coded`` u8 [size]; what is damaged ends the call with an error."""

    count: int
    size: int

    def __post_init__(self) -> None:
        if self.count < 1 or self.size < 1:
            raise ValueError(f"nothing to decode in {self}")


def arguments(problem: DecodeRans) -> list[Argument]:
    """The buffers in calling order, the output last."""
    return [Argument("coded", (problem.size,), "uint8"), Argument("codes", (problem.count,), "uint8")]
