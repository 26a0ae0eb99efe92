"""Drawing images with a float model or an artifact, and judging one by the other.

An artifact draws from its manifest alone: nothing here imports torch unless a float model is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import metrics, prompts, sampler
from mpq_compiler.conditioning import TEXT, Conditioning, Conditions
from mpq_compiler.errors import UserError
from mpq_compiler.prompts import TextEncoder
from mpq_compiler.sampler import Call
from mpq_compiler.schedulers import Scheduler

Array = np.ndarray
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
    conditioning: Conditioning
    unseen: int = 1
    """A seed of noise that it was not calibrated on."""

    @property
    def inputs(self) -> tuple[str, ...]:
        return (self.latent, "timestep", *self.conditioning.inputs)

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
        """Latents f32 [images, C, H, W] from the noise of ``seed``: the same noise for every painter."""
        check(images, steps, seed)
        return sampler.sample(
            self.call,
            self.scheduler,
            sampler.gaussian(images, self.shape, seed),
            steps=steps,
            **self.conditioning.arguments(conditions, images, guidance),
            latent=self.latent,
            seed=seed,
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
        conditioning=Conditioning(
            manifest["name"],
            {
                value["name"]: (tuple(value["shape"][1:]), value["dtype"])
                for value in manifest["functions"][0]["inputs"]
                if value["name"] not in (about["latent"], "timestep")
            },
            about.get("fixed", {}),
            about["classes"],
            about["null_class"],
            TextEncoder.load(about["text"], compiled.artifact.file(prompts.FILE)) if about.get("text") else None,
        ),
        unseen=manifest["calibration"]["seed"] + 1,
    )


def float_model(model: str | Path, painter: Painter) -> Any:
    """The float model (a `Denoiser`) of an artifact's painter, loaded for the sizes that the artifact takes."""
    from mpq_compiler import denoiser

    text = painter.conditioning.inputs.get(TEXT)
    return denoiser.load(model, size=painter.shape[1:], tokens=text[0][0] if text else None)


def with_conditions(painter: Painter, path: str | Path | None) -> Painter:
    """The painter that draws the conditions of a file in turn, if there is one."""
    if path is None:
        return painter
    given = painter.conditioning.load(path)
    return replace(painter, conditioning=replace(painter.conditioning, given=given))


def from_denoiser(loaded: Any) -> Painter:
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
    """The reference with the artifact's sampler: the same steps from the same noise. UserError: as below."""
    require_same_task(painter, reference)
    return replace(reference, scheduler=painter.scheduler)


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
    guidance: float | None = None,
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

    conditions = reference.conditioning.varied(images)
    drawn_reference = reference.draw(conditions, images, steps, seed, guidance, teacher_force, progress)
    drawn = painter.draw(conditions, images, steps, seed, guidance)
    pictures_reference, pictures = reference.decode(drawn_reference), painter.decode(drawn)
    extractor, reason = metrics.features_for(features, pictures.shape[1:])
    return {
        "sqnr_db": metrics.sqnr_db(np.concatenate(expected), np.concatenate(got)),
        "trajectory_sqnr_db": metrics.trajectory_sqnr_db(drawn_reference, drawn),
        **metrics.compare_images(pictures_reference, pictures, extractor, reason, conditions.labels),
        "steps": steps,
        "seed": seed,
        "guidance": reference.conditioning.usual_guidance() if guidance is None else guidance,
    }


def _require_no_effect(path: str, options: Mapping[str, Any]) -> None:
    """UserError where a compiled model is to be evaluated with options of a compilation."""
    from mpq_compiler.compiler import Options

    used = {"guidance", "conditions", "threads", "jobs", "cache"}
    idle = [
        f"--{name.replace('_', '-')}"
        for name, value in options.items()
        if name not in used and value != getattr(Options, name)
    ]
    if idle:
        raise UserError(
            f"'{path}' is compiled already, and {', '.join(idle)} would change nothing: leave it out, or name the model"
        )


def check(images: int, steps: int, seed: int = 0) -> None:
    """UserError for what cannot be drawn; long work should ask before it starts."""
    if images < 1 or steps < 1:
        raise UserError(f"cannot draw {images} images in {steps} steps; give 1 or more of both")
    if seed < 0:
        raise UserError(f"cannot draw noise of seed {seed}; give 0 or more")


def _require_drawing(model: str, steps: int, options: dict[str, Any]) -> None:
    """UserError where the model cannot draw in so many steps; it is not held while its artifact is made."""
    from mpq_compiler.compiler import Options, load_denoiser

    loaded = load_denoiser(model, Options(**options))
    loaded.scheduler.timesteps(steps)
    loaded.conditioning.arguments(loaded.conditioning.varied(1), 1, options.get("guidance"))


def evaluate_path(
    path: str,
    against: str | None,
    images: int,
    steps: int,
    seed: int | None,
    progress: Any,
    options: dict[str, Any],
) -> dict[str, Any]:
    """`evaluate` of an artifact, or of a model that is compiled for this machine first, against its float model.

    seed: of the noise; None: one that calibration did not draw from (`Painter.unseen`).
    """
    import tempfile

    from mpq_compiler import artifact, checkpoint

    check(images, steps, seed or 0)
    with tempfile.TemporaryDirectory() as scratch:
        target = Path(path)
        if not (target / artifact.MANIFEST).exists() and target.suffix != ".zip":
            from mpq_compiler.compiler import compile

            against = against or path
            target = Path(scratch) / "compiled.mpq"
            _require_drawing(path, steps, options)  # before it is compiled
            compile(path, target, progress, **options)
        else:
            _require_no_effect(path, options)
        painter = with_conditions(from_artifact(target, options.get("threads")), options.get("conditions"))
        if against is None and painter.name not in checkpoint.bundled():
            raise UserError(f"'{painter.name}' is no bundled model: name the float model with --against")
        loaded = float_model(against or painter.name, painter)
        reference = with_conditions(sampled_like(from_denoiser(loaded), painter), options.get("conditions"))
        guidance = options.get("guidance")
        guided = "null_conditions" in painter.conditioning.arguments(painter.conditioning.varied(1), 1, guidance)
        seed = painter.unseen if seed is None else seed
        with progress("evaluating", -(-images // BATCH) * steps * (1 + guided)) as advance:
            return evaluate(
                *(painter, reference, images, steps, seed, loaded.features, guidance), lambda done, total: advance(1)
            )
