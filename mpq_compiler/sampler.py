"""The deterministic DDIM sampling loop, in numpy; the float model and every artifact share it.

No torch here, so an artifact samples where only the runtime is installed. All arithmetic on images is one
float32 operation at a time (no fused multiply-add), so equal model outputs give equal images on every
machine.

Source of the update: Song, Meng and Ermon, "Denoising Diffusion Implicit Models" (arXiv 2010.02502), eq. 12
with eta = 0; schedules, spacing and clipping agree with diffusers' DDIMScheduler (tested).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np

from mpq_compiler.errors import UserError, nearest

Array = np.ndarray
Progress = Callable[[int, int], None]
"""Called with (done, total) after every model call."""

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
CODECS = ("identity", "pixel_unshuffle2")

# Schedulers whose own default is to clip the predicted image to [-1, 1]; the others never do.
_CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")


class Model(Protocol):
    """What the loop draws with: the inputs by name, arrays with the batch first; the output as an array."""

    def __call__(self, **inputs: Array) -> Any: ...


@dataclass(frozen=True)
class Scheduler:
    """The noise schedule and DDIM's update; the fields and their defaults are those of diffusers'
    DDIMScheduler."""

    num_train_timesteps: int = 1000
    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True
    steps_offset: int = 0
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        for field, known in (
            ("prediction_type", PREDICTIONS),
            ("timestep_spacing", SPACINGS),
            ("beta_schedule", SCHEDULES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UserError(
                    f"the scheduler's {field} {value!r} is not known; {nearest(str(value), known)}"
                )
        if self.num_train_timesteps < 1:
            raise UserError(
                f"the scheduler's num_train_timesteps is {self.num_train_timesteps}; it must be 1 or more"
            )
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "the scheduler combines prediction_type 'epsilon' with rescale_betas_zero_snr, under which "
                "the first step would divide by zero; use 'v_prediction' or leave the rescaling out"
            )

    @classmethod
    def from_config(cls, config: Mapping[str, Any]) -> Scheduler:
        """The schedule that a diffusers scheduler_config.json describes, for sampling with DDIM.

        A configuration of another ancestral or ODE solver (PNDM, Euler, DPM-Solver, ...) keeps its noise
        schedule, prediction type and spacing. Raises UserError for what DDIM cannot express: flow matching,
        thresholding.
        """
        name = str(config.get("_class_name", "DDIMScheduler"))
        if "FlowMatch" in name:
            raise UserError(
                f"the scheduler is a {name}, and flow matching is not supported; name another scheduler file"
            )
        if config.get("thresholding"):
            raise UserError(
                "the scheduler uses dynamic thresholding, which is not supported; set thresholding to false"
            )
        known = {field.name for field in dataclasses.fields(cls)}
        values = {key: value for key, value in config.items() if key in known and value is not None}
        values.setdefault("clip_sample", name in _CLIPPING)
        if betas := values.get("trained_betas"):
            values["trained_betas"] = tuple(float(beta) for beta in betas)
        try:
            return cls(**values)
        except TypeError as error:
            raise UserError(f"the scheduler's configuration is malformed: {error}") from error

    def to_config(self) -> dict[str, Any]:
        """The same as a scheduler_config.json that diffusers and `from_config` read."""
        return {"_class_name": "DDIMScheduler", **dataclasses.asdict(self)}

    @cached_property
    def alphas_cumprod(self) -> Array:
        """Share of signal power left at every training step: float64 [num_train_timesteps]."""
        count = self.num_train_timesteps
        if self.trained_betas is not None:
            betas = np.array(self.trained_betas, np.float64)
        elif self.beta_schedule == "linear":
            betas = np.linspace(self.beta_start, self.beta_end, count)
        elif self.beta_schedule == "scaled_linear":
            betas = np.linspace(self.beta_start**0.5, self.beta_end**0.5, count) ** 2
        else:
            bars = [math.cos((i / count + 0.008) / 1.008 * math.pi / 2) ** 2 for i in range(count + 1)]
            betas = np.array([min(1 - bars[i + 1] / bars[i], 0.999) for i in range(count)])
        bar = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            # Lin et al., "Common Diffusion Noise Schedules and Sample Steps are Flawed" (arXiv 2305.08891),
            # alg. 1.
            root = np.sqrt(bar)
            bar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return bar

    def timesteps(self, steps: int) -> Array:
        """The timestep values of a trajectory of `steps` steps, descending: int64 [steps]."""
        count = self.num_train_timesteps
        if not 1 <= steps <= count:
            raise UserError(f"cannot sample in {steps} steps; choose from 1 to {count}")
        if self.timestep_spacing == "linspace":
            values: Array = np.linspace(0, count - 1, steps).round()[::-1]
        elif self.timestep_spacing == "leading":
            values = (np.arange(steps) * (count // steps))[::-1] + self.steps_offset
        else:
            # The float range can yield one value too many; a trajectory has exactly `steps`.
            values = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
        return np.clip(values, 0, count - 1).astype(np.int64)

    def step(self, output: Array, timestep: int, steps: int, x: Array) -> Array:
        """The latents one step on: float32 like `x`, from the model's `output` at `timestep` of `steps`
        steps."""
        before = timestep - self.num_train_timesteps // steps
        a = self.alphas_cumprod[timestep]
        final = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0]
        a_before = self.alphas_cumprod[before] if before >= 0 else final
        signal, noise = np.float32(math.sqrt(a)), np.float32(math.sqrt(1 - a))
        if self.prediction_type == "epsilon":
            image, epsilon = (x - noise * output) / signal, output
        elif self.prediction_type == "sample":
            image, epsilon = output, (x - signal * output) / noise
        else:
            image, epsilon = signal * x - noise * output, signal * output + noise * x
        if self.clip_sample:
            limit = np.float32(self.clip_sample_range)
            image = np.clip(image, -limit, limit)
        return np.float32(math.sqrt(a_before)) * image + np.float32(math.sqrt(1 - a_before)) * epsilon


@dataclass(frozen=True)
class Call:
    """One call of the model within `sample`, handed to its `observe`."""

    step: int
    """Index of the step, 0 first."""
    timestep: int
    rows: slice
    """Which samples the batch holds."""
    guided: bool
    """True for the unconditional call that guidance adds."""
    inputs: dict[str, Array]
    output: Array


def gaussian(count: int, shape: tuple[int, ...], seed: int) -> Array:
    """Initial noise, float32 [count, *shape]: the first n of a larger count with the same seed are the
    same."""
    return np.random.Generator(np.random.PCG64(seed)).standard_normal((count, *shape), dtype=np.float32)


def sample(
    model: Model,
    scheduler: Scheduler,
    noise: Array,
    conditions: Mapping[str, Array],
    steps: int,
    *,
    latent: str = "sample",
    guidance: float = 1.0,
    null_conditions: Mapping[str, Array] | None = None,
    batch: int | None = None,
    observe: Callable[[Call], None] | None = None,
    progress: Progress | None = None,
) -> Array:
    """Draws latents from `noise` in `steps` DDIM steps: float32, the shape of `noise`.

    Args:
        model: called with `latent`=x, timestep=int64[B] and the conditions; further output channels than x
            has
            (a predicted variance) are dropped.
        noise: [N, C, H, W], standard normal.
        conditions: by input name, arrays [N, ...].
        guidance: classifier-free guidance, u + guidance * (c - u); other than 1 needs `null_conditions` [N,
        ...]. batch: how many samples a model call holds at most (all of them by default).
        observe: sees every model call.

    Raises:
        UserError: the model's output is not finite, or an argument does not fit.
    """
    count, guided = len(noise), guidance != 1.0
    if guided and null_conditions is None:
        raise UserError(
            "guidance needs the inputs of the unconditional model; leave guidance at 1 for this model"
        )
    for name, value in conditions.items():
        if len(value) != count:
            raise UserError(f"the condition '{name}' has {len(value)} rows for {count} samples")
    timesteps = scheduler.timesteps(steps)
    batch = min(batch or count, count) or 1
    total = -(-count // batch) * steps * (2 if guided else 1)
    done = 0

    def call(x: Array, step: int, rows: slice, extra: Mapping[str, Array], unconditional: bool) -> Array:
        nonlocal done
        timestep = np.full(len(x), timesteps[step], np.int64)
        inputs = {
            latent: x,
            "timestep": timestep,
            **{key: np.asarray(value)[rows] for key, value in extra.items()},
        }
        output = np.asarray(model(**inputs), dtype=np.float32)
        if not np.isfinite(output).all():
            raise UserError(
                f"the model's output at timestep {timesteps[step]} is not finite; its weights, or the scales "
                "of the artifact, do not suit these inputs"
            )
        if observe:
            observe(Call(step, int(timesteps[step]), rows, unconditional, inputs, output))
        done += 1
        if progress:
            progress(done, total)
        return output[:, : x.shape[1]]

    drawn = np.empty(
        noise.shape, np.float32
    )  # observers keep the inputs of every call, so no array is reused
    for start in range(0, count, batch):
        rows = slice(start, min(start + batch, count))
        x = np.asarray(noise[rows], dtype=np.float32)
        for step, timestep in enumerate(timesteps):
            output = call(x, step, rows, conditions, False)
            if guided:
                assert null_conditions is not None
                base = call(x, step, rows, null_conditions, True)
                output = base + np.float32(guidance) * (output - base)
            x = scheduler.step(output, int(timestep), steps, x)
        drawn[rows] = x
    return drawn


def decode(codec: str, latents: Array) -> Array:
    """Images in [-1, 1], float32 [N, channels, height, width], from latents [N, C, h, w].

    `pixel_unshuffle2` stores a pixel's 2x2 neighbours as channels: [N, 4c, h, w] -> [N, c, 2h, 2w],
    lossless. `identity` is for denoisers of pixels; for those of a VAE's latents it shows the latents
    themselves.
    """
    latents = np.asarray(latents, dtype=np.float32)
    if codec == "pixel_unshuffle2":
        n, channels, height, width = latents.shape
        blocks = latents.reshape(n, channels // 4, 2, 2, height, width)
        latents = blocks.transpose(0, 1, 4, 2, 5, 3).reshape(n, channels // 4, 2 * height, 2 * width)
    elif codec != "identity":
        raise UserError(f"the codec {codec!r} is not known; {nearest(codec, CODECS)}")
    return np.clip(latents, -1, 1)
