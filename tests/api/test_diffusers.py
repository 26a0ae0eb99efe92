"""`compile(pipeline)`: the pipeline comes back with an artifact that draws what its denoiser drew."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import save_file

import mpq_compiler
from mpq_compiler.api import diffusers as api_diffusers
from mpq_compiler.evaluation import metrics
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.input_specs import convention_of
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

W8A8: dict[str, Any] = {"recipe": "w8a8", "target": "reference"}  # kernels are tested in test_drop_in


def quiet(pipeline: Any) -> Any:
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def gentle(name: str, **changes: Any) -> torch.nn.Module:
    """A tiny model whose output is small: a random denoiser that is not would amplify every difference."""
    model = tiny.model(name, **changes)
    last = next(getattr(model, name) for name in ("conv_out", "proj_out_2", "proj_out") if hasattr(model, name))
    last.weight.mul_(0.2)
    last.bias.zero_()
    return model


def vae() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return diffusers.AutoencoderKL(block_out_channels=(8,), norm_num_groups=4, latent_channels=4).eval()


def ddim() -> Any:
    return quiet(diffusers.DDIMPipeline(unet=gentle("unet2d"), scheduler=diffusers.DDIMScheduler()))


def dit() -> Any:
    """Of 1000 classes, for diffusers' pipeline takes the label 1000 for none; its VAE does not enlarge."""
    return quiet(diffusers.DiTPipeline(gentle("dit", num_embeds_ada_norm=1000), vae(), diffusers.DDIMScheduler()))


def test_an_unconditional_pipeline_is_sampled_alone(tmp_path: Path) -> None:
    def draw(pipeline: Any) -> np.ndarray:
        drawn = pipeline(
            batch_size=2, generator=torch.Generator().manual_seed(1), num_inference_steps=4, output_type="np"
        )
        return 2 * np.moveaxis(drawn.images, -1, 1) - 1

    pipeline = ddim()
    expected = draw(pipeline)
    again = mpq_compiler.compile(pipeline, tmp_path / "x.mpq", **W8A8, samples=16, steps=4)
    assert again is pipeline
    assert isinstance(pipeline.unet, CompiledDenoiser)
    assert pipeline.unet.report.calibration["samples"] == 16
    assert pipeline.unet.manifest["name"] == "DDIMPipeline"
    assert metrics.psnr_db(expected, draw(pipeline)) > 30


@pytest.mark.parametrize("name", ["EulerDiscreteScheduler", "FlowMatchEulerDiscreteScheduler", "DDIMScheduler"])
def test_a_scheduler_that_was_never_saved_is_known(name: str) -> None:
    """The configuration of one that no file was read for does not say what it is of."""
    unet = gentle("unet2d")
    pipeline = diffusers.DDPMPipeline(unet=unet, scheduler=getattr(diffusers, name)())
    assert api_diffusers._denoiser(pipeline, "unet", None).scheduler.solver == name


def test_a_pipeline_calibrates_by_drawing(tmp_path: Path) -> None:
    """Classes with guidance, as DiT's pipeline draws them; the artifact draws the same images in it."""
    pipeline = dit()

    def draw() -> np.ndarray:
        drawn = pipeline(
            class_labels=[0, 9], generator=torch.Generator().manual_seed(5), num_inference_steps=4, output_type="np"
        )
        return 2 * np.moveaxis(drawn.images, -1, 1) - 1

    expected = draw()
    calls = [{"class_labels": [k, k + 1, k + 2, 9], "num_inference_steps": 5} for k in range(4)]
    mpq_compiler.compile(pipeline, tmp_path / "x.mpq", calls=calls, **W8A8)
    compiled = pipeline.transformer
    assert isinstance(compiled, CompiledDenoiser)
    about = compiled.report.calibration
    assert about["steps"] == "5" and len(about["file"]) == 64
    assert about["inputs"] == 4 * 5 * 8 * 3 // 4  # 4 calls of 5 steps, 4 images with and without their class, 3 of 4
    assert metrics.psnr_db(expected, draw()) > 30


