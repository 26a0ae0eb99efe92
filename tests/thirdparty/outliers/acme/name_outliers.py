"""A pass as another package would bring it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, RANGE


@dataclass(frozen=True)
class NameOutliers(Pass):
    """Tells which tensors have the widest range for what they mostly hold.

    The range over the mean magnitude: where it is large, most values share a few levels of their quantizer.

        (no change; a note)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    requires: ClassVar[frozenset[str]] = frozenset({"calibration"})
    statistics: ClassVar[frozenset[str]] = frozenset({RANGE})

    count: int = 3
    """How many tensors to name."""

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        calibration = program.facts[CALIBRATION]
        spread = {
            name: float((edge.high.max() - edge.low.min()) / edge.values.abs().mean().clamp_min(1e-12))
            for name, edge in calibration.edges.items()
        }
        for name in sorted(spread, key=spread.__getitem__, reverse=True)[: self.count]:
            program.note(f"%{name} spans {spread[name]:.0f} times its mean magnitude")
        return program
