"""The importance of layers by how little they have in common with others; no layer is quantized to learn it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler.allocation.sensitivity_table import ORTHOGONALITY
from mpq_compiler.analysis.noise_power import rounded
from mpq_compiler.formats import get as get_format
from mpq_compiler.ir import provenance
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import LossTable
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Activations
from mpq_compiler.quantization.statistics import CALIBRATION, Calibration
from mpq_compiler.support.errors import UserError


@dataclass(frozen=True)
class Orthogonality(Pass):
    """Weighs layers by their network orthogonality: how little their outputs have in common with others'.

    ``ORM(f_i, f_j) = |f_j^T f_i|^2 / (|f_i^T f_i| |f_j^T f_j|)``, Frobenius norms, of the outputs f [inputs, elements]
    of two layers of the float program (OMPQ, arXiv 2109.07865), at times spread evenly over the calibration (MPQ-Diff,
    arXiv 2412.00144). A layer with gamma, its mean over all layers and times, has the importance ``e^(-beta gamma)``
    relative to the largest. The loss of a format is the importance times the bits that it has less than the widest;
    of an activation, with the importances of all layers that read it. `bit-allocation{objective=orthogonality}` takes
    these losses, which know nothing of errors.

        (no change; facts["orthogonality"] holds weights[path][format] and activations[edge][bits])
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.MEASURES
    width: ClassVar[str | None] = "activations"
    requires: ClassVar[frozenset[str]] = frozenset({"calibration"})
    provides: ClassVar[frozenset[str]] = frozenset({"orthogonality"})

    formats: tuple[str, ...] = ("int2", "int3", "int4")
    """Weight formats to choose from; among those of equal bits the allocation takes the smallest. Every bit counts
    alike, so that wide formats take from many layers what few need: as in OMPQ there are 2 to 4 bits."""
    activations: tuple[int, ...] = (8,)
    """Activation widths to choose from."""
    beta: float = 10.0
    """Rate at which importance falls with gamma."""
    times: int = 8
    """Timesteps at which outputs are compared."""
    inputs: int = 8
    """Calibration inputs at each timestep, neighbours in time."""

    def __post_init__(self) -> None:
        self.require("activations", 2, 8)
        self.require("beta", 0, 100)
        self.require("times", 1)
        self.require("inputs", 2)
        if not self.formats:
            raise UserError("option 'formats' of pass 'orthogonality' must name a format to choose, and is empty")
        for name in self.formats:
            get_format(name)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        calls = program.quantizable
        parts = self._parts(program.facts[CALIBRATION])
        with session.track("orthogonality", len(parts)) as advance:

            def measure(part: dict[str, Tensor]) -> Tensor:
                found = orm(_grams(program, calls, part)).mean(1)
                advance(1)
                return found

            gamma = torch.stack(session.map(measure, parts)).mean(0)
        common: dict[str, list[float]] = {}
        for call, own in zip(calls, gamma.tolist(), strict=True):
            common.setdefault(str(weight_path(call)), []).append(own)
        mean = {path: sum(own) / len(own) for path, own in common.items()}  # of all calls of a shared weight
        weight = torch.tensor([*mean.values()], dtype=torch.float64)
        importance = dict(zip(mean, (-self.beta * (weight - weight.min())).exp().tolist(), strict=True))
        table: LossTable = {
            **self._losses(calls, importance),
            "inputs": sum(len(part["timestep"]) for part in parts),
            "dynamic": session.requests.activations == Activations.DYNAMIC,
            "floating": session.requests.activations == Activations.FLOATING,
        }
        program.facts[ORTHOGONALITY] = table
        for path in mean:
            provenance.note(program, path, self.name(), gamma=mean[path], importance=importance[path])
        return program

    def _parts(self, calibration: Calibration) -> list[dict[str, Tensor]]:
        """The inputs at each of `times` times; a small calibration gives fewer."""
        count = len(calibration.timesteps)
        starts = torch.linspace(0, max(0, count - self.inputs), self.times).round().long().unique().tolist()
        return [{n: v[start : start + self.inputs] for n, v in calibration.inputs.items()} for start in starts]

    def _losses(self, calls: list[fx.Node], importance: dict[str, float]) -> LossTable:
        bits = {name: get_format(name).bits for name in self.formats}

        def losses(own: float, widths: dict[str, int]) -> dict[str, float]:
            most = max(widths.values())
            return {name: rounded(own * (most - width)) for name, width in widths.items()}

        readers: dict[str, set[str]] = {}
        for call in calls:
            readers.setdefault(input_edge(call).name, set()).add(str(weight_path(call)))
        widths = {str(width): width for width in self.activations}
        return {
            "weights": {path: losses(own, bits) for path, own in importance.items()},
            "activations": {
                edge: losses(sum(importance[path] for path in sorted(paths)), widths) for edge, paths in readers.items()
            },
        }


def orm(grams: Tensor) -> Tensor:
    """The orthogonality metric [L, L] of the outputs f of L layers, from their ``f f^T`` [L, N, N].

    ``|f_j^T f_i|^2`` is the inner product of two of these. The metric is 0 for orthogonal outputs, and 1 for outputs
    that are equal up to a rotation and a factor. Outputs that are all 0 have 1 with all, for they hold nothing of their
    own.
    """
    flat = grams.flatten(1)
    norms = flat.norm(dim=1)
    unit = flat / norms.clamp_min(1e-300)[:, None]
    found: Tensor = (unit @ unit.T).clamp(0, 1)
    empty = norms == 0
    found[empty], found[:, empty] = 1, 1
    return found


def _grams(program: Program, calls: list[fx.Node], inputs: dict[str, Tensor]) -> Tensor:
    """The products f f^T of the output f of each call, f64 [calls, N, N]."""
    place = {call.name: index for index, call in enumerate(calls)}
    count = len(inputs["timestep"])
    found = torch.zeros(len(calls), count, count, dtype=torch.float64)

    def watch(node: fx.Node, value: Any) -> None:
        if node.name in place:
            flat = value.reshape(count, -1).double()
            found[place[node.name]] = flat @ flat.T

    run(program, inputs, watch)
    return found
