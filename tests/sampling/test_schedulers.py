"""Schedules and updates against diffusers' schedulers, on a model that any stand-in for noise would betray."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend import trajectories
from mpq_compiler.sampling.loop import gaussian, sample
from mpq_compiler.sampling.schedulers import (
    DDIM,
    LCM,
    Euler,
    FlowMatchEuler,
    NoiseSchedule,
    Scheduler,
    exchanged,
    from_config,
)
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

SD = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
COSINE = {"beta_schedule": "squaredcos_cap_v2"}
TRAILING = {"timestep_spacing": "trailing"}
CONFIGS: list[tuple[str, dict[str, Any]]] = [
    ("DDIM", {"prediction_type": "epsilon", **COSINE, **TRAILING}),
    ("DDIM", {"prediction_type": "v_prediction", "beta_schedule": "linear", "rescale_betas_zero_snr": True}),
    ("DDIM", {"prediction_type": "sample", "beta_schedule": "scaled_linear", "timestep_spacing": "linspace"}),
    ("DDIM", {**SD, "clip_sample": False, "set_alpha_to_one": False, "steps_offset": 1}),
    ("DDIM", {"trained_betas": [0.1, 0.2, 0.3, 0.2], "num_train_timesteps": 4, "clip_sample_range": 2.0}),
    ("LCM", {**SD}),
    ("LCM", {**COSINE, "prediction_type": "v_prediction", "clip_sample": True, "original_inference_steps": 25}),
    ("LCM", {"prediction_type": "sample", "beta_schedule": "linear", "rescale_betas_zero_snr": True}),
    ("EulerDiscrete", {**SD, **TRAILING}),  # SD-Turbo
    ("EulerDiscrete", {**SD, "timestep_spacing": "leading", "steps_offset": 1}),  # SDXL
    ("EulerDiscrete", {"prediction_type": "v_prediction"}),
    ("EulerDiscrete", {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True, **TRAILING}),
    ("EulerDiscrete", {"prediction_type": "sample", **SD}),
    ("EulerAncestralDiscrete", {**SD, **TRAILING}),  # SDXL-Turbo
    ("EulerAncestralDiscrete", {"prediction_type": "v_prediction"}),
    ("FlowMatchEulerDiscrete", {"shift": 3.0}),  # Stable Diffusion 3
    ("FlowMatchEulerDiscrete", {}),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "base_shift": 0.6, "shift_terminal": 0.02}),
    ("FlowMatchEulerDiscrete", {"use_dynamic_shifting": True, "time_shift_type": "linear"}),
]
MU = 0.5 + (1.15 - 0.5) / (4096 - 256) * (1024 - 256)
"""Of diffusers' calculate_shift for 1024 tokens; with a base_shift of 0.6 it is 0.6 + 0.55 / 3840 * 768."""


def toy(sample: np.ndarray, timestep: np.ndarray) -> np.ndarray:
    """A smooth stand-in for a model."""
    return np.tanh(np.float32(0.7) * sample - np.float32(0.001) * timestep[:, None, None, None].astype(np.float32))


def timesteps_of(reference: Any, steps: int, shift: float) -> None:
    dynamic = reference.config.get("use_dynamic_shifting")
    reference.set_timesteps(steps, **({"mu": shift} if dynamic else {}))


