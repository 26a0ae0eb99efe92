"""Random-weight denoisers, small enough for every test: seeded, diffusers' own classes and folder layout.

>>> from tests import tiny
>>> folder = tiny.save("unet2d", tmp_path)         # config.json, safetensors, scheduler/, harness.json
>>> model = tiny.model("unet2d")                   # the diffusers module itself, float32, eval
>>> inputs = tiny.inputs("unet2d", batch=2)        # keyword tensors by the names of Denoiser.input_specs
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import diffusers
import torch

TOKENS = 7
"""Length of the text condition of the text-conditioned configurations."""

_UNET = {"layers_per_block": 1, "block_out_channels": (32, 64), "norm_num_groups": 8}

_ODD = {
    "sample_size": (18, 22),
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 1,
    "block_out_channels": (33, 66),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
}

CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    # An unconditional pixel-space UNet with attention.
    "unet2d": (
        "UNet2DModel",
        _UNET
        | {
            "sample_size": 16,
            "in_channels": 3,
            "out_channels": 3,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 16,
        },
    ),
    # Class-conditional, asymmetric downsampling padding (0, 1, 0, 1), scale-shift time conditioning.
    "unet2d-class": (
        "UNet2DModel",
        _UNET
        | {
            "sample_size": 8,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
            "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": 16,
            "num_class_embeds": 11,
            "downsample_padding": 0,
            "resnet_time_scale_shift": "scale_shift",
        },
    ),
    # No channel count is a multiple of 4: 33 and 66 channels in 3 groups (of 11 and 22), 18x22 pixels.
    "unet2d-odd": ("UNet2DModel", _ODD | {"norm_num_groups": 3, "attention_head_dim": 11}),
    # The same in 11 groups (of 3 and 6 channels) with one head as wide as the layer.
    "unet2d-odd11": ("UNet2DModel", _ODD | {"norm_num_groups": 11, "attention_head_dim": 33}),
    # The same at 17x23. diffusers' UNet2DModel cannot return to an odd size after a downsampling, so `model`
    # keeps the resolution at both levels. No configuration says so: `save` refuses, denoiser.wrap takes it.
    "unet2d-17x23": (
        "UNet2DModel",
        _ODD | {"sample_size": (17, 23), "norm_num_groups": 11, "attention_head_dim": 11},
    ),
    # Stable Diffusion 1.5's structure: cross-attention to text tokens.
    "sd15": (
        "UNet2DConditionModel",
        _UNET
        | {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D"),
            "cross_attention_dim": 32,
            "attention_head_dim": 4,
        },
    ),
    # SDXL's structure: linear projections, several transformer layers, added text and size conditions.
    "sdxl": (
        "UNet2DConditionModel",
        _UNET
        | {
            "sample_size": 16,
            "in_channels": 4,
            "out_channels": 4,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
            "attention_head_dim": (2, 4),
            "use_linear_projection": True,
            "transformer_layers_per_block": (1, 2),
            "cross_attention_dim": 64,
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": 8,
            "projection_class_embeddings_input_dim": 80,
        },
    ),
    # A PixArt transformer; the output carries the predicted variance as 4 further channels.
    "pixart": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 2,
            "cross_attention_dim": 32,
            "sample_size": 16,
            "patch_size": 2,
            "caption_channels": 32,
            "use_additional_conditions": False,
        },
    ),
}
FAMILIES = ("unet2d", "sd15", "pixart")
"""One configuration per family of denoisers, for tests that run over all of them."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "trailing",
}


def model(name: str, seed: int = 0, **changes: Any) -> torch.nn.Module:
    """The diffusers module of configuration `name` (`changes` override its keys), float32, eval, seeded.

    diffusers starts some layers at zero and all norms at identity; every parameter is drawn here, so that no
    layer of a random model is dead and no operand is trivially 0 or 1.
    """
    class_name, config = CONFIGS[name]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = getattr(diffusers, class_name)(**(config | changes))
        for key, parameter in module.named_parameters():
            if key.endswith("bias"):
                torch.nn.init.normal_(parameter, std=0.05)
            elif parameter.ndim == 1:
                torch.nn.init.normal_(parameter, mean=1.0, std=0.1)
            elif not parameter.any():
                torch.nn.init.normal_(parameter, std=0.05)
    if name == "unet2d-17x23":
        module.down_blocks[0].downsamplers[0].conv.stride = (1, 1)
        module.up_blocks[0].upsamplers[0].interpolate = False
    return module.eval().requires_grad_(False)


def inputs(name: str, batch: int = 2, seed: int = 0, **changes: Any) -> dict[str, torch.Tensor]:
    """Random inputs of `model(name)` by the names of `Denoiser.input_specs`; mixed timesteps in a batch."""
    class_name, config = CONFIGS[name]
    config = config | changes
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(batch, *shape, generator=generator)

    size = config["sample_size"]
    height, width = (size, size) if isinstance(size, int) else size
    latent = "hidden_states" if class_name.endswith("Transformer2DModel") else "sample"
    values = {
        latent: normal(config["in_channels"], height, width),
        "timestep": torch.randint(0, 1000, (batch,), generator=generator),
    }
    if classes := config.get("num_class_embeds"):
        values["class_labels"] = torch.randint(0, classes, (batch,), generator=generator)
    if width := config.get("caption_channels") or config.get("cross_attention_dim"):
        values["encoder_hidden_states"] = normal(TOKENS, width)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        values["text_embeds"] = normal(pooled)
        values["time_ids"] = torch.randint(0, 16, (batch, 6), generator=generator).float()
    return values


def save(name: str, folder: Path, seed: int = 0, variant: str | None = None, **changes: Any) -> Path:
    """Saves `model(name)` under `folder`/`name` in diffusers' pipeline layout and returns that folder.

    It holds unet/ or transformer/ (config.json and safetensors, half precision with `variant="fp16"`),
    scheduler/scheduler_config.json and harness.json (the codec and the number of text tokens).
    """
    if name == "unet2d-17x23":
        raise ValueError("unet2d-17x23 exists in memory only")
    module = model(name, seed, **changes)
    part = "transformer" if CONFIGS[name][0].endswith("Transformer2DModel") else "unet"
    root = Path(folder) / name
    if variant == "fp16":
        module = module.half()
    module.save_pretrained(root / part, variant=variant)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    harness = {"codec": "identity", "tokens": TOKENS}
    (root / "harness.json").write_text(json.dumps(harness, indent=2) + "\n")
    return root
