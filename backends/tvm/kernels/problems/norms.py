"""Group, layer and RMS normalization over channels-last float32, with an epilogue (SiLU, quantization, ...).

The first two apply ``(x - mean) * (gamma * rstd) + beta`` with one fused multiply-add, RMS norm ``(x * rstd) * gamma``.
With ``block`` channels are rotated by Hadamard matrices of that size before the epilogue's quantizer (`hadamard`).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

from mpq_compiler.backends.tvm.kernels.problems.argument import BATCH, Argument, Shape
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue, epilogue_arguments, quantizer_arguments


@dataclass(frozen=True)
class GroupNorm:
    """y = epilogue(group_norm(x [B, positions, channels])), groups of neighbouring channels.

    block: channels of a rotation before the epilogue's quantizer, or at its end where it has none; 0: none
    parts: channels of x0, x1, ... where x is those tensors side by side; it is read where they lie
    raw:   bits of the codes of x itself, which a quantizer of its own makes as a second result; its tables have
           ``raw_groups`` entries

    Arguments: x (or x0, x1, ...), gamma [channels] and beta [channels] where `affine`, the epilogue's, raw_scale,
    raw_zero (and group, where the epilogue has none) where `raw`, y, raw.
    """

    positions: int
    channels: int
    groups: int
    eps: float = 1e-5
    affine: bool = True
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1
    block: int = 0
    parts: tuple[int, ...] = ()
    raw: int | None = None
    raw_groups: int = 1

    def __post_init__(self) -> None:
        if self.channels % self.groups:
            raise ValueError(f"{self.channels} channels do not divide into {self.groups} groups")
        if self.parts and sum(self.parts) != self.channels:
            raise ValueError(f"tensors of {self.parts} channels are not {self.channels} channels side by side")


@dataclass(frozen=True)
class LayerNorm:
    """y = epilogue(layer_norm(x [B, positions, channels])) over the channels of each row.

    block: as of `GroupNorm`
    into:  (elements of a sample, offset of the first row, from one row to the next) of a larger buffer, y then, of
           which the result is a part

    Arguments: x, gamma [channels] where `scale`, beta [channels] where `shift`, the epilogue's, y.
    """

    positions: int
    channels: int
    eps: float = 1e-5
    scale: bool = True
    shift: bool = True
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1
    block: int = 0
    into: tuple[int, int, int] | None = None


@dataclass(frozen=True)
class RmsNorm:
    """y = epilogue(x / sqrt(mean(x^2) + eps) * gamma) over the channels of each row of x [B, positions, channels].

    block: as of `GroupNorm`
    into:  as of `LayerNorm`

    Arguments: x, gamma [channels] where `scale`, the epilogue's, y.
    """

    positions: int
    channels: int
    eps: float = 1e-6
    scale: bool = True
    epilogue: Epilogue = field(default_factory=Epilogue)
    time_groups: int = 1
    block: int = 0
    into: tuple[int, int, int] | None = None


Norm = GroupNorm | LayerNorm | RmsNorm


def arguments(problem: Norm) -> list[Argument]:
    """The kernel's buffers in calling order, output last."""
    rows, channels = (BATCH, problem.positions), problem.channels
    has_gamma, has_beta = _affine(problem)
    return [
        *(Argument(name, (*rows, count)) for name, count in sources_of(problem)),
        *([Argument("gamma", (channels,))] if has_gamma else []),
        *([Argument("beta", (channels,))] if has_beta else []),
        *epilogue_arguments(problem.epilogue, rows, channels, problem.time_groups),
        *_raw_arguments(problem),
        Argument("y", _written(problem), problem.epilogue.out_dtype),
        *([Argument("raw", (*rows, channels), "uint8")] if outputs(problem) == 2 else []),
    ]


def _written(problem: Norm) -> Shape:
    into = None if isinstance(problem, GroupNorm) else problem.into
    return (BATCH, problem.positions, problem.channels) if into is None else (BATCH, into[0])


def outputs(problem: Norm) -> int:
    """How many of the arguments, the last ones, are results."""
    return 2 if isinstance(problem, GroupNorm) and problem.raw is not None else 1


def sources_of(problem: Norm) -> list[tuple[str, int]]:
    """Name and channels of the tensors that are normalized."""
    parts = problem.parts if isinstance(problem, GroupNorm) else ()
    return [(f"x{i}", count) for i, count in enumerate(parts)] or [("x", problem.channels)]


def _raw_arguments(problem: Norm) -> list[Argument]:
    if not isinstance(problem, GroupNorm) or problem.raw is None:
        return []
    scale, zero, group = quantizer_arguments(problem.raw, problem.raw_groups)
    tables = [replace(scale, name="raw_scale"), replace(zero, name="raw_zero")]
    return tables if problem.epilogue.bits is not None else [*tables, group]


def _affine(problem: Norm) -> tuple[bool, bool]:
    if isinstance(problem, GroupNorm):
        return problem.affine, problem.affine
    return problem.scale, isinstance(problem, LayerNorm) and problem.shift
