"""Weights whose codes are entropy-coded: decoded once, when an artifact is loaded (`support.rans`)."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.backends.tvm.kernels.problems.argument import Argument


@dataclass(frozen=True)
class DecodeRans:
    """Integers [count] from ``coded`` u8 [size]; what is damaged ends the call with an error.

    bits: of a code: 8, an int8; or 4, two in a byte, the first in the low bits, which number the integers from -8 on
    """

    count: int
    size: int
    bits: int = 8

    def __post_init__(self) -> None:
        if self.bits not in (4, 8):
            raise ValueError(f"integers are decoded to codes of 4 and 8 bits, not {self.bits}")
        if self.count < 1 or self.size < 1:
            raise ValueError(f"nothing to decode in {self}")


def arguments(problem: DecodeRans) -> list[Argument]:
    """The buffers in calling order, the output last."""
    decoded = -(-problem.count * problem.bits // 8)
    return [Argument("coded", (problem.size,), "uint8"), Argument("codes", (decoded,), "uint8")]
