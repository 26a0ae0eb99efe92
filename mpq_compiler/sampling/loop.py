"""The sampling loop, in NumPy; the float model and every artifact share it.

Nothing here imports torch, so an artifact samples where only the runtime is installed. Equal model outputs give equal
images on every machine: noise comes from a seed, and updates are exact (`schedulers`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mpq_compiler.sampling.schedulers import Scheduler
from mpq_compiler.support.errors import UserError, nearest

Array = np.ndarray
Progress = Callable[[int, int], None]
"""A callback for (calls done, calls in all), after every model call."""

CODECS = ("identity", "pixel_unshuffle2")
"""The names of the ways from latents to an image; `decode` explains them."""


class Model(Protocol):
    """A denoiser as the loop calls it: inputs by name, arrays with the batch first; the output is an array."""

    def __call__(self, **inputs: Array) -> Any: ...


@dataclass(frozen=True)
class Call:
    """One call of the model within `sample`, as its `observe` sees it."""

    step: int
    """The index of the step, from 0."""
    timestep: float
    rows: slice
    """The samples that the batch holds."""
    guided: bool
    """Whether this is the unconditional call that guidance adds."""
    inputs: dict[str, Array]
    output: Array
    latents: Array
    """The latents before the step, which ``inputs`` may have scaled."""


def gaussian(count: int, shape: tuple[int, ...], seed: int | Sequence[int]) -> Array:
    """Initial noise, float32 [count, *shape]; a larger count with the same seed begins with the same samples."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((count, *shape), dtype=np.float32)


class NotFinite(UserError):
    """A model gives what is no number."""


def sample(
    model: Model,
    scheduler: Scheduler,
    noise: Array,
    conditions: Mapping[str, Array],
    steps: int,
    *,
    latent: str = "sample",
    seed: int = 0,
    guidance: float = 1.0,
    null_conditions: Mapping[str, Array] | None = None,
    batch: int | None = None,
    image: Array | None = None,
    first: int = 0,
    observe: Callable[[Call], None] | None = None,
    progress: Progress | None = None,
) -> Array:
    """Draws latents from `noise` in `steps` steps: float32, the shape of `noise`.

    Args:
        model: called with `latent`=x, timestep [B] (the scheduler's values and type) and the conditions; further output
            channels than x has (a predicted variance) are dropped.
        noise: [N, C, H, W], standard normal.
        conditions: by input name, arrays [N, ...].
        latent: name of the input for latents.
        seed: seeds the noise that stochastic schedulers add; this noise does not depend on `batch`.
        guidance: classifier-free guidance, u + guidance * (c - u); other than 1 needs `null_conditions` [N, ...].
        batch: how many samples a model call holds at most (all of them by default).
        image: latents [N, C, H, W] of pictures to go on from, which `noise` is laid on; None begins with noise alone.
        first: the step to begin with where there is an `image`, from 0.
        observe: is called after every model call.
        progress: is called after every model call with the calls done and their number in all.

    Raises:
        UserError: the model's output is not finite, or an argument does not fit.
    """
    count, guided = len(noise), guidance != 1.0
    if guided and null_conditions is None:
        raise UserError("guidance needs the inputs of the unconditional model; leave guidance at 1 for this model")
    for name, value in conditions.items():
        if len(value) != count:
            raise UserError(f"the condition '{name}' has {len(value)} rows for {count} samples")
    timesteps = scheduler.timesteps(steps)
    batch = min(batch or count, count) or 1
    total = -(-count // batch) * (steps - first) * (2 if guided else 1)
    done = 0

    def call(x: Array, step: int, rows: slice, extra: Mapping[str, Array], unconditional: bool) -> Array:
        nonlocal done
        timestep = np.full(len(x), timesteps[step])
        inputs = {
            latent: scheduler.scaled(x, step, steps),
            "timestep": timestep,
            **{key: np.asanyarray(value)[rows] for key, value in extra.items()},
        }
        output = np.asanyarray(model(**inputs), dtype=np.float32)
        if not np.isfinite(output).all():
            raise NotFinite(
                f"the model's output at timestep {timesteps[step]:g} is not finite; its weights, or the scales "
                "of the artifact, do not suit these inputs"
            )
        if observe:
            observe(Call(step, float(timesteps[step]), rows, unconditional, inputs, output, x))
        done += 1
        if progress:
            progress(done, total)
        if output.shape[1] < x.shape[1]:
            raise UserError(
                f"the model gives {output.shape[1]} channels for {x.shape[1]} that it takes: the others come from "
                "elsewhere, such as an image to be changed, and it cannot draw alone"
            )
        return output[:, : x.shape[1]]

    drawn: list[Array] = []  # observers keep the inputs of every call, so no array is reused
    for start in range(0, count, batch):
        rows = slice(start, min(start + batch, count))
        given = np.asarray(noise[rows], dtype=np.float32)
        x = scheduler.start(given, steps) if image is None else scheduler.noised(image[rows], given, first, steps)
        for step in range(first, steps):
            output = call(x, step, rows, conditions, False)
            if guided:
                assert null_conditions is not None
                base = call(x, step, rows, null_conditions, True)
                output = base + np.float32(guidance) * (output - base)
            fresh = gaussian(count, noise.shape[1:], (seed, step + 1))[rows] if scheduler.stochastic else None
            x = scheduler.step(output, step, steps, x, fresh)
        drawn.append(x)
    return np.concatenate(drawn) if drawn else np.empty(noise.shape, np.float32)


def decode(codec: str, latents: Array) -> Array:
    """Decodes latents [N, C, h, w] to images in [-1, 1], float32 [N, channels, height, width].

    `pixel_unshuffle2` undoes the storing of a pixel's 2x2 neighbours as channels: [N, 4c, h, w] -> [N, c, 2h, 2w],
    without loss. `identity` is for denoisers of pixels; for those of a VAE's latents it shows the latents themselves.
    """
    latents = np.asarray(latents, dtype=np.float32)
    if codec == "pixel_unshuffle2":
        n, channels, height, width = latents.shape
        blocks = latents.reshape(n, channels // 4, 2, 2, height, width)
        latents = blocks.transpose(0, 1, 4, 2, 5, 3).reshape(n, channels // 4, 2 * height, 2 * width)
    elif codec != "identity":
        raise UserError(f"the codec {codec!r} is not known; {nearest(codec, CODECS)}")
    images: Array = np.clip(latents, -1, 1)
    return images
