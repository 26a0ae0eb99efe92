"""Painters draw images for comparison: artifacts and float models, from the same noise and conditions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast

import numpy as np

from mpq_compiler.artifact.manifest import Cost, Manifest, cost
from mpq_compiler.artifact.signature import Key
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.sampling import text_encoder
from mpq_compiler.sampling.conditioning import TEXT, Conditioning, Conditions
from mpq_compiler.sampling.loop import Call
from mpq_compiler.sampling.schedulers import Scheduler
from mpq_compiler.sampling.text_encoder import TextEncoder
from mpq_compiler.support.errors import UserError

Array = np.ndarray
BATCH = 50
"""The number of images drawn together; an artifact splits the batch into its specializations."""


@dataclass
class Painter:
    """A denoiser that can draw: everything that `loop.sample` needs of a model or an artifact."""

    name: str
    call: Callable[..., Any]
    scheduler: Scheduler
    latent: str
    shape: tuple[int, int, int]
    codec: str
    conditioning: Conditioning
    unseen: int = 1
    """A seed of noise on which it was not calibrated."""
    steps: int = 10
    """The usual number of sampling steps: those for which an artifact decided what steps reuse."""
    cost: Cost | None = None
    """Bytes, memory and bit operations of an artifact; None of a float model."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """The names of its inputs, latents and timestep first."""
        return (self.latent, "timestep", *self.conditioning.inputs)

    @property
    def undecoded(self) -> str | None:
        """A sentence where what is drawn are latents without a decoder; None: it is images."""
        if self.codec != "identity" or self.shape[0] in (1, 3):
            return None
        return (
            f"'{self.name}' draws latents of {self.shape[0]} channels and has no decoder: pictures show the first "
            "three as colors, metrics of images are those of latents; its pipeline, with the artifact in the model's "
            "place, draws images (docs/calibration.md)"
        )

    def draw(
        self,
        conditions: Conditions,
        images: int,
        steps: int,
        seed: int,
        guidance: float | None = None,
        observe: Callable[[Call], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Array:
        """Draws latents f32 [images, C, H, W]; a seed gives every painter of a shape the same noise.

        Args:
            conditions: one row for each image.
            images: the number of images.
            steps: sampling steps.
            seed: of the noise.
            guidance: classifier-free guidance; None takes the model's usual one.
            observe: is called after every model call.
            progress: is called with (done, total) after every model call.

        Raises:
            UserError: a number out of range, guidance that the model does not know, or an output that is not finite.
        """
        check(images, steps, seed)
        return sampling.sample(
            self.call,
            self.scheduler,
            sampling.gaussian(images, self.shape, seed),
            steps=steps,
            **self.conditioning.arguments(conditions, images, guidance),
            latent=self.latent,
            seed=seed,
            batch=BATCH,
            observe=observe,
            progress=progress,
        )

    def decode(self, latents: Array) -> Array:
        """Decodes latents to images in [-1, 1], f32 [N, channels, height, width]."""
        return sampling.decode(self.codec, latents)


def from_artifact(path: str | Path, threads: int | None = None, key: Key | None = None) -> Painter:
    """Loads an artifact as a painter; ``key`` is that of `load`.

    UserError: it is not sound, or its manifest does not say how it is sampled.
    """
    from mpq_compiler.runtime import compiled_denoiser

    compiled = compiled_denoiser.load(path, threads, key=key)
    manifest = compiled.manifest
    about = manifest.get("sampling")
    if about is None:
        raise UserError(f"the artifact '{path}' does not say how it is sampled; run it with `mpqc run`")
    return Painter(
        name=manifest["name"],
        call=compiled.steps(),
        scheduler=Scheduler.from_config(about["scheduler"]),
        latent=about["latent"],
        shape=tuple(about["shape"]),
        codec=about["codec"],
        conditioning=Conditioning.of_artifact(
            manifest,
            TextEncoder.load(about["text"], compiled.artifact.file(text_encoder.FILE)) if about.get("text") else None,
        ),
        unseen=manifest["calibration"]["seed"] + 1,
        cost=cost(cast(Manifest, manifest)),
        **({"steps": len(manifest["reuse"]["timesteps"])} if "reuse" in manifest else {}),
    )


def float_model(model: str | Path, painter: Painter) -> Any:
    """Loads the float model (a `Denoiser`) of an artifact's painter, for the sizes that the artifact takes."""
    from mpq_compiler.frontend import denoiser

    text = painter.conditioning.inputs.get(TEXT)
    return denoiser.load(model, size=painter.shape[1:], tokens=text[0][0] if text else None)


def with_conditions(painter: Painter, path: str | Path | None) -> Painter:
    """Gives a painter the conditions of a file to draw in turn; without a file it stays as it is."""
    if path is None:
        return painter
    given = painter.conditioning.load(path)
    return replace(painter, conditioning=replace(painter.conditioning, given=given))


def from_denoiser(loaded: Any) -> Painter:
    """The painter of a float model."""
    return Painter(
        name=loaded.name,
        call=lambda **inputs: loaded(**inputs).numpy(),
        scheduler=loaded.scheduler,
        latent=loaded.latent,
        shape=loaded.latent_shape,
        codec=loaded.codec,
        conditioning=loaded.conditioning,
    )


def sampled_like(reference: Painter, painter: Painter) -> Painter:
    """Gives the reference the artifact's scheduler. UserError: their latents or conditions differ."""
    require_same_task(painter, reference)
    return replace(reference, scheduler=painter.scheduler)


def require_same_task(painter: Painter, reference: Painter) -> None:
    """Raises a UserError where two painters do not take the same latents and conditions."""
    for what in ("shape", "latent", "inputs", "codec"):
        ours, theirs = getattr(painter, what), getattr(reference, what)
        if ours != theirs:
            both = f"'{painter.name}' and '{reference.name}'"
            raise UserError(f"{both} cannot be compared: {what} {ours} against {theirs}")


def check(images: int, steps: int, seed: int = 0) -> None:
    """Raises a UserError where a number is out of range; call it before long work starts."""
    if images < 1 or steps < 1:
        raise UserError(f"cannot draw {images} images in {steps} steps; give 1 or more of both")
    if seed < 0:
        raise UserError(f"cannot draw noise of seed {seed}; give 0 or more")
