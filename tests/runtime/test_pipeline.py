"""Compiled pipelines draw what diffusers draws, without torch, whatever is loaded when; and refuse what they cannot."""

from __future__ import annotations

import functools
import subprocess
import sys
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    FluxImg2ImgPipeline,
    StableDiffusion3Img2ImgPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
)
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.drop_ins import CompiledDecoder
from mpq_compiler.runtime.pipeline import CompiledPipeline, load_pipeline
from mpq_compiler.sampling import loop
from mpq_compiler.support.errors import UserError
from tests.harness import compiled_pipeline, tiny_pipelines

PROMPT = "a red fox in the sea"
KNOWN_SCHEDULER = {"stable-diffusion", "sdxl", "sd3", "flux"}
"""Families whose scheduler is not replaced, and whose pipeline calls its decoder alone: with the same parts diffusers
draws the same pictures.
"""
FROM_PICTURES = {
    "stable-diffusion": StableDiffusionImg2ImgPipeline,
    "sdxl": StableDiffusionXLImg2ImgPipeline,
    "sd3": StableDiffusion3Img2ImgPipeline,
    "flux": FluxImg2ImgPipeline,
}
"""What diffusers has of them for pictures that are drawn from one."""
LEAST_DB = 33.0
"""PSNR of pictures at 8 bits; those of random weights, which is low for these."""


@functools.cache
def loaded(name: str = "stable-diffusion") -> CompiledPipeline:
    return load_pipeline(compiled_pipeline.path(name))


def drawn_by_diffusers(
    name: str, prompt: str, seed: int, stand_ins: Mapping[str, object] | None = None, **call: object
) -> np.ndarray:
    """What diffusers' own pipeline draws of the same noise, with these in the place of its modules."""
    source, compiled = tiny_pipelines.pipeline(name), loaded(name)
    source.set_progress_bar_config(disable=True)
    for part, stand_in in (stand_ins or {}).items():
        setattr(source, part, stand_in)
    shape = compiled.part(compiled.denoiser).manifest["sampling"]["shape"]
    call["latents"] = torch.from_numpy(compiled._convention.pack(loop.gaussian(1, tuple(shape), seed)))
    if name == "klein":  # which takes its latents as images, and has them as tokens
        call["latents"] = call["latents"].transpose(1, 2).unflatten(2, (4, 4))
    if (size := tiny_pipelines.SIZES.get(name)) is not None:
        call |= {"height": size[0] * source.vae_scale_factor, "width": size[1] * source.vae_scale_factor}
    if name == "pixart":
        call["use_resolution_binning"] = False
    return np.asarray(source(prompt=prompt, output_type="np", **call).images)


@pytest.mark.parametrize("name", tiny_pipelines.FAMILIES)
def test_draws_what_diffusers_draws(name: str) -> None:
    found = loaded(name)(PROMPT, steps=4, seed=1)
    expected = drawn_by_diffusers(name, PROMPT, 1, num_inference_steps=4)
    assert found.pixels.shape == expected.shape and expected.std() > 0.05
    assert -10 * np.log10(np.square(found.pixels - expected).mean()) > LEAST_DB
    assert found.images[0].size == expected.shape[2:0:-1]
    assert np.abs(np.asarray(found.images[0], np.float32) / 255 - found.pixels[0]).max() <= 0.5001 / 255
    alike = [part for part in ("transformer", "unet", "vae") if (name, part) != ("klein", "vae")]
    alike = [part for part, about in loaded(name).document["parts"].items() if about["role"] == "text" or part in alike]
    stand_ins = {part: loaded(name).drop_in(part) for part in alike}
    again = drawn_by_diffusers(name, PROMPT, 1, stand_ins, num_inference_steps=4)
    if name in KNOWN_SCHEDULER:
        assert -10 * np.log10(np.square(found.pixels - again).mean()) > 60


def test_guidance_and_negative_prompts_are_those_of_diffusers() -> None:
    said = {"steps": 4, "seed": 2, "guidance": 3.0}
    plain = loaded()(PROMPT, **said).pixels
    away = loaded()(PROMPT, "green harbour", **said).pixels
    expected = drawn_by_diffusers(
        "stable-diffusion", PROMPT, 2, num_inference_steps=4, guidance_scale=3.0, negative_prompt="green harbour"
    )
    assert np.abs(plain - away).max() > 0.01
    assert -10 * np.log10(np.square(away - expected).mean()) > LEAST_DB
    with pytest.raises(UserError, match="give a guidance above 1"):
        loaded()(PROMPT, "green harbour", steps=1, guidance=1.0)