@pytest.mark.parametrize(("kind", "config"), CONFIGS)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_draws_what_diffusers_draws(
    kind: str, config: dict[str, Any], steps: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To 1e-5, with the same noise in each step; diffusers' schedule of alphas is float32, and replaced by ours."""
    reference = getattr(diffusers, f"{kind}Scheduler")(**config)
    dynamic = {"image_seq_len": 1024} if config.get("use_dynamic_shifting") else {}
    ours, note = from_config({"_class_name": f"{kind}Scheduler", **reference.config, **dynamic})
    assert note is None
    if isinstance(ours, NoiseSchedule):
        np.testing.assert_allclose(ours.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-6)
        reference.alphas_cumprod = torch.from_numpy(ours.alphas_cumprod.copy())
        if kind.startswith("Euler") and config.get("rescale_betas_zero_snr"):
            reference.alphas_cumprod[-1] = 2**-24
    if "shift_terminal" in config and steps == 1:
        assert np.isfinite(ours.timesteps(1)).all()  # diffusers' are NaN
        return
    timesteps_of(reference, steps, MU if config.get("base_shift") is None else 0.6 + 0.55 / 3840 * 768)
    np.testing.assert_allclose(ours.timesteps(steps), reference.timesteps.numpy(), rtol=1e-6)
    assert ours.fractional == (ours.timesteps(steps).dtype.kind == "f")

    noise = gaussian(2, (3, 5, 5), 0)
    drawn = iter([gaussian(2, (3, 5, 5), (7, step + 1)) for step in range(steps)])
    module = sys.modules[type(reference).__module__]
    if hasattr(module, "randn_tensor"):
        monkeypatch.setattr(module, "randn_tensor", lambda *args, **more: torch.from_numpy(next(drawn)))
    x = torch.from_numpy(noise) * getattr(reference, "init_noise_sigma", 1.0)
    for timestep in reference.timesteps:
        given = reference.scale_model_input(x, timestep) if hasattr(reference, "scale_model_input") else x
        output = toy(given.numpy(), np.full(2, float(timestep)))
        x = reference.step(torch.from_numpy(output), timestep, x).prev_sample.float()
    result = sample(toy, ours, noise, {}, steps, seed=7)
    assert result.dtype == np.float32
    np.testing.assert_allclose(result, x.numpy(), rtol=1e-5, atol=1e-5)
    image = gaussian(2, (3, 5, 5), 9)
    add = reference.scale_noise if hasattr(reference, "scale_noise") else reference.add_noise
    given = (torch.from_numpy(image), torch.from_numpy(noise))
    for step, timestep in enumerate(reference.timesteps):
        order = (given[0], timestep[None], given[1]) if hasattr(reference, "scale_noise") else (*given, timestep[None])
        np.testing.assert_allclose(ours.noised(image, noise, step, steps), add(*order).numpy(), rtol=1e-4, atol=1e-5)


def test_flux_asks_for_even_sigmas() -> None:
    """As diffusers' FluxPipeline does: from 1 to 1/steps, and dynamic shifting by the number of tokens."""
    reference = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    reference.set_timesteps(4, sigmas=np.linspace(1.0, 1 / 4, 4), mu=MU)
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", **reference.config}
    ours = Scheduler.from_config({**config, "even_sigmas": True, "image_seq_len": 1024})
    np.testing.assert_allclose(ours.timesteps(4), reference.timesteps.numpy(), rtol=1e-6)


@pytest.mark.parametrize(("name", "tokens", "even"), [("flux", 64, True), ("sd3", 64, False), ("sana", 64, False)])
def test_a_model_says_how_many_tokens_its_image_has(name: str, tokens: int, even: bool) -> None:
    config = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    model = denoisers.wrap(tiny.model(name), size=tiny.SIZES.get(name), tokens=tiny.TOKENS, scheduler=config)
    scheduler: Any = model.scheduler
    assert (scheduler.image_seq_len, scheduler.even_sigmas) == (tokens, even)
    assert model.input_specs["timestep"].dtype == torch.float32


def test_fractions_of_timesteps_reach_the_model() -> None:
    config = {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "linspace"}
    model = denoisers.wrap(tiny.model("unet2d"), scheduler=config)
    recorded = trajectories.record_calibration(model, 1, 4)
    assert recorded["timestep"].tolist() == [999.0, 666.0, 333.0, 0.0]
    assert trajectories.record_calibration(model, 1, 3)["timestep"].tolist() == [999.0, 499.5, 0.0]


@pytest.mark.parametrize("config", CONFIGS)
def test_configurations_travel(config: tuple[str, dict[str, Any]]) -> None:
    """Through JSON, and diffusers reads them too."""
    kind, values = config
    scheduler = Scheduler.from_config({"_class_name": f"{kind}Scheduler", **values})
    assert Scheduler.from_config(json.loads(json.dumps(scheduler.to_config()))) == scheduler
    again = getattr(diffusers, f"{kind}Scheduler").from_config(scheduler.to_config())
    assert json.dumps({key: again.config[key] for key in values}) == json.dumps(values)


@pytest.mark.parametrize(
    ("config", "kind", "note"),
    [
        ({"_class_name": "PNDMScheduler", **SD, "skip_prk_steps": True}, "DDIM", "PNDMScheduler is replaced by DDIM"),
        ({"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True}, "DDIM", "with use_karras_sigmas is"),
        ({"_class_name": "FlowMatchHeunDiscreteScheduler", "shift": 3.0}, "FlowMatchEuler", "replaced by Euler's"),
        (
            {"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True, "flow_shift": 3.0},
            "FlowMatchEuler",
            "DPMSolverMultistepScheduler is replaced by Euler's method",
        ),
    ],
)
def test_what_is_replaced_is_said(config: dict[str, Any], kind: str, note: str) -> None:
    scheduler, said = from_config(config)
    assert type(scheduler).__name__ == kind
    assert said is not None and note in said
    if isinstance(scheduler, DDIM):
        assert not scheduler.clip_sample
    else:
        assert scheduler.to_config()["shift"] == 3.0
    assert said in denoisers.wrap(tiny.model("unet2d"), scheduler=config).notes


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "invert_sigmas": True}, "invert_sigmas"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "time_shift_type": "expo"}, "exponential"),
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "divide by zero"),
        ({"num_train_timesteps": 0}, "num_train_timesteps is 0; it must be 1 to"),
        ({"num_train_timesteps": "many"}, "num_train_timesteps must be a whole number, not 'many'"),
        ({"num_train_timesteps": 10.5}, "num_train_timesteps must be a whole number"),
        ({"beta_start": 5}, "beta_start is 5; it must be more than 0 and less than 1"),
        ({"beta_end": -3.0}, "beta_end is -3"),
        ({"beta_end": float("nan")}, "beta_end must be a finite number"),
        ({"beta_schedule": "scaled_linear", "beta_start": 0}, "beta_start is 0"),
        ({"trained_betas": [0.1, 0.2]}, "2 trained_betas, and its num_train_timesteps is 1000"),
        ({"trained_betas": [0.1, "x"], "num_train_timesteps": 2}, "trained_betas must be a finite number, not 'x'"),
        ({"trained_betas": [0.1, 1.5], "num_train_timesteps": 2}, "trained_betas is 1.5"),
        ({"clip_sample": "yes"}, "clip_sample must be true or false"),
        ({"clip_sample": True, "clip_sample_range": -1}, "clip_sample_range is -1"),
        ({"_class_name": "LCMScheduler", "original_inference_steps": 5000}, "must be 1 to 1000"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 0}, "shift is 0; it must be more than 0"),
        (
            {
                "_class_name": "FlowMatchEulerDiscreteScheduler",
                **{"use_dynamic_shifting": True, "base_image_seq_len": 8, "max_image_seq_len": 8},
            },
            "base_image_seq_len is 8",
        ),
    ],
)
def test_schedules_that_are_refused(config: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        Scheduler.from_config(config)


def test_one_scheduler_in_the_place_of_another() -> None:
    own = DDIM(beta_schedule="scaled_linear", prediction_type="v_prediction", steps_offset=1, clip_sample=False)
    found = exchanged(own, "LCMScheduler")
    assert isinstance(found, LCM) and found.prediction_type == "v_prediction" and not found.clip_sample
    np.testing.assert_array_equal(found.alphas_cumprod, own.alphas_cumprod)
    assert exchanged(found, "DDIMScheduler") == own and exchanged(found, own.to_config()) == own
    assert not exchanged(Euler(), "DDIMScheduler").clip_sample  # latents, which nothing was said to bound
    for other, message in {
        "DDIM": "'DDIM' is not known; there is: DDIMScheduler",
        "FlowMatchEulerDiscreteScheduler": "draws with other models than one of DDIMScheduler",
    }.items():
        with pytest.raises(UserError, match=message):
            exchanged(own, other)
    with pytest.raises(UserError, match=r"scheduler DDIMScheduler with .* would be replaced by DDIM"):
        exchanged(own, {"_class_name": "DDIMScheduler", "use_karras_sigmas": True})


def test_flow_matching_has_no_prediction_type() -> None:
    with pytest.raises(UserError, match="no prediction type"):
        denoisers.wrap(
            tiny.model("sd3"),
            tokens=tiny.TOKENS,
            scheduler={"_class_name": "FlowMatchEulerDiscreteScheduler"},
            prediction_type="epsilon",
        )


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_descend_within_range(spacing: str) -> None:
    scheduler = DDIM(timestep_spacing=spacing, steps_offset=1)
    for steps in (1, 2, 3, 7, 10, 49, 333, 999, 1000):
        values = scheduler.timesteps(steps)
        assert len(values) == steps and values.max() <= 999 and values.min() >= 0
        assert (np.diff(values) < 0).all() or steps == 1000  # the offset meets the end of the range
    for steps in (0, 1001):
        with pytest.raises(UserError, match="1 to 1000"):
            scheduler.timesteps(steps)


def test_no_torch_is_needed(tmp_path: Path) -> None:
    code = "import mpq_compiler.sampling.loop, sys; assert not {'torch', 'diffusers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("solver", [DDIM, Euler, FlowMatchEuler])
def test_the_clean_latents_that_an_output_predicts(solver, prediction):
    """A perfect output predicts the latents that noise was laid on, at every step."""
    if solver is FlowMatchEuler:
        scheduler = solver()
    else:
        scheduler = solver(prediction_type=prediction, **({"clip_sample": False} if solver is DDIM else {}))
    image, noise = np.random.default_rng(0).standard_normal((2, 3, 4, 4), dtype=np.float32)
    for index, time in enumerate(scheduler.timesteps(5)):
        given = scheduler.scaled(scheduler.noised(image, noise, index, 5), index, 5)
        if solver is FlowMatchEuler:
            output = noise - image
        else:
            a = np.interp(time, np.arange(1000), scheduler.alphas_cumprod)
            velocity = np.sqrt(a) * noise - np.sqrt(1 - a) * image
            output = {"epsilon": noise, "sample": image, "v_prediction": velocity}[prediction].astype(np.float32)
        np.testing.assert_allclose(scheduler.predicted(output, given, float(time)), image, atol=2e-3)
