"""The error of whole images: what is drawn from a noise in all steps of the sampler, against the float model's image.

Errors of single calls count by their power, as if those of one image's steps had nothing to do with each other. What
training leaves of them are systematic ones, which add up from step to step or cancel, and that only a whole trajectory
shows. Gradients go back through the sampler's steps, each of which is computed once more on the way, so that memory
holds one call's activations, however many steps there are (as AccuQuant has it for a few steps, arXiv 2510.20348).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.analysis.trajectory_error import TrajectoryError, geometric_mean
from mpq_compiler.ir import segments
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.adjoint import backward
from mpq_compiler.sampling.loop import Call, NotFinite
from mpq_compiler.support import cache
from mpq_compiler.training.data import BATCH
from mpq_compiler.training.objective import HELD, VALUES, Objective
from mpq_compiler.training.state import State
from mpq_compiler.training.student import Student, differentiable, leaves, tried
from mpq_compiler.training.variables import Variable

ROWS = 16
"""Images of a step of training."""
GROUPS = 32
"""The most groups of `ROWS` images; they come back in turn."""
PART = 8
"""Images that a thread runs at a time, at most."""
PASSES = 4
"""Forward passes that take as long as a call does here: one on the way forth, and three with its gradients."""


@dataclass
class Images(Objective):
    """The relative squared errors of images, by the mean of their logarithms: each counts as it does in dB.

    The error at the start is added to each: of images that are nearer to the float model's the error counts as it
    is, and one that takes another way altogether does not outweigh the others.
    """

    program: Program
    """Fake-quantized, with settled weights."""
    groups: Sequence[TrajectoryError]
    """The images to train on, a group in each step."""
    held_out: TrajectoryError
    session: Session

    def __post_init__(self) -> None:
        each = VALUES * sum(segments.value_bytes(self.program, 1).values())
        self.rows = min(PART, max(1, HELD // each))
        self.usual = 0.0

    def go_on(self, state: State) -> None:
        self.usual = state.before

    def error(self, variables: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> float:
        try:
            return self.held_out.typical_noise(tried(self.program, variables, thetas))
        except NotFinite:
            return math.inf

    def gradients(self, step: int, made: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """The loss is the geometric mean of the errors of a group; the gradients are those of its logarithm.

        Of a program that does not draw any more it is infinite, and there are no gradients.
        """
        images = self.groups[(step - 1) % len(self.groups)]
        values = {name: value.detach() for name, value in made.items()}

        def forth(inputs: Mapping[str, Tensor]) -> Tensor:
            with torch.no_grad():
                return Student(self.program, values).run(inputs)

        def model(**inputs: np.ndarray) -> np.ndarray:
            return torch.cat(self.session.map(forth, images.parts(inputs, self.rows))).numpy()

        calls: list[Call] = []
        try:
            drawn = images.draw(model, calls.append)
        except NotFinite:
            return math.inf, {}
        errors = images.relative(drawn) + self.usual
        slopes = 2 / (errors * images.power * images.count)
        gradient = (drawn.astype(np.float64) - images.reference) * slopes.reshape(-1, *[1] * (drawn.ndim - 1))
        sums: dict[str, Tensor] = {}

        def back(part: tuple[dict[str, Tensor], Tensor]) -> tuple[Sequence[Tensor | None], Tensor]:
            inputs, arriving = part
            inner = leaves(made)
            latents = inputs[images.denoiser.latent].requires_grad_()
            with torch.enable_grad():
                output = Student(self.program, inner).run(inputs)
                *found, own = torch.autograd.grad(
                    output, [*differentiable(inner).values(), latents], arriving.to(output.dtype), allow_unused=True
                )
            return found, torch.zeros_like(latents) if own is None else own

        def pull(call: Call, arriving: np.ndarray) -> np.ndarray:
            pieces = torch.from_numpy(arriving).split(self.rows)
            parts = self.session.map(back, zip(images.parts(call.inputs, self.rows), pieces, strict=True))
            for found, _ in parts:
                for name, gradient in zip(differentiable(made), found, strict=True):
                    if gradient is not None:
                        sums[name] = sums[name] + gradient if name in sums else gradient
            return torch.cat([own for _, own in parts]).numpy()

        backward(images.denoiser.scheduler, calls, gradient, images.guidance, pull)
        return geometric_mean(errors), {name: sums[name] for name in made if name in sums}


def drawn(session: Session, groups: int) -> list[TrajectoryError]:
    """Draws groups of the float model's images to train on, other ones than the held-out ones."""
    found: list[TrajectoryError] = []
    with session.track("teaching images", groups) as advance:
        for number in range(groups):
            images = TrajectoryError.drawn(session, ROWS, 1 + number)
            assert images is not None
            found.append(images)
            advance(1)
    return found


def affordable(updates: int, calls: int, judged: int) -> tuple[int, int]:
    """The numbers of steps and of groups of images that take as long as so many updates by single calls.

    Args:
        updates: of batches of single calls (`data.BATCH`), three passes each.
        calls: of the model for an image.
        judged: held-out images, over all times that they are drawn.
    """
    passes = 3 * BATCH * updates // calls - judged
    steps = passes // ((PASSES + 1) * ROWS)  # each with images of its own, which the float model draws once
    if steps > GROUPS:
        steps = (passes - GROUPS * ROWS) // (PASSES * ROWS)
    return max(0, steps), min(max(0, steps), GROUPS)


def digest(images: Sequence[TrajectoryError]) -> str:
    """A digest of images, for a cache key: what the float model draws tells noise and conditions apart."""
    first = images[0]
    told = f"{first.denoiser.scheduler} {first.steps} {first.guidance}"
    return cache.digest(told, {str(number): i.reference for number, i in enumerate(images)})
