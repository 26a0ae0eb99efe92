"""Pipelines taken apart: of every family the parts make what the pipeline itself gives its denoiser, and its images."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from diffusers import DDPMPipeline, FlowMatchHeunDiscreteScheduler, UNet2DModel

from mpq_compiler.frontend import pipeline_parts
from mpq_compiler.frontend.denoiser import wrap_seen
from mpq_compiler.frontend.input_specs import convention_of
from mpq_compiler.frontend.pipeline_parts import Parts
from mpq_compiler.frontend.watch_pipeline import Watched, schedule_of, watch
from mpq_compiler.sampling.convention import Convention
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
    module = getattr(tiny_pipelines.pipeline(name), taken.denoiser)
    convention = convention_of(module) if taken.seen is None else Convention()
    assert (taken.seen is not None) == (name == "klein")
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
        ("klein", "empty", 4.0),
    ],
)
def test_what_guidance_leads_away_from(name: str, null: str | None, guidance: float) -> None:
    assert (parts(name).null, parts(name).guidance) == (null, guidance)


def test_a_call_of_no_known_form_is_taken_as_it_was_seen() -> None:
    """FLUX.2's: latents are tokens, numbers of tokens are constants, and the schedule is the pipeline's own."""
    seen = parts("klein").seen
    assert seen is not None and seen.inputs == ("hidden_states", "encoder_hidden_states") and seen.unit == 1000
    assert {*seen.arguments} - {*seen.inputs} == {"timestep", "img_ids", "txt_ids"}
    source = tiny_pipelines.pipeline("klein")
    source.set_progress_bar_config(disable=True)
    for steps in (1, 4, 30):
        with torch.no_grad():
            source(prompt="a fox", num_inference_steps=steps, height=16, width=16, output_type="latent")
        np.testing.assert_allclose(seen.scheduler.sigmas(steps), source.scheduler.sigmas.numpy(), rtol=1e-4)


def test_a_seen_call_is_that_of_the_module() -> None:
    source = tiny_pipelines.pipeline("klein")
    seen = parts("klein").seen
    assert seen is not None
    made = wrap_seen(
        source.transformer, seen.arguments, seen.inputs, name="klein", unit=seen.unit, scheduler=seen.scheduler
    )
    inputs = {name: seen.arguments[name] for name in seen.inputs} | {"timestep": torch.tensor([1000.0])}
    with torch.no_grad():
        expected = source.transformer(**seen.arguments, return_dict=False)[0]
    np.testing.assert_allclose(made(**inputs).numpy(), expected.numpy(), rtol=1e-5, atol=1e-6)
    with pytest.raises(UserError, match="compiled as its pipeline called it, at one size"):
        made.resized(8, 8)


@pytest.mark.parametrize(
    ("fault", "said"),
    [
        ("prediction", "gives its scheduler another prediction than its denoiser's"),
        ("latents", "gives its denoiser other latents than its scheduler"),
        ("time", "gives its denoiser 1 for the time 7"),
        ("argument", "gives its denoiser 'img_ids', which is no tensor"),
    ],
)
def test_a_step_that_does_something_of_its_own_is_refused(fault: str, said: str) -> None:
    seen, taken = drawn("klein", "a fox"), parts("klein")
    predicted, time, latents = seen.taken
    seen.taken = {
        "prediction": (-predicted, time, latents),
        "latents": (predicted, time, 2 * latents),
        "time": (predicted, torch.tensor(7.0), latents),
    }.get(fault, seen.taken)
    if fault == "argument":
        seen.calls[0]["img_ids"] = 3
    with pytest.raises(UserError, match=said):
        pipeline_parts._seen(tiny_pipelines.pipeline("klein"), seen, "hidden_states", taken.conditions, {})


def test_a_schedule_that_is_not_known_is_refused() -> None:
    source = tiny_pipelines.pipeline("klein")
    source.set_progress_bar_config(disable=True)
    own, call = source.scheduler.set_timesteps, {"prompt": "a fox", "height": 16, "width": 16}

    @functools.wraps(own)
    def odd(*args: object, mu: float, sigmas: np.ndarray, **more: object) -> None:
        own(*args, mu=mu + len(sigmas) ** 2, sigmas=sigmas, **more)

    source.scheduler.set_timesteps = odd
    with pytest.raises(UserError, match="numbers the times of its FlowMatchEulerDiscreteScheduler in a way that is"):
        schedule_of(source, **call)
    source.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match="FlowMatchHeunDiscreteScheduler is not known here"):
        schedule_of(source, **call)


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
    with pytest.raises(UserError, match=r"DDPMPipeline draws without a prompt.*with parts denoiser"):
        pipeline_parts.take_apart(source, "unet")


def test_a_pipeline_that_fails_says_how() -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    source.text_encoder.forward = lambda *args, **kwargs: 1 / 0
    with pytest.raises(UserError, match=r"does not draw.*ZeroDivisionError"):
        pipeline_parts.take_apart(source, "unet")
