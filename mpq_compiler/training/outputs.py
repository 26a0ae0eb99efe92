"""The error of single calls against the float model's outputs, and what a term on features adds to it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.analysis.trajectory_error import PART
from mpq_compiler.ir import ops, segments
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training.data import Data
from mpq_compiler.training.objective import HELD, Objective
from mpq_compiler.training.relation_loss import Memory, Relations
from mpq_compiler.training.relation_loss import Step as RelationStep
from mpq_compiler.training.state import Stage, State
from mpq_compiler.training.student import Student, differentiable, leaves, values
from mpq_compiler.training.variables import Variable


@dataclass
class Outputs(Objective):
    """The relative squared error of the outputs of calls, a batch of mixed times in each step."""

    program: Program
    """Fake-quantized, with settled weights."""
    stage: Stage
    data: Data
    """The calls to train on."""
    held_out: Data
    """The calls to judge by."""
    session: Session
    seed: int
    """The seed of the order of the calls."""

    def __post_init__(self) -> None:
        self.power = float(self.held_out.squared(self.held_out.targets).double().mean())
        self.relations: Relations | None = None
        if self.stage.relation is not None:
            self.relations = Relations.start(self.stage.relation, self.program, self.data.inputs)
        sizes = {} if self.relations else segments.value_bytes(self.program, self.data.part)
        self.last = [] if self.relations else segments.ends(self.program, sizes, HELD)

    def go_on(self, state: State) -> None:
        if self.relations is not None:
            self.relations.memory = Memory(**state.memory) if state.memory else self.relations.memory
            state.memory = vars(self.relations.memory)

    def error(self, variables: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> float:
        return noise(self.program, variables, thetas, self.held_out, self.session)

    def gradients(self, step: int, made: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss is that of a batch, to which a relation adds its term.

        Segments, where there are several, hold their values in turn.
        """
        index = _batch(step, len(self.data), self.stage.batch, self.seed)
        batch, relation = self.data.select(index), None
        if self.relations is not None:
            before = self.data.before(index, self.relations.term.window - 1)
            generator = torch.Generator().manual_seed((self.seed << 32) + step)
            relation = self.relations.step(len(batch), generator, before)

        def part(numbered: tuple[int, Data]) -> tuple[float, tuple[Tensor | None, ...], Tensor | None]:
            number, piece = numbered
            inner = leaves(made)
            return self._part(piece, inner, len(batch), number, relation)

        pieces = self.session.map(part, enumerate(batch.parts()))
        if relation is not None:
            group = ops.time_group(batch.inputs["timestep"], self.program.facts[TIME_GROUPS])
            relation.push(torch.cat([pixels for *_, pixels in pieces if pixels is not None]), group)
        reached: dict[str, Tensor] = {}
        for name, *parts in zip(differentiable(made), *(found for _, found, _ in pieces), strict=True):
            sums = [g for g in parts if g is not None]
            if sums:
                reached[name] = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
        return sum(loss for loss, *_ in pieces), reached

    def _part(
        self, piece: Data, inner: Mapping[str, Tensor], count: int, number: int, relation: RelationStep | None
    ) -> tuple[float, tuple[Tensor | None, ...], Tensor | None]:
        """The loss of a part of ``count`` calls, its gradients by those of inner values, and pixels of its features."""
        wanted, variables = relation and relation.relations.term.node, differentiable(inner).values()

        def outputs(inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
            """The features that the relation compares, where there is one, and the output."""
            seen: list[Tensor] = []
            output = Student(self.program, inner).run(
                inputs, watch=lambda node, value: seen.append(value) if node.name == wanted else None
            )
            return seen, output

        def error(output: Tensor) -> Tensor:
            return piece.squared(output - piece.targets).sum() / (count * self.power)

        if len(self.last) > 1:
            losses: list[Tensor] = []

            def by_output(output: Tensor) -> tuple[Tensor, ...]:
                losses.append(error(output.requires_grad_()))
                return torch.autograd.grad(losses[0], output)

            with torch.enable_grad():
                segments.backward(Student(self.program, inner), piece.inputs, self.last, by_output)
            return float(losses[0].detach()), tuple(value.grad for value in variables), None
        seen, output = outputs(piece.inputs)
        share, pixels = len(piece) / count, None
        loss = error(output)
        if relation is not None:
            rows = slice(number * PART, number * PART + len(piece))
            more, pixels = relation.loss(seen[0], piece.inputs, rows, lambda inputs: outputs(inputs)[0][0])
            loss = loss + more * share
        return float(loss.detach()), torch.autograd.grad(loss, list(variables), allow_unused=True), pixels


def _batch(step: int, count: int, most: int, seed: int) -> Tensor:
    """The indices of a step's calls; an epoch has every call once, in an order of its own."""
    size = min(most, count)
    epoch, place = divmod(step - 1, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + (epoch << 32)))
    return order[place * size : (place + 1) * size]


@torch.no_grad()
def noise(
    program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor], data: Data, session: Session
) -> float:
    """The weighted squared error of the outputs over the teacher's squared outputs: the inverse of the SQNR.

    Args:
        program: fake-quantized.
        trained: its variables.
        thetas: their values.
        data: the calls.
        session: runs the parts.
    """

    made = values(program, trained, thetas)

    def part(piece: Data) -> float:
        output = Student(program, made).run(piece.inputs)
        return float(piece.squared(output - piece.targets).double().sum())

    return sum(session.map(part, data.parts())) / float(data.squared(data.targets).double().sum())
