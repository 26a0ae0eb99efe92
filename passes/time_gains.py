"""Measures how much an error of the output costs images, by the time at which it is made."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from mpq_compiler import formats
from mpq_compiler.analysis.time_weights import TIME_GAINS
from mpq_compiler.analysis.trajectory_error import IMAGE_STEPS, PART, TrajectoryError, runs_of_gains
from mpq_compiler.ir import provenance
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import Asked, Demand, fitting
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.realize import realize, uniform
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Rounding
from mpq_compiler.quantization.statistics import MOMENTS, RANGE, VALUES, Statistic


@dataclass(frozen=True)
class TimeGains(Pass):
    """Measures how much of an error of the output at one time is left in the images.

    Early errors decide what is drawn, late ones are seen as they are, and those between are mostly cleaned up by the
    steps that follow: the gains differ by a factor of a hundred. With them `sensitivity` sums what layers do to images
    rather than to outputs. A plain plan, one weight format and one width, makes the errors: images are drawn with its
    output in one step at a time and the float model's in all others. Where nothing can be drawn there is a note, and
    all times count alike.

        (no change; facts["time-gains"] holds ascending timesteps, and the gain at each)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.GROUPS_TIME
    width: ClassVar[str | None] = "activations"
    requires: ClassVar[frozenset[str]] = frozenset({"time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"time-gains"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, MOMENTS})

    weights: str = "int4"
    """Format of all weights while gains are measured."""
    activations: int = 8
    """Width of all activations while gains are measured; a budget of activations takes its own."""
    images: int = 16
    """Images to draw."""

    def __post_init__(self) -> None:
        formats.get(self.weights)
        self.require("activations", 2, 8)
        self.require("images", 1)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        image_error = None if session.denoiser is None else TrajectoryError.drawn(session, self.images)
        if image_error is None:
            program.note("time-gains: nothing can be drawn here, and errors at all times count alike")
            return program
        plan = uniform(self.weights, activations=float(self.activations))
        planned = plan.run(program, replace(session, progress=None, latency=None))
        measured = image_error.gains(realize(planned, session))
        largest = max(gain for _, gain in measured)
        found = [(time, float(f"{gain / largest:.5e}")) for time, gain in measured]
        program.facts[TIME_GAINS] = found
        provenance.note(program, provenance.PROGRAM, self.name(), gains=found)
        return program

    def demand(self, asked: Asked) -> Demand:
        if not asked.draws:
            return Demand()
        fitted = fitting(asked.sizes.layers, [formats.get(self.weights)], Rounding.NEAREST)
        return fitted + asked.running(self.images, PART) * runs_of_gains(IMAGE_STEPS)
