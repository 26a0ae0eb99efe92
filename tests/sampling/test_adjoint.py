from __future__ import annotations

import numpy as np
import pytest

from mpq_compiler.sampling import schedulers
from mpq_compiler.sampling.adjoint import backward
from mpq_compiler.sampling.loop import gaussian, sample

SHAPE = (3, 2, 4, 4)
PULLS = np.float32([[0.5, -0.2], [0.1, 0.3]])
"""The linear part of a model that mixes channels."""
SOLVERS = {
    "ddim": schedulers.DDIM(clip_sample=False),
    "ddim, clipped": schedulers.DDIM(clip_sample_range=0.7),
    "ddim, v": schedulers.DDIM(prediction_type="v_prediction", timestep_spacing="trailing"),
    "lcm": schedulers.LCM(),
    "euler": schedulers.Euler(),
    "euler, sample": schedulers.Euler(prediction_type="sample", timestep_spacing="leading"),
    "ancestral": schedulers.EulerAncestral(),
    "flow": schedulers.FlowMatchEuler(shift=3.0),
}


def model(sample, timestep, bias, channels=2):
    """Bends its latents; ``channels`` beyond theirs are variances that the loop drops."""
    value = np.tanh(np.einsum("dc,nchw->ndhw", PULLS, sample) + bias[:, :, None, None])
    return np.concatenate([value, value[:, : channels - 2]], 1)


def pulled(call, arriving):
    """The gradient by the model's latents, and that by its bias."""
    slope = 1 - np.square(call.output[:, :2])
    inner = arriving[:, :2].astype(np.float64) * slope
    return np.einsum("dc,ndhw->nchw", PULLS, inner), inner.sum((2, 3))


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("guidance", [1.0, 2.5])
@pytest.mark.parametrize("channels", [2, 3])
def test_gradients_are_what_differences_of_whole_trajectories_are(solver, guidance, channels):
    """By the model's bias, with fresh noise, clipped images and guidance, of any scheduler."""
    noise, weights = gaussian(3, SHAPE[1:], 1), gaussian(3, SHAPE[1:], 2).astype(np.float64)
    bias = np.float32([[0.1, -0.3]] * 3)

    def drawn(bias, observe=None):
        return sample(
            lambda **inputs: model(**inputs, channels=channels), SOLVERS[solver], noise, {"bias": bias}, 4,
            seed=5, guidance=guidance, null_conditions={"bias": 0 * bias}, observe=observe,
        )  # fmt: skip

    calls = []
    drawn(bias, calls.append)
    found = np.zeros(bias.shape)

    def pull(call, arriving):
        assert arriving.shape == call.output.shape and arriving.dtype == np.float32
        assert not arriving[:, 2:].any()
        by_latents, by_bias = pulled(call, arriving)
        if not call.guided:  # the unconditional call has none
            found[:] += by_bias
        return by_latents

    backward(SOLVERS[solver], calls, weights, guidance, pull)
    step = 2e-4  # clipped numbers have kinks
    for row, channel in np.ndindex(bias.shape):
        change = np.zeros_like(bias)
        change[row, channel] = step
        more, less = (np.sum(weights * drawn(bias + sign * change)) for sign in (1, -1))
        assert found[row, channel] == pytest.approx((more - less) / (2 * step), rel=0.01, abs=0.02)
