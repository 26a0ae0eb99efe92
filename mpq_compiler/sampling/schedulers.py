"""The noise schedules and updates of diffusers' schedulers, in NumPy.

All arithmetic on images is one float32 operation at a time (no fused multiply-add), so equal model outputs give equal
images on every machine. What depends on the schedule alone is computed in float64 and rounded once. Fields, their
defaults and the names in configurations are diffusers'. Nothing here imports torch.

Sources: DDIM, Song, Meng and Ermon (arXiv 2010.02502), eq. 12 with eta = 0; Euler's method in sigma, and its ancestral
variant, Karras et al. (arXiv 2206.00364) and k-diffusion; latent consistency, Luo et al. (arXiv 2310.04378); flow
matching with shifted time, Esser et al. (arXiv 2403.03206).
"""

from __future__ import annotations

import dataclasses
import math
import typing
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

import numpy as np

from mpq_compiler.support.errors import UserError, nearest

Array = np.ndarray

PREDICTIONS = ("epsilon", "sample", "v_prediction")
SPACINGS = ("leading", "linspace", "trailing")
SCHEDULES = ("linear", "scaled_linear", "squaredcos_cap_v2")
SHIFTS = ("exponential", "linear")
MOST_TIMESTEPS = 1_000_000
"""The most training timesteps that a configuration may state."""


