"""Pipelines taken apart: of every family the parts make what the pipeline itself gives its denoiser, and its images."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, UNet2DModel

from mpq_compiler.frontend import pipeline_parts
from mpq_compiler.frontend.input_specs import convention_of
from mpq_compiler.frontend.pipeline_parts import Parts
from mpq_compiler.frontend.watch_pipeline import Watched, watch
from mpq_compiler.support.errors import UserError
from tests.harness import tiny_pipelines

PROMPTS = ("", "green harbour", "an old man on a tree by the harbour, and a blue house in the green sea of snow")
"""An empty prompt, a short one, and one that is cut."""


@functools.cache
def parts(name: str) -> Parts:
    source = tiny_pipelines.pipeline(name)
    return pipeline_parts.take_apart(source, tiny_pipelines.denoiser(name), tiny_pipelines.SIZES.get(name))


def drawn(name: str, prompt: str) -> Watched:
    source = tiny_pipelines.pipeline(name)
    call = {"prompt": prompt, "num_inference_steps": 1, "output_type": "pt", "guidance_scale": 1.0}
    if (size := tiny_pipelines.SIZES.get(name)) is not None:
        call |= {"height": size[0] * source.vae_scale_factor, "width": size[1] * source.vae_scale_factor}
    if name == "pixart":
        call["use_resolution_binning"] = False
    source.set_progress_bar_config(disable=True)
    return watch(source, tiny_pipelines.denoiser(name), **call, generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_parts_make_what_the_pipeline_makes(name: str) -> None:
    taken = parts(name)
    convention = convention_of(getattr(tiny_pipelines.pipeline(name), taken.denoiser))
    for prompt in PROMPTS:
        seen = drawn(name, prompt)
        given = convention.inputs(seen.called or {})
        for condition, ours in taken.encode([prompt]).items():
            np.testing.assert_allclose(ours, given[condition].numpy(), rtol=1e-5, atol=1e-6)
    assert seen.latents is not None and seen.decoded is not None and seen.images is not None
    z = taken.decoded(latents=seen.latents.numpy())["z"]
    np.testing.assert_array_equal(z, seen.decoded.numpy())
    with torch.no_grad():
        sample = taken.decoder(torch.from_numpy(z)).numpy()
    np.testing.assert_allclose(taken.images(sample=sample)["images"], seen.images.numpy(), atol=1e-6)


@pytest.mark.parametrize(
    ("name", "null", "guidance"),
    [
        ("stable-diffusion", "empty", 7.5),
        ("sdxl", "zeros", 5.0),
        ("pixart", "empty", 4.5),
        ("sd3", "empty", 7.0),
        ("flux", None, 3.5),
    ],
)
def test_what_guidance_leads_away_from(name: str, null: str | None, guidance: float) -> None:
    assert (parts(name).null, parts(name).guidance) == (null, guidance)


def test_the_decoder_has_no_encoder() -> None:
    taken = parts("stable-diffusion")
    whole = tiny_pipelines.pipeline("stable-diffusion").vae
    names = {name.partition(".")[0] for name, _ in taken.decoder.model.named_parameters()}
    assert names == {"decoder", "post_quant_conv"}
    assert {name.partition(".")[0] for name, _ in whole.named_parameters()} > names  # which the pipeline keeps


def test_a_pipeline_is_left_as_it_was() -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    kinds = {name: type(part) for name, part in source.components.items()}
    pipeline_parts.take_apart(source, "unet")
    assert {name: type(part) for name, part in source.components.items()} == kinds
    assert not {"forward", "decode", "step"} & {
        *vars(source.unet), *vars(source.vae), *vars(source.text_encoder), *vars(source.scheduler)
    }  # fmt: skip


def test_a_pipeline_without_prompts_is_refused() -> None:
    unet = UNet2DModel(sample_size=8, block_out_channels=(32, 32), norm_num_groups=16, layers_per_block=1,
                       down_block_types=("DownBlock2D",) * 2, up_block_types=("UpBlock2D",) * 2)  # fmt: skip
    source = DDPMPipeline(unet, tiny_pipelines.pipeline("stable-diffusion").scheduler)
    with pytest.raises(UserError, match=r"DDPMPipeline draws without a prompt.*--parts denoiser"):
        pipeline_parts.take_apart(source, "unet")


def test_a_pipeline_that_fails_says_how() -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    source.text_encoder.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(UserError, match=r"does not draw.*ZeroDivisionError"):
        pipeline_parts.take_apart(source, "unet")
