"""The basis of a program's weights: how passes rewrote the channels that layers read and write.

Rewrites are linear. With ``W`` the model's own weight the program's is ``R W C``, where ``R`` scales outputs, and ``C``
scales, rotates and selects inputs. A pass that rewrites a weight records its step, so that whatever is added to ``W``
later (a LoRA) can be added to the program's weight.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional

from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.program import Program


@dataclass(frozen=True, eq=False)
class Scaled:
    """Multiplies the channels of one side by ``factor`` [C]."""

    factor: Tensor
    outputs: bool = False
    """Whether it is the channels that the layer writes."""

    def __call__(self, weight: Tensor) -> Tensor:
        return weight * self._over(weight)

    def undone(self, weight: Tensor, channels: int) -> Tensor:
        """The weight that it was applied to."""
        return weight / self._over(weight)

    def _over(self, weight: Tensor) -> Tensor:
        return self.factor.reshape(-1, *[1] * (weight.dim() - 1)) if self.outputs else self.factor


@dataclass(frozen=True, eq=False)
class Rotated:
    """Multiplies every block of input channels by ``matrix`` [block, block] from the right."""

    matrix: Tensor

    def __call__(self, weight: Tensor) -> Tensor:
        blocks = weight.reshape(*weight.shape[:-1], -1, len(self.matrix))
        return (blocks @ self.matrix.to(weight)).reshape(weight.shape)

    def undone(self, weight: Tensor, channels: int) -> Tensor:
        """The weight that it was applied to; the matrix is orthogonal."""
        return Rotated(self.matrix.T)(weight)


@dataclass(frozen=True)
class Part:
    """Keeps the input channels from ``start`` to ``stop``."""

    start: int
    stop: int

    def __call__(self, weight: Tensor) -> Tensor:
        return weight[..., self.start : self.stop]

    def undone(self, weight: Tensor, channels: int) -> Tensor:
        """The weight of so many channels that it was applied to, with zeros for what it left out."""
        return functional.pad(weight, (self.start, channels - self.stop))


Step = Scaled | Rotated | Part


@dataclass(frozen=True)
class Basis:
    """The parameter of the model that a weight was, and the steps that rewrote it."""

    origin: str
    steps: tuple[Step, ...] = ()

    def rewritten(self, weight: Tensor) -> Tensor:
        """The program's form of a weight of the model, f32 [O, ..., C] with the input channels last."""
        found = weight.double()
        for step in self.steps:
            found = step(found)
        return found.to(torch.float32)

    def undone(self, weight: Tensor, channels: int) -> Tensor:
        """The model's form of a weight of the program: the inverse of `rewritten`, for so many channels of the model.

        Inputs that the program's weight does not read are zero: weights of the parts add up to the whole.
        """
        found = weight.double()
        for step in reversed(self.steps):
            found = step.undone(found, channels)
        return found.to(torch.float32)


BASES = Fact[dict[str, Basis]]("weight-bases")
"""The basis of every weight that passes rewrote, by the parameter's path in the program."""


def basis_of(program: Program, path: str) -> Basis:
    """The basis of a weight; its own where no pass rewrote it."""
    return _bases(program).get(path, Basis(path))


def _bases(program: Program) -> dict[str, Basis]:
    known: dict[str, Basis] | None = program.facts.get(BASES)
    return known or {}


def record(program: Program, path: str, step: Step, origin: str | None = None) -> None:
    """Records that a pass rewrote a weight.

    Args:
        program: keeps the record.
        path: the parameter's path in the program.
        step: what was done to it.
        origin: the path of the weight that it was made of; None: itself.
    """
    before = basis_of(program, origin or path)
    program.facts[BASES] = {**_bases(program), path: replace(before, steps=(*before.steps, step))}
