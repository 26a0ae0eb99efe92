"""Specializations: a packed program at one size of latents, with its batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.ir.program import Program


@dataclass(frozen=True)
class Specialization:
    """A program at one image size, for some batch sizes."""

    program: Program
    batches: tuple[int, ...]

    @property
    def size(self) -> str:
        """The height and width of the latents, as "24x32"."""
        return size_text(self.program)


def size_of(program: Program) -> tuple[int, int]:
    """The height and width of a program's latents."""
    height, width = program.inputs[0].shape[-2:]
    return int(height), int(width)


def size_text(program: Program) -> str:
    """The height and width of a program's latents, as "24x32"."""
    return "x".join(map(str, size_of(program)))