@dataclass(frozen=True)
class Scheduler(ABC):
    """A schedule of timesteps and the update of the latents between them."""

    num_train_timesteps: int = 1000

    solver: ClassVar[str]
    """The name of diffusers' class."""
    stochastic: ClassVar[bool] = False
    """Whether its steps add fresh noise."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_train_timesteps <= MOST_TIMESTEPS:
            raise UserError(
                f"the scheduler's num_train_timesteps is {self.num_train_timesteps}; it must be 1 to {MOST_TIMESTEPS}"
            )

    @staticmethod
    def from_config(config: Mapping[str, Any]) -> Scheduler:
        """The scheduler that a diffusers scheduler_config.json describes, or the nearest one."""
        return from_config(config)[0]

    def to_config(self) -> dict[str, Any]:
        """The scheduler_config.json of this scheduler, which diffusers and `from_config` read."""
        return {"_class_name": self.solver, **dataclasses.asdict(self)}

    @property
    def fractional(self) -> bool:
        """Whether its timesteps may be fractions, not whole numbers."""
        return False

    @abstractmethod
    def timesteps(self, steps: int) -> Array:
        """The timestep values of a trajectory of `steps` steps, descending: int64 [steps], float32 if `fractional`."""

    def start(self, noise: Array, steps: int) -> Array:
        """The latents to begin with, from standard normal `noise`."""
        return noise

    @abstractmethod
    def noised(self, image: Array, noise: Array, index: int, steps: int) -> Array:
        """The latents before step `index` of a trajectory to the latents `image`, with standard normal `noise`."""

    def scaled(self, x: Array, index: int, steps: int) -> Array:
        """Scales the latents `x` to what the model takes at step `index`."""
        return x

    @abstractmethod
    def predicted(self, output: Array, x: Array, timestep: float) -> Array:
        """The clean latents that an `output` predicts for latents `x` as the model takes them, at a timestep."""

    @abstractmethod
    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        """Takes one step: the next latents, float32, from the latents `x` and the model's `output` for them.

        Args:
            output: the model's prediction, float32, the shape of `x`.
            index: the step, from 0.
            steps: steps of the whole trajectory.
            x: the latents before the step, unscaled.
            fresh: standard normal noise of the shape of `x`, where the scheduler is `stochastic`.
        """

    def _require_steps(self, steps: int, most: int) -> None:
        if not 1 <= steps <= most:
            raise UserError(f"cannot sample in {steps} steps; choose from 1 to {most}")


@dataclass(frozen=True)
class NoiseSchedule(Scheduler):
    """The variance-preserving schedules: alphas_cumprod from betas."""

    beta_start: float = 0.0001
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    prediction_type: str = "epsilon"
    timestep_spacing: str = "leading"
    steps_offset: int = 0
    rescale_betas_zero_snr: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                wanted = f"num_train_timesteps is {self.num_train_timesteps}"
                raise UserError(f"the scheduler has {len(self.trained_betas)} trained_betas, and its {wanted}")
            _require_between("trained_betas", *self.trained_betas)
        else:
            for field in ("beta_start", "beta_end"):
                _require_between(field, getattr(self, field))
        for field, known in (
            ("prediction_type", PREDICTIONS),
            ("timestep_spacing", SPACINGS),
            ("beta_schedule", SCHEDULES),
        ):
            value = getattr(self, field)
            if value not in known:
                raise UserError(f"the scheduler's {field} {value!r} is not known; {nearest(str(value), known)}")

    @cached_property
    def alphas_cumprod(self) -> Array:
        """The share of signal power left at every training step, float64 [num_train_timesteps]."""
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
        count = self.num_train_timesteps
        self._require_steps(steps, count)
        if self.timestep_spacing == "linspace":
            values: Array = np.linspace(0, count - 1, steps).round()[::-1]
        elif self.timestep_spacing == "leading":
            values = (np.arange(steps) * (count // steps))[::-1] + self.steps_offset
        else:
            # The float range can yield one value too many; a trajectory has exactly `steps`.
            values = np.round(np.arange(count, 0, -count / steps))[:steps] - 1
        times: Array = np.clip(values, 0, count - 1).astype(np.int64)
        return times

    def noised(self, image: Array, noise: Array, index: int, steps: int) -> Array:
        a = self.alphas_cumprod[int(self.timesteps(steps)[index])]
        return np.float32(math.sqrt(a)) * image + np.float32(math.sqrt(1 - a)) * noise

    def predicted(self, output: Array, x: Array, timestep: float) -> Array:
        a = float(np.interp(timestep, np.arange(self.num_train_timesteps), self.alphas_cumprod))
        return self._prediction(output, a, x)[0]

    def _prediction(self, output: Array, a: float, x: Array) -> tuple[Array, Array]:
        """The predicted image and the predicted noise, where a share `a` of the power is signal."""
        signal, noise = np.float32(math.sqrt(a)), np.float32(math.sqrt(1 - a))
        if self.prediction_type == "epsilon":
            return (x - noise * output) / signal, output
        if self.prediction_type == "sample":
            return output, (x - signal * output) / noise
        return signal * x - noise * output, signal * output + noise * x


@dataclass(frozen=True)
class DDIM(NoiseSchedule):
    """Deterministic DDIM; it also replaces solvers that are not known here."""

    solver: ClassVar[str] = "DDIMScheduler"

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    set_alpha_to_one: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clip_sample_range <= 0:
            raise UserError(f"the scheduler's clip_sample_range is {self.clip_sample_range:g}; it must be more than 0")
        if self.rescale_betas_zero_snr and self.prediction_type == "epsilon":
            raise UserError(
                "the scheduler combines prediction_type 'epsilon' with rescale_betas_zero_snr, under which "
                "the first step would divide by zero; use 'v_prediction' or leave the rescaling out"
            )

    def _clipped(self, image: Array) -> Array:
        limit = np.float32(self.clip_sample_range)
        return np.clip(image, -limit, limit) if self.clip_sample else image

    def predicted(self, output: Array, x: Array, timestep: float) -> Array:
        return self._clipped(super().predicted(output, x, timestep))

    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        timestep = int(self.timesteps(steps)[index])
        before = timestep - self.num_train_timesteps // steps
        final = 1.0 if self.set_alpha_to_one else self.alphas_cumprod[0]
        a_before = self.alphas_cumprod[before] if before >= 0 else final
        image, epsilon = self._prediction(output, self.alphas_cumprod[timestep], x)
        image = self._clipped(image)
        return np.float32(math.sqrt(a_before)) * image + np.float32(math.sqrt(1 - a_before)) * epsilon


@dataclass(frozen=True)
class LCM(DDIM):
    """The sampler of latent consistency models: every step predicts the image and adds noise to it again."""

    solver: ClassVar[str] = "LCMScheduler"
    stochastic: ClassVar[bool] = True

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    clip_sample: bool = False
    original_inference_steps: int = 50
    """Steps of the schedule that the model was distilled on; a trajectory takes a subset of them."""
    timestep_scaling: float = 10.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1 <= self.original_inference_steps <= self.num_train_timesteps:
            raise UserError(
                f"the scheduler's original_inference_steps is {self.original_inference_steps}; it must be 1 to "
                f"{self.num_train_timesteps}, its num_train_timesteps"
            )

    def timesteps(self, steps: int) -> Array:
        origin = np.arange(self.original_inference_steps, 0, -1)
        origin = origin * (self.num_train_timesteps // self.original_inference_steps) - 1
        self._require_steps(steps, len(origin))
        return origin[np.floor(np.linspace(0, len(origin), steps, endpoint=False)).astype(np.int64)].astype(np.int64)

    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        timesteps = self.timesteps(steps)
        scaled = timesteps[index] * self.timestep_scaling
        skip, out = 0.25 / (scaled**2 + 0.25), scaled / math.sqrt(scaled**2 + 0.25)
        image, _ = self._prediction(output, self.alphas_cumprod[timesteps[index]], x)
        denoised = np.float32(out) * self._clipped(image) + np.float32(skip) * x
        if index == steps - 1:
            return denoised
        assert fresh is not None
        a = self.alphas_cumprod[timesteps[index + 1]]
        return np.float32(math.sqrt(a)) * denoised + np.float32(math.sqrt(1 - a)) * fresh


@dataclass(frozen=True)
class Euler(NoiseSchedule):
    """Euler's method in sigma, the standard deviation of the noise where the signal is not scaled down."""

    solver: ClassVar[str] = "EulerDiscreteScheduler"

    timestep_spacing: str = "linspace"

    @property
    def fractional(self) -> bool:
        return self.timestep_spacing == "linspace"

    def timesteps(self, steps: int) -> Array:
        if not self.fractional:
            return super().timesteps(steps)
        self._require_steps(steps, self.num_train_timesteps)
        return np.linspace(0, self.num_train_timesteps - 1, steps, dtype=np.float32)[::-1]

    def sigmas(self, steps: int) -> Array:
        """The sigma before every step and after the last, float32 [steps + 1], descending to 0."""
        bar = self.alphas_cumprod.copy()
        if self.rescale_betas_zero_snr:
            bar[-1] = 2.0**-24  # as diffusers has it: a first sigma that is not infinite
        known = np.sqrt((1 - bar) / bar)
        values = np.interp(self.timesteps(steps), np.arange(len(known)), known)
        return np.append(values, 0.0).astype(np.float32)

    def start(self, noise: Array, steps: int) -> Array:
        most = self.sigmas(steps)[0]
        first: Array = noise * (np.sqrt(most**2 + 1) if self.timestep_spacing == "leading" else most)
        return first

    def noised(self, image: Array, noise: Array, index: int, steps: int) -> Array:
        begun: Array = image + self.sigmas(steps)[index] * noise
        return begun

    def scaled(self, x: Array, index: int, steps: int) -> Array:
        scaled: Array = x / np.sqrt(self.sigmas(steps)[index] ** 2 + 1)
        return scaled

    def _derivative(self, output: Array, sigma: np.float32, x: Array) -> Array:
        if self.prediction_type == "epsilon":
            image = x - sigma * output
        elif self.prediction_type == "sample":
            image = output
        else:
            image = output * (-sigma / np.sqrt(sigma**2 + 1)) + x / (sigma**2 + 1)
        return (x - image) / sigma

    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        # Scalars are float32 as diffusers has them: with a first sigma of 4096 their rounding shows in the image.
        sigma, after = self.sigmas(steps)[index : index + 2]
        moved: Array = x + self._derivative(output, sigma, x) * (after - sigma)
        return moved


