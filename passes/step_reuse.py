"""Measures what images lose where steps of a sampler take a part of the network from earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np

from mpq_compiler import formats
from mpq_compiler.analysis.noise_power import noise_of_program, rounded
from mpq_compiler.analysis.reuse_losses import (
    REUSE_LOSSES,
    Drawing,
    Gap,
    MarkedDrawing,
    ReuseLosses,
    of_all_gaps,
    relative_error,
    schedule_of_one,
    some_gaps,
)
from mpq_compiler.ir import provenance, reuse
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.realize import realize, uniform
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, MOMENTS, RANGE, VALUES, Statistic, fingerprint
from mpq_compiler.support import cache

GAIN = "gain"
"""The name of its result in the cache."""


@dataclass(frozen=True)
class StepReuse(Pass):
    """Measures, for cuts of the network and steps in a row, what reuse costs images.

    Deep parts of a denoiser change little from step to step (DeepCache, arXiv 2312.00858), and so does what it puts
    out (AdaptiveDiffusion, arXiv 2410.09873). Candidates come from the graph alone (`ir.reuse.cuts`): the whole
    network, the inner part of a UNet behind each skip, the blocks of a transformer. For each, one, two, three ...
    steps in a row take a sum of the last three values that were computed, with the weights that come nearest to
    what would be computed there (`MarkedDrawing.fitted`), at a few places of the schedule; losses at others lie
    between. That is of the float model: the program of `bit-allocation` sums losses of reuse and of bits, and by images
    of quantized weights those of reuse would have noise in them that stands in place of other noise. Losses are in the
    unit of `sensitivity`, by the ratio of both for a plain plan, one weight format and one width. What reuse makes of
    the noise of bits is measured with the plan that is chosen (`keep-values`).

        (no change; facts["reuse-losses"] holds the loss of each number of steps in a row, from each step on)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.GROUPS_TIME
    width: ClassVar[str | None] = "activations"
    settings: ClassVar[Mapping[str, str]] = {"reuse": "steps"}
    requires: ClassVar[frozenset[str]] = frozenset({"time-groups", "sensitivity"})
    provides: ClassVar[frozenset[str]] = frozenset({"reuse-losses"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, MOMENTS})

    steps: int = 20
    """Sampling steps, for which the schedule is made."""
    cuts: int = 3
    """Most values that could be kept; one is chosen."""
    places: int = 8
    """Places of the schedule where losses are measured."""
    images: int = 16
    """Images to draw."""
    weights: str = "int4"
    """Format of all weights where the unit of losses is measured."""
    activations: int = 8
    """Width of all activations where the unit of losses is measured; a budget of activations takes its own."""

    def __post_init__(self) -> None:
        formats.get(self.weights)
        self.require("steps", 2)
        self.require("activations", 2, 8)
        for option in ("cuts", "places", "images"):
            self.require(option, 1)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if session.denoiser is None or not session.denoiser.conditioning.possible:
            program.note("step-reuse: nothing can be drawn here, and every step computes all")
            return program
        cuts = reuse.cuts(program, self.cuts)
        measured, gain = self._measured(program, cuts, session)
        times = tuple(float(t) for t in session.denoiser.scheduler.timesteps(self.steps))
        losses = {cut: of_all_gaps(each, self.steps) for cut, each in measured.items()}
        program.facts[REUSE_LOSSES] = ReuseLosses(times, losses, gain)
        stated = {
            cut.node: {f"{gap.length} behind {gap.begin}": loss for gap, loss in each.items()}
            for cut, each in measured.items()
        }
        shares = {cut.node: round(cut.share, 3) for cut in cuts}
        provenance.note(program, provenance.PROGRAM, self.name(), share=shares, losses=stated, gain=gain)
        return program

    def _measured(
        self, program: Program, cuts: Sequence[reuse.Cut], session: Session
    ) -> tuple[dict[reuse.Cut, dict[Gap, float]], float]:
        """The losses, and the noise power of images over their unit; the cache keeps them."""
        inputs = program.facts[SENSITIVITY].get("inputs", 1)
        about = f"reuse 3 {self.options()} {session.seed} {inputs}"
        key = fingerprint(program, program.facts[CALIBRATION].select(inputs), about)
        results = cache.Results("sensitivity", key, session.cache)
        gaps = some_gaps(self.steps, self.places)
        names = {(cut, gap): f"{cut.node} {gap.begin} {gap.length}" for cut in cuts for gap in gaps}
        if GAIN not in results or any(name not in results for name in names.values()):
            self._measure(program, cuts, names, inputs, results, session)
        else:
            session.reuse(f"{len(names)} losses of reuse")
        return {cut: {gap: results[names[cut, gap]] for gap in gaps} for cut in cuts}, results[GAIN]

    def _measure(
        self,
        program: Program,
        cuts: Sequence[reuse.Cut],
        names: Mapping[tuple[reuse.Cut, Gap], str],
        inputs: int,
        results: cache.Results,
        session: Session,
    ) -> None:
        """Draws by every gap, and adds its loss to the results; the first of all is the gain."""
        drawing = Drawing(session, self.steps, self.images)
        with session.track("drawing with reuse", len(names)) as advance:
            for cut in cuts:
                marked = program.fork()
                reuse.mark(marked, cut.node)
                schedules = {
                    name: schedule_of_one(cut, drawing.timesteps, gap) for (of, gap), name in names.items() if of is cut
                }
                drawn = MarkedDrawing(drawing, marked, set().union(*(s.kept for s in schedules.values())))
                if GAIN not in results:
                    results[GAIN] = self._gain(program, drawing, drawn.whole, inputs)
                for name, schedule in schedules.items():
                    if name not in results:
                        _, latents = drawn.fitted(schedule)
                        results[name] = rounded(relative_error(latents, drawn.whole) / results[GAIN])
                    advance(1)

    def _gain(self, program: Program, drawing: Drawing, expected: np.ndarray, inputs: int) -> float:
        """The noise power of images over the unit of `sensitivity`, of a plain plan."""
        session = drawing.session
        plan = uniform(self.weights, activations=float(self.activations))
        simulated = realize(plan.run(program, replace(session, progress=None, latency=None)), session)
        latents = drawing.draw(lambda **inputs: drawing.run(simulated, inputs))
        return rounded(relative_error(latents, expected) / noise_of_program(program, simulated, inputs, session))

    def demand(self, asked: Asked) -> Demand:
        if not asked.draws:
            return Demand()
        drawn = sum(self.steps - gap.begin + gap.length for gap in some_gaps(self.steps, self.places))
        return asked.running(self.images, self.images) * (self.cuts * (drawn + self.steps))
