"""The training script on a handful of random images: it learns, resumes exactly, and its output loads."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import train_denoisers as script
from mpq_compiler.frontend.denoiser import load
from mpq_compiler.sampling.loop import gaussian, sample

JUDGES = Path(script.__file__).parent / "results" / "judges"
TRAINED = {
    "unet": "fashion-unet", "text": "fashion-text", "dit": "fashion-dit",
    "emoji-unet": str(JUDGES / "emoji-unet"), "emoji-dit": str(JUDGES / "emoji-dit"),
}  # fmt: skip
"""What each recipe has given."""


@pytest.fixture(scope="module")
def emoji(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "colour.npz"
    images = np.random.default_rng(0).integers(0, 256, (18, 32, 32, 3), np.uint8)
    images[:, 4:] //= 8
    images += (np.arange(18, dtype=np.uint8) % 9 * 20)[:, None, None, None]
    np.savez(path, x_train=images, y_train=np.arange(18) % 9, x_test=images[9:], y_test=np.arange(9))
    return path


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


def test_an_interrupted_run_ends_with_the_same_weights(npz, tmp_path):
    settings, data = script.Settings(steps=6, batch=8), script.Data.load(npz)
    straight = script.train(settings, data, tmp_path / "straight")
    script.train(settings, data, tmp_path / "halved", until=3)
    assert not (tmp_path / "halved" / "unet").exists()
    resumed = script.train(settings, data, tmp_path / "halved")
    assert resumed.step == 6
    assert all(torch.equal(a, b) for a, b in zip(weights(straight), weights(resumed), strict=True))
    with pytest.raises(SystemExit, match="another batch, seed"):
        script.train(script.Settings(steps=6, batch=4, seed=5), data, tmp_path / "halved")


@pytest.mark.parametrize("model", TRAINED)
def test_the_trained_model_loads_and_samples(npz, emoji, tmp_path, model):
    """Each recipe gives what its bundled model is: structure, sampling, conditions."""
    data = script.Data.load(emoji if "emoji" in model else npz, model)
    script.train(script.Settings(model=model, steps=2, batch=4), data, tmp_path / "out")
    trained, bundled = load(tmp_path / "out"), load(TRAINED[model])
    assert trained.parameters == bundled.parameters
    assert trained.scheduler == bundled.scheduler and trained.codec == bundled.codec
    assert trained.class_names == bundled.class_names and trained.null_class == bundled.null_class
    for name, value in bundled.default_conditions(12).items():
        assert np.array_equal(trained.default_conditions(12)[name], value)
    assert {k: v for k, v in trained.config.items() if not k.startswith("_")} == {
        k: v for k, v in bundled.config.items() if not k.startswith("_")
    }
    noise, conditions = gaussian(1, data.latents.shape[1:], 0), trained.default_conditions(1)
    latents = sample(trained, trained.scheduler, noise, conditions, 2, latent=trained.latent)
    shape = (1, 3, 32, 32) if "emoji" in model else (1, 1, 28, 28)
    assert trained.decode(latents).shape == shape


@pytest.mark.parametrize("model", ["unet", "text", "dit"])
def test_one_batch_can_be_learned(npz, model):
    trainer = script.Trainer(script.Settings(model=model, batch=8, warmup=1), script.Data.load(npz))
    losses = []
    for _ in range(15):
        trainer.step = 0  # the same images, noise and timesteps
        losses.append(trainer.advance())
    assert losses[-1] < 0.5 * losses[0]


def test_an_epoch_sees_every_image_once(npz):
    trainer = script.Trainer(script.Settings(batch=5), script.Data.load(npz))
    seen = []
    for step in range(4):
        trainer.step = step
        seen += trainer.rows().tolist()
    assert sorted(seen) == list(range(20))


def test_prompts_are_measured_on_the_images():
    """Brightness in thirds, and the rougher half of each class: a prompt names what the image shows."""
    light = torch.tensor([0.2, 0.5, 0.9, 0.25, 0.55, 0.95])
    pixels = torch.full((6, 1, 28, 28), -1.0)
    pixels[:, :, 4:24, 4:24] = (2 * light - 1)[:, None, None, None]
    pixels[3:, :, 4:24:2, 4:24] += 0.05  # stripes
    table = script.prompt_table(script.text_encoder())
    rows = script.prompt_rows(pixels, torch.full((6,), 9))
    tones = ("dark", "gray", "bright") * 2
    prompts = [f"{tone} {'plain' if i < 3 else 'patterned'} boot" for i, tone in enumerate(tones)]
    assert np.array_equal(table[rows], script.text_encoder().encode(prompts))
    assert np.array_equal(table[script.NULL_PROMPT], script.text_encoder().encode([""])[0])


def test_conditions_are_dropped_for_guidance(npz):
    data, rows = script.Data.load(npz), torch.arange(4)
    dropped = torch.tensor([True, False, True, False])
    trainer = script.Trainer(script.Settings(model="text", batch=4), data)
    text = trainer.conditions(rows, dropped)["encoder_hidden_states"]
    assert torch.equal(text[dropped], trainer.table[[script.NULL_PROMPT] * 2])
    assert torch.equal(text[~dropped], trainer.table[data.prompts()[rows[~dropped]]])
    for model in ("unet", "dit"):
        labels = script.Trainer(script.Settings(model=model, batch=4), data).conditions(rows, dropped)["class_labels"]
        assert labels.tolist() == [10, 1, 10, 3]


def test_latents_are_the_codec_of_the_images(npz):
    data, bundled = script.Data.load(npz), load("fashion-unet")
    with np.load(npz) as file:
        pixels = (bundled.decode(data.latents)[:, 0] + 1) * 127.5
        assert np.array_equal(np.rint(pixels), file["x_train"])


def test_data_that_do_not_fit(npz, tmp_path):
    with pytest.raises(SystemExit, match="not an npz"):
        script.Data.load(tmp_path / "none.npz")
    np.savez(tmp_path / "bad.npz", x_train=np.zeros((3, 32, 32), np.uint8), y_train=np.zeros(3))
    with pytest.raises(SystemExit, match=r"uint8 \[N, 28, 28\]"):
        script.Data.load(tmp_path / "bad.npz")
    np.savez(tmp_path / "classes.npz", x_train=np.zeros((3, 28, 28), np.uint8), y_train=np.array([0, 9, 10]))
    with pytest.raises(SystemExit, match="classes 0 to 9 for unet"):
        script.Data.load(tmp_path / "classes.npz")
    with pytest.raises(SystemExit, match=r"uint8 \[N, 32, 32, 3\] and y_train integers \[N\] for emoji-dit"):
        script.Data.load(npz, "emoji-dit")
    with pytest.raises(SystemExit, match="fewer than a batch"):
        script.Trainer(script.Settings(), script.Data.load(npz))
