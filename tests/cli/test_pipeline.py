"""Pipelines on the command line: from a folder to a picture, what is chosen of it, and what is refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from PIL import Image

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle, pipeline
from mpq_compiler.cli import mpqc
from mpq_compiler.driver import pipeline as pipelines
from mpq_compiler.frontend import pipeline_parts, widened
from mpq_compiler.runtime.pipeline import load_pipeline
from tests.harness import compiled_pipeline, once, packed, tiny, tiny_pipelines

FEW = ("--recipe", "w8a8", "--samples", "2", "--steps", "4", "--jobs", "1")


@pytest.fixture
def folder() -> Path:
    """A pipeline as diffusers saves it; read only."""
    return once.made("tiny-sd", tiny_pipelines.pipeline("stable-diffusion").save_pretrained)


def run(tmp_path: Path, *arguments: object, cache: bool = True) -> Any:
    """The JSON of a command that ends well."""
    document = tmp_path / "result.json"
    further = ("--cache", packed.kernel_cache()) if cache else ()
    assert mpqc.main([*map(str, (*arguments, *further)), "--json", str(document)]) == 0
    return json.loads(document.read_text())


def refused(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    """The sentence of a command that is refused."""
    assert mpqc.main([*map(str, arguments)]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("mpqc: ")
    return said


def test_from_a_folder_to_a_picture(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = tmp_path / "out.mpq"
    report = run(tmp_path, "compile", folder, "-o", out, *FEW)
    assert schemas.check(report, "compile-pipeline") is None
    roles = {name: part["role"] for name, part in report["parts"].items()}
    assert roles == {"text_encoder": "text", "unet": "denoiser", "vae": "decoder"}
    for part in report["parts"].values():
        assert schemas.check({key: value for key, value in part.items() if key != "role"}, "compile") is None
        assert part["quality"]["sqnr_db"] > 20 and abs(part["quality"]["agreement_db"]) < 0.1
    drawn = tmp_path / "x.png"
    command = ("generate", out, "-o", drawn, "--prompt", "a red fox", "--steps", 3, "--images", 2, "--seed", 4)
    result = run(tmp_path, *command, cache=False)
    assert schemas.check(result, "generate") is None and result["guidance"] == 7.5
    expected = load_pipeline(out)(["a red fox"] * 2, steps=3, seed=4)
    np.testing.assert_array_equal(np.asarray(Image.open(drawn)), np.concatenate([*map(np.asarray, expected.images)], 1))
    with_program = compiled_pipeline.path()  # in memory, and again: the same bytes
    for part in roles:
        for name in (bundle.WEIGHTS, bundle.KERNELS):
            assert (out / part / name).read_bytes() == (with_program / part / name).read_bytes()


def test_a_picture_of_a_picture(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out, first = compiled_pipeline.path(), tmp_path / "first.png"
    pipe = load_pipeline(out)
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (20, 30, 3), np.uint8)).save(first)
    command = ("generate", out, "-o", tmp_path / "x.png", "--prompt", "a red fox", "--steps", 4, "--image", first)
    result = run(tmp_path, *command, "--strength", 0.5, cache=False)
    height, width = pipe.size
    assert f"has 30 x 20 pixels and is resized to {width} x {height}" in " ".join(capsys.readouterr().err.split())
    assert schemas.check(result, "generate") is None and (result["image"], result["strength"]) == (str(first), 0.5)
    resized = Image.open(first).resize((width, height), Image.Resampling.LANCZOS)
    expected = pipe("a red fox", steps=4, image=resized, strength=0.5).images[0]
    np.testing.assert_array_equal(np.asarray(Image.open(tmp_path / "x.png")), np.asarray(expected))
    assert "0 steps to draw" in refused(capsys, *command, "--strength", 0.1, "--overwrite")

    run(tmp_path, "compile", folder, "-o", tmp_path / "plain.mpq", "--parts", "text,decoder", *FEW)
    message = refused(capsys, "generate", tmp_path / "plain.mpq", *command[2:], "--overwrite")
    assert "has no encoder: compile the pipeline with --parts text,denoiser,decoder,encoder" in message


def test_a_prompt_to_a_file_of_tokens(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, ids = compiled_pipeline.path(), tmp_path / "ids"
    command = ("tokenize", out, "-o", ids, "--prompt", "a red fox " * 20, "--steps", 2)
    result = run(tmp_path, *command, cache=False)
    assert schemas.check(result, "tokenize") is None and result["calls"] == 2 + 4 + 1
    assert "is cut off" in capsys.readouterr().err
    assert "exists" in refused(capsys, *command)
    for wrong, said in ((("--steps", 0), "give 1 or more"), (("--images", 0), "give 1 or more")):
        assert said in refused(capsys, "tokenize", out, "-o", tmp_path / "x", "--prompt", "x", *wrong)
    assert "is no pipeline" in refused(capsys, "tokenize", out / "unet", "-o", tmp_path / "x", "--prompt", "x")
    assert not (tmp_path / "x").exists()


def test_the_denoiser_alone_is_the_artifact_that_it_was(folder: Path, tmp_path: Path) -> None:
    run(tmp_path, "compile", folder, "-o", tmp_path / "a.mpq", "--parts", "denoiser", *FEW, "--target", "reference",
        "--calibration", _calls(tmp_path))  # fmt: skip
    run(tmp_path, "compile", folder / "unet", "-o", tmp_path / "b.mpq", *FEW, "--target", "reference",
        "--scheduler", folder / "scheduler" / "scheduler_config.json", "--calibration", _calls(tmp_path))  # fmt: skip
    made = [bundle.read(tmp_path / name).manifest for name in ("a.mpq", "b.mpq")]
    assert made[0]["files"][bundle.WEIGHTS] == made[1]["files"][bundle.WEIGHTS]


def _calls(folder: Path) -> Path:
    from safetensors.numpy import save_file

    draw = np.random.default_rng(0)
    rows = {"sample": (16, 4, 8, 8), "encoder_hidden_states": (16, tiny_pipelines.TOKENS, 32)}
    tensors = {name: draw.standard_normal(shape, np.float32) for name, shape in rows.items()}
    save_file(tensors | {"timestep": np.linspace(999, 0, 16).astype(np.int64)}, folder / "calls.safetensors")
    return folder / "calls.safetensors"


def test_another_decoder_and_prompts_of_ones_own(folder: Path, tmp_path: Path) -> None:
    decoder = AutoencoderTiny(
        encoder_block_out_channels=(16, 16), decoder_block_out_channels=(16, 16), num_encoder_blocks=(1, 1),
        num_decoder_blocks=(1, 1), latent_channels=4,
    )  # fmt: skip
    decoder.save_pretrained(tmp_path / "taesd")
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("\n".join(tiny_pipelines.WORDS.split()))
    report = run(tmp_path, "compile", folder, "-o", tmp_path / "a.mpq", "--parts", "text,decoder", "--prompts", prompts,
                 "--decoder", tmp_path / "taesd", *FEW)  # fmt: skip
    assert [*report["parts"]] == ["text_encoder", "vae"]
    assert bundle.read(tmp_path / "a.mpq" / "vae").manifest["model"]["parameters"] == sum(
        p.numel() for p in decoder.decoder.parameters()
    )
    few = [note for note in report["notes"] if "calibrated on" in note]
    assert [note.split(":")[0] for note in few] == ["text_encoder"]
    assert few[0].endswith("several dB: give more --prompts")


def test_a_part_that_was_left_out_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(compiled_pipeline.path(), tmp_path / "a.mpq"))
    document = json.loads((out / pipeline.FILE).read_text())
    del document["parts"]["vae"]
    document[pipeline.OWN] = bundle.digest(document, pipeline.OWN)
    (out / pipeline.FILE).write_bytes(bundle.canonical(document))
    said = refused(capsys, "generate", out, "-o", tmp_path / "x.png", "--prompt", "a fox", "--steps", 1)
    assert "has no decoder: compile the pipeline with --parts text,denoiser,decoder" in said
    assert not (tmp_path / "x.png").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--parts", "vae"), "there is no part 'vae' of a pipeline"),
        (("--parts", ","), "--parts names no part"),
        (("--decoder", "nowhere"), "cannot read 'nowhere/config.json'"),
        (("--prompts", "nowhere.txt"), "cannot read --prompts 'nowhere.txt'"),
        (("--shapes", "1x4x8x8,1x4x4x4"), "--shapes of a whole pipeline has one size"),
        (("--estimate",), "--estimate is of a pipeline's denoiser: add --parts denoiser"),
        (("--parts", "denoiser", "--decoder", "x"), "--decoder is of a pipeline that is compiled with all its parts"),
        (("--weights", "0"), "leaves no room at all"),
        (("--weights", "4", "--parts", "denoiser,denoisers"), "there is no part 'denoisers'"),
        (("--weights", "text=8,unet=4"), "has a budget of 'unet', which is no part"),
        (("--weights", "text=8,text=4"), "has two budgets of 'text'"),
        (("--weights", "text=8,denoiser=4"), "has no budget of 'decoder'"),
        (("--weights", "text=8,denoiser=4,decoder=x"), "'x' is neither bits (3.7) nor bytes"),
    ],
)
def test_what_is_refused_at_once(
    arguments: tuple[str, ...], said: str, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "compile", folder, "-o", tmp_path / "a.mpq", *arguments)
    assert not (tmp_path / "a.mpq").exists()


def test_loading_prints_nothing_that_nobody_can_act_on(folder: Path) -> None:
    """Importing the pipeline's class warns of torchvision, where it is not installed."""
    code = f"from mpq_compiler.driver import pipeline; pipeline.load({str(folder)!r})"
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert "torchvision" not in done.stderr


