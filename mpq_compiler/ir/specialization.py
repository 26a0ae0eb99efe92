"""Specializations: a packed program at one size of latents, for one kind of calls or of steps, with its batch sizes."""

from __future__ import annotations

from dataclasses import dataclass

from mpq_compiler.ir.program import Program


@dataclass(frozen=True)
class Specialization:
    """A program at one image size, for one kind of calls or of steps, for some batch sizes."""

    program: Program
    batches: tuple[int, ...]
    kind: int = 0
    """The index of its kind of calls; 0: that of the program that was calibrated, at another size."""
    step: str = ""
    """What its steps do beside or in place of computing all: `KEEPING` or `REUSING` of `ir.reuse`."""

    @property
    def name(self) -> str:
        """The end of the names of its functions: the height and width of the latents, as "24x32", or the kind."""
        return self.step or (kind_name(self.kind) if self.kind else size_text(self.program))


def kind_name(kind: int) -> str:
    """The name of a kind of calls, by its index."""
    return f"call{kind}"


def size_of(program: Program) -> tuple[int, int]:
    """The height and width of a program's latents."""
    height, width = program.inputs[0].shape[-2:]
    return int(height), int(width)


def size_text(program: Program) -> str:
    """The height and width of a program's latents, as "24x32"."""
    return "x".join(map(str, size_of(program)))