def test_called_as_fluxs_pipeline_calls_its_transformer(tmp_path: Path) -> None:
    """Packed latents and their places, timesteps in fractions of 1; what holds no more than sizes may be left in."""
    model = gentle("flux")
    denoiser = denoisers.wrap(model, name="flux", size=tiny.SIZES["flux"], tokens=tiny.TOKENS)
    calibration = tmp_path / "calibration.safetensors"
    save_file(tiny.inputs("flux", batch=32, seed=1), calibration)
    mpq_compiler.compile(denoiser, tmp_path / "x.mpq", calibration=calibration, **W8A8)
    compiled = mpq_compiler.load(tmp_path / "x.mpq")
    given, convention = tiny.inputs("flux", batch=2), convention_of(model)
    call = {
        **given,
        "hidden_states": convention.pack(given["hidden_states"]),
        "timestep": given["timestep"] / 1000,
        "img_ids": denoiser.module.get_buffer("img_ids_0"),
        "txt_ids": torch.zeros(tiny.TOKENS, 3),
        "joint_attention_kwargs": {},
        "return_dict": False,
    }
    with compiled.cache_context("cond"):
        drawn = compiled(**call)[0]
    assert drawn.shape == (2, 64, 16)
    assert metrics.sqnr_db(model(**call)[0].numpy(), drawn.numpy()) > 15
    with pytest.raises(UserError, match="'img_ids' is missing"):
        compiled(**{**call, "img_ids": None})


def test_calls_and_targets_that_cannot_be(tmp_path: Path) -> None:
    pipeline, output = ddim(), tmp_path / "x.mpq"
    with pytest.raises(UserError, match="DDIMPipeline does not take 'prompt'"):
        mpq_compiler.compile(pipeline, output, calls=["a fox"])
    with pytest.raises(UserError, match=r"call 1 for calibration, of batch_size 'many', failed in DDIMPipeline"):
        mpq_compiler.compile(pipeline, output, calls=[{"batch_size": "many"}])
    with pytest.raises(UserError, match="give one of them"):
        mpq_compiler.compile(pipeline, output, calls=[{}], calibration="x.safetensors")
    drawn: list[Any] = []
    pipeline.unet.register_forward_pre_hook(lambda *given: drawn.append(given))
    for wrong, says in (({"recipe": "nothing"}, "unknown recipe"), ({"weights": "many"}, "neither bits")):
        with pytest.raises(UserError, match=says):
            mpq_compiler.compile(pipeline, output, calls=[{"num_inference_steps": 2}], **wrong)
    output.touch()
    with pytest.raises(UserError, match="exists"):
        mpq_compiler.compile(pipeline, output, calls=[{"num_inference_steps": 2}])
    output.unlink()
    assert not drawn  # what is wrong is said before anything is drawn
    with pytest.raises(UserError, match="could not run here"):
        mpq_compiler.compile(pipeline, output, target="aarch64-dotprod")
    with pytest.raises(UserError, match="cannot compile a DDIMScheduler"):
        mpq_compiler.compile(pipeline.scheduler, output)
    assert isinstance(pipeline.unet, torch.nn.Module)
    assert not output.exists()


def test_a_pipeline_in_half_precision(tmp_path: Path) -> None:
    """Its denoiser is compiled from float32 and answers in the type that it is asked in."""
    pipeline = ddim().to(torch.bfloat16)
    unet = pipeline.unet
    mpq_compiler.compile(pipeline, tmp_path / "x.mpq", **W8A8, samples=4, steps=2)
    assert next(unet.parameters()).dtype == torch.bfloat16
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    times = torch.tensor([500, 20])
    ours = pipeline.unet(x, times).sample
    whole = pipeline.unet.run({"sample": x.float(), "timestep": times})
    assert torch.equal(ours, torch.from_numpy(whole).bfloat16())
    assert metrics.sqnr_db(unet.float()(x.float(), times).sample.detach().numpy(), whole) > 10


