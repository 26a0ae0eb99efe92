"""Draws with whole pipelines of diffusers, tiny and random, before and after their denoisers are compiled.

    python -m benchmarks.diffusers_pipelines
    python -m benchmarks.diffusers_pipelines WanPipeline ZImagePipeline     # these rows anew

Each pipeline draws eight times for calibration, is compiled (w8a8), and draws in four steps what no call of the
calibration drew, once in float and once compiled, from the same generator. PSNR is that of its images, films or
sounds. A random denoiser may amplify every difference: beside it is what the float pipeline gives when noise of the
SQNR that the artifact has on the float pipeline's own calls is added to what its denoiser predicts.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import diffusers
import numpy as np
import torch
import transformers

import mpq_compiler
from benchmarks.machine import provenance
from mpq_compiler.support.errors import UserError
from tests.harness import tiny_calls

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "diffusers_pipelines.json"
DOCS = ROOT / "docs" / "models.md"
BEGIN, END = "<!-- pipelines: begin -->", "<!-- pipelines: end -->"
DRAWS, STEPS, UNSEEN = 8, 4, 50

Arguments = dict[str, Any]
Made = tuple[Any, Callable[[int], Arguments]]
"""A pipeline, and the arguments of its call by a seed."""
MAKERS: dict[str, Callable[[], Made]] = {}


def maker(function: Callable[[], Made]) -> Callable[[], Made]:
    MAKERS[function.__name__] = function
    return function


# --- parts ----------------------------------------------------------------------------------------------------------


def part(kind: str, **config: Any) -> Any:
    """A model of diffusers with weights of its own, none of which is left at zero or uninitialised."""
    torch.manual_seed(0)
    model = getattr(diffusers, kind)(**config).eval()
    for weight in model.parameters():
        if not torch.isfinite(weight).all() or (weight.ndim > 1 and not weight.any()):
            torch.nn.init.normal_(weight.data, std=0.02)
    return model


def denoiser(name: str) -> Any:
    """A denoiser of the test suite's configurations."""
    kind, config = tiny_calls.CONFIGS[name]
    return part(kind, **config)


def normal(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def images(levels: int = 2, **config: Any) -> Any:
    """An autoencoder that enlarges latents by two on each level but one."""
    return part(
        "AutoencoderKL",
        block_out_channels=(8, *[16] * (levels - 1)),
        down_block_types=("DownEncoderBlock2D",) * levels,
        up_block_types=("UpDecoderBlock2D",) * levels,
        norm_num_groups=4,
        **config,
    )


def flow(**config: Any) -> Any:
    return diffusers.FlowMatchEulerDiscreteScheduler(**config)


def without(*names: str) -> Arguments:
    return dict.fromkeys(names)


def texts(seed: int, tokens: int, width: int, guided: bool = True) -> Arguments:
    """Texts that were encoded elsewhere."""
    given = {"prompt_embeds": normal(seed, 1, tokens, width)}
    return given | ({"negative_prompt_embeds": normal(99, 1, tokens, width)} if guided else {})


def masks(tokens: int, ending: str = "prompt_attention_mask") -> Arguments:
    mask = torch.ones(1, tokens, dtype=torch.int64)
    return {ending: mask, f"negative_{ending}": mask}


UNET = {
    "block_out_channels": (16, 32),
    "layers_per_block": 1,
    "sample_size": 16,
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
    "cross_attention_dim": 32,
    "attention_head_dim": 8,
    "norm_num_groups": 4,
}
BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}
SIZE = {"height": 32, "width": 32}


# --- pipelines ------------------------------------------------------------------------------------------------------


