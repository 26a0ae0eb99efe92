"""Small diffusers pipelines from prompt to picture, with random weights: one for each way from text to denoiser."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    AutoencoderKLFlux2,
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    Flux2KleinPipeline,
    Flux2Transformer2DModel,
    FluxPipeline,
    FluxTransformer2DModel,
    PixArtSigmaPipeline,
    PixArtTransformer2DModel,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    T5Config,
    T5EncoderModel,
)

from benchmarks import train_emoji
from tests.harness import once

WORDS = "a red fox in the snow two ships and lighthouse by sea harbour blue house green tree an of on old man with"
TOKENS = 16
"""The tokens of CLIP's texts here."""
Pipeline = Any


@functools.cache
def _clip_words() -> tuple[dict[str, int], list[tuple[str, str]]]:
    """The vocabulary and the merges of a byte-pair encoding as CLIP's, made once a run.

    The library's trainer takes pairs that are equally frequent in another order in every process.
    """
    path = once.made("clip-words.json", lambda file: file.write_text(train_emoji.byte_pairs([WORDS] * 3, 600)))
    return train_emoji.words_and_merges(path.read_text())


def clip_tokenizer() -> CLIPTokenizer:
    vocabulary, merges = _clip_words()
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TOKENS, pad_token="<|endoftext|>")


def clip(kind: type = CLIPTextModel, legacy: bool = False, tokens: int = TOKENS) -> torch.nn.Module:
    """A text encoder of CLIP; ``legacy`` pools at the largest token, as those of before 2023 do."""
    tokenizer = clip_tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=tokens,
        projection_dim=32,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=2 if legacy else tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return kind(config).eval()


def t5_tokenizer(length: int = 12) -> PreTrainedTokenizerFast:
    letters = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ,.\u2581"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    pieces += [(f"\u2581{word}", -1 - i / 100) for i, word in enumerate(WORDS.split())] + [(c, -5.0) for c in letters]
    made = Tokenizer(models.Unigram(pieces, unk_id=2, byte_fallback=False))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=length
    )


def t5() -> torch.nn.Module:
    config = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def autoencoder(**changes: Any) -> AutoencoderKL:
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * 2,
        "up_block_types": ("UpDecoderBlock2D",) * 2,
        "block_out_channels": (32, 64),
        "latent_channels": 4,
        "norm_num_groups": 16,
        "sample_size": 16,
    }
    return AutoencoderKL(**(config | changes)).eval()


def unet(**changes: Any) -> UNet2DConditionModel:
    config = {
        "sample_size": 8,
        "layers_per_block": 1,
        "block_out_channels": (32, 64),
        "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
        "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
        "cross_attention_dim": 32,
        "attention_head_dim": 4,
        "norm_num_groups": 16,
    }
    return UNet2DConditionModel(**(config | changes)).eval()


BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}


def stable_diffusion() -> Pipeline:
    scheduler = DDIMScheduler(**BETAS, clip_sample=False, set_alpha_to_one=False)
    return StableDiffusionPipeline(
        autoencoder(), clip(), clip_tokenizer(), unet(), scheduler, None, None, requires_safety_checker=False
    )


def sdxl() -> Pipeline:
    """Two encoders side by side, a pooled text, and what guidance leads away from is zeros."""
    denoiser = unet(
        cross_attention_dim=64, addition_embed_type="text_time", addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=80,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        autoencoder(), clip(), clip(CLIPTextModelWithProjection, legacy=True), clip_tokenizer(), clip_tokenizer(),
        denoiser, EulerDiscreteScheduler(**BETAS),
    )  # fmt: skip


def pixart() -> Pipeline:
    """A mask of the tokens goes to the denoiser."""
    transformer = PixArtTransformer2DModel(
        sample_size=32, num_layers=1, patch_size=4, attention_head_dim=8, num_attention_heads=4, caption_channels=32,
        in_channels=4, cross_attention_dim=32, out_channels=8, norm_type="ada_norm_single",
    )  # fmt: skip
    return PixArtSigmaPipeline(
        t5_tokenizer(), t5(), autoencoder(), transformer.eval(), DPMSolverMultistepScheduler()
    )


def sd3() -> Pipeline:
    """Three encoders, of which two are padded to the width of the third."""
    transformer = SD3Transformer2DModel(
        sample_size=8, patch_size=1, in_channels=4, num_layers=1, attention_head_dim=8, num_attention_heads=4,
        caption_projection_dim=32, joint_attention_dim=80, pooled_projection_dim=64, out_channels=4,
    )  # fmt: skip
    encoder = T5Config(
        vocab_size=len(t5_tokenizer()), d_model=80, d_kv=8, d_ff=64, num_layers=1, num_heads=4,
        feed_forward_proj="gated-gelu",
    )  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer.eval(), FlowMatchEulerDiscreteScheduler(), autoencoder(shift_factor=0.06),
        clip(CLIPTextModelWithProjection, tokens=77), clip_tokenizer(), clip(CLIPTextModelWithProjection, tokens=77),
        clip_tokenizer(), T5EncoderModel(encoder).eval(), t5_tokenizer(),
    )  # fmt: skip


def flux() -> Pipeline:
    """Latents are tokens, and the guidance is an input of the denoiser."""
    transformer = FluxTransformer2DModel(
        patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 4, 8), guidance_embeds=True,
    )  # fmt: skip
    decoder = autoencoder(use_quant_conv=False, use_post_quant_conv=False, shift_factor=0.1, scaling_factor=0.36)
    return FluxPipeline(
        FlowMatchEulerDiscreteScheduler(), decoder, clip(tokens=77), clip_tokenizer(), t5(), t5_tokenizer(),
        transformer.eval(),
    )  # fmt: skip


def klein() -> Pipeline:
    """A language model reads the prompt as a question, and the denoiser is called in a way that is not known."""
    tokenizer = clip_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}question {{ m['content'] }} answer{% endfor %}"
    tokenizer.model_max_length = 512
    encoder = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=48, num_hidden_layers=28, num_attention_heads=2,
        num_key_value_heads=1, head_dim=16, max_position_embeddings=512,
    )  # fmt: skip
    transformer = Flux2Transformer2DModel(
        in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
        joint_attention_dim=96, axes_dims_rope=(4, 4, 4, 4), guidance_embeds=False,
    )  # fmt: skip
    decoder = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
        block_out_channels=(16, 32), layers_per_block=1, latent_channels=4, norm_num_groups=8,
    )  # fmt: skip
    decoder.bn.running_mean.normal_()
    decoder.bn.running_var.uniform_(0.5, 2)
    return Flux2KleinPipeline(
        FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), decoder.eval(), Qwen3ForCausalLM(encoder).eval(),
        tokenizer, transformer.eval(),
    )  # fmt: skip


FAMILIES: dict[str, Callable[[], Pipeline]] = {
    "stable-diffusion": stable_diffusion,
    "sdxl": sdxl,
    "pixart": pixart,
    "sd3": sd3,
    "flux": flux,
    "klein": klein,
}
SIZES = {"flux": (8, 8), "klein": (8, 8)}
"""Height and width of the decoder's latents, where they are not the configuration's."""


def pipeline(name: str) -> Pipeline:
    """A pipeline, the same one every time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return FAMILIES[name]()


def denoiser(name: str) -> str:
    """The attribute of a pipeline's denoiser."""
    return "unet" if name in ("stable-diffusion", "sdxl") else "transformer"
