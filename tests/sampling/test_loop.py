"""The sampling loop: batches, guidance, noise, codecs. What it samples with is in test_schedulers."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pytest
import torch

from mpq_compiler.sampling.loop import CODECS, decode, gaussian, sample
from mpq_compiler.sampling.schedulers import DDIM, LCM, Euler, EulerAncestral, Scheduler
from mpq_compiler.support.errors import UserError


def toy(sample: np.ndarray, timestep: np.ndarray, **conditions: np.ndarray) -> np.ndarray:
    """A smooth stand-in for a model, the same in every batch composition."""
    shift = conditions.get("class_labels", np.zeros(len(sample)))
    mixed = np.tanh(
        sample.astype(np.float32) + np.float32(0.001) * timestep[:, None, None, None].astype(np.float32)
    )
    return mixed + np.float32(0.1) * shift[:, None, None, None].astype(np.float32)


@pytest.mark.parametrize("scheduler", [DDIM(), LCM(), Euler(), EulerAncestral()])
def test_batching_changes_nothing(scheduler: Scheduler):
    noise, labels = gaussian(5, (2, 4, 4), 0), {"class_labels": np.arange(5)}
    whole = sample(toy, scheduler, noise, labels, 6)
    assert np.array_equal(whole, sample(toy, scheduler, noise, labels, 6, batch=2))
    other = sample(toy, scheduler, noise, labels, 6, seed=1)
    assert np.array_equal(whole, other) != scheduler.stochastic


def test_guidance_extrapolates_from_the_null_condition():
    noise = gaussian(2, (1, 3, 3), 0)
    ones, zeros = {"class_labels": np.ones(2)}, {"class_labels": np.zeros(2)}
    calls: list[bool] = []
    guided = sample(
        toy,
        DDIM(),
        noise,
        ones,
        4,
        guidance=3.0,
        null_conditions=zeros,
        observe=lambda call: calls.append(call.guided),
    )
    assert calls == [False, True] * 4
    direct = sample(
        toy, DDIM(), noise, {"class_labels": np.full(2, 3.0)}, 4
    )  # u + 3 (c - u), linear in labels
    np.testing.assert_allclose(guided, direct, atol=1e-5)
    with pytest.raises(UserError, match="guidance"):
        sample(toy, DDIM(), noise, ones, 4, guidance=2.0)


def test_output_that_is_not_finite():
    with pytest.raises(UserError, match="timestep 0 is not finite"):
        sample(lambda **inputs: inputs["sample"] * np.nan, DDIM(), gaussian(1, (1, 2, 2), 0), {}, 1)


def test_conditions_of_another_length():
    with pytest.raises(UserError, match="'class_labels' has 3 rows for 2 samples"):
        sample(toy, DDIM(), gaussian(2, (1, 2, 2), 0), {"class_labels": np.zeros(3)}, 1)


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
    code = "import mpq_compiler.sampling.loop, sys; assert not {'torch', 'diffusers', 'scipy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
