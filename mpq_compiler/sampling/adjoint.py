"""The way back through a sampling loop: how its last latents change with the model's outputs.

Nothing here imports torch. A step of every scheduler is a function of each number of the latents and of the output by
itself, so central differences have all of its slopes in four evaluations, whichever scheduler it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

from mpq_compiler.sampling.loop import Call
from mpq_compiler.sampling.schedulers import Scheduler

Array = np.ndarray

DIFFERENCE = 1e-4
"""Half of the difference by which slopes are measured, in float64: steps are linear but for where images are clipped.
"""


def backward(
    scheduler: Scheduler,
    calls: Sequence[Call],
    gradient: Array,
    guidance: float,
    pull: Callable[[Call, Array], Array],
) -> None:
    """Carries a gradient by the latents in which a trajectory ends back through its steps, the last one first.

    Args:
        scheduler: of the trajectory.
        calls: all of them, as `loop.sample` has its ``observe`` see them, each with all rows.
        gradient: by the last latents, [N, C, H, W].
        guidance: classifier-free guidance.
        pull: is given a call and the gradient by its output, float32 of its shape, and returns the gradient by the
            latents that the model was given, [N, C, H, W].
    """
    steps = calls[-1].step + 1
    gradient = gradient.astype(np.float64)
    for step in reversed(range(steps)):
        own = [call for call in calls if call.step == step]
        x, channels = own[0].latents.astype(np.float64), own[0].latents.shape[1]
        shares = [1.0] if len(own) == 1 else [1 - guidance if call.guided else guidance for call in own]
        output = np.zeros_like(x)
        for share, call in zip(shares, own, strict=True):
            output += share * call.output[:, :channels].astype(np.float64)
        by_output, by_x, scale = _slopes(scheduler, output, step, steps, x)
        by_output, gradient = gradient * by_output, gradient * by_x
        for share, call in zip(shares, own, strict=True):
            arriving = np.zeros(call.output.shape, np.float32)
            arriving[:, :channels] = share * by_output
            gradient += scale * pull(call, arriving)


def _slopes(scheduler: Scheduler, output: Array, step: int, steps: int, x: Array) -> tuple[Array, Array, Array]:
    """The slopes of a step by the output and by the latents, and those of scaling these; float64 [N, C, H, W]."""
    fresh = np.zeros_like(x)  # what a step adds has no part in its slopes

    def central(f: Callable[[float], Array]) -> Array:
        slope: Array = (f(DIFFERENCE) - f(-DIFFERENCE)) / (2 * DIFFERENCE)
        return slope

    return (
        central(lambda change: scheduler.step(output + change, step, steps, x, fresh)),
        central(lambda change: scheduler.step(output, step, steps, x + change, fresh)),
        central(lambda change: scheduler.scaled(x + change, step, steps)),
    )