def stable_diffusion(kind: str, **parts: Any) -> Any:
    return getattr(diffusers, kind)(
        unet=part("UNet2DConditionModel", **UNET),
        vae=images(),
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        requires_safety_checker=False,
        **without("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
        **parts,
    )


@maker
def StableDiffusionPipeline() -> Made:
    return stable_diffusion("StableDiffusionPipeline"), lambda seed: texts(seed, 12, 32) | SIZE


@maker
def StableDiffusionImg2ImgPipeline() -> Made:
    # of 6 steps, 4 are drawn
    pipeline = stable_diffusion("StableDiffusionImg2ImgPipeline")
    return (
        pipeline,
        lambda seed: (
            texts(seed, 12, 32)
            | {"image": normal(seed, 1, 3, 32, 32).sigmoid(), "strength": 0.7, "num_inference_steps": 6}
        ),
    )


@maker
def StableDiffusionInpaintPipeline() -> Made:
    mask = torch.zeros(1, 1, 32, 32)
    mask[..., 8:24, 8:24] = 1
    return stable_diffusion(
        "StableDiffusionInpaintPipeline"
    ), lambda seed: texts(seed, 12, 32) | SIZE | {"image": normal(seed, 1, 3, 32, 32).sigmoid(), "mask_image": mask}


@maker
def StableDiffusionControlNetPipeline() -> Made:
    pipeline = stable_diffusion("StableDiffusionPipeline")
    torch.manual_seed(0)
    control = diffusers.ControlNetModel.from_unet(pipeline.unet, conditioning_embedding_out_channels=(8, 16)).eval()
    for weight in control.parameters():
        if not weight.any():
            torch.nn.init.normal_(weight.data, std=0.02)
    pipeline = stable_diffusion("StableDiffusionControlNetPipeline", controlnet=control)
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | {"image": normal(seed, 1, 3, 32, 32).sigmoid()}


@maker
def LatentConsistencyModelPipeline() -> Made:
    return diffusers.LatentConsistencyModelPipeline(
        unet=part("UNet2DConditionModel", **UNET, time_cond_proj_dim=32),
        vae=images(),
        scheduler=diffusers.LCMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False),
        requires_safety_checker=False,
        **without("text_encoder", "tokenizer", "safety_checker", "feature_extractor"),
    ), lambda seed: texts(seed, 12, 32, guided=False) | SIZE | {"guidance_scale": 8.5}


@maker
def StableDiffusionXLPipeline() -> Made:
    unet = part(
        "UNet2DConditionModel",
        **UNET,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )
    scheduler = diffusers.EulerDiscreteScheduler(**BETAS, steps_offset=1, timestep_spacing="leading")
    encoders = without("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline = diffusers.StableDiffusionXLPipeline(
        unet=unet, vae=images(), scheduler=scheduler, add_watermarker=False, **encoders
    )
    pooled = {"negative_pooled_prompt_embeds": normal(98, 1, 32)}
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | pooled | {"pooled_prompt_embeds": normal(seed, 1, 32)}


@maker
def StableDiffusion3Pipeline() -> Made:
    transformer = part(
        "SD3Transformer2DModel",
        sample_size=16,
        patch_size=2,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_projection_dim=32,
        joint_attention_dim=32,
        pooled_projection_dim=32,
    )
    encoders = without(*(f"{p}{n}" for p in ("text_encoder", "tokenizer") for n in ("", "_2", "_3")))
    pipeline = diffusers.StableDiffusion3Pipeline(
        transformer=transformer, vae=images(shift_factor=0.1), scheduler=flow(shift=3.0), **encoders
    )
    pooled = {"negative_pooled_prompt_embeds": normal(98, 1, 32)}
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | pooled | {"pooled_prompt_embeds": normal(seed, 1, 32)}


@maker
def FluxPipeline() -> Made:
    transformer = part(
        "FluxTransformer2DModel",
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=32,
        pooled_projection_dim=32,
        axes_dims_rope=[4, 4, 8],
        guidance_embeds=True,
    )
    encoders = without("text_encoder", "text_encoder_2", "tokenizer", "tokenizer_2")
    pipeline = diffusers.FluxPipeline(
        transformer=transformer, vae=images(shift_factor=0.1), scheduler=flow(use_dynamic_shifting=True), **encoders
    )
    return pipeline, lambda seed: texts(seed, 12, 32, False) | SIZE | {"pooled_prompt_embeds": normal(seed, 1, 32)}


@maker
def PixArtSigmaPipeline() -> Made:
    transformer = part(
        "PixArtTransformer2DModel",
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        caption_channels=32,
        cross_attention_dim=32,
        out_channels=8,
        norm_type="ada_norm_single",
    )
    pipeline = diffusers.PixArtSigmaPipeline(
        vae=images(), transformer=transformer, scheduler=diffusers.DDIMScheduler(), **without(*ENCODER)
    )
    unbinned = {"negative_prompt": None, "use_resolution_binning": False}
    return pipeline, lambda seed: texts(seed, 12, 32) | masks(12) | SIZE | unbinned


ENCODER = ("text_encoder", "tokenizer")


