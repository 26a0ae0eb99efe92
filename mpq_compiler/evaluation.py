"""Drawing images with a float model or an artifact, and judging one by the other.

An artifact draws from its manifest alone: nothing here imports torch unless a float model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import metrics, sampler
from mpq_compiler.errors import UserError
from mpq_compiler.sampler import Call, Scheduler

Array = np.ndarray
_PLACES = {"sample": "unet", "hidden_states": "transformer"}
"""The attribute of diffusers' pipelines that holds a denoiser, by the name of its latents."""
BATCH = 50
"""Images drawn together; an artifact splits the batch into its specializations."""


@dataclass
class Painter:
    """A denoiser that can draw: what `sampler.sample` needs of a model or an artifact."""

    name: str
    call: Callable[..., Any]
    scheduler: Scheduler
    latent: str
    shape: tuple[int, int, int]
    codec: str
    inputs: tuple[str, ...]
    classes: int | None
    """How many classes can be asked for, the null class not among them."""

    def conditions(self, images: int, label: int | None = None) -> dict[str, Array]:
        """Class labels of ``images`` pictures: one class, or all in turn; {} for an unconditional model."""
        extra = [n for n in self.inputs if n not in (self.latent, "timestep")]
        if not extra:
            if label is not None:
                raise UserError(f"'{self.name}' has no classes; leave --class out")
            return {}
        if extra != ["class_labels"]:
            raise UserError(
                f"'{self.name}' is conditioned on {', '.join(extra)}, and cannot be drawn from without its encoders: "
                f"put it into its diffusers pipeline, pipeline.{_PLACES.get(self.latent, 'unet')} = "
                "mpq_compiler.load(ARTIFACT)"
            )
        classes = self.classes or 1
        if label is not None and not 0 <= label < classes:
            raise UserError(f"'{self.name}' has the classes 0 to {classes - 1}; --class {label} is none of them")
        labels = np.arange(images) % classes if label is None else np.full(images, label)
        return {"class_labels": labels.astype(np.int64)}

    def draw(
        self,
        images: int,
        steps: int,
        seed: int,
        label: int | None = None,
        observe: Callable[[Call], None] | None = None,
        progress: Callable[[int, int], None] | None = None,
    ) -> Array:
        """Latents f32 [images, C, H, W] from the noise of ``seed``: the same noise for every painter."""
        if images < 1 or steps < 1:
            raise UserError(f"cannot draw {images} images in {steps} steps; give 1 or more of both")
        return sampler.sample(
            self.call,
            self.scheduler,
            sampler.gaussian(images, self.shape, seed),
            self.conditions(images, label),
            steps,
            latent=self.latent,
            batch=BATCH,
            observe=observe,
            progress=progress,
        )

    def decode(self, latents: Array) -> Array:
        return sampler.decode(self.codec, latents)


def from_artifact(path: str | Path, threads: int | None = None) -> Painter:
    """The painter of a compiled denoiser."""
    from mpq_compiler import runtime

    compiled = runtime.load(path, threads)
    manifest: Mapping[str, Any] = compiled.manifest
    about = manifest.get("sampling")
    if about is None:
        raise UserError(f"the artifact '{path}' does not say how it is sampled; run it with `mpqc run`")
    return Painter(
        name=manifest["name"],
        call=lambda **inputs: compiled.run(inputs),
        scheduler=Scheduler.from_config(about["scheduler"]),
        latent=about["latent"],
        shape=tuple(about["shape"]),
        codec=about["codec"],
        inputs=tuple(compiled.input_names),
        classes=about["classes"],
    )


def from_model(model: str | Path) -> Painter:
    """The painter of a float model, by bundled name or folder."""
    from mpq_compiler import denoiser

    return from_denoiser(denoiser.load(model))


def from_denoiser(loaded: Any) -> Painter:
    return Painter(
        name=loaded.name,
        call=lambda **inputs: loaded(**inputs).numpy(),
        scheduler=loaded.scheduler,
        latent=loaded.latent,
        shape=loaded.latent_shape,
        codec=loaded.codec,
        inputs=tuple(loaded.input_specs),
        classes=loaded.classes,
    )


def require_same_task(painter: Painter, reference: Painter) -> None:
    """UserError where two painters do not take the same latents and conditions."""
    for what in ("shape", "latent", "inputs", "codec"):
        ours, theirs = getattr(painter, what), getattr(reference, what)
        if ours != theirs:
            both = f"'{painter.name}' and '{reference.name}'"
            raise UserError(f"{both} cannot be compared: {what} {ours} against {theirs}")


def evaluate(
    painter: Painter,
    reference: Painter,
    images: int,
    steps: int,
    seed: int,
    features: Path | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> dict[str, Any]:
    """All metrics of ``painter`` against ``reference`` on the same noise (docs/metrics.md).

    `sqnr_db` is teacher-forced: the painter is asked for every call of the reference's trajectories.
    """
    require_same_task(painter, reference)
    expected: list[Array] = []
    got: list[Array] = []

    def teacher_force(call: Call) -> None:
        expected.append(call.output)
        got.append(np.asarray(painter.call(**call.inputs), dtype=np.float32))

    drawn_reference = reference.draw(images, steps, seed, observe=teacher_force, progress=progress)
    drawn = painter.draw(images, steps, seed)
    pictures_reference, pictures = reference.decode(drawn_reference), painter.decode(drawn)
    extractor, reason = metrics.features_for(features, pictures.shape[1:])
    labels = painter.conditions(images).get("class_labels")
    return {
        "sqnr_db": metrics.sqnr_db(np.concatenate(expected), np.concatenate(got)),
        "trajectory_sqnr_db": metrics.trajectory_sqnr_db(drawn_reference, drawn),
        **metrics.compare_images(pictures_reference, pictures, extractor, reason, labels),
        "steps": steps,
        "seed": seed,
    }


def evaluate_path(
    path: str,
    against: str | None,
    images: int,
    steps: int,
    seed: int,
    progress: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`evaluate` of an artifact, or of a model that is compiled for this machine first, against its float model."""
    import tempfile

    from mpq_compiler import artifact, checkpoint, denoiser

    with tempfile.TemporaryDirectory() as scratch:
        target = Path(path)
        if not (target / artifact.MANIFEST).exists() and target.suffix != ".zip":
            from mpq_compiler.compiler import compile

            against = against or path
            target = Path(scratch) / "compiled.mpq"
            compile(path, target, progress, **options)
        painter = from_artifact(target)
        if against is None and painter.name not in checkpoint.bundled():
            raise UserError(f"'{painter.name}' is no bundled model: name the float model with --against")
        loaded = denoiser.load(against or painter.name)
        with progress("evaluating", -(-images // BATCH) * steps) as advance:
            return evaluate(
                painter, from_denoiser(loaded), images, steps, seed, loaded.features, lambda done, total: advance(1)
            )
