"""Evaluation by functions of one's own, and by what conditions change, of models whose answers are known."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpq_compiler.evaluation import distances, user_functions
from mpq_compiler.evaluation.conditional_difference import ConditionalDifference, observed
from mpq_compiler.evaluation.evaluate import evaluate
from mpq_compiler.evaluation.painter import Painter
from mpq_compiler.sampling.conditioning import LABELS, Conditioning
from mpq_compiler.sampling.schedulers import Scheduler
from mpq_compiler.support.errors import Notice, UserError
from tests.harness import own_module

NULL = 4
EMBEDDED = np.random.default_rng(0).normal(size=(NULL + 1, 1, 12, 12)).astype(np.float32)

JUDGES = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(1, 8, 3, 2), torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3, 2), torch.nn.Flatten())

class Calls:
    images, asked = [], []

def features(images):
    assert not torch.is_grad_enabled() and images.dtype == torch.float32 and 0 <= images.min() <= images.max() <= 1
    Calls.images.append(len(images))
    return net(images)

def score(images, classes):
    Calls.asked += classes
    return [float(image.mean()) + label for image, label in zip(images, classes)]

several = {"dot": features}

def fails(images):
    raise ValueError("out of\\nluck")

def flat(images):
    return images.flatten()

def nan(images):
    return images.flatten(1) * float("nan")

def nothing(images):
    return None

def by_one(images, classes):
    return images.mean()
"""


def painter(strength: float = 1.0, turned: float = 0.0, inputs: tuple[str, ...] = (LABELS,), **changes: Any) -> Painter:
    """A model of images of 12 pixels a side, with the null class `NULL`, which adds a picture of its own to each."""

    def call(sample: np.ndarray, timestep: np.ndarray, class_labels: np.ndarray | None = None) -> np.ndarray:
        own = EMBEDDED[NULL if class_labels is None else class_labels]
        away = strength * (own - EMBEDDED[NULL])
        return 0.3 * sample + away + turned * away[:, :, ::-1] + EMBEDDED[NULL]

    specs = {name: ((), "int64") for name in inputs}
    conditioning = Conditioning("drawn", specs, classes=NULL if inputs else None, null_class=NULL if inputs else None)
    scheduler = Scheduler.from_config({"_class_name": "DDIMScheduler", "num_train_timesteps": 1000})
    about = {"latent": "sample", "shape": (1, 12, 12), "codec": "identity", **changes}
    return Painter("drawn", call, scheduler, conditioning=conditioning, **about)