@dataclass(frozen=True)
class EulerAncestral(Euler):
    """Ancestral Euler, SDXL-Turbo's sampler: a step overshoots to a smaller sigma, then adds noise up to its own."""

    solver: ClassVar[str] = "EulerAncestralDiscreteScheduler"
    stochastic: ClassVar[bool] = True

    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        sigma, after = self.sigmas(steps)[index : index + 2]
        up = np.sqrt(after**2 * (sigma**2 - after**2) / sigma**2)
        down = np.sqrt(after**2 - up**2)
        assert fresh is not None
        moved: Array = x + self._derivative(output, sigma, x) * (down - sigma) + fresh * up
        return moved


@dataclass(frozen=True)
class FlowMatchEuler(Scheduler):
    """Flow matching: the model predicts noise minus image, sigma falls from 1 to 0, and the timestep is 1000 sigma."""

    solver: ClassVar[str] = "FlowMatchEulerDiscreteScheduler"

    shift: float = 1.0
    use_dynamic_shifting: bool = False
    base_shift: float = 0.5
    max_shift: float = 1.15
    base_image_seq_len: int = 256
    max_image_seq_len: int = 4096
    shift_terminal: float | None = None
    time_shift_type: str = "exponential"
    image_seq_len: int = 4096
    """Tokens of an image, on which dynamic shifting depends; the pipeline states them, diffusers' configuration not."""
    mu: tuple[float, ...] | None = None
    """What shifts times dynamically in place of that number of tokens, as FLUX.2's pipeline has it: a number, and what
    each step of the trajectory adds to it.
    """
    even_sigmas: bool = False
    """Whether unshifted sigmas go evenly from 1 to 1/steps, as in Flux's pipeline, and not to the smallest of training.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shift <= 0:
            raise UserError(f"the scheduler's shift is {self.shift:g}; it must be more than 0")
        if self.use_dynamic_shifting and self.base_image_seq_len >= self.max_image_seq_len:
            raise UserError(
                f"the scheduler's base_image_seq_len is {self.base_image_seq_len}; it must be less than its "
                f"max_image_seq_len, {self.max_image_seq_len}"
            )
        if self.time_shift_type not in SHIFTS:
            hint = nearest(str(self.time_shift_type), SHIFTS)
            raise UserError(f"the scheduler's time_shift_type {self.time_shift_type!r} is not known; {hint}")

    @property
    def fractional(self) -> bool:
        return True

    def _shifted(self, sigmas: Array, steps: int) -> Array:
        if not self.use_dynamic_shifting:
            return self.shift * sigmas / (1 + (self.shift - 1) * sigmas)
        slope = (self.max_shift - self.base_shift) / (self.max_image_seq_len - self.base_image_seq_len)
        mu = self.base_shift + slope * (self.image_seq_len - self.base_image_seq_len)
        if self.mu:
            mu = self.mu[0] + self.mu[1] * steps
        weight = math.exp(mu) if self.time_shift_type == "exponential" else mu
        return weight / (weight + (1 / sigmas - 1))

    def sigmas(self, steps: int) -> Array:
        """The sigma before every step and after the last, float32 [steps + 1], descending to 0."""
        self._require_steps(steps, self.num_train_timesteps)
        if self.even_sigmas:
            values = np.linspace(1.0, 1 / steps, steps)
        else:
            ends = np.array([1.0, 1 / self.num_train_timesteps])
            # diffusers shifts the ends, and then everything between them once more
            ends = ends if self.use_dynamic_shifting else self._shifted(ends, steps)
            values = np.linspace(float(ends[0]), float(ends[1]), steps)
        values = self._shifted(values, steps)
        if self.shift_terminal and steps > 1:
            values = 1 - (1 - values) * (1 - self.shift_terminal) / (1 - values[-1])
        return np.append(values, 0.0).astype(np.float32)

    def timesteps(self, steps: int) -> Array:
        return self.sigmas(steps)[:-1] * np.float32(self.num_train_timesteps)

    def noised(self, image: Array, noise: Array, index: int, steps: int) -> Array:
        sigma = self.sigmas(steps)[index]
        begun: Array = sigma * noise + (1 - sigma) * image
        return begun

    def predicted(self, output: Array, x: Array, timestep: float) -> Array:
        image: Array = x - np.float32(timestep / self.num_train_timesteps) * output
        return image

    def step(self, output: Array, index: int, steps: int, x: Array, fresh: Array | None = None) -> Array:
        sigma, after = self.sigmas(steps)[index : index + 2]
        moved: Array = x + (after - sigma) * output
        return moved


_SOLVERS: dict[str, type[Scheduler]] = {cls.solver: cls for cls in (DDIM, LCM, Euler, EulerAncestral, FlowMatchEuler)}
# Schedulers whose own default is to clip the predicted image to [-1, 1]; the others never do.
_CLIPPING = ("DDIMScheduler", "DDPMScheduler", "DDIMParallelScheduler", "DDPMParallelScheduler")
# Options that are not implemented here, and the value at which they change nothing.
_LEFT_OUT: dict[str, Any] = {
    "use_karras_sigmas": False,
    "use_exponential_sigmas": False,
    "use_beta_sigmas": False,
    "sigma_min": None,
    "sigma_max": None,
    "timestep_type": "discrete",
    "interpolation_type": "linear",
    "final_sigmas_type": "zero",
    "stochastic_sampling": False,
}


def config_of(scheduler: Any) -> dict[str, Any]:
    """The configuration of a diffusers scheduler, with the class's name, which one built in code leaves out."""
    return {**scheduler.config, "_class_name": type(scheduler).__name__}


