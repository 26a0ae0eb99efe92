"""Tiny denoisers that are compiled by a call: films, sounds, packed tokens, and others whose inputs no table knows.

>>> from tests.harness import tiny_calls
>>> model = tiny_calls.model("wan")                # the diffusers module itself, float32, eval, random weights
>>> call = tiny_calls.call("wan", batch=2, seed=3) # keyword arguments of its forward, as its pipeline gives them
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_2d_rotary_pos_embed_lumina
from torch import Tensor

from mpq_compiler.frontend import call_file
from mpq_compiler.frontend.call_module import variations
from mpq_compiler.frontend.denoiser import Denoiser, wrap_calls

TOKENS, TEXT = 12, 32
"""Length and width of the text conditions."""

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen-image": (
        "QwenImageTransformer2DModel",
        {
            "in_channels": 16,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": (8, 4, 4),
        },
    ),
    "z-image": (
        "ZImageTransformer2DModel",
        {
            "in_channels": 4,
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 32,
            "axes_dims": [8, 4, 4],
            "axes_lens": [256, 32, 32],
        },
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 4, 4],
            "guidance_embeds": False,
        },
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 32,
            "axes_dims_rope": [4, 4, 8],
            "approximator_hidden_dim": 32,
            "approximator_layers": 1,
            "approximator_num_channels": 16,
        },
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {
            "sample_size": 16,
            "in_channels": 4,
            "hidden_size": 32,
            "num_layers": 2,
            "num_refiner_layers": 1,
            "num_attention_heads": 2,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "axes_dim_rope": [8, 4, 4],
            "cap_feat_dim": 32,
        },
    ),
    "cogview4": (
        "CogView4Transformer2DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "text_embed_dim": 32,
            "time_embed_dim": 16,
            "condition_dim": 4,
        },
    ),
    "auraflow": (
        "AuraFlowTransformer2DModel",
        {
            "sample_size": 16,
            "num_mmdit_layers": 1,
            "num_single_dit_layers": 1,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "caption_projection_dim": 32,
            "joint_attention_dim": 32,
            "pos_embed_max_size": 256,
        },
    ),
    "wan": (
        "WanTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 32,
            "freq_dim": 64,
            "ffn_dim": 32,
            "num_layers": 2,
            "rope_max_seq_len": 32,
        },
    ),
    "ltx-video": (
        "LTXVideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "cross_attention_dim": 32,
            "num_layers": 2,
            "caption_channels": 32,
        },
    ),
    "cogvideox": (
        "CogVideoXTransformer3DModel",
        {
            "num_attention_heads": 4,
            "attention_head_dim": 8,
            "in_channels": 4,
            "out_channels": 4,
            "time_embed_dim": 8,
            "text_embed_dim": 32,
            "num_layers": 2,
            "sample_width": 4,
            "sample_height": 4,
            "sample_frames": 9,
            "max_text_seq_length": 12,
        },
    ),
    "mochi": (
        "MochiTransformer3DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "num_layers": 2,
            "pooled_projection_dim": 16,
            "in_channels": 12,
            "text_embed_dim": 32,
            "time_embed_dim": 8,
            "max_sequence_length": 12,
        },
    ),
    "stable-audio": (
        "StableAudioDiTModel",
        {
            "sample_size": 32,
            "in_channels": 4,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_attention_heads": 2,
            "out_channels": 4,
            "cross_attention_dim": 32,
            "time_proj_dim": 16,
            "global_states_input_dim": 64,
            "cross_attention_input_dim": 32,
        },
    ),
    "stable-video": (
        "UNetSpatioTemporalConditionModel",
        {
            "block_out_channels": (32, 64),
            "layers_per_block": 1,
            "sample_size": 16,
            "down_block_types": ("CrossAttnDownBlockSpatioTemporal", "DownBlockSpatioTemporal"),
            "up_block_types": ("UpBlockSpatioTemporal", "CrossAttnUpBlockSpatioTemporal"),
            "cross_attention_dim": 32,
            "num_attention_heads": 4,
            "projection_class_embeddings_input_dim": 48,
            "addition_time_embed_dim": 16,
        },
    ),
    # Films and sounds together, in packed tokens; two outputs.
    "ltx2-video": (
        "LTX2VideoTransformer3DModel",
        {
            "in_channels": 8,
            "out_channels": 8,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "cross_attention_dim": 32,
            "audio_in_channels": 8,
            "audio_out_channels": 8,
            "audio_num_attention_heads": 2,
            "audio_attention_head_dim": 8,
            "audio_cross_attention_dim": 16,
            "num_layers": 1,
            "caption_channels": TEXT,
            "rope_double_precision": False,
        },
    ),
    "hunyuan-video": (
        "HunyuanVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 1,
            "num_single_layers": 1,
            "num_refiner_layers": 1,
            "patch_size": 2,
            "patch_size_t": 1,
            "guidance_embeds": True,
            "text_embed_dim": TEXT,
            "pooled_projection_dim": 16,
            "rope_axes_dim": (4, 6, 6),
        },
    ),
    # AnimateDiff: frames are rows of the text condition.
    "animate-diff": (
        "UNetMotionModel",
        {
            "block_out_channels": (16, 32),
            "norm_num_groups": 8,
            "down_block_types": ("CrossAttnDownBlockMotion", "DownBlockMotion"),
            "up_block_types": ("UpBlockMotion", "CrossAttnUpBlockMotion"),
            "cross_attention_dim": TEXT,
            "num_attention_heads": 2,
            "in_channels": 4,
            "out_channels": 4,
            "layers_per_block": 1,
            "sample_size": 8,
        },
    ),
    # Patches of frames, rows and columns.
    "sana-video": (
        "SanaVideoTransformer3DModel",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "num_layers": 1,
            "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12,
            "cross_attention_dim": 24,
            "caption_channels": TEXT,
            "sample_size": 8,
            "patch_size": (1, 2, 2),
            "qk_norm": "rms_norm_across_heads",
            "rope_max_seq_len": 32,
        },
    ),
    # One axis, of which its configuration says nothing.
    "unet1d": (
        "UNet1DModel",
        {
            "block_out_channels": (32, 64),
            "in_channels": 4,
            "out_channels": 4,
            "extra_in_channels": 64,
            "down_block_types": ("DownBlock1DNoSkip", "DownBlock1D"),
            "up_block_types": ("UpBlock1D", "UpBlock1DNoSkip"),
        },
    ),
    # NCSN++ (arXiv 2011.13456): the image is added to every level, multiplied by the time.
    "ncsnpp": (
        "UNet2DModel",
        {
            "block_out_channels": (32, 64),
            "in_channels": 3,
            "out_channels": 3,
            "layers_per_block": 1,
            "sample_size": 16,
            "norm_num_groups": None,
            "mid_block_scale_factor": 1.414,
            "time_embedding_type": "fourier",
            "down_block_types": ("SkipDownBlock2D", "AttnSkipDownBlock2D"),
            "up_block_types": ("AttnSkipUpBlock2D", "SkipUpBlock2D"),
            "norm_eps": 1e-6,
        },
    ),
    "lumina-next": (
        "LuminaNextDiT2DModel",
        {
            "sample_size": 8,
            "patch_size": 2,
            "in_channels": 4,
            "hidden_size": 24,
            "num_layers": 1,
            "num_attention_heads": 3,
            "num_kv_heads": 1,
            "multiple_of": 16,
            "learn_sigma": False,
            "qk_norm": True,
            "cross_attention_dim": TEXT,
            "scaling_factor": 1.0,
        },
    ),
}


def model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """The diffusers module of configuration ``name`` (``changes`` override its keys), float32, eval, seeded.

    None of its weights is left at zero or one, or uninitialised.
    """
    kind, config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module: torch.nn.Module = getattr(diffusers, kind)(**(config | changes))
        for key, weight in module.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(weight, std=0.05)
            elif weight.ndim == 1:
                torch.nn.init.normal_(weight, mean=1.0, std=0.1)
            elif not torch.isfinite(weight).all() or not weight.any():
                torch.nn.init.normal_(weight, std=0.05)
    return module.eval().requires_grad_(False)


def call(name: str, batch: int = 2, seed: int = 0) -> dict[str, Any]:
    """A call of ``model(name)`` by the names of its forward: random latents and texts, mixed times."""
    kind, config = CONFIGS[name]
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(batch, *shape, generator=generator)

    channels, times = config.get("in_channels", 4), torch.rand(batch, generator=generator)
    found = {"timestep": (1000 * times).round(), "encoder_hidden_states": normal(TOKENS, TEXT)}
    mask = torch.arange(TOKENS) < TOKENS - torch.arange(batch)[:, None]
    spatial = torch.cartesian_prod(torch.arange(4), torch.arange(4))
    ids = torch.cat([torch.zeros(16, 1, dtype=torch.int64), spatial], 1)
    if name == "qwen-image":
        found |= {"timestep": times, "encoder_hidden_states_mask": mask, "img_shapes": [(1, 4, 4)]}
    elif name == "z-image":
        texts, latents = normal(TOKENS, TEXT), normal(channels, 1, 8, 8)
        return {"x": list(latents), "t": times, "cap_feats": list(texts)}
    elif name == "flux2":
        ids = torch.cat([ids, torch.zeros(16, 1, dtype=torch.int64)], 1)
        found |= {"timestep": times, "img_ids": ids, "txt_ids": torch.zeros(TOKENS, 4)}
    elif name == "chroma":
        found |= {"timestep": times, "img_ids": ids.float(), "txt_ids": torch.zeros(TOKENS, 3)}
    elif name == "lumina2":  # numbers positions by the lengths of texts
        found |= {"timestep": times, "encoder_attention_mask": torch.ones_like(mask)}
    elif name == "cogview4":
        sizes = torch.full((batch, 2), 64)
        found |= {"original_size": sizes, "target_size": sizes, "crop_coords": torch.zeros_like(sizes)}
    elif name == "auraflow":
        found |= {"timestep": times}
    elif name == "ltx-video":
        found |= {"encoder_attention_mask": mask, "num_frames": 2, "height": 4, "width": 4}
        return found | {"hidden_states": normal(32, channels)}
    elif name == "ltx2-video":
        found |= {"audio_hidden_states": normal(9, 8), "audio_encoder_hidden_states": normal(TOKENS, TEXT)}
        found |= {"num_frames": 2, "height": 4, "width": 4, "audio_num_frames": 9, "fps": 25.0}
        return found | {"hidden_states": normal(32, channels), "encoder_attention_mask": mask}
    elif name in ("mochi", "hunyuan-video"):
        found |= {"encoder_attention_mask": torch.ones_like(mask) if name == "mochi" else mask}
        if name == "hunyuan-video":
            found |= {"pooled_projections": normal(16), "guidance": torch.full((batch,), 6000.0)}
    elif name == "stable-audio":
        found |= {"timestep": times, "global_hidden_states": normal(1, 64), "rotary_embedding": None}
        return found | {"hidden_states": normal(channels, 32)}
    elif name == "stable-video":
        found |= {"encoder_hidden_states": normal(1, TEXT), "added_time_ids": torch.tensor([[6.0, 127, 0.02]] * batch)}
        return found | {"sample": normal(2, 8, 8, 8)}
    elif name == "animate-diff":
        found["encoder_hidden_states"] = found["encoder_hidden_states"].repeat_interleave(2, 0)
        return found | {"sample": normal(4, 2, 8, 8)}
    elif name == "lumina-next":
        rotary = get_2d_rotary_pos_embed_lumina(8, 16, 16)
        found |= {"timestep": times, "encoder_mask": mask.float(), "image_rotary_emb": rotary}
        found |= {"cross_attention_kwargs": {}}
    elif name in ("unet1d", "ncsnpp"):
        shape = (32,) if name == "unet1d" else (16, 16)
        return {"sample": normal(channels, *shape), "timestep": found["timestep"] if name == "unet1d" else times + 0.1}
    if kind == "CogVideoXTransformer3DModel":
        return found | {"hidden_states": normal(3, channels, 4, 4)}
    if "3DModel" in kind:
        return found | {"hidden_states": normal(channels, 2, 4, 4)}
    packed = name in ("qwen-image", "flux2", "chroma")
    return found | {"hidden_states": normal(16, channels) if packed else normal(channels, 8, 8)}


def denoiser(name: str, folder: Path) -> Denoiser:
    """``model(name)`` as the compiler takes it, by recorded calls (written to ``folder``)."""
    module, file = model(name), folder / f"{name}.safetensors"
    call_file.write(file, module, variations(module, call(name), 12, 0, None), latent=None, time=None)
    return wrap_calls(module, file, name=name)
