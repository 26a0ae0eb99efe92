"""Marks the value that steps of a sampler keep for later ones."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from mpq_compiler.analysis.noise_power import rounded
from mpq_compiler.analysis.reuse_losses import REUSE_LOSSES, Drawing, MarkedDrawing, error_of_each, relative_error
from mpq_compiler.analysis.trajectory_error import PART, geometric_mean
from mpq_compiler.ir import provenance
from mpq_compiler.ir.findings import ALLOCATION
from mpq_compiler.ir.program import Program, TensorStore
from mpq_compiler.ir.reuse import LEAST, REUSE, cuts, mark
from mpq_compiler.pipeline.demand import Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.realize import realize
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.reuse import SLOTS, Schedule, sources_of
from mpq_compiler.support.errors import UserError

NUMBERS, FEWEST, MOST = 25_000, 4, 32
"""The numbers that the images have in sum by which weights are fitted, and the fewest and the most images."""


def images_of(size: int) -> int:
    """The images by which weights are fitted, by the numbers of one."""
    return min(max(-(-NUMBERS // size), FEWEST), MOST)


@dataclass(frozen=True)
class KeepValues(Pass):
    """Puts ``mpq::keep`` behind the value that `bit-allocation` decided to keep from step to step, if any.

    It is the identity: a step that computes all is what it would be without. Of the packed program there are two more
    then, of a step that puts the value out too and of one that takes it from earlier steps and computes what is left
    (`ir.reuse`). By images of the float model the weights of kept values are fitted, of each step and then of all
    together (`MarkedDrawing.fitted`, `MarkedDrawing.refined`). By as many others, with the plan's bits, those are taken
    that come nearer to the float model's; what all of it loses is measured, beside the sum of the losses that chose it
    and beside what bits lose. With ``every`` the schedule is set by hand, as DeepCache's (arXiv 2312.00858);
    a model without time, such as the text encoder of a pipeline, keeps nothing. Where nothing can be drawn values are
    extrapolated, with a note.

        %up_blocks_1_resnets_0_add_1          = aten.add(%up_blocks_1_resnets_0_conv_shortcut, ...)
      =>
        %up_blocks_1_resnets_0_add_1_computed = aten.add(%up_blocks_1_resnets_0_conv_shortcut, ...)
        %up_blocks_1_resnets_0_add_1          = mpq::keep(%up_blocks_1_resnets_0_add_1_computed)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.REWRITES
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"kept"})

    every: int = 0
    """Every so many steps one computes all, whatever was decided; 0: as decided."""
    begin: float = 0.3
    """The share of the steps before that, which all compute all; with ``every``."""
    share: float = 1.0
    """The most that a step leaves out, of the multiplications; with ``every``."""
    steps: int = 20
    """Sampling steps, for which the schedule is made."""
    images: int = 0
    """Images by which weights are fitted, and what all that was decided loses together is measured; 0: as many as have
    `NUMBERS` numbers, of `FEWEST` to `MOST`."""
    rounds: int = 6
    """How often the weights of all steps are fitted together, at most; 0 leaves those of each step by itself."""

    def __post_init__(self) -> None:
        self.require("every", 0)
        self.require("begin", 0, 1)
        self.require("share", 0, 1)
        self.require("steps", 2)
        self.require("images", 0)
        self.require("rounds", 0)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        form = None if session.denoiser is None else session.denoiser.form
        if self.every and form is not None and form.time is None:
            program.note("keep-values: this model has no time, and no steps that could take anything from earlier ones")
        elif self.every:
            program.facts[REUSE] = self._by_hand(program, session)
        if (chosen := program.facts.get(REUSE)) is None:
            return program
        measured = None
        if session.denoiser is not None and session.denoiser.conditioning.possible:
            chosen, found = self._fitted(program, chosen, session)
            program.facts[REUSE] = chosen
            losses, plan = program.facts.get(REUSE_LOSSES), program.facts.get(ALLOCATION, {}).get("reuse")
            if losses is not None and plan is not None and not self.every:
                measured = found | {"measured": rounded(found["measured"] / losses.gain)}
                program.facts[ALLOCATION] |= {"reuse": plan | measured}
        else:
            program.note("keep-values: nothing can be drawn here, and values are extrapolated by the timestep")
        mark(program, chosen.node)
        provenance.note(program, provenance.PROGRAM, self.name(), reuse=chosen.to_json(), measured=measured)
        return program

    def _fitted(self, program: Program, schedule: Schedule, session: Session) -> tuple[Schedule, dict[str, float]]:
        """The schedule with fitted weights, and relative noise powers of images.

        ``measured`` is that of reuse in the float model, ``noise`` that of the plan's bits, ``noise_reusing`` that of
        both together.
        """
        assert session.denoiser is not None
        images = self.images or images_of(math.prod(session.denoiser.latent_shape))
        fitting, judging = (Drawing(session, len(schedule.timesteps), images, fold) for fold in range(2))
        marked, quantized = program.fork(), realize(program.fork(tensors=TensorStore(program.tensors)), session)
        for each in (marked, quantized):
            mark(each, schedule.node)
        drawn = MarkedDrawing(fitting, marked, schedule.kept)
        found = [drawn.fitted(schedule)[0]]
        if self.rounds:
            found.append(drawn.refined(found[0], self.rounds)[0])
        exact, of_bits = (MarkedDrawing(judging, each, schedule.kept) for each in (marked, quantized))
        errors = [error_of_each(of_bits.by(each), exact.whole) for each in found]
        best = int(np.argmin([geometric_mean(each) for each in errors]))
        return found[best], {
            "measured": relative_error(exact.by(found[best]), exact.whole),
            "noise": rounded(relative_error(of_bits.whole, exact.whole)),
            "noise_reusing": rounded(float(errors[best].mean())),
        }

    def demand(self, asked: Asked) -> Demand:
        if not asked.draws:
            return Demand()
        images = self.images or images_of(asked.sizes.latents)
        moved = SLOTS * self.steps // 2 * self.steps // 4  # half of the steps reuse; of the others half are behind one
        return asked.running(images, PART) * (self.rounds * (moved + self.steps) + 7 * self.steps)

    def _by_hand(self, program: Program, session: Session) -> Schedule:
        """The schedule of the options. UserError: no value stands for a part of the network worth keeping."""
        found = next(iter(cuts(program, 1, self.share)), None)
        if found is None:
            raise UserError(
                f"keep-values{{every}} finds no value that stands for {LEAST:.0%} to {self.share:.0%} of the network: "
                "leave the pass out"
            )
        assert session.denoiser is not None
        timesteps = [float(t) for t in session.denoiser.scheduler.timesteps(self.steps)]
        first = max(1, round(self.begin * self.steps))
        whole = [step < first or (step - first) % self.every == 0 for step in range(self.steps)]
        return Schedule(found.node, tuple(timesteps), sources_of(whole, timesteps))
