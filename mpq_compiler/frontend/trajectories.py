"""Records a denoiser's calls along sampling trajectories, for calibration and for training."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.sampling.loop import Call, Model, NotFinite, Progress, gaussian, sample
from mpq_compiler.support.errors import UserError


def record_calibration(
    denoiser: Denoiser,
    samples: int,
    steps: int,
    seed: int = 0,
    progress: Progress | None = None,
    *,
    conditions: Mapping[str, Any] | None = None,
    guidance: float | None = None,
    batch: int = 32,
    model: Model | None = None,
) -> dict[str, torch.Tensor]:
    """Records the denoiser's inputs along sampling trajectories.

    Args:
        denoiser: what is sampled.
        samples: the number of trajectories.
        steps: steps of each.
        seed: seeds the initial noise, the scheduler's noise and the order of the conditions.
        progress: is called after every model call with the calls done and their number in all.
        conditions: arrays [samples, ...] by input name. Without them the model gets `denoiser.given`, or its classes
            or prompts in random order, the null class or the empty prompt among them.
        guidance: classifier-free guidance, by default `denoiser.guidance`.
        batch: how many samples a model call holds at most.
        model: is called in the denoiser's place.

    Returns:
        The inputs by name, [samples * steps, ...], ordered by time (all samples of the first, noisiest step first),
        then by sample. With guidance the unconditional calls are recorded as well, [2 * samples * steps, ...], with
        the conditional calls of a step before its unconditional ones.

    Raises:
        UserError: conditions that cannot be made, or a model whose output is not finite.
    """
    calls = _recorded(denoiser, samples, steps, seed, progress, conditions, guidance, batch, model)
    return _inputs_of(denoiser, calls)


def recording(denoiser: Denoiser, samples: int, steps: int, seed: int) -> tuple[str, dict[str, np.ndarray]]:
    """What decides on the inputs that `record_calibration` records beside the model's outputs: a text and arrays."""
    conditioning = denoiser.conditioning
    arguments = conditioning.arguments(conditioning.mixed(samples, seed), samples, denoiser.guidance)
    arrays = {
        f"{kind} {name}": value
        for kind, given in arguments.items()
        if isinstance(given, Mapping)
        for name, value in given.items()
    }
    numbers = {kind: given for kind, given in arguments.items() if not isinstance(given, Mapping)}
    return json.dumps([samples, steps, seed, denoiser.sampling(), numbers], sort_keys=True), arrays


def deciding(
    denoiser: Denoiser, given: Mapping[str, torch.Tensor] | None, samples: int, steps: int, seed: int
) -> tuple[str, Mapping[str, torch.Tensor] | Mapping[str, np.ndarray]]:
    """What decides on the inputs of a run, for the digest of its results: those that are given, or else `recording`."""
    return ("", given) if given is not None else recording(denoiser, samples, steps, seed)


def record_teacher(
    denoiser: Denoiser, samples: int, steps: int, seed: int, model: Model | None = None, batch: int = 32
) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    """Records inputs as `record_calibration` does, and the model's outputs for them [N, C, H, W]."""
    calls = _recorded(denoiser, samples, steps, seed, None, None, None, batch, model)
    return _inputs_of(denoiser, calls), torch.from_numpy(np.concatenate([call.output for call in calls]))


def _recorded(
    denoiser: Denoiser,
    samples: int,
    steps: int,
    seed: int,
    progress: Progress | None,
    conditions: Mapping[str, Any] | None,
    guidance: float | None,
    batch: int,
    model: Model | None,
) -> list[Call]:
    """The calls of `record_calibration`, in its order."""
    if samples < 1:
        raise UserError(f"cannot calibrate on {samples} samples; give 1 or more")
    conditioning = denoiser.conditioning
    if conditions is None:
        chosen = conditioning.mixed(samples, seed)
    else:
        null = conditioning.varied(samples).null if conditioning.possible else None
        chosen = replace(conditioning.from_arrays(conditions, "the conditions given"), null=null)

    calls: list[Call] = []
    try:
        sample(
            model or denoiser,
            denoiser.scheduler,
            gaussian(samples, denoiser.latent_shape, seed),
            steps=steps,
            **conditioning.arguments(chosen, samples, denoiser.guidance if guidance is None else guidance),
            latent=denoiser.latent,
            seed=seed,
            batch=batch,
            observe=calls.append,
            progress=progress,
        )
    except NotFinite as error:
        raise UserError(
            f"{error}; a model of other times than those of {type(denoiser.scheduler).__name__} compiles by recorded "
            "calls (--calibration FILE)"
        ) from error
    calls.sort(key=lambda call: (call.step, call.guided, call.rows.start))
    return calls


def _inputs_of(denoiser: Denoiser, calls: list[Call]) -> dict[str, torch.Tensor]:
    return {
        name: torch.from_numpy(np.concatenate([call.inputs[name] for call in calls])).to(spec.dtype)
        for name, spec in denoiser.input_specs.items()
    }