def from_config(config: Mapping[str, Any]) -> tuple[Scheduler, str | None]:
    """Builds the scheduler that a diffusers scheduler_config.json describes, or the nearest one.

    A solver that is not known here is replaced by DDIM with the same noise schedule, prediction type and spacing, or by
    Euler's method for flow matching.

    Returns:
        The scheduler, and a sentence on what was replaced, or None.

    Raises:
        UserError: dynamic thresholding or inverted sigmas, which nothing here can replace; a malformed configuration.
    """
    name = str(config.get("_class_name", DDIM.solver))
    for key in ("thresholding", "invert_sigmas"):
        if config.get(key):
            raise UserError(f"the scheduler uses {key}, which is not supported; set it to false")
    values = {key: value for key, value in config.items() if value is not None}
    flow = "FlowMatch" in name or config.get("use_flow_sigmas") or config.get("prediction_type") == "flow_prediction"
    odd = [key for key, plain in _LEFT_OUT.items() if name in _SOLVERS and config.get(key, plain) not in (plain, None)]
    kind = FlowMatchEuler if flow else DDIM if odd else _SOLVERS.get(name, DDIM)
    if flow:
        values.setdefault("shift", values.get("flow_shift", 1.0))
    note = None
    if kind.solver != name or odd:
        what = name + (f" with {', '.join(odd)}" if odd else "")
        place = "Euler's method" if flow else "DDIM"
        note = f"the model's {what} is replaced by {place} with the same noise schedule"
        if not flow and name not in _SOLVERS and not {"beta_start", "trained_betas"} & values.keys():
            note = (
                f"the model's {what} has a noise schedule of its own, for which {place} with another stands in: "
                "calibrate on inputs of its pipeline (--calibration), and draw with its pipeline alone"
            )
    if kind is DDIM:
        values.setdefault("clip_sample", name in _CLIPPING)
    types = typing.get_type_hints(kind)
    known = {field.name: types[field.name] for field in dataclasses.fields(kind)}
    return kind(**{key: _typed(key, value, known[key]) for key, value in values.items() if key in known}), note


