"""A compiled pipeline as its users go on: another scheduler, saved and loaded, methods of a model that it has not."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch

import mpq_compiler
from mpq_compiler.evaluation import metrics
from mpq_compiler.support.errors import UserError
from tests.api.test_diffusers import gentle, quiet, vae
from tests.harness import tiny

ROOT = Path(__file__).resolve().parents[2]
W8A8: dict[str, Any] = {"recipe": "w8a8", "target": "reference"}


def stable_diffusion(unet: Any) -> Any:
    """Stable Diffusion without a text encoder; prompts come encoded."""
    parts = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor"))
    scheduler = diffusers.DDIMScheduler(steps_offset=1, clip_sample=False)
    return quiet(
        diffusers.StableDiffusionPipeline(
            unet=unet, vae=vae(), scheduler=scheduler, requires_safety_checker=False, **parts
        )
    )


def prompt(seed: int) -> dict[str, Any]:
    text, null = (tiny.inputs("sd15", batch=1, seed=s)["encoder_hidden_states"] for s in (seed, 99))
    return {"prompt_embeds": text, "negative_prompt_embeds": null, "height": 16, "width": 16}


def draw(pipeline: Any, **changes: Any) -> np.ndarray:
    given = {"num_inference_steps": 4, "output_type": "latent", "generator": torch.Generator().manual_seed(3)}
    latents: torch.Tensor = pipeline(**{**prompt(50), **given, **changes}).images
    return latents.numpy()


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A pipeline that was compiled while it sampled by DDIM, whose timesteps are whole numbers."""
    output = tmp_path_factory.mktemp("swap") / "x.mpq"
    calls = [prompt(seed) for seed in range(4)]
    return mpq_compiler.compile(stable_diffusion(gentle("sd15")), output, calls=calls, steps=5, **W8A8)


@pytest.mark.parametrize(
    "name",
    [
        "EulerDiscreteScheduler",
        "EulerAncestralDiscreteScheduler",
        "HeunDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "UniPCMultistepScheduler",
        "PNDMScheduler",
        "LCMScheduler",
    ],
)
def test_another_scheduler_behind_the_compilation(compiled: Any, name: str) -> None:
    """Its timesteps may be fractions, whatever those of the calibration were."""
    whole = stable_diffusion(gentle("sd15"))
    for pipeline in (whole, compiled):
        pipeline.scheduler = getattr(diffusers, name).from_config(whole.scheduler.config)
    assert metrics.sqnr_db(draw(whole), draw(compiled)) > 30


@pytest.mark.parametrize("first", ["mpq_compiler", "diffusers"])
def test_a_pipeline_is_saved_and_loaded(compiled: Any, tmp_path: Path, first: str) -> None:
    """Whichever package another process imports first; it draws the same bits there."""
    compiled.save_pretrained(tmp_path / "saved")
    compiled.save_pretrained(tmp_path / "saved")  # over itself
    compiled.unet.save_pretrained(tmp_path / "first" / "unet")  # before other parts have made the folder
    second = {"mpq_compiler": "diffusers", "diffusers": "mpq_compiler"}[first]
    script = f"""
import {first}, {second}, diffusers, numpy, torch
from tests.api.test_swap import draw, quiet
absent = dict.fromkeys(("text_encoder", "tokenizer", "safety_checker", "feature_extractor", "image_encoder"))
pipeline = quiet(diffusers.StableDiffusionPipeline.from_pretrained({str(tmp_path / "saved")!r}, **absent))
assert type(pipeline.unet).__name__ == "CompiledDenoiser", type(pipeline.unet)
numpy.save({str(tmp_path / "drawn.npy")!r}, draw(pipeline))
"""
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True, cwd=ROOT)
    assert np.array_equal(np.load(tmp_path / "drawn.npy"), draw(compiled))


def test_something_else_in_the_way_stays(compiled: Any, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"is no artifact|not an artifact"):
        compiled.unet.save_pretrained(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda p: p.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6), "enable_freeu"),
        (lambda p: p.fuse_qkv_projections(), "fuse_qkv_projections"),
        (lambda p: p.unet.set_attn_processor(None), "set_attn_processor"),
        (lambda p: p.unet.load_lora_adapter({}), "load_lora_adapter"),
        (lambda p: p.unet.add_adapter(None), "add_adapter"),
        (lambda p: p.unet.enable_gradient_checkpointing(), "enable_gradient_checkpointing"),
        (lambda p: list(p.unet.parameters()), "parameters"),
        (lambda p: p.unet.state_dict(), "state_dict"),
        (lambda p: p.unet.half(), "half"),
    ],
)
def test_what_only_a_model_can_do_says_when(compiled: Any, call: Any, name: str) -> None:
    with pytest.raises(UserError, match=f"'{name}' is of the model.*UNet2DConditionModel had .* before compiling"):
        call(compiled)


def test_attributes_of_the_configuration(compiled: Any) -> None:
    assert compiled.unet.in_channels == compiled.unet.config.in_channels == 4
    assert not hasattr(compiled.unet, "hf_hook") and not hasattr(compiled.unet, "enable_freeu")
    with pytest.raises(AttributeError, match="a compiled denoiser has no attribute 'nonsense'"):
        _ = compiled.unet.nonsense
