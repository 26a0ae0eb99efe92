"""The integer program that gives every layer its format."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from mpq_compiler import costs, formats
from mpq_compiler.allocation import Problem, solve
from mpq_compiler.calibration import GRAM, RANGE, VALUES, input_edge
from mpq_compiler.costs import weight_path
from mpq_compiler.errors import UserError
from mpq_compiler.fitting import activation_parameters
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import ActivationPlan, Program, Stage, WeightPlan, weight_of


@dataclass(frozen=True)
class BitAllocation(Pass):
    """Chooses a weight format and an activation width for every layer: least summed noise power under the budgets.

    A multiple-choice program solved to optimality with HiGHS (MixDQ, arXiv 2405.17873, section 4.3, in joint form). A
    choice is a pair of weight format and activation width, so that bit operations stay linear; layers that read one
    tensor are linked to one width. Bytes are those of the artifact, overheads included.

        %to_q = aten.linear(%norm, to_q.weight, to_q.bias)
      =>
        %to_q = aten.linear(%norm, to_q.weight, to_q.bias)   w int3   a u8
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
        calls = program.quantizable
        sites: dict[str, list[fx.Node]] = {}
        for node in calls:
            sites.setdefault(str(weight_path(node)), []).append(node)
        widths = sorted({input_edge(n).name: n for n in calls})
        for path, nodes in sites.items():
            name = self.uniform or "int8"
            formats.get(name)
            program.weights[path] = WeightPlan(name, tuple(n.name for n in nodes))
        if self.uniform is None:
            self._solve(program, sites)
        else:
            bits = 8 if self.activations >= 8 else int(self.activations)
            for edge in widths:
                _plan_activation(program, edge, bits)
        return program

    def _solve(self, program: Program, sites: dict[str, list[fx.Node]]) -> None:
        if "sensitivity" not in program.facts:
            raise UserError("pass 'bit-allocation' needs 'sensitivity': put sensitivity before it, or set uniform=int8")
        problem = self.problem(program, sites)
        solution = solve(Problem.from_json(problem))
        for path, nodes in sites.items():
            name, bits = solution.choices[path].split(" u")
            program.weights[path] = WeightPlan(name, tuple(n.name for n in nodes))
            for node in nodes:
                _plan_activation(program, input_edge(node).name, int(bits))
        program.facts["allocation"] = {"objective": solution.objective, "gap": solution.gap, "costs": solution.costs}

    def problem(self, program: Program, sites: dict[str, list[fx.Node]]) -> dict[str, Any]:
        """The allocation problem as the plain data that ``mpqc allocate`` reads."""
        table = program.facts["sensitivity"]
        edges = {input_edge(n).name for nodes in sites.values() for n in nodes}
        readers = {e: [p for p, nodes in sites.items() if any(input_edge(n).name == e for n in nodes)] for e in edges}
        elements = costs.activation_elements(program)
        macs = costs.macs(program)
        layers = []
        for path, nodes in sites.items():
            weight_name = str(weight_of(nodes[0]))
            own = {input_edge(n).name for n in nodes}
            # What an edge costs is shared out among its readers: they are linked to one width.
            widths = sorted(int(b) for b in table["activations"].get(next(iter(own)), {"8": 0.0}))
            choices = []
            for name, loss in table["weights"][path].items():
                for bits in widths:
                    act = sum(table["activations"][e][str(bits)] / len(readers[e]) for e in own)
                    choices.append(
                        {
                            "name": f"{name} u{bits}",
                            "loss": loss + act,
                            "costs": {
                                "bytes": costs.weight_bytes(program, weight_name, name),
                                "activation_bits": sum(bits * elements[e] / len(readers[e]) for e in own),
                                "bops": sum(costs.bops(macs[n.name], formats.get(name).bits, bits) for n in nodes),
                            },
                            "attributes": {"activation": f"u{bits}"},
                        }
                    )
            layers.append({"name": path, "choices": choices})
        links = [{"layers": readers[e], "attribute": "activation"} for e in sorted(edges) if len(readers[e]) > 1]
        budgets = [{"cost": "activation_bits", "max": self.activations * sum(elements[e] for e in edges)}]
        if (limit := self.byte_budget(program)) is not None:
            groups = len(program.facts["time-groups"]) + 1
            fixed = costs.fixed_bytes(program, len(edges), groups)
            least = fixed + sum(min(c["costs"]["bytes"] for c in layer["choices"]) for layer in layers)
            if limit < least:
                bits = costs.average_bits(least, program.facts["parameters"])
                raise UserError(
                    f"a budget of {limit} bytes ({costs.average_bits(limit, program.facts['parameters']):.2f} true average "
                    f"bits) cannot be met: the least that the formats allow is {least} bytes ({bits:.2f} bits)"
                )
            budgets.append({"cost": "bytes", "max": limit - fixed})
        if self.bops is not None:
            budgets.append({"cost": "bops", "max": self.bops})
        return {"version": 1, "layers": layers, "budgets": budgets, "links": links}

    def byte_budget(self, program: Program) -> int | None:
        """Payload bytes allowed: the smaller of both budgets, None without one."""
        limits = [] if self.bytes is None else [self.bytes]
        if self.weights is not None:
            limits.append(int(self.weights * program.facts["parameters"] / 8))
        return min(limits, default=None)


def _plan_activation(program: Program, edge: str, bits: int) -> None:
    if edge in program.activations:
        return
    scale, zero = activation_parameters(program, edge, bits)
    program.activations[edge] = ActivationPlan(
        bits, program.tensors.add(f"{edge}:scale", scale), program.tensors.add(f"{edge}:zero_point", zero)
    )