def clip(folder: Path, width: int) -> dict[str, Any]:
    """A random text encoder of Stable Diffusion's kind, and a tokenizer that spells."""
    letters = [chr(c) for c in range(ord("a"), ord("z") + 1)]
    vocabulary = ["<|startoftext|>", "<|endoftext|>", *letters, *(f"{letter}</w>" for letter in letters)]
    (folder / "vocab.json").write_text(json.dumps({word: i for i, word in enumerate(vocabulary)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    tokenizer = transformers.CLIPTokenizer(str(folder / "vocab.json"), str(folder / "merges.txt"), model_max_length=12)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = transformers.CLIPTextConfig(
            vocab_size=len(vocabulary),
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=1,
            num_attention_heads=2,
            max_position_embeddings=12,
            bos_token_id=0,
            eos_token_id=1,
        )
        return {"text_encoder": transformers.CLIPTextModel(config).eval(), "tokenizer": tokenizer}


def test_stable_diffusion_whole(tmp_path: Path) -> None:
    """Prompts through tokenizer, text encoder, guidance, denoiser and VAE; the artifact in place of the UNet."""
    parts = clip(tmp_path, width=32)
    pipeline = quiet(
        diffusers.StableDiffusionPipeline(
            unet=gentle("sd15"),
            vae=vae(),
            scheduler=diffusers.PNDMScheduler(skip_prk_steps=True),
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
            **parts,
        )
    )

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        drawn = pipeline("a boat", height=16, width=16, num_inference_steps=4, generator=generator, output_type="np")
        return 2 * np.moveaxis(drawn.images, -1, 1) - 1

    expected = draw()
    prompts = [{"prompt": p, "height": 16, "width": 16} for p in ("a fox", "some trees", "rain", "an old town")]
    mpq_compiler.compile(pipeline, tmp_path / "x.mpq", calls=prompts, steps=6, guidance=5.0, **W8A8)
    compiled = pipeline.unet
    assert isinstance(compiled, CompiledDenoiser)
    about = compiled.report.calibration
    assert (about["steps"], about["guidance"]) == ("6", "5")
    assert compiled.manifest["functions"][0]["inputs"][2]["shape"][1:] == [12, 32]
    assert metrics.psnr_db(expected, draw()) > 30


def embedded(name: str, seed: int) -> tuple[Any, Any]:
    """The inputs of a prompt that was encoded elsewhere, and of the negative prompt."""
    return tiny.inputs(name, batch=1, seed=seed), tiny.inputs(name, batch=1, seed=99)


def sdxl(seed: int) -> tuple[Any, dict[str, Any]]:
    text, null = embedded("sdxl", seed)
    scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="leading", steps_offset=1)
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    return lambda: diffusers.StableDiffusionXLPipeline(
        unet=gentle("sdxl"), vae=vae(), scheduler=scheduler, add_watermarker=False, **encoders
    ), {
        "prompt_embeds": text["encoder_hidden_states"],
        "pooled_prompt_embeds": text["text_embeds"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": null["text_embeds"],
    }


def sd3(seed: int) -> tuple[Any, dict[str, Any]]:
    text, null = embedded("sd3", seed)
    encoders = dict.fromkeys(f"{part}{n}" for part in ("text_encoder", "tokenizer") for n in ("", "_2", "_3"))
    return lambda: diffusers.StableDiffusion3Pipeline(
        transformer=gentle("sd3"), vae=vae(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **encoders
    ), {
        "prompt_embeds": text["encoder_hidden_states"],
        "pooled_prompt_embeds": text["pooled_projections"],
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_pooled_prompt_embeds": null["pooled_projections"],
    }


def flux(seed: int) -> tuple[Any, dict[str, Any]]:
    text, _ = embedded("flux", seed)
    encoders = dict.fromkeys(("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2"))
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    return lambda: diffusers.FluxPipeline(transformer=gentle("flux"), vae=vae(), scheduler=scheduler, **encoders), {
        "prompt_embeds": text["encoder_hidden_states"],
        "pooled_prompt_embeds": text["pooled_projections"],
    }


def masked(name: str, seed: int) -> dict[str, Any]:
    text, null = embedded(name, seed)
    mask = torch.ones(1, tiny.TOKENS, dtype=torch.int64)
    return {
        "prompt_embeds": text["encoder_hidden_states"],
        "prompt_attention_mask": mask,
        "negative_prompt": None,
        "negative_prompt_embeds": null["encoder_hidden_states"],
        "negative_prompt_attention_mask": mask,
        "use_resolution_binning": False,
    }


def pixart(seed: int) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.DPMSolverMultistepScheduler()
    return lambda: diffusers.PixArtAlphaPipeline(
        tokenizer=None, text_encoder=None, vae=vae(), transformer=gentle("pixart"), scheduler=scheduler
    ), masked("pixart", seed)


def sana(seed: int) -> tuple[Any, dict[str, Any]]:
    scheduler = diffusers.DPMSolverMultistepScheduler(use_flow_sigmas=True, prediction_type="flow_prediction")
    return lambda: diffusers.SanaPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=gentle("sana"), scheduler=scheduler
    ), masked("sana", seed)


SIDES = {"sana": 256}  # without a VAE, Sana's pipeline takes it to enlarge by 32


@pytest.mark.slow
@pytest.mark.parametrize("make", [sdxl, sd3, flux, pixart, sana], ids=lambda make: make.__name__)
def test_every_familys_pipeline_whole(make: Any, tmp_path: Path) -> None:
    """Calibrated by eight prompts in six steps, it draws from another prompt in four what it drew before."""
    size = dict.fromkeys(("height", "width"), SIDES.get(make.__name__, 16))
    pipeline = quiet(make(0)[0]())

    def draw() -> np.ndarray:
        generator = torch.Generator().manual_seed(3)
        given = {**make(50)[1], **size, "num_inference_steps": 4, "generator": generator, "output_type": "latent"}
        return pipeline(**given).images.numpy()

    expected = draw()
    calls = [{**make(seed)[1], **size} for seed in range(8)]
    mpq_compiler.compile(pipeline, tmp_path / "x.mpq", calls=calls, steps=6, **W8A8)
    assert metrics.sqnr_db(expected, draw()) > 30