def exchanged(own: Scheduler, other: str | Mapping[str, object]) -> Scheduler:
    """A scheduler in the place of a model's own: one by diffusers' name, with the noise schedule of ``own``, or whole.

    Args:
        own: that of the model.
        other: the name of a class, or a scheduler_config.json.

    Raises:
        UserError: it is not known, is of another kind than the model was trained for, or is malformed.
    """
    if isinstance(other, str):
        name, config = other, {"clip_sample": False, **own.to_config(), "_class_name": other}
    else:
        name, config = str(other.get("_class_name")), {**other}
    if name not in _SOLVERS:
        raise UserError(f"the scheduler '{name}' is not known; {nearest(name, _SOLVERS)}")
    if issubclass(_SOLVERS[name], FlowMatchEuler) != isinstance(own, FlowMatchEuler):
        raise UserError(f"the scheduler '{name}' draws with other models than one of {own.solver}")
    found, note = from_config(config)
    if note is not None:
        raise UserError(note.replace("the model's", "the scheduler").replace("is replaced", "would be replaced"))
    return found


_HUGE = 1e30  # the largest magnitude that a number of a configuration may have


def _typed(key: str, value: Any, wanted: Any) -> Any:
    """Converts the value of a field to its type. UserError: it has another type, or is not finite."""
    kinds = [kind for kind in typing.get_args(wanted) if kind is not type(None)] or [wanted]
    kind = typing.get_origin(kinds[0]) or kinds[0]
    number = isinstance(value, int | float | np.number) and not isinstance(value, bool) and bool(-_HUGE < value < _HUGE)
    if kind is tuple and isinstance(value, list | tuple | np.ndarray):
        return tuple(_typed(key, item, float) for item in value)
    if (kind is float and number) or (kind is int and number and value == int(value)):
        return kind(value)
    if kind in (bool, str) and isinstance(value, kind):
        return value
    names = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a text", tuple: "a list"}
    raise UserError(f"the scheduler's {key} must be {names[kind]}, not {value!r}")


def _require_between(key: str, *betas: float) -> None:
    """Raises a UserError unless the betas, the shares of noise that steps add, lie between 0 and 1."""
    for beta in betas:
        if not 0 < beta < 1:
            raise UserError(f"the scheduler's {key} is {beta:g}; it must be more than 0 and less than 1")