@maker
def SanaPipeline() -> Made:
    transformer = part(
        "SanaTransformer2DModel",
        patch_size=1,
        in_channels=4,
        out_channels=4,
        num_layers=2,
        num_attention_heads=4,
        attention_head_dim=8,
        num_cross_attention_heads=4,
        cross_attention_head_dim=8,
        cross_attention_dim=32,
        caption_channels=32,
        sample_size=8,
    )
    vae = part(
        "AutoencoderDC",
        latent_channels=4,
        attention_head_dim=8,
        encoder_block_types=("ResBlock", "EfficientViTBlock"),
        decoder_block_types=("ResBlock", "EfficientViTBlock"),
        encoder_block_out_channels=(8, 8),
        decoder_block_out_channels=(8, 8),
        encoder_qkv_multiscales=((), (5,)),
        decoder_qkv_multiscales=((), (5,)),
        encoder_layers_per_block=(1, 1),
        decoder_layers_per_block=(1, 1),
        downsample_block_type="conv",
        upsample_block_type="interpolate",
        decoder_norm_types="rms_norm",
        decoder_act_fns="silu",
        scaling_factor=0.41407,
    )
    pipeline = diffusers.SanaPipeline(vae=vae, transformer=transformer, scheduler=flow(shift=3.0), **without(*ENCODER))
    unbinned = {"negative_prompt": None, "use_resolution_binning": False}
    return pipeline, lambda seed: texts(seed, 12, 32) | masks(12) | SIZE | unbinned


@maker
def DiTPipeline() -> Made:
    transformer = part(
        "DiTTransformer2DModel",
        sample_size=16,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        out_channels=8,
        num_embeds_ada_norm=1000,
        norm_type="ada_norm_zero",
    )
    pipeline = diffusers.DiTPipeline(transformer=transformer, vae=images(), scheduler=diffusers.DDIMScheduler())
    return pipeline, lambda seed: {"class_labels": [seed % 1000], "guidance_scale": 2.0}