def test_a_pipeline_without_text_encoders_is_its_denoiser(tmp_path: Path) -> None:
    folder = tiny.save("unet2d", tmp_path)
    index = {"_class_name": "LDMPipeline", "unet": ["diffusers", "UNet2DModel"], "vqvae": ["diffusers", "VQModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    report = run(tmp_path, "compile", folder, "-o", tmp_path / "a.mpq", *FEW, "--target", "reference")
    assert schemas.check(report, "compile") is None


def test_weights_in_half_precision_stay_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is held in float32 but what an operator reads, and the parts are those of the same weights in float32."""
    source = tiny_pipelines.pipeline("stable-diffusion").to(torch.float16)
    source.save_pretrained(tmp_path / "half")
    source.to(torch.float32).save_pretrained(tmp_path / "float")
    monkeypatch.setattr(widened, "LEAST", 1)
    half, whole = (pipelines.load(tmp_path / name) for name in ("half", "float"))
    for part in ("unet", "text_encoder"):
        assert all(isinstance(p, widened.Widened) for p in getattr(half, part).parameters() if p.numel() > 1)
        assert not any(isinstance(p, widened.Widened) for p in getattr(whole, part).parameters())
    apart = [pipeline_parts.take_apart(each, "unet") for each in (half, whole)]
    ours, theirs = (each.encode(["a red fox"]) for each in apart)
    np.testing.assert_array_equal(ours["encoder_hidden_states"], theirs["encoder_hidden_states"])
    assert apart[0].conditions == apart[1].conditions and apart[0].decoded == apart[1].decoded


def test_a_folder_that_lacks_a_part(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lacking = Path(shutil.copytree(folder, tmp_path / "lacking"))
    shutil.rmtree(lacking / "vae")
    said = refused(capsys, "compile", lacking, "-o", tmp_path / "a.mpq")
    assert "cannot be loaded" in said and "--parts denoiser" in said


def test_parts_are_those_of_a_pipeline(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny.save("unet2d", tmp_path / "unet")
    said = refused(capsys, "compile", tmp_path / "unet", "-o", tmp_path / "a.mpq", "--parts", "text")
    assert "parts are those of a pipeline" in said


JUDGES = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, 4), torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten())

def words(images, prompts):
    return images.mean((1, 2, 3)) + torch.tensor([len(prompt.split()) for prompt in prompts])
"""


def test_pictures_are_held_against_those_of_the_float_pipeline(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "pipeline_judges.py").write_text(JUDGES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    result = run(tmp_path, "eval", compiled_pipeline.path(), "--against", folder, "--images", 3, "--eval-steps", 4,
                 "--features", "pipeline_judges:net", "--score", "pipeline_judges:words", cache=False)  # fmt: skip
    by, score = result["features"]["pipeline_judges:net"], result["scores"]["pipeline_judges:words"]
    assert by["dimensions"] == 4 and by["recall"] is None and by["fid"]["value"] < 0.01
    assert score["value"] > 2 and abs(score["difference"]["value"]) < 0.05
    assert [*result["parts"]] == ["text_encoder", "unet", "vae", "vae_encoder"]
    assert all(0 < part["bops"] < part["float_bops"] for part in result["parts"].values())
    difference = result["conditional_difference"]
    assert difference["images"] == 3 and len(difference["steps"]) == 4 and difference["cosine"] > 0.9
    assert difference["compiled"] == pytest.approx(difference["float"], rel=0.1)
    assert schemas.check(result, "eval-pipeline") is None
    assert result["images"] == 3 and result["psnr_db"]["value"] > 33 and result["ssim"]["value"] > 0.95


def test_what_eval_of_a_pipeline_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = compiled_pipeline.path()
    assert "name the folder of the float one with --against" in refused(capsys, "eval", path)
    assert "--weights would change nothing" in refused(capsys, "eval", path, "--against", "x", "--weights", "4")
    missing = ("eval", path, "--against", "x", "--score", "nowhere:f")
    assert "--score 'nowhere:f' cannot be imported" in refused(capsys, *missing)
    assert "--prompts is of a pipeline" in refused(capsys, "eval", path / "unet", "--prompts", "x")


def test_a_pipeline_is_verified_with_its_parts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = Path(shutil.copytree(compiled_pipeline.path(), tmp_path / "a.mpq"))
    result = run(tmp_path, "verify", out, cache=False)
    assert schemas.check(result, "verify") is None and result["sha256"] == pipeline.read(out).document[pipeline.OWN]
    found = run(tmp_path, "inspect", out, cache=False)
    assert schemas.check(found, "inspect") is None
    assert [*found["parts"]] == ["text_encoder", "unet", "vae", "vae_encoder"]
    assert "is a pipeline: name one of its parts" in refused(capsys, "inspect", out, "--layers")
    assert "were given their bytes apart" in refused(capsys, "inspect", out, "--why", "vae")
    assert "has no part 'vea'" in refused(capsys, "inspect", out, "--why", "vea")
    layer = bundle.read(out / "vae").manifest["plan"]["layers"][0]["name"]
    assert run(tmp_path, "inspect", out, "--why", f"vae/{layer}", cache=False)["parameter"] == layer
    (out / "vae" / bundle.KERNELS).write_bytes(b"")
    assert "kernels.so is truncated" in refused(capsys, "verify", out)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((), "which draws what it is told: add --prompt"),
        (("--prompt", "x", "--class", "3"), "which draws prompts alone: leave --class out"),
        (("--prompt", "x", "--compare", "y"), "leave --compare out"),
        (("--prompt", "x", "--guidance", "1", "--negative-prompt", "y"), "give a guidance above 1"),
        (("--prompt", "x", "--steps", "0"), "give 1 or more of both"),
        (("--prompt", "x", "--scheduler", "DDIM"), "the scheduler 'DDIM' is not known; there is: DDIMScheduler"),
        (("--prompt", "x", "--scheduler", "no.json"), "cannot read 'no.json'"),
        (("--prompt", "x", "--strength", "0.5"), "add --image FILE, or leave it out"),
        (("--prompt", "x", "--image", "no.png"), "--image no.png: there is no such file"),
        (("--prompt", "x", "--image", __file__), "is no picture that Pillow reads"),
    ],
)
def test_pictures_that_cannot_be(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert said in refused(capsys, "generate", compiled_pipeline.path(), "-o", tmp_path / "x.png", *arguments)
    assert not [*tmp_path.iterdir()]
