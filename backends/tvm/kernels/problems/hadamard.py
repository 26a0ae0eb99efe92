"""Rotation of channels by Hadamard matrices, with an epilogue: the quantizer of the layers that read them."""

from __future__ import annotations

from dataclasses import dataclass, field

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, epilogue_arguments


@dataclass(frozen=True)
class Hadamard:
    """y = epilogue(hadamard(x [B, positions, channels], block)), as `ops.hadamard` to the bit.

    Arguments: x, the epilogue's, y.
    """

    positions: int
    channels: int
    block: int
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1

    def __post_init__(self) -> None:
        check_block(self.channels, self.block)


def check_block(channels: int, block: int) -> None:
    """ValueError: so many channels cannot be rotated by blocks of that size."""
    if block < 2 or block & (block - 1) or channels % block:
        raise ValueError(f"{channels} channels do not divide into blocks of {block}, a power of two")


def arguments(problem: Hadamard) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    rows, channels = (BATCH, problem.positions), problem.channels
    return [
        Argument("x", (*rows, channels)),
        *epilogue_arguments(problem.epilogue, rows, channels, problem.time_groups),
        Argument("y", (*rows, channels), problem.epilogue.out_dtype),
    ]
