"""What denoisers are asked to draw: classes, prompts, conditions from a file, and guidance."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers.models.embeddings import get_timestep_embedding
from safetensors.numpy import save_file

from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend import trajectories
from mpq_compiler.sampling.conditioning import Conditioning
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

UNCONDITIONAL = Conditioning("pixels", {})
CLASSES = Conditioning("ten", {"class_labels": ((), "int64")}, classes=10, null_class=10)
NO_NULL = replace(CLASSES, null_class=None)
TEXT = Conditioning(
    "text",
    {"encoder_hidden_states": ((3, 2), "float32"), "time_ids": ((2,), "float32")},
    {"time_ids": [8, 8]},
)
FLUX = Conditioning("flux", {"encoder_hidden_states": ((3, 2), "float32"), "guidance": ((), "float32")})


@pytest.fixture(scope="module")
def prompts() -> Conditioning:
    return denoisers.load("fashion-text").conditioning


def test_classes_in_turn_with_the_null_class_for_guidance() -> None:
    varied = CLASSES.varied(12)
    assert varied.values["class_labels"].tolist() == [*range(10), 0, 1]
    assert varied.labels is not None and varied.null is not None
    assert varied.labels.tolist() == varied.values["class_labels"].tolist()
    assert varied.null["class_labels"].tolist() == [10] * 12
    mixed = CLASSES.mixed(22, seed=1).values["class_labels"]
    assert sorted(mixed.tolist()) == sorted([*range(11)] * 2)
    assert mixed.tolist() != CLASSES.mixed(22, seed=2).values["class_labels"].tolist()
    assert set(NO_NULL.mixed(22, seed=1).values["class_labels"].tolist()) == set(range(10))


def test_prompts_in_turn_with_the_empty_prompt_for_guidance(prompts: Conditioning) -> None:
    assert prompts.text is not None
    empty = prompts.text.encode([""])
    varied = prompts.varied(70)
    assert varied.null is not None and varied.labels is not None
    assert varied.labels.tolist() == [i % 10 for i in range(70)]
    assert (varied.null["encoder_hidden_states"] == empty).all()
    rows = prompts.mixed(33, seed=0).values["encoder_hidden_states"]
    assert (rows == empty).all(axis=(1, 2)).sum() == 3
    assert len(np.unique(rows.reshape(33, -1), axis=0)) == 31  # 30 prompts and the empty one


def test_guidance_goes_into_a_second_call_or_into_an_input(prompts: Conditioning) -> None:
    for conditioning in (prompts, CLASSES):
        conditions = conditioning.varied(4)
        assert set(conditioning.arguments(conditions, 4, None)) == {"conditions"}
        assert set(conditioning.arguments(conditions, 4, 1.0)) == {"conditions"}
        arguments = conditioning.arguments(conditions, 4, 2.0)
        assert arguments["guidance"] == 2.0 and arguments["null_conditions"] is conditions.null
    given = FLUX.from_arrays({"encoder_hidden_states": np.ones((2, 3, 2), np.float32)}, "x")
    assert FLUX.arguments(given, 2, 2.0)["conditions"]["guidance"].tolist() == [2.0, 2.0]
    assert FLUX.arguments(given, 2, None)["conditions"]["guidance"].tolist() == [3.5, 3.5]
    for conditioning, words in ((UNCONDITIONAL, "unconditional"), (NO_NULL, "no inputs for that")):
        with pytest.raises(UserError, match=words):
            conditioning.arguments(conditioning.varied(2), 2, 2.0)


@pytest.mark.parametrize(
    ("conditioning", "label", "prompt", "sentence"),
    [
        (UNCONDITIONAL, 3, None, "'pixels' has no classes: it is unconditional"),
        (UNCONDITIONAL, None, "boot", "'pixels' has no prompts"),
        (CLASSES, None, "boot", r"'ten' has no prompts, but the classes 0 to 9 \(10: no class\)$"),
        (CLASSES, 11, None, r"classes 0 to 9 \(10: no class\), and 11 is none of them"),
        (CLASSES, 3, "boot", "not both"),
        (TEXT, 3, None, "cannot be made without its encoders"),
        (TEXT, None, "boot", "conditions"),
        (TEXT, None, None, "conditions"),
    ],
)
def test_what_a_model_cannot_be_asked_for(
    conditioning: Conditioning, label: int | None, prompt: str | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        conditioning.chosen(2, label, prompt)


def test_a_text_model_has_no_classes(prompts: Conditioning) -> None:
    with pytest.raises(UserError, match="has no classes, but prompts such as 'dark plain tshirt'"):
        prompts.chosen(2, 3, None)


def test_a_file_gives_its_rows_in_turn(tmp_path: Path) -> None:
    path = tmp_path / "conditions.safetensors"
    text = np.arange(18, dtype=np.float16).reshape(3, 3, 2)
    save_file({"encoder_hidden_states": text, "null.encoder_hidden_states": -text[:1]}, path)
    conditioning = replace(TEXT, given=TEXT.load(path))
    varied = conditioning.varied(5)
    assert varied.null is not None
    assert varied.values["encoder_hidden_states"].dtype == np.float32
    assert np.array_equal(varied.values["encoder_hidden_states"], text[[0, 1, 2, 0, 1]])
    assert np.array_equal(varied.null["encoder_hidden_states"], np.repeat(-text[:1], 5, 0))
    assert varied.values["time_ids"].tolist() == [[8.0, 8.0]] * 5
    mixed = conditioning.mixed(3, seed=3).values["encoder_hidden_states"]
    assert sorted(mixed[:, 0, 0].tolist()) == [0, 6, 12]


@pytest.mark.parametrize(
    ("tensors", "sentence"),
    [
        ({"time_ids": np.ones((2, 2))}, "must hold 'encoder_hidden_states'"),
        ({"encoder_hidden_states": np.ones((2, 4, 2))}, r"is \[2, 4, 2\], and must be \[2, 3, 2\]"),
        ({"encoder_hidden_states": np.ones((0, 3, 2))}, r"must be \[N, 3, 2\]"),
        ({"encoder_hidden_states": np.ones((2, 3, 2)), "time_ids": np.ones((3, 2))}, "'encoder_hidden_states'"),
        ({"encoder_hidden_states": np.ones((2, 3, 2)), "encoder_hidden": np.ones(2)}, "did you mean"),
        ({"encoder_hidden_states": np.full((2, 3, 2), np.nan)}, "NaN"),
    ],
)
def test_files_that_are_refused(tmp_path: Path, tensors: dict[str, np.ndarray], sentence: str) -> None:
    save_file(tensors, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=sentence):
        TEXT.load(tmp_path / "x.safetensors")


def test_labels_in_a_file_must_be_whole_and_known(tmp_path: Path) -> None:
    save_file({"class_labels": np.array([1.5])}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="whole numbers"):
        CLASSES.load(tmp_path / "x.safetensors")
    save_file({"class_labels": np.array([3, 12])}, tmp_path / "x.safetensors")
    with pytest.raises(UserError, match="12 is none of them"):
        CLASSES.load(tmp_path / "x.safetensors")


def test_latent_consistency_models_take_the_guidance_as_sines() -> None:
    model = denoisers.wrap(tiny.model("sd15", time_cond_proj_dim=16), tokens=tiny.TOKENS)
    text = tiny.inputs("sd15", batch=2)["encoder_hidden_states"]
    assert model.conditions == ("encoder_hidden_states", "timestep_cond")
    assert model.conditioning.needed == ("encoder_hidden_states",)
    recorded = trajectories.record_calibration(model, 2, 1, conditions={"encoder_hidden_states": text}, guidance=4.0)
    # diffusers' pipeline embeds 1000 (guidance - 1) as timesteps are; float32 angles of 3000 are off by 1e-4
    expected = get_timestep_embedding(torch.tensor([3000.0, 3000.0]), 16, downscale_freq_shift=1)
    np.testing.assert_allclose(recorded["timestep_cond"], expected, atol=2e-4)


def test_dit_knows_its_null_class_by_structure() -> None:
    model = denoisers.wrap(tiny.model("dit"), name="dit")
    assert (model.classes, model.null_class) == (10, 10)
    null = model.null_conditions(2)
    assert null is not None
    assert null["class_labels"].tolist() == [10, 10]