@pytest.mark.parametrize("name", sorted(KNOWN_SCHEDULER))
def test_draws_from_a_picture_as_diffusers_does(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    compiled, said = loaded(name), {"strength": 0.5, "guidance": 1.5}
    image = compiled(PROMPT, steps=4, seed=3).pixels[0]
    found = compiled("two ships", steps=4, seed=1, image=image, **said).pixels
    anew = compiled("two ships", steps=4, seed=1, image=image, strength=1.0, guidance=1.5).pixels
    assert np.abs(anew - found).max() > 0.01

    module = sys.modules[FROM_PICTURES[name].__module__]
    shape = compiled.part(compiled.denoiser).manifest["sampling"]["shape"]
    noise = torch.from_numpy(loop.gaussian(1, tuple(shape), 1))
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: noise)
    monkeypatch.setattr(DiagonalGaussianDistribution, "sample", lambda self, generator=None: self.mode())
    source = FROM_PICTURES[name].from_pipe(tiny_pipelines.pipeline(name))
    source.set_progress_bar_config(disable=True)
    with torch.no_grad():
        mean = source.vae.encode(source.image_processor.preprocess(image[None])).latent_dist.mode().numpy()
    for part, about in compiled.document["parts"].items():
        if about["role"] != "encoder":
            setattr(source, part, compiled.drop_in(part))
    encoded = source.vae.encode(source.image_processor.preprocess(image[None])).latent_dist.mode().numpy()
    assert 10 * np.log10(np.square(mean).mean() / np.square(encoded - mean).mean()) > 20
    sized = {"height": image.shape[0], "width": image.shape[1]} if name in ("sd3", "flux") else {}
    expected = source(
        "two ships", image=image[None], num_inference_steps=4, guidance_scale=1.5, strength=0.5, output_type="np",
        **sized,
    ).images  # fmt: skip
    assert np.square(found - expected).mean() < 1e-6  # 60 dB


def test_what_cannot_be_drawn_from() -> None:
    with pytest.raises(UserError, match=r"has 8 x 9 pixels, and .* draws"):
        loaded()(PROMPT, image=np.zeros((9, 8, 3)))
    image = np.zeros((*loaded().size, 3))
    for strength in (0.2, -1, 1.5):
        with pytest.raises(UserError, match=r"strength of .* in 4 steps is . steps to draw"):
            loaded()(PROMPT, steps=4, image=image, strength=strength)


def test_the_same_pictures_one_part_at_a_time_and_in_company() -> None:
    first = loaded()(PROMPT, steps=3, seed=5).pixels
    sequential = load_pipeline(compiled_pipeline.path(), threads=1, sequential=True)
    np.testing.assert_array_equal(sequential(PROMPT, steps=3, seed=5).pixels, first)
    assert not sequential._loaded
    both = loaded()([PROMPT, "two ships"], steps=3, seed=5).pixels
    np.testing.assert_array_equal(both[:1], first)
    assert not np.array_equal(both[1:], first)


def test_one_part_at_a_time_is_one_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    alive: weakref.WeakSet[object] = weakref.WeakSet()
    most = []
    load = compiled_denoiser.load

    def counted(*args: Any, **kwargs: Any) -> Any:
        most.append(len(alive))  # of those before, at the moment when the next is loaded
        part = load(*args, **kwargs)
        alive.add(part)
        return part

    monkeypatch.setattr(compiled_denoiser, "load", counted)
    load_pipeline(compiled_pipeline.path(), sequential=True)(PROMPT, steps=1)
    assert most and max(most) == 0
    most.clear()
    load_pipeline(compiled_pipeline.path())(PROMPT, steps=1)
    assert len(most) == 3 and max(most) == 2


def test_draws_without_torch(tmp_path: Path) -> None:
    code = (
        "import sys; sys.modules.update(dict.fromkeys(('torch', 'diffusers', 'transformers')))\n"
        "import numpy as np, mpq_compiler\n"
        f"pipe = mpq_compiler.load_pipeline({str(compiled_pipeline.path())!r})\n"
        f"found = pipe({PROMPT!r}, steps=3, seed=5)\n"
        f"found.images[0].save({str(tmp_path / 'x.png')!r}); np.save({str(tmp_path / 'x.npy')!r}, found.pixels)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    np.testing.assert_array_equal(np.load(tmp_path / "x.npy"), loaded()(PROMPT, steps=3, seed=5).pixels)
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")


def test_a_prompt_that_is_too_long_is_cut_as_diffusers_cuts_it() -> None:
    long = "a red fox by the sea and a green house and an old man in the tree with two blue ships of snow"
    (said,) = loaded().cut(long)
    assert said == "the prompt has more than 16 tokens: 'in the tree with two blue ships of snow' is cut off"
    with pytest.warns(UserWarning, match="is cut off"):
        found = loaded()(long, steps=2, seed=1).pixels
    np.testing.assert_array_equal(found, loaded()(long.removesuffix("in the tree with two blue ships of snow"),
                                                  steps=2, seed=1).pixels)  # fmt: skip
    assert not loaded().cut(PROMPT)


def test_a_prompt_of_signs_that_no_word_has() -> None:
    assert loaded()("\u72d0 \u2603 \U0001f98a", steps=1).pixels.shape == (1, 16, 16, 3)


def test_a_part_that_is_not_there_is_named() -> None:
    with pytest.raises(UserError, match="has no part 'transformer'"):
        loaded().part("transformer")


def test_what_a_stand_in_lacks_is_said() -> None:
    encoder, decoder = loaded().drop_in("text_encoder"), loaded().drop_in("vae")
    output = encoder(torch.zeros(1, tiny_pipelines.TOKENS, dtype=torch.int64))
    assert output[0] is output.last_hidden_state and output[0].shape == (1, tiny_pipelines.TOKENS, 32)
    with pytest.raises(UserError, match="reads 'pooler_output' of its text encoder"):
        _ = output.pooler_output.shape
    with pytest.raises(UserError, match="add encoder to parts"):
        CompiledDecoder(loaded().part("vae")).encode(torch.zeros(1, 3, 16, 16))
    with pytest.raises(UserError, match="stands in with its decoder: take that of 'vae'"):
        loaded().drop_in("vae_encoder")
    assert decoder.config.scaling_factor == 0.18215 and decoder.to("cpu") is decoder
