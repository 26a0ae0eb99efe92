"""The classifier's training on a handful of images: what it writes is what `Features` runs."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch

from benchmarks import emoji_classes, train_features
from mpq_compiler.evaluation.features import Features


@pytest.mark.parametrize("shape", [(28, 28), (32, 32, 3)])
def test_what_is_written_runs_and_knows_its_images(shape, tmp_path, monkeypatch):
    rng, labels = np.random.default_rng(0), np.arange(40) % 4
    images = rng.integers(0, 40, (40, *shape), np.uint8)
    for image, label in zip(images, labels, strict=True):
        image[8 * (label // 2) : 8 * (label // 2) + 12, 4:24] += np.uint8(60 + 100 * (label % 2))
    np.savez(tmp_path / "data.npz", x_train=images, y_train=labels, x_test=images[:8], y_test=labels[:8])
    arguments = [str(tmp_path / "data.npz"), str(tmp_path / "out.safetensors"), "--steps", "60", "--batch", "16"]
    monkeypatch.setattr(sys, "argv", ["train_features", *arguments])
    train_features.main()
    loaded = Features.load(tmp_path / "out.safetensors")
    pixels = train_features.pixels(images)
    assert loaded.shape == tuple(pixels.shape[1:])
    found, scores = loaded(pixels)
    assert (scores.argmax(1) == labels).mean() > 0.9
    assert np.allclose(found[:8].mean(0), loaded.mean, atol=1e-5)
    model = train_features.Classifier(pixels.shape[1], pixels.shape[2], 4).eval()
    model.load_state_dict({name: torch.from_numpy(np.array(value)) for name, value in loaded.weights.items()})
    with torch.no_grad():
        assert np.allclose(model(pixels).numpy(), scores, atol=1e-5)


def test_emoji_of_one_name_are_on_one_side(tmp_path, monkeypatch):
    """A picture in the other style would tell what a test picture shows; people of other skin are not taken twice."""
    import json

    from PIL import Image

    entries = [
        {"name": f"THING {number}", "category": "Objects", "image": f"{number}.png",
         "has_img_google": True, "has_img_twitter": True,
         "skin_variations": {"1F3FB": {"image": f"{number}.png", "has_img_google": True, "has_img_twitter": True}}}
        for number in range(20)
    ]  # fmt: skip
    for package in ("google", "twitter"):
        root = tmp_path / package / "package"
        (root / "img" / package / "64").mkdir(parents=True)
        (root / "emoji.json").write_text(json.dumps(entries))
        for number in range(20):
            Image.new("RGBA", (64, 64), (10 * number, 0, 0, 255)).save(root / "img" / package / "64" / f"{number}.png")
    monkeypatch.setattr(sys, "argv", ["emoji_classes", str(tmp_path), str(tmp_path / "out.npz")])
    emoji_classes.main()
    with np.load(tmp_path / "out.npz") as file:
        reds = {part: sorted(file[f"x_{part}"][:, 0, 0, 0].tolist()) for part in ("train", "test")}
        assert set(file["y_train"]) == {emoji_classes.CATEGORIES.index("Objects")}
    assert len(reds["train"]) == 36 and len(reds["test"]) == 4
    assert reds["test"][::2] == reds["test"][1::2] and not set(reds["test"]) & set(reds["train"])