@pytest.fixture
def judges(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module `judges` in the current folder, once it is imported."""
    own_module.write(tmp_path, "judges", JUDGES, monkeypatch)
    return lambda: sys.modules["judges"]


def test_features_and_scores_of_ones_own(judges) -> None:
    found = evaluate(
        painter(0.8), painter(), 37, 3, 1, features="judges:features", score=["judges:score"]
    )
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    module = judges()
    assert module.Calls.images[0] == 2 and max(module.Calls.images) <= user_functions.TOGETHER
    assert sum(module.Calls.images) == 2 + 2 * 37  # tried first, then of both models
    assert module.Calls.asked == [0, 1] + 2 * [i % 4 for i in range(37)]
    drawn = [each.decode(each.draw(each.conditioning.varied(37), 37, 3, 1)) for each in (painter(), painter(0.8))]
    theirs, ours = (module.net(torch.from_numpy((images + 1) / 2)).detach().double().numpy() for images in drawn)
    by = found["features"]["judges:features"]
    assert by["dimensions"] == theirs.shape[1] and by["fid"]["value"] > 0
    for name, metric in distances.METRICS.items():
        assert by[name]["value"] == pytest.approx(metric(theirs, ours), rel=1e-4, abs=1e-9)
    score = found["scores"]["judges:score"]
    means = [images.mean() / 2 + 0.5 + np.mean(np.arange(37) % 4) for images in drawn]
    assert (score["float"], score["value"]) == pytest.approx(means, abs=1e-5)
    difference = score["difference"]
    assert difference["value"] == pytest.approx(means[1] - means[0], abs=1e-5)
    assert difference["low"] <= difference["value"] <= difference["high"]
    assert difference["high"] - difference["low"] < 0.5 * (score["high"] - score["low"])  # pairs tell more


def test_functions_in_python_have_their_own_names() -> None:
    def bright(images: torch.Tensor) -> np.ndarray:
        return images.numpy().mean((2, 3))

    class Judge(torch.nn.Module):
        def forward(self, images: torch.Tensor, asked: list[None]) -> torch.Tensor:
            assert asked == [None] * len(images)
            return images.amax((1, 2, 3))

    plain = painter(inputs=())
    found = evaluate(plain, plain, 5, 2, 1, features=bright, score=Judge())
    ((name, by),) = found["features"].items()
    assert name.endswith("bright") and by["fid"]["value"] == by["kid"]["value"] == pytest.approx(0, abs=1e-12)
    (score,) = found["scores"].values()
    assert score["difference"] == {"value": 0, "low": 0, "high": 0}
    assert "conditional_difference" not in found and "features" not in evaluate(plain, plain, 5, 2, 1)


def test_covariances_of_fewer_images_than_features_are_a_notice(judges) -> None:
    with pytest.warns(Notice, match=r"FID of 5 images by the 16 features of 'judges:features' .* of rank 4"):
        evaluate(painter(), painter(), 5, 1, 1, features="judges:features")


@pytest.mark.parametrize(
    ("option", "given", "sentence"),
    [
        ("features", "judges", "features='judges' names no function: write MODULE:FUNCTION"),
        ("features", "nowhere:f", "'nowhere:f' cannot be imported: ModuleNotFoundError: No module named 'nowhere'"),
        ("features", "judges:featrues", "'judges:featrues' cannot be imported: AttributeError: module 'judges'"),
        ("features", "judges:several", "'judges:several' is a dict, and no function"),
        ("features", Path("features"), "features='features' is no function"),
        ("features", "judges:fails", r"'judges:fails' fails on images [2, 1, 12, 12]: ValueError: out of\nluck"),
        ("features", "judges:flat", "'judges:flat' gave [288] for 2 images: it has to give [2, D]"),
        ("features", "judges:nan", "'judges:nan' gave NaN or infinity"),
        ("features", "judges:nothing", "'judges:nothing' fails on images [2, 1, 12, 12]"),
        ("score", "judges:features", "score='judges:features' fails on images [2, 1, 12, 12]: TypeError"),
        ("score", "judges:by_one", "score='judges:by_one' gave [] for 2 images: it has to give [2]"),
    ],
)
def test_what_is_wrong_with_a_function_is_said_before_anything_is_drawn(judges, option, given, sentence) -> None:
    def never(**inputs: np.ndarray) -> np.ndarray:
        raise AssertionError("drawn")

    refused = painter()
    refused.call = never
    with pytest.raises(UserError) as raised:
        evaluate(refused, refused, 4, 2, 1, **{option: given})
    assert sentence in str(raised.value) and "\n" not in str(raised.value)


def test_latents_are_no_images(judges) -> None:
    latents = painter(shape=(4, 12, 12))
    with pytest.raises(UserError, match="features is of images, and 'drawn' draws latents of 4 channels"):
        evaluate(latents, latents, 4, 2, 1, features="judges:features")


@pytest.mark.parametrize("guidance", [None, 3.0])
@pytest.mark.parametrize(("strength", "turned"), [(1.0, 0.0), (0.5, 0.0), (1.0, 1.0), (0.0, 0.0)])
def test_what_the_condition_changes(guidance, strength, turned) -> None:
    """By hand, since the difference is what the model adds for a class, at any latents."""
    seen: list[Any] = []
    reference = painter()
    conditions = reference.conditioning.varied(20)
    reference.draw(conditions, 20, 3, 1, guidance, observe=seen.append)
    found = evaluate(painter(strength, turned), reference, 20, 3, 1, guidance=guidance)["conditional_difference"]
    assert found["images"] == 16 and len(found["steps"]) == 3
    assert [step["timestep"] for step in found["steps"]] == [call.timestep for call in seen if not call.guided]
    theirs = (EMBEDDED - EMBEDDED[NULL])[conditions.values[LABELS][:16]]
    ours = strength * (theirs + turned * theirs[:, :, ::-1])
    outputs = [call.output[:16] for call in seen if not call.guided]
    for step, output in zip(found["steps"], outputs, strict=True):
        with_condition = output - theirs + ours
        assert step["float"] == pytest.approx(np.linalg.norm(theirs) / np.linalg.norm(output), rel=1e-4)
        assert step["compiled"] == pytest.approx(np.linalg.norm(ours) / np.linalg.norm(with_condition), rel=1e-4)
    if strength == 0:
        assert found["cosine"] is None and found["compiled"] == pytest.approx(0, abs=1e-6)
    else:
        cosine = (theirs * ours).sum() / np.linalg.norm(theirs) / np.linalg.norm(ours)
        assert found["cosine"] == pytest.approx(float(cosine), rel=1e-4)
    total = np.linalg.norm(np.concatenate(outputs))
    assert found["float"] == pytest.approx(np.sqrt(3) * np.linalg.norm(theirs) / total, rel=1e-4)


def test_calls_of_a_pipeline_are_observed_two_samples_at_a_time() -> None:
    """The first without a condition; the channels behind those of the latents are a variance."""

    class Net(torch.nn.Module):
        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor) -> tuple[torch.Tensor]:
            return (torch.cat([sample + text[:, :, None, None], 0 * sample], 1),)

    def compiled(sample: torch.Tensor, timestep: torch.Tensor, text: torch.Tensor, return_dict: bool) -> Any:
        return Net()(sample, timestep, 2 * text)

    found, net = ConditionalDifference(), Net()
    for _ in range(2):
        with observed(net, compiled, found):
            for time in (9, 1):
                net(torch.ones(2, 3, 4, 4), torch.tensor(time), text=torch.tensor([[0.0], [1.0]]))
            net(torch.ones(1, 3, 4, 4), torch.tensor(0), text=torch.ones(1, 1))
    net(torch.ones(2, 3, 4, 4), torch.tensor(9), text=torch.ones(2, 1))
    told = found.to_json(2)
    assert [step.pop("timestep") for step in told["steps"]] == [9, 1]
    expected = {"float": 1 / 2, "compiled": 2 / 3, "cosine": 1.0}
    assert told["steps"][0] == {name: pytest.approx(value) for name, value in expected.items()}
    assert found.sums[0][0] == 2 * 48 * 2**2
