"""The two streams that block-by-block training reads: values of the float program, and those of its simulation.

What crosses the cut before a part is computed once, for all calls, and kept; large values in temporary files that are
mapped into memory. So a step of training costs one part, and never what lies before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq_compiler.analysis.trajectory_error import PART
from mpq_compiler.ir import scratch
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.parts import Part, extract, joined
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training.data import Data
from mpq_compiler.training.student import Student


class Streams:
    """The values that cross cuts, for all calls: those to train on, then those to judge by."""

    def __init__(self, program: Program, data: Data, held_out: Data, session: Session) -> None:
        """Begins with the inputs of the program.

        Args:
            program: the float program.
            data: the calls to train on.
            held_out: the calls to judge by.
            session: runs parts of the calls.
        """
        self.program, self.session = program, session
        self.calls, self.rows = data, len(data)
        self.sizes: dict[str, Tensor] = shapes(program, 2)
        given = {name: torch.cat([value, held_out.inputs[name]]) for name, value in data.inputs.items()}
        self.float = dict(given)
        self.simulated = dict(given)
        self.held_out = held_out

    def targets(self, part: Part) -> None:
        """Computes what the float program makes in a part."""
        self._run(self.program, part, self.float)

    def go_on(self, simulation: Program, part: Part) -> None:
        """Computes what the simulation makes in a part, for the parts that follow."""
        self._run(simulation, part, self.simulated)

    def forget(self, names: Sequence[str]) -> None:
        """Lets go of values that no later part reads."""
        for name in names:
            for stream in (self.float, self.simulated):
                stream.pop(name, None)

    def factors(self, part: Part) -> list[float]:
        """The factors by which all outputs of a part have one power, 1 where there is one output."""
        if len(part.outputs) == 1:
            return [1.0]
        judged = (self.float[name][self.rows :].double() for name in part.outputs)
        return [1 / max(float(value.square().flatten(1).sum(1).mean().sqrt()), 1e-30) for value in judged]

    def data(self, part: Part, factors: Sequence[float]) -> tuple[Data, Data]:
        """A part's calls, inputs of the simulation and outputs of the float program, to train on and to judge by."""
        targets = [(self.float[name], factor) for name, factor in zip(part.outputs, factors, strict=True)]
        inputs = {name: self.simulated[name] for name in part.inputs}
        given = StreamedData(inputs, torch.empty(self.rows, 0), None, part=self.calls.part, sources=tuple(targets))
        judged = given.select(torch.arange(self.rows, len(targets[0][0])))
        return replace(given, weights=self.calls.weights), replace(judged, weights=self.held_out.weights)

    def student(self, simulation: Program, part: Part, factors: Sequence[float]) -> Program:
        """The program of a part that is trained: its one output has all outputs side by side."""
        return joined(extract(simulation, part.inputs, part.outputs, self.sizes), factors)

    def _run(self, program: Program, part: Part, stream: dict[str, Tensor]) -> None:
        piece = extract(program, part.inputs, part.outputs, self.sizes)
        total = len(next(iter(stream.values())))
        sizes = {name: self.sizes[name] for name in part.outputs}
        made = {name: scratch.zeros((total, *size.shape[1:]), size.dtype) for name, size in sizes.items()}

        @torch.no_grad()
        def rows(start: int) -> None:
            inputs = {name: stream[name][start : start + PART] for name in part.inputs}
            for name, value in zip(part.outputs, Student(piece, {}).run(inputs), strict=True):
                made[name][start : start + PART] = value

        self.session.map(rows, range(0, total, PART))
        stream |= made


@dataclass(frozen=True, kw_only=True)
class StreamedData(Data):
    """Calls of a part, whose targets are put together as they are needed."""

    sources: tuple[tuple[Tensor, float], ...]
    """The values that make a target, each with its factor."""

    def select(self, index: Tensor) -> Data:
        targets = [value[index].flatten(1) * factor for value, factor in self.sources]
        inputs = {name: value[index] for name, value in self.inputs.items()}
        weights = None if self.weights is None else self.weights[index]
        return Data(inputs, torch.cat(targets, 1), weights, part=self.part)
