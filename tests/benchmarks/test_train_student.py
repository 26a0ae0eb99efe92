"""The few-step students: where a step arrives, what a student learns, and that its model loads and draws."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import train_student as script
from benchmarks.train_denoisers import SCHEDULER, Data, Settings
from mpq_compiler.frontend.denoiser import load
from mpq_compiler.sampling.loop import gaussian, sample


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Data:
    path = tmp_path_factory.mktemp("data") / "random.npz"
    images = np.random.default_rng(0).integers(0, 256, (20, 28, 28), np.uint8)
    np.savez(path, x_train=images, y_train=np.arange(20) % 10, x_test=images[:2], y_test=np.arange(2))
    return Data.load(path, script.MODEL)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_a_step_is_the_samplers(steps: int) -> None:
    alphas, times = torch.from_numpy(SCHEDULER.alphas_cumprod).float(), SCHEDULER.timesteps(steps)
    x, output = torch.randn(2, 3, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    for index, time in enumerate(times):
        at = torch.full((3,), int(time))
        step = script.Step.between(alphas, at, at - 1000 // steps)
        expected = SCHEDULER.step(output.numpy(), index, steps, x.numpy())
        torch.testing.assert_close(step.taken(x, output), torch.from_numpy(expected), rtol=1e-4, atol=1e-5)


def test_the_velocity_that_arrives_arrives() -> None:
    """Of each timestep of the two-step student, for images that are not clipped."""
    alphas = torch.from_numpy(SCHEDULER.alphas_cumprod).float()
    x, arrived = 0.1 * torch.randn(2, 2, 4, 5, 5, generator=torch.Generator().manual_seed(0))
    at = torch.tensor([499, 999])
    step = script.Step.between(alphas, at, at - 500)
    arrived[1] = step.next_noise[1] * x[1] + 0.1 * arrived[1]  # within reach of the first step
    torch.testing.assert_close(step.taken(x, step.leading_to(arrived, x)), arrived, rtol=1e-4, atol=1e-5)


def test_a_student_learns_to_arrive_where_its_teacher_does(data: Data, tmp_path: Path) -> None:
    teacher = script.teacher()
    trainer = script.Distiller(Settings(script.MODEL, batch=8, warmup=1, learning_rate=5e-4), data, teacher, 2, 2)
    losses = []
    for _ in range(8):
        trainer.step = 0  # the same images, noise and timesteps
        losses.append(float(trainer.advance()))
    assert losses[-1] < 0.8 * losses[0]
    assert all(torch.equal(a, b) for a, b in zip(trainer.teacher.parameters(), teacher.parameters(), strict=True))


def test_the_students_load_and_draw(data: Data, tmp_path: Path) -> None:
    script.distill(Settings(script.MODEL, 1, batch=4), data, tmp_path)
    for steps, _ in script.STAGES:
        student = load(tmp_path / str(steps))
        drawn = sample(student, student.scheduler, gaussian(2, (4, 14, 14), 0), student.default_conditions(2), steps)
        assert np.isfinite(drawn).all() and student.parameters == load(script.TEACHER).parameters
