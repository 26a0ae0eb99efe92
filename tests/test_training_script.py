"""The training script on a handful of random images: it learns, resumes exactly, and its output loads."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_compiler.denoiser import gaussian, load, sample

SCRIPT = Path(__file__).parents[1] / "benchmarks" / "train_fashion.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("train_fashion", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


@pytest.fixture(scope="module")
def npz(tmp_path_factory) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path_factory.mktemp("data") / "random.npz"
    images = (
        rng.integers(0, 16, (20, 28, 28), np.uint8) + (np.arange(20, dtype=np.uint8) % 10 * 25)[:, None, None]
    )
    np.savez(path, x_train=images, y_train=np.arange(20) % 10, x_test=images[:2], y_test=np.arange(2))
    return path


def weights(trainer) -> list[torch.Tensor]:
    return [*trainer.model.parameters(), *trainer.average.parameters()]


def test_an_interrupted_run_ends_with_the_same_weights(script, npz, tmp_path):
    settings, data = script.Settings(steps=6, batch=8), script.Data.load(npz)
    straight = script.train(settings, data, tmp_path / "straight")
    script.train(settings, data, tmp_path / "halved", until=3)
    assert not (tmp_path / "halved" / "unet").exists()
    resumed = script.train(settings, data, tmp_path / "halved")
    assert resumed.step == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    with pytest.raises(SystemExit, match="another batch, seed"):
        script.train(script.Settings(steps=6, batch=4, seed=5), data, tmp_path / "halved")


def test_the_trained_model_loads_and_samples(script, npz, tmp_path):
    script.train(script.Settings(steps=2, batch=4), script.Data.load(npz), tmp_path)
    trained, bundled = load(tmp_path), load("fashion-unet")
    assert trained.parameters == bundled.parameters
    assert trained.scheduler == bundled.scheduler and trained.class_names == bundled.class_names
    assert {k: v for k, v in trained.config.items() if not k.startswith("_")} == {
        k: v for k, v in bundled.config.items() if not k.startswith("_")
    }
    latents = sample(
        trained, trained.scheduler, gaussian(1, (4, 14, 14), 0), trained.default_conditions(1), 2
    )
    assert trained.decode(latents).shape == (1, 1, 28, 28)


def test_one_batch_can_be_learned(script, npz):
    trainer = script.Trainer(script.Settings(batch=8, warmup=1), script.Data.load(npz))
    losses = []
    for _ in range(15):
        trainer.step = 0  # the same images, noise and timesteps
        losses.append(trainer.advance())
    assert losses[-1] < 0.5 * losses[0]


def test_an_epoch_sees_every_image_once(script, npz):
    trainer = script.Trainer(script.Settings(batch=5), script.Data.load(npz))
    seen = []
    for step in range(4):
        trainer.step = step
        seen += trainer.rows().tolist()
    assert sorted(seen) == list(range(20))


def test_latents_are_the_codec_of_the_images(script, npz):
    data, bundled = script.Data.load(npz), load("fashion-unet")
    with np.load(npz) as file:
        pixels = (bundled.decode(data.latents)[:, 0] + 1) * 127.5
        assert np.array_equal(np.rint(pixels), file["x_train"])


def test_data_that_do_not_fit(script, npz, tmp_path):
    with pytest.raises(SystemExit, match="not an npz"):
        script.Data.load(tmp_path / "none.npz")
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((3, 32, 32), np.uint8), y_train=np.zeros(3))
    with pytest.raises(SystemExit, match=r"uint8 \[N, 28, 28\]"):
        script.Data.load(tmp_path / "bad.npz")
    with pytest.raises(SystemExit, match="fewer than a batch"):
        script.Trainer(script.Settings(), script.Data.load(npz))
