"""The sampling loop against diffusers' DDIMScheduler, and its own promises."""

from __future__ import annotations

import subprocess
import sys

import diffusers
import numpy as np
import pytest
import torch

from mpq_compiler.errors import UserError
from mpq_compiler.sampler import CODECS, Scheduler, decode, gaussian, sample

CONFIGS = [
    {"prediction_type": "epsilon", "beta_schedule": "squaredcos_cap_v2", "timestep_spacing": "trailing"},
    {"prediction_type": "v_prediction", "beta_schedule": "linear", "rescale_betas_zero_snr": True},
    {"prediction_type": "sample", "beta_schedule": "scaled_linear", "timestep_spacing": "linspace"},
    {
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "beta_end": 0.012,
        "clip_sample": False,
        "set_alpha_to_one": False,
        "steps_offset": 1,
    },
    {"trained_betas": [0.1, 0.2, 0.3, 0.2], "num_train_timesteps": 4, "clip_sample_range": 2.0},
]


def toy(sample: np.ndarray, timestep: np.ndarray, **conditions: np.ndarray) -> np.ndarray:
    """A smooth stand-in for a model, the same in every batch composition."""
    shift = conditions.get("class_labels", np.zeros(len(sample)))
    mixed = np.tanh(
        sample.astype(np.float32) + np.float32(0.001) * timestep[:, None, None, None].astype(np.float32)
    )
    return mixed + np.float32(0.1) * shift[:, None, None, None].astype(np.float32)


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("steps", [1, 3, 4])
def test_equals_diffusers(config, steps):
    reference = diffusers.DDIMScheduler(**config)
    ours = Scheduler.from_config({"_class_name": "DDIMScheduler", **reference.config})
    reference.set_timesteps(steps)
    assert ours.timesteps(steps).tolist() == reference.timesteps.tolist()
    np.testing.assert_allclose(ours.alphas_cumprod, reference.alphas_cumprod.numpy(), rtol=2e-4, atol=1e-6)
    noise = gaussian(2, (3, 5, 5), 0)
    x = torch.from_numpy(noise)
    for timestep in reference.timesteps:
        output = toy(x.numpy(), np.full(2, int(timestep)))
        x = reference.step(torch.from_numpy(output), timestep, x).prev_sample
    drawn = sample(toy, ours, noise, {}, steps)
    assert drawn.dtype == np.float32
    np.testing.assert_allclose(drawn, x.numpy(), rtol=1e-3, atol=1e-3)


def test_configuration_round_trip():
    scheduler = Scheduler.from_config(CONFIGS[4])
    assert Scheduler.from_config(scheduler.to_config()) == scheduler
    assert diffusers.DDIMScheduler.from_config(scheduler.to_config()).config.clip_sample_range == 2.0


def test_other_solvers_keep_their_schedule_and_do_not_clip():
    config = {"_class_name": "PNDMScheduler", "beta_schedule": "scaled_linear", "skip_prk_steps": True}
    scheduler = Scheduler.from_config(config)
    assert scheduler.beta_schedule == "scaled_linear" and not scheduler.clip_sample


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"prediction_type": "v-prediction"}, "did you mean 'v_prediction'"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler"}, "flow matching"),
        ({"thresholding": True}, "thresholding"),
        ({"rescale_betas_zero_snr": True}, "divide by zero"),
        ({"num_train_timesteps": 0}, "1 or more"),
    ],
)
def test_schedules_that_are_refused(config, message):
    with pytest.raises(UserError, match=message):
        Scheduler.from_config(config)


@pytest.mark.parametrize("spacing", ["leading", "linspace", "trailing"])
def test_timesteps_descend_within_range(spacing):
    scheduler = Scheduler(timestep_spacing=spacing, steps_offset=1)
    for steps in (1, 2, 3, 7, 10, 49, 333, 999, 1000):
        values = scheduler.timesteps(steps)
        assert len(values) == steps and values.max() <= 999 and values.min() >= 0
        assert (np.diff(values) < 0).all() or steps == 1000  # the offset meets the end of the range
    for steps in (0, 1001):
        with pytest.raises(UserError, match="1 to 1000"):
            scheduler.timesteps(steps)


def test_batching_changes_nothing():
    noise, labels = gaussian(5, (2, 4, 4), 0), {"class_labels": np.arange(5)}
    whole = sample(toy, Scheduler(), noise, labels, 6)
    assert np.array_equal(whole, sample(toy, Scheduler(), noise, labels, 6, batch=2))


def test_guidance_extrapolates_from_the_null_condition():
    noise = gaussian(2, (1, 3, 3), 0)
    ones, zeros = {"class_labels": np.ones(2)}, {"class_labels": np.zeros(2)}
    calls: list[bool] = []
    guided = sample(
        toy,
        Scheduler(),
        noise,
        ones,
        4,
        guidance=3.0,
        null_conditions=zeros,
        observe=lambda call: calls.append(call.guided),
    )
    assert calls == [False, True] * 4
    direct = sample(
        toy, Scheduler(), noise, {"class_labels": np.full(2, 3.0)}, 4
    )  # u + 3 (c - u), linear in labels
    np.testing.assert_allclose(guided, direct, atol=1e-5)
    with pytest.raises(UserError, match="guidance"):
        sample(toy, Scheduler(), noise, ones, 4, guidance=2.0)


def test_output_that_is_not_finite():
    with pytest.raises(UserError, match="timestep 0 is not finite"):
        sample(lambda **inputs: inputs["sample"] * np.nan, Scheduler(), gaussian(1, (1, 2, 2), 0), {}, 1)


def test_conditions_of_another_length():
    with pytest.raises(UserError, match="'class_labels' has 3 rows for 2 samples"):
        sample(toy, Scheduler(), gaussian(2, (1, 2, 2), 0), {"class_labels": np.zeros(3)}, 1)


def test_noise_of_fewer_samples_is_a_prefix():
    assert np.array_equal(gaussian(8, (4, 14, 14), 5)[:3], gaussian(3, (4, 14, 14), 5))


def test_codecs():
    images = np.random.default_rng(0).uniform(-1, 1, (2, 3, 6, 8)).astype(np.float32)
    latents = torch.nn.functional.pixel_unshuffle(torch.from_numpy(images), 2).numpy()
    assert np.array_equal(decode("pixel_unshuffle2", latents), images)
    assert np.array_equal(decode("identity", 2 * images), np.clip(2 * images, -1, 1))
    with pytest.raises(UserError, match=CODECS[1]):
        decode("pixel_unshuffle", latents)


def test_samples_without_torch():
    code = "import mpq_compiler.sampler, sys; assert not {'torch', 'diffusers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
