"""The lowering of a packed program to ONNX models: its stages, and the rules that hold after each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from mpq_compiler.artifact.bundle import WEIGHTS
from mpq_compiler.backends.onnx import FUNCTION
from mpq_compiler.backends.onnx.emit import Selected, read_constants, select
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.ir.stored_tensors import Stored
from mpq_compiler.ir.verifier import VerificationError, Violation
from mpq_compiler.pipeline.passes import Contract
from mpq_compiler.pipeline.stages import LoweringStage


@dataclass(frozen=True)
class Models:
    """The models by the names of their functions."""

    models: Mapping[str, Selected] = field(default_factory=dict)


Stage = LoweringStage[Models]


@dataclass(frozen=True, eq=False)
class SelectOperators(LoweringStage[Models]):
    """Each call becomes ONNX operators, equal ones once; values lie channels-first where convolutions and norms ask it.

    others: the program at other image sizes, each of which gets a model. UserError: a node that ONNX cannot express.
    """

    program: Program
    stored: Mapping[str, Stored]
    others: Sequence[Specialization] = ()

    contract: ClassVar[Contract] = Contract.LOWERED

    def run(self, plan: Models) -> Models:
        programs = {FUNCTION: self.program} | {f"{FUNCTION}_{o.name}": o.program for o in self.others}
        return Models({name: select(each, self.stored, WEIGHTS) for name, each in programs.items()})


class EliminateDeadConstants(LoweringStage[Models]):
    """Constants that no operator reads are dropped."""

    def run(self, plan: Models) -> Models:
        return Models({name: replace(each, model=read_constants(each.model)) for name, each in plan.models.items()})


BEHIND_SELECTION: tuple[type[Stage], ...] = (EliminateDeadConstants,)


def names() -> tuple[str, ...]:
    """The names of all stages, in order."""
    return (SelectOperators.name(), *(stage.name() for stage in BEHIND_SELECTION))


def check(plan: Models) -> Iterator[Violation]:
    """The rules that the models break."""
    for name, selected in plan.models.items():
        graph = selected.model.graph
        given = [value.name for value in graph.input] + [tensor.name for tensor in graph.initializer]
        known = set(given)
        if len(known) < len(given):
            yield Violation("single-assignment", name, "an input or constant has the name of another")
        for node in graph.node:
            for operand in node.input:
                if operand and operand not in known:
                    yield Violation("order", node.name, f"it reads '{operand}', which nothing has made by then")
            for result in node.output:
                if result in known:
                    yield Violation("single-assignment", node.name, f"it makes '{result}', which there is already")
            known.update(node.output)
        missing = [value.name for value in graph.output if value.name not in known]
        missing += [value.name for value in selected.values.values() if value.name not in known]
        if missing:
            yield Violation("output", missing[0], "nothing makes it")


def verify(plan: Models, after: str) -> None:
    """Raises VerificationError with the first violation; ``after`` names the stage that made the models."""
    if (found := next(check(plan), None)) is not None:
        raise VerificationError(f"{found} after stage '{after}'; this is a fault of the compiler, please report it")