@maker
def QwenImagePipeline() -> Made:
    transformer = denoiser("qwen-image")
    vae = part(
        "AutoencoderKLQwenImage",
        base_dim=16,
        z_dim=4,
        dim_mult=[1, 2, 4],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.QwenImagePipeline(vae=vae, transformer=transformer, scheduler=flow(), **without(*ENCODER))
    mask = masks(12, "prompt_embeds_mask")
    return pipeline, lambda seed: texts(seed, 12, 32) | mask | SIZE | {"true_cfg_scale": 3.0}


@maker
def ZImagePipeline() -> Made:
    transformer = denoiser("z-image")
    pipeline = diffusers.ZImagePipeline(
        vae=images(shift_factor=0.1), transformer=transformer, scheduler=flow(), **without(*ENCODER)
    )
    return (
        pipeline,
        lambda seed: (
            SIZE
            | {
                "prompt_embeds": [normal(seed, 12, 32)],
                "negative_prompt_embeds": [normal(99, 12, 32)],
                "guidance_scale": 3.0,
            }
        ),
    )


@maker
def Flux2KleinPipeline() -> Made:
    transformer = denoiser("flux2")
    vae = part(
        "AutoencoderKLFlux2",
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(8, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
    )
    pipeline = diffusers.Flux2KleinPipeline(vae=vae, transformer=transformer, scheduler=flow(), **without(*ENCODER))
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | {"guidance_scale": 4.0}


@maker
def ChromaPipeline() -> Made:
    transformer = denoiser("chroma")
    pipeline = diffusers.ChromaPipeline(
        vae=images(shift_factor=0.1), transformer=transformer, scheduler=flow(), **without(*ENCODER)
    )
    given = {name: mask.float() for name, mask in masks(12).items()}
    return pipeline, lambda seed: texts(seed, 12, 32) | given | SIZE | {"guidance_scale": 3.0}


@maker
def Lumina2Pipeline() -> Made:
    transformer = denoiser("lumina2")
    pipeline = diffusers.Lumina2Pipeline(
        vae=images(shift_factor=0.1), transformer=transformer, scheduler=flow(), **without(*ENCODER)
    )
    wide = {"height": 128, "width": 128}  # its VAE is taken to enlarge by 8
    return pipeline, lambda seed: texts(seed, 12, 32) | masks(12) | wide


@maker
def CogView4Pipeline() -> Made:
    transformer = denoiser("cogview4")
    scheduler = flow(base_shift=0.25, max_shift=0.75, use_dynamic_shifting=True, time_shift_type="linear")
    pipeline = diffusers.CogView4Pipeline(
        vae=images(), transformer=transformer, scheduler=scheduler, **without(*ENCODER)
    )
    return pipeline, lambda seed: texts(seed, 16, 32) | SIZE


@maker
def AuraFlowPipeline() -> Made:
    transformer = denoiser("auraflow")
    pipeline = diffusers.AuraFlowPipeline(vae=images(), transformer=transformer, scheduler=flow(), **without(*ENCODER))
    return pipeline, lambda seed: texts(seed, 12, 32) | masks(12) | SIZE


@maker
def HunyuanDiTPipeline() -> Made:
    transformer = part(
        "HunyuanDiT2DModel",
        sample_size=8,
        num_layers=2,
        patch_size=2,
        attention_head_dim=8,
        num_attention_heads=4,
        in_channels=4,
        cross_attention_dim=32,
        cross_attention_dim_t5=32,
        pooled_projection_dim=16,
        hidden_size=32,
        text_len=12,
        text_len_t5=12,
    )
    pipeline = diffusers.HunyuanDiTPipeline(
        vae=images(levels=4),
        transformer=transformer,
        scheduler=diffusers.DDPMScheduler(),
        requires_safety_checker=False,
        **without("safety_checker", "feature_extractor", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"),
    )

    def arguments(seed: int) -> Arguments:
        second = {f"{name}_2": value for name, value in (texts(seed + 1, 12, 32) | masks(12)).items()}
        wide = {"height": 64, "width": 64, "use_resolution_binning": False}
        return texts(seed, 12, 32) | masks(12) | second | wide

    return pipeline, arguments


@maker
def WanPipeline() -> Made:
    transformer = denoiser("wan")
    vae = part(
        "AutoencoderKLWan",
        base_dim=3,
        z_dim=4,
        dim_mult=[1, 1, 1],
        num_res_blocks=1,
        temperal_downsample=[False, True],
        latents_mean=[0.0] * 4,
        latents_std=[1.0] * 4,
    )
    pipeline = diffusers.WanPipeline(
        vae=vae, transformer=transformer, scheduler=flow(shift=3.0), **without(*ENCODER, "transformer_2")
    )
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | {"num_frames": 5}


@maker
def LTXPipeline() -> Made:
    transformer = denoiser("ltx-video")
    vae = part(
        "AutoencoderKLLTXVideo",
        latent_channels=8,
        block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        layers_per_block=(1, 1, 1, 1, 1),
        decoder_layers_per_block=(1, 1, 1, 1, 1),
        spatio_temporal_scaling=(True, True, False, False),
        decoder_spatio_temporal_scaling=(True, True, False, False),
        decoder_inject_noise=(False,) * 5,
        upsample_residual=(False,) * 4,
        upsample_factor=(1,) * 4,
        patch_size=1,
    )
    pipeline = diffusers.LTXPipeline(vae=vae, transformer=transformer, scheduler=flow(), **without(*ENCODER))
    return pipeline, lambda seed: texts(seed, 12, 32) | masks(12) | SIZE | {"num_frames": 9}


@maker
def CogVideoXPipeline() -> Made:
    transformer = denoiser("cogvideox")
    vae = part(
        "AutoencoderKLCogVideoX",
        down_block_types=("CogVideoXDownBlock3D",) * 4,
        up_block_types=("CogVideoXUpBlock3D",) * 4,
        block_out_channels=(8, 8, 8, 8),
        latent_channels=4,
        layers_per_block=1,
        norm_num_groups=2,
    )
    pipeline = diffusers.CogVideoXPipeline(
        vae=vae, transformer=transformer, scheduler=diffusers.CogVideoXDDIMScheduler(), **without(*ENCODER)
    )
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | {"num_frames": 9}


@maker
def MochiPipeline() -> Made:
    transformer = denoiser("mochi")
    vae = part(
        "AutoencoderKLMochi",
        latent_channels=12,
        encoder_block_out_channels=(32, 32, 32, 32),
        decoder_block_out_channels=(32, 32, 32, 32),
        layers_per_block=(1, 1, 1, 1, 1),
    )
    pipeline = diffusers.MochiPipeline(vae=vae, transformer=transformer, scheduler=flow(), **without(*ENCODER))
    given = {name: mask.bool() for name, mask in masks(12).items()}
    return pipeline, lambda seed: texts(seed, 12, 32) | given | SIZE | {"num_frames": 7}


@maker
def StableAudioPipeline() -> Made:
    transformer = denoiser("stable-audio")
    vae = part(
        "AutoencoderOobleck",
        encoder_hidden_size=8,
        downsampling_ratios=[1, 2],
        decoder_channels=4,
        decoder_input_channels=4,
        channel_multiples=[2, 4],
        sampling_rate=4,
    )
    torch.manual_seed(0)
    projection = diffusers.StableAudioProjectionModel(
        text_encoder_dim=32, conditioning_dim=32, min_value=0, max_value=32
    )
    torch.manual_seed(0)
    encoder = transformers.T5EncoderModel(
        transformers.T5Config(vocab_size=8, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    )
    pipeline = diffusers.StableAudioPipeline(
        vae=vae,
        text_encoder=encoder.eval(),
        projection_model=projection.eval(),
        tokenizer=None,
        transformer=transformer,
        scheduler=diffusers.EDMDPMSolverMultistepScheduler(),
    )
    mask = {n: torch.ones(1, 12, dtype=torch.int64) for n in ("attention_mask", "negative_attention_mask")}
    return pipeline, lambda seed: texts(seed, 12, 32) | mask | {"audio_end_in_s": 8.0}


@maker
def StableVideoDiffusionPipeline() -> Made:
    unet = denoiser("stable-video")
    vae = part(
        "AutoencoderKLTemporalDecoder",
        block_out_channels=(32, 32),
        down_block_types=("DownEncoderBlock2D",) * 2,
        latent_channels=4,
    )
    torch.manual_seed(0)
    config = transformers.CLIPVisionConfig(
        hidden_size=32,
        projection_dim=32,
        num_hidden_layers=1,
        num_attention_heads=4,
        image_size=32,
        intermediate_size=32,
        patch_size=8,
    )
    pipeline = diffusers.StableVideoDiffusionPipeline(
        vae=vae,
        unet=unet,
        image_encoder=transformers.CLIPVisionModelWithProjection(config).eval(),
        scheduler=diffusers.EulerDiscreteScheduler(
            **BETAS,
            prediction_type="v_prediction",
            sigma_max=700.0,
            sigma_min=0.002,
            timestep_type="continuous",
            use_karras_sigmas=True,
        ),
        feature_extractor=transformers.CLIPImageProcessor(crop_size=32, size=32),
    )
    return pipeline, lambda seed: SIZE | {"image": normal(seed, 1, 3, 32, 32).sigmoid(), "num_frames": 2}


@maker
def AnimateDiffPipeline() -> Made:
    adapter = part(
        "MotionAdapter",
        block_out_channels=(16, 32),
        motion_layers_per_block=1,
        motion_norm_num_groups=4,
        motion_num_attention_heads=4,
    )
    pipeline = diffusers.AnimateDiffPipeline(
        vae=images(),
        unet=part("UNet2DConditionModel", **UNET),
        motion_adapter=adapter,
        scheduler=diffusers.DDIMScheduler(**BETAS, clip_sample=False),
        **without(*ENCODER),
    )
    return pipeline, lambda seed: texts(seed, 12, 32) | SIZE | {"num_frames": 4}


# --- a row ----------------------------------------------------------------------------------------------------------


def row(name: str, target: str) -> dict[str, Any]:
    """What becomes of a pipeline when its denoiser is compiled."""
    begin = time.perf_counter()
    pipeline, arguments = quiet(name)
    denoiser = "unet" if getattr(pipeline, "unet", None) is not None else "transformer"
    model = getattr(pipeline, denoiser)
    expected, outputs, calls = recorded(pipeline, model, arguments(UNSEEN))
    try:
        with tempfile.TemporaryDirectory() as scratch:
            compiled, _ = quiet(name)
            compiled = mpq_compiler.compile(
                compiled,
                Path(scratch, "x.mpq"),
                calls=[arguments(seed) for seed in range(DRAWS)],
                steps=2 * STEPS,
                recipe="w8a8",
                target=target,
                cache=Path(scratch, "cache"),
            )
            drawn = draw(compiled, arguments(UNSEEN))
            artifact = getattr(compiled, denoiser)
            with torch.no_grad():
                predicted = [flat(artifact(*args, **kwargs)) for args, kwargs in calls]
    except UserError as error:
        return {"state": "refused", "sentence": str(error)}
    error, power = (
        (a - b).square().sum() for a, b in ((torch.cat(predicted), torch.cat(outputs)), (torch.cat(outputs), 0))
    )
    noisy = drawn_with_noise(pipeline, model, arguments(UNSEEN), float(error / power))
    return {
        "state": "compiled",
        "psnr_db": psnr(expected, drawn),
        "noise_db": psnr(expected, noisy),
        "call_db": round(float(10 * torch.log10(power / error)), 1),
        "seconds": round(time.perf_counter() - begin, 1),
    }


def quiet(name: str) -> Made:
    pipeline, arguments = MAKERS[name]()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline, arguments


def draw(pipeline: Any, arguments: Arguments) -> np.ndarray:
    given = {"num_inference_steps": STEPS, "generator": torch.Generator().manual_seed(3), "output_type": "np"}
    output = pipeline(**given | arguments)
    drawn = next(getattr(output, name) for name in ("images", "frames", "audios") if hasattr(output, name))
    return np.asarray(drawn, np.float64)


def recorded(pipeline: Any, model: torch.nn.Module, arguments: Arguments) -> tuple[np.ndarray, list[Any], list[Any]]:
    """What is drawn, and what the denoiser was given and predicted meanwhile."""
    outputs, calls = [], []

    def hook(module: torch.nn.Module, args: tuple[Any, ...], kwargs: Arguments, output: Any) -> None:
        calls.append((args, kwargs))
        outputs.append(flat(output))

    handle = model.register_forward_hook(hook, with_kwargs=True)
    drawn = draw(pipeline, arguments)
    handle.remove()
    return drawn, outputs, calls


def drawn_with_noise(pipeline: Any, model: torch.nn.Module, arguments: Arguments, ratio: float) -> np.ndarray:
    """What is drawn with noise on every prediction, whose power is a ratio of the prediction's."""
    generator = torch.Generator().manual_seed(0)

    def noise(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            deviation = (ratio * value.square().mean()).sqrt()
            return value + deviation * torch.randn(value.shape, generator=generator)
        if isinstance(value, dict):
            return type(value)({key: noise(part) for key, part in value.items()})
        return type(value)(noise(part) for part in value)

    handle = model.register_forward_hook(lambda module, args, output: noise(output))
    drawn = draw(pipeline, arguments)
    handle.remove()
    return drawn


def flat(output: Any) -> torch.Tensor:
    """All numbers of what a model returns."""
    if isinstance(output, torch.Tensor):
        return output.flatten().double()
    values = output.values() if isinstance(output, dict) else output
    return torch.cat([flat(value) for value in values if value is not None])


def psnr(expected: np.ndarray, drawn: np.ndarray) -> float:
    """Decibels, of values in [0, 1], and of sounds in [-1, 1] of a peak of 1."""
    return round(float(-10 * np.log10(np.square(expected - drawn).mean())), 1)


# --- the table ------------------------------------------------------------------------------------------------------


def line(name: str, found: dict[str, Any]) -> str:
    if found["state"] != "compiled":
        return f"| `{name}` | {found['state']}: {' '.join(found['sentence'].replace('|', '/').split())} | | | |"
    cells = [f"{found[key]:.1f} dB" for key in ("psnr_db", "noise_db", "call_db")]
    return f"| `{name}` | " + " | ".join(cells) + f" | {found['seconds']:.0f} s |"


def write(rows: dict[str, dict[str, Any]], target: str) -> None:
    """Writes the results, and the table in docs/models.md."""
    about = {**provenance(), "target": target}
    ordered = {name: rows[name] for name in MAKERS if name in rows}
    RESULTS.write_text(json.dumps({**about, "rows": ordered}, indent=1) + "\n", encoding="utf-8")
    before, _, rest = DOCS.read_text(encoding="utf-8").partition(BEGIN)
    lines = [
        BEGIN,
        "| pipeline | PSNR | float with noise | a call, SQNR | took |",
        "|" + " --- |" * 5,
        *(line(name, found) for name, found in ordered.items()),
        "",
        f"Target `{target}` on {about['cpu']}.",
        END,
    ]
    DOCS.write_text(before + "\n".join(lines) + rest.partition(END)[2], encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="PIPELINE", help="only these rows")
    parser.add_argument("--target", default="native")
    options = parser.parse_args()
    if unknown := [name for name in options.names if name not in MAKERS]:
        sys.exit(f"'{unknown[0]}' is no pipeline here: {', '.join(MAKERS)}")
    rows = json.loads(RESULTS.read_text())["rows"] if options.names and RESULTS.exists() else {}
    for name in options.names or MAKERS:
        rows[name] = row(name, options.target)
        print(line(name, rows[name]), flush=True)
        write(rows, options.target)


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    main()
