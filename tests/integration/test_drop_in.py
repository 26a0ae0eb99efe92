"""Artifacts in the place of diffusers' denoisers, called as its pipelines call them, in the process that compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import mpq_compiler
from mpq_compiler.api import compile
from mpq_compiler.evaluation import metrics
from mpq_compiler.frontend import denoiser, record
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from tests.harness import tiny

SCHEDULERS = {"DDPMPipeline": "DDPMScheduler", "DDIMPipeline": "DDIMScheduler"}


def gentle() -> torch.nn.Module:
    """A tiny model of images whose output is small: a random denoiser that is not would amplify every difference."""
    model = tiny.model("unet2d")
    model.conv_out.weight.mul_(0.2)
    model.conv_out.bias.zero_()
    return model


def draw(name: str, unet: Any, seed: int, images: int = 4) -> np.ndarray:
    """Images [N, 3, H, W] in [-1, 1] of a diffusers pipeline with that denoiser."""
    pipeline = getattr(diffusers, name)(unet=gentle(), scheduler=getattr(diffusers, SCHEDULERS[name])())
    pipeline.unet = unet
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(seed)
    drawn = pipeline(batch_size=images, generator=generator, num_inference_steps=5, output_type="np").images
    return 2 * np.moveaxis(drawn, -1, 1) - 1


@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> CompiledDenoiser:
    """Calibrated on what both pipelines ask the float model for, from other noise."""
    folder = tmp_path_factory.mktemp("pixels")
    for name in SCHEDULERS:
        unet = gentle()
        with record.record_inputs(unet, folder / name):
            draw(name, unet, seed=1, images=8)
    calls = [load_file(folder / name) for name in SCHEDULERS]
    save_file({n: torch.cat([c[n] for c in calls]) for n in calls[0]}, folder / "calibration")
    model = denoiser.wrap(gentle(), name="pixels")
    compile.compile(model, folder / "unet.mpq", recipe="w8a8", calibration=folder / "calibration")
    return mpq_compiler.load(folder / "unet.mpq")


@pytest.mark.parametrize("name", SCHEDULERS)
def test_unconditional_pipelines(compiled: CompiledDenoiser, name: str) -> None:
    """From the same generator the pipeline draws what it draws with the float model, and not what it does without."""
    silent = gentle()
    silent.conv_out.weight.zero_()
    floating, artifact, without = (draw(name, unet, seed=0) for unet in (gentle(), compiled, silent))
    assert metrics.psnr_db(floating, artifact) > 30
    assert metrics.psnr_db(floating, without) < metrics.psnr_db(floating, artifact) - 10


def test_called_as_stable_diffusion_calls_its_unet(tmp_path: Path) -> None:
    root = tiny.save("sd15", tmp_path)
    file = tmp_path / "calibration.safetensors"
    save_file(tiny.inputs("sd15", batch=32, seed=1), file)
    compile.compile(root, tmp_path / "unet.mpq", recipe="w8a8", calibration=file)
    given = tiny.inputs("sd15", batch=2)  # both calls of guidance
    outputs = [
        unet(
            given["sample"],
            torch.tensor(601),
            encoder_hidden_states=given["encoder_hidden_states"],
            timestep_cond=None,
            cross_attention_kwargs=None,
            added_cond_kwargs=None,
            return_dict=False,
        )[0]
        for unet in (tiny.model("sd15"), mpq_compiler.load(tmp_path / "unet.mpq"))
    ]
    assert isinstance(outputs[1], torch.Tensor)
    assert outputs[1].shape == outputs[0].shape
    assert metrics.sqnr_db(*(output.numpy() for output in outputs)) > 15
