"""The integer program that gives every layer its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mpq_compiler import costs, formats, sensitivity_table
from mpq_compiler.allocation import Problem, solve
from mpq_compiler.calibration import GRAM, RANGE, VALUES, input_edge
from mpq_compiler.costs import weight_path
from mpq_compiler.errors import UserError
from mpq_compiler.fitting import activation_parameters
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import CONTRACTIONS, ActivationPlan, Program, Stage, WeightPlan, weight_of


@dataclass(frozen=True)
class BitAllocation(Pass):
    """Chooses a weight format and an activation width for every layer: least summed noise power under the budgets.

    A multiple-choice program solved to optimality with HiGHS (MixDQ, arXiv 2405.17873, section 4.3, in joint form). A
    choice is a pair of weight format and activation width, so that bit operations stay linear; layers that read one
    tensor are linked to one width. Bytes are those of the artifact, overheads included.

        %mid_block_attentions_0_to_q = aten.linear(%mid_block_attentions_0_group_norm, .weight, .bias)
      =>
        %mid_block_attentions_0_to_q = aten.linear(%mid_block_attentions_0_group_norm, ...)  ...  w int3  a u8/t3 ...
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"plan"})
    statistics: ClassVar[frozenset[str]] = frozenset({RANGE, VALUES, GRAM})

    weights: float | None = None
    """Budget in true average bits: all stored bytes over the number of parameters."""
    bytes: int | None = None
    """Budget in stored bytes."""
    activations: float = 8.0
    """Budget in average bits of the activations that are quantized."""
    bops: float | None = None
    """Budget in bit operations per sample and step."""
    uniform: str | None = None
    """One format for every layer, whatever it costs: no program is solved."""

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.PLANNED)
        sites: dict[str, list[fx.Node]] = {}
        for node in program.quantizable:
            sites.setdefault(str(weight_path(node)), []).append(node)
        if self.uniform is not None:
            bits = int(min(self.activations, 8))
            choices = {path: (formats.get(self.uniform).name, bits) for path in sites}
        else:
            choices = self._solve(program)
        for path, nodes in sites.items():
            name, bits = choices[path]
            program.weights[path] = WeightPlan(name, tuple(n.name for n in nodes))
            for node in nodes:
                _plan_activation(program, input_edge(node).name, bits)
        self._check_uniform(program)
        for node in program.graph.nodes:
            if node.target in CONTRACTIONS and weight_of(node) is None:
                program.fallbacks[node.name] = "grouped convolutions and computed weights have no quantized kernel"
        return program

    def _solve(self, program: Program) -> dict[str, tuple[str, int]]:
        """Weight format and activation bits of each layer."""
        if "sensitivity" not in program.facts:
            raise UserError("pass 'bit-allocation' needs 'sensitivity': put sensitivity before it, or set uniform=int8")
        table = program.facts["sensitivity"] | costs.describe(program)
        limit = sensitivity_table.byte_limit(table, self.weights, self.bytes)
        problem = sensitivity_table.problem(table, limit, self.activations, self.bops)
        solution = solve(Problem.from_json(problem))
        program.facts["allocation"] = {"objective": solution.objective, "gap": solution.gap, "costs": solution.costs}
        split = {path: choice.split(" u") for path, choice in solution.choices.items()}
        return {path: (name, int(bits)) for path, (name, bits) in split.items()}

    def _check_uniform(self, program: Program) -> None:
        """A uniform plan that exceeds a budget is refused rather than written."""
        limit = sensitivity_table.byte_limit(program.facts, self.weights, self.bytes)
        stored = costs.stored_bytes(program)
        if limit is not None and stored > limit:
            bits = costs.average_bits(stored, program.facts["parameters"])
            raise UserError(
                f"uniform {self.uniform} takes {stored} bytes ({bits:.3f} true average bits), more than the budget of "
                f"{limit} bytes; use the default recipe, which mixes formats"
            )


def _plan_activation(program: Program, edge: str, bits: int) -> None:
    if edge in program.activations:
        return
    scale, zero = activation_parameters(program, edge, bits)
    program.activations[edge] = ActivationPlan(
        bits, program.tensors.add(f"{edge}:scale", scale), program.tensors.add(f"{edge}:zero_point", zero)
    )
