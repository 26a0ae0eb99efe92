"""Calibration inputs and statistics."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from mpq_compiler.calibration import GRAM, RANGE, VALUES, collect
from mpq_compiler.errors import UserError
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program


@dataclass(frozen=True)
class Calibrate(Pass):
    """Records the denoiser's inputs along sampling trajectories, and measures each tensor that may be quantized.

    The inputs come from the float model's own sampling, all time steps of ``samples`` trajectories of ``steps`` steps,
    or from `--calibration`. Statistics are what later passes ask for, collected in one run. The graph stays as it is:

        (no change; facts["calibration"] holds inputs, ranges, values and second moments)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})
    provides: ClassVar[frozenset[str]] = frozenset({"calibration"})

    samples: int = 32
    """Trajectories."""
    steps: int = 20
    """Steps of each."""

    def __post_init__(self) -> None:
        for option in ("samples", "steps"):
            self.require(option, 1)

    def run(self, program: Program, session: Session) -> Program:
        from mpq_compiler.denoiser import record_calibration

        assert session.denoiser is not None
        program = program.fork()
        if not program.quantizable:
            raise UserError(f"{program.model} has no linear or conv2d layer that could be quantized")
        inputs = session.calibration
        if inputs is None:
            with session.track("recording calibration inputs", self.steps) as advance:
                inputs = record_calibration(
                    session.denoiser, self.samples, self.steps, session.seed, lambda done, total: advance(1)
                )
        count = len(next(iter(inputs.values())))
        with session.track("calibrating", count) as advance:
            wanted = session.statistics or frozenset({RANGE, VALUES, GRAM})
            calibration = collect(program, inputs, wanted, session.seed, advance)
        for name, edge in calibration.edges.items():
            if not bool(torch.isfinite(edge.low).all() and torch.isfinite(edge.high).all()):
                raise UserError(f"{program.model} gives values that are not finite at '{name}' during calibration")
        program.facts["calibration"] = calibration
        return program
