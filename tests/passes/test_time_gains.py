from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.analysis.time_weights import TIME_GAINS, by_gains
from mpq_compiler.analysis.trajectory_error import IMAGE_STEPS, TrajectoryError
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import NOTES
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.passes.time_gains import TimeGains
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.support.errors import UserError
from tests.harness import programs

MODEL = "unet2d"
IMAGES = 3


def session(tmp_path, **more):
    return Session(programs.denoiser(MODEL), programs.calibration(MODEL), cache=tmp_path, **more)


@pytest.fixture(scope="module")
def grouped():
    return programs.after(MODEL, "time-groups")


@pytest.fixture(scope="module")
def plain(grouped):
    program = grouped
    for name, options in (("bit-allocation", {"uniform": "int2"}), ("insert-fake-quant", {}), ("round-weights", {})):
        program = make_pass(name, options).run(program, Session())
    return program


def test_times_of_kernels_are_not_asked_for(tmp_path, grouped):
    """Of the plan while gains are measured: a budget of time is that of the formats to choose from."""

    class Times:
        def costs(self, *asked):
            raise AssertionError(asked)

    found = TimeGains(images=1).run(grouped, session(tmp_path, latency=Times()))
    assert len(found.facts[TIME_GAINS]) == IMAGE_STEPS


def test_an_image_that_goes_another_way_hardly_counts_among_others(tmp_path, plain, monkeypatch):
    """The typical noise is that of most images, where the noise is that of the worst."""
    image_error = TrajectoryError.drawn(session(tmp_path), IMAGES)
    before = image_error.noise(plain), image_error.typical_noise(plain)
    assert before[1] <= before[0] * (1 + 1e-9)
    made = image_error.draw

    def astray(model, observe=None):
        drawn = made(model, observe).copy()
        drawn[0] += 100 * (drawn[0] - image_error.reference[0])
        return drawn

    monkeypatch.setattr(image_error, "draw", astray)
    after = image_error.noise(plain), image_error.typical_noise(plain)
    assert after[0] > 500 * before[0] and after[1] < 30 * before[1]


def test_a_model_of_few_steps_draws_in_as_many(tmp_path, plain):
    image_error = TrajectoryError.drawn(session(tmp_path, steps=4), IMAGES)
    assert len(image_error.gains(plain)) == 4 == len(image_error.outputs)


def test_a_gain_is_the_error_of_the_images_by_that_of_one_step(tmp_path, plain):
    image_error = TrajectoryError.drawn(session(tmp_path), IMAGES)
    found = image_error.gains(plain)
    assert len(found) == IMAGE_STEPS and found == sorted(found) and all(gain > 0 for _, gain in found)
    denoiser = image_error.denoiser
    for hit, (time, gain) in itertools.islice(enumerate(reversed(found)), 0, None, 3):
        errors, steps = [], itertools.count()

        def model(hit=hit, errors=errors, steps=steps, **inputs):
            exact = denoiser(**inputs).numpy()
            if next(steps) != hit:
                return exact
            given = {n: torch.from_numpy(x).to(denoiser.input_specs[n].dtype) for n, x in inputs.items()}
            wrong = run(plain, given).numpy()
            errors.append((float(inputs["timestep"][0]), np.square(wrong - exact).sum()))
            return wrong

        noise = sampling.gaussian(IMAGES, denoiser.latent_shape, image_error.seed)
        drawn = sampling.sample(model, denoiser.scheduler, noise, {}, IMAGE_STEPS, seed=image_error.seed, batch=IMAGES)
        ((when, error),) = errors
        assert when == time
        assert gain == pytest.approx(np.square(drawn - image_error.reference).sum() / error, rel=1e-4)


def test_the_pass_measures_the_same_for_any_jobs(tmp_path, grouped):
    pass_ = TimeGains(weights="int2", images=IMAGES)
    found = [pass_.run(grouped, session(tmp_path, jobs=jobs)).facts[TIME_GAINS] for jobs in (1, 2)]
    assert found[0] == found[1]
    assert max(gain for _, gain in found[0]) == 1.0
    assert TIME_GAINS not in grouped.facts


def test_where_nothing_can_be_drawn_all_times_count_alike(tmp_path, grouped):
    program = TimeGains().run(grouped, Session(cache=tmp_path))
    assert TIME_GAINS not in program.facts
    assert "count alike" in program.facts[NOTES][-1]


def test_sensitivity_counts_errors_by_their_gains(tmp_path, grouped):
    """A gain of nearly nothing at all times but one leaves the loss at that time."""
    calibration = grouped.facts[CALIBRATION]
    measure = Sensitivity(inputs=4, formats=("int2",), activations=(8,))
    inputs = calibration.select(4)
    times = sorted({float(t) for t in inputs["timestep"]})
    assert len(times) > 1
    last, program = times[-1], grouped.fork()
    task = measure.tasks(program)[0]
    alone = {name: x[inputs["timestep"] == last] for name, x in inputs.items()}
    wanted, key = measure.measure(program, Ablation(program, alone), alone, task), measure.key(program, inputs)
    program.facts[TIME_GAINS] = [(time, 1.0 if time == last else 1e-9) for time in times]
    assert measure.measure(program, Ablation(program, inputs), inputs, task) == pytest.approx(wanted, rel=1e-4)
    assert measure.key(program, inputs) != key


def test_weights_of_a_noise_power_are_those_of_repeated_outputs():
    generator = torch.Generator().manual_seed(0)
    y, reference = (torch.randn(3, 4, 5, generator=generator) for _ in range(2))
    repeated = torch.tensor([0, 1, 1, 2, 2, 2])
    weighted = noise_power(y, reference, torch.tensor([1.0, 2.0, 3.0]))
    assert weighted == pytest.approx(noise_power(y[repeated], reference[repeated]))


def test_gains_between_measured_times_lie_on_a_logarithmic_line():
    found = by_gains(torch.tensor([0.0, 100.0, 150.0, 200.0, 900.0]), [(100.0, 1.0), (200.0, 100.0)])
    assert torch.allclose(found, torch.tensor([1.0, 1.0, 10.0, 100.0, 100.0], dtype=torch.float64))


@pytest.mark.parametrize("option", [{"weights": "int9"}, {"activations": 9}, {"images": 0}])
def test_bad_options(option):
    with pytest.raises(UserError):
        TimeGains(**option)
