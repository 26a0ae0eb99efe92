"""Measures what images lose where steps of a sampler take a part of the network from earlier steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

from mpq_compiler import formats
from mpq_compiler.analysis.noise_power import noise_of_program, rounded
from mpq_compiler.analysis.reuse_losses import (
    REUSE_LOSSES,
    Drawing,
    MarkedDrawing,
    Option,
    ReuseLosses,
    options_of,
    relative_error,
    schedule_of,
    stretches_of,
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
    """Measures, for cuts of the network and stretches of steps, what reuse costs the images of the quantized model.

    Deep parts of a denoiser change little from step to step (DeepCache, arXiv 2312.00858). Candidates come from the
    graph alone (`ir.reuse.cuts`): the inner part of a UNet behind each skip, the blocks of a transformer. Each is tried
    in each stretch of the schedule, with every second, third ... step computed, the value taken as it was (order 0) or
    extrapolated from the last two (order 1). A plain plan, one weight format and one width, quantizes: extrapolation
    amplifies its noise, and the loss has that in it. Losses are in the unit of `sensitivity`, so that the program of
    `bit-allocation` sums them with those of bits.

        (no change; facts["reuse-losses"] holds the loss of each option at each cut)
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
    stretches: int = 4
    """Stretches of steps, each with its own interval."""
    orders: tuple[int, ...] = (0, 1)
    """0 takes the last value, 1 extrapolates the last two."""
    images: int = 16
    """Images to draw."""
    weights: str = "int4"
    """Format of all weights while losses are measured."""
    activations: int = 8
    """Width of all activations while losses are measured; a budget of activations takes its own."""

    def __post_init__(self) -> None:
        formats.get(self.weights)
        self.require("steps", 2)
        self.require("orders", 0, 1)
        self.require("activations", 2, 8)
        for option in ("cuts", "stretches", "images"):
            self.require(option, 1)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if session.denoiser is None or not session.denoiser.conditioning.possible:
            program.note("step-reuse: nothing can be drawn here, and every step computes all")
            return program
        cuts = reuse.cuts(program, self.cuts)
        if not cuts:
            program.note("step-reuse: no value stands for a part of the network that is worth keeping")
            return program
        losses, gain = self._measured(program, cuts, session)
        stretches = stretches_of(self.steps, self.stretches)
        times = tuple(float(t) for t in session.denoiser.scheduler.timesteps(self.steps))
        program.facts[REUSE_LOSSES] = ReuseLosses(times, stretches, losses, gain)
        stated = {c.node: {f"{o.stretch}: {o.name}": loss for o, loss in each.items()} for c, each in losses.items()}
        shares = {cut.node: round(cut.share, 3) for cut in cuts}
        provenance.note(
            program, provenance.PROGRAM, self.name(), stretches=stretches, share=shares, losses=stated, gain=gain
        )
        return program

    def _measured(
        self, program: Program, cuts: Sequence[reuse.Cut], session: Session
    ) -> tuple[dict[reuse.Cut, dict[Option, float]], float]:
        """The losses, and the noise power of images over their unit; the cache keeps them."""
        stretches = stretches_of(self.steps, self.stretches)
        options = options_of(stretches, self.orders)
        inputs = program.facts[SENSITIVITY].get("inputs", 1)
        about = f"reuse 1 {self.options()} {session.seed} {inputs}"
        key = fingerprint(program, program.facts[CALIBRATION].select(inputs), about)
        results = cache.Results("sensitivity", key, session.cache)
        names = {(cut, option): f"{cut.node} {option.stretch} {option.name}" for cut in cuts for option in options}
        if GAIN not in results or any(name not in results for name in names.values()):
            self._measure(program, cuts, stretches, names, inputs, results, session)
        else:
            session.reuse(f"{len(names)} losses of reuse")
        return {cut: {o: results[names[cut, o]] for o in options} for cut in cuts}, results[GAIN]

    def _measure(
        self,
        program: Program,
        cuts: Sequence[reuse.Cut],
        stretches: Sequence[tuple[int, int]],
        names: Mapping[tuple[reuse.Cut, Option], str],
        inputs: int,
        results: cache.Results,
        session: Session,
    ) -> None:
        """Draws by every option, and adds its loss to the results; the first of all is the gain."""
        drawing = Drawing(session, self.steps, self.images)
        denoiser = drawing.denoiser
        expected = drawing.draw(lambda **inputs: denoiser(**inputs).numpy())
        plan = uniform(self.weights, activations=float(self.activations))
        simulated = realize(plan.run(program, replace(session, progress=None, latency=None)), session)
        with session.track("drawing with reuse", len(names)) as advance:
            for cut in cuts:
                marked = simulated.fork()
                reuse.mark(marked, cut.node)
                drawn = MarkedDrawing(drawing, marked, {begin - 1 for begin, _ in stretches})
                if GAIN not in results:
                    noise = noise_of_program(program, simulated, inputs, session)
                    results[GAIN] = rounded(relative_error(drawn.whole, expected) / noise)
                for (of, option), name in names.items():
                    if of is cut and name not in results:
                        latents = drawn.by(schedule_of(cut, drawing.timesteps, stretches, [option]))
                        results[name] = rounded(relative_error(latents, drawn.whole) / results[GAIN])
                    advance(int(of is cut))

    def demand(self, asked: Asked) -> Demand:
        stretches = stretches_of(self.steps, self.stretches)
        drawn = sum(self.steps - stretches[o.stretch][0] for o in options_of(stretches, self.orders))
        return asked.running(self.images, self.images) * (self.cuts * (drawn + self.steps))

