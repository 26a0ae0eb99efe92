"""Random-weight denoisers, small enough for every test: seeded, diffusers' own classes and folder layout.

>>> from tests.harness import tiny
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
from diffusers.models.embeddings import get_2d_rotary_pos_embed

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

_TRANSFORMER = {
    "num_attention_heads": 2,
    "attention_head_dim": 16,
    "in_channels": 4,
    "num_layers": 2,
    "sample_size": 16,
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
    # PixArt-alpha 1024: conditioned on resolution and aspect ratio too.
    "pixart-size": (
        "PixArtTransformer2DModel",
        {
            "num_attention_heads": 3,
            "attention_head_dim": 16,
            "in_channels": 4,
            "out_channels": 8,
            "num_layers": 1,
            "cross_attention_dim": 48,
            "sample_size": 16,
            "patch_size": 2,
            "caption_channels": 32,
            "use_additional_conditions": True,
        },
    ),
    # DiT: class-conditional, the embedding of block 0 is read again at the end, learned variance.
    "dit": (
        "DiTTransformer2DModel",
        _TRANSFORMER | {"out_channels": 8, "patch_size": 2, "num_embeds_ada_norm": 10},
    ),
    # Hunyuan-DiT: two text conditions with masks, rotary positions, a long skip (block 0 to block 3).
    "hunyuan": (
        "HunyuanDiT2DModel",
        _TRANSFORMER
        | {
            "num_layers": 4,
            "patch_size": 2,
            "hidden_size": 32,
            "cross_attention_dim": 32,
            "cross_attention_dim_t5": 24,
            "pooled_projection_dim": 16,
            "text_len": TOKENS,
            "text_len_t5": 9,
        },
    ),
    # Stable Diffusion 3.5: joint attention with normalized q and k, a second attention in block 0.
    "sd3": (
        "SD3Transformer2DModel",
        _TRANSFORMER
        | {
            "out_channels": 4,
            "patch_size": 2,
            "joint_attention_dim": 24,
            "caption_projection_dim": 32,
            "pooled_projection_dim": 64,
            "pos_embed_max_size": 32,
            "qk_norm": "rms_norm",
            "dual_attention_layers": (0,),
        },
    ),
    # Flux: latents packed 2x2 into tokens outside of the model, rotary positions, embedded guidance.
    "flux": (
        "FluxTransformer2DModel",
        {
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "in_channels": 16,
            "num_layers": 1,
            "num_single_layers": 2,
            "joint_attention_dim": 24,
            "pooled_projection_dim": 20,
            "axes_dims_rope": (4, 6, 6),
            "guidance_embeds": True,
        },
    ),
    # Sana: linear attention, depthwise convolutions, a masked text condition.
    "sana": (
        "SanaTransformer2DModel",
        _TRANSFORMER
        | {
            "out_channels": 4,
            "patch_size": 1,
            "sample_size": 8,
            "num_cross_attention_heads": 4,
            "cross_attention_head_dim": 8,
            "cross_attention_dim": 32,
            "caption_channels": 24,
        },
    ),
}
FAMILIES = ("unet2d", "sd15", "pixart")
"""One configuration per kind of graph (pixels, text, tokens), for tests of single passes."""
ALL_FAMILIES = ("unet2d", "sd15", "sdxl", "pixart", "dit", "hunyuan", "sd3", "flux", "sana")
"""One configuration for each of diffusers' families that the compiler takes."""
SIZES = {"flux": 16}
"""Height and width of the latents, where the configuration does not say."""

SCHEDULER = {
    "_class_name": "DDIMScheduler",
    "num_train_timesteps": 1000,
    "beta_schedule": "squaredcos_cap_v2",
    "prediction_type": "epsilon",
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "timestep_spacing": "trailing",
}

PIPELINE = (
    "trace,layout,calibrate{samples=2,steps=4},time-groups{groups=2},bit-allocation{uniform=int4},"
    "insert-fake-quant,round-weights{method=nearest},fold-fake-quant,fuse-epilogues"
)
"""A pipeline that compiles a model in seconds."""


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

    def whole(limit: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, limit, (batch, *shape), generator=generator)

    size = config.get("sample_size") or SIZES[name]
    height, width = (size, size) if isinstance(size, int) else size
    latent = "hidden_states" if class_name.endswith(("Transformer2DModel", "DiT2DModel")) else "sample"
    channels = config["in_channels"] // (4 if name == "flux" else 1)
    values = {latent: normal(channels, height, width), "timestep": whole(1000).float()}
    if classes := config.get("num_class_embeds"):
        values["class_labels"] = whole(classes)
    if classes := config.get("num_embeds_ada_norm"):
        values["class_labels"] = whole(classes + 1)  # the last is "no class"
    widths = ("caption_channels", "joint_attention_dim", "cross_attention_dim")
    if features := next((config[key] for key in widths if key in config), None):
        values["encoder_hidden_states"] = normal(config.get("text_len", TOKENS), features)
    if name.startswith(("pixart", "sana")):
        values["encoder_attention_mask"] = _mask(batch, TOKENS)
    if name == "hunyuan":
        second = config["text_len_t5"]
        values["text_embedding_mask"] = _mask(batch, TOKENS)
        values["encoder_hidden_states_t5"] = normal(second, config["cross_attention_dim_t5"])
        values["text_embedding_mask_t5"] = _mask(batch, second)
        values["image_meta_size"] = whole(1024, 6).float()
        values["style"] = whole(1)
    elif "pooled_projection_dim" in config:
        values["pooled_projections"] = normal(config["pooled_projection_dim"])
    if config.get("guidance_embeds"):
        values["guidance"] = torch.full((batch,), 3.5)
    if config.get("addition_embed_type") == "text_time":
        pooled = config["projection_class_embeddings_input_dim"] - 6 * config["addition_time_embed_dim"]
        values["text_embeds"] = normal(pooled)
        values["time_ids"] = whole(16, 6).float()
    if config.get("use_additional_conditions"):
        values["resolution"] = torch.full((batch, 2), 8.0 * size)
        values["aspect_ratio"] = torch.ones(batch, 1)
    return values


def _mask(batch: int, tokens: int) -> torch.Tensor:
    """1.0 for the tokens of a text, 0.0 for the padding behind: texts of different lengths."""
    lengths = torch.arange(batch) % tokens + 1
    return (torch.arange(tokens) < lengths[:, None]).float()


def call(name: str, model: torch.nn.Module, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
    """The output [B, C, H, W] of `model(name)`, called as diffusers' pipeline calls it."""
    given = dict(inputs)
    added = {key: given.pop(key) for key in ("text_embeds", "time_ids", "resolution", "aspect_ratio") if key in given}
    if added:
        given["added_cond_kwargs"] = added
    if name == "hunyuan":
        start, stop = (0, 0), (32, 32)  # 512 pixels in patches of 2 latents
        given["image_rotary_emb"] = get_2d_rotary_pos_embed(16, (start, stop), (8, 8), output_type="pt")
    if name == "flux":
        height, width = given["hidden_states"].shape[2:]
        folded = torch.nn.functional.unfold(given["hidden_states"], 2, stride=2)  # FluxPipeline._pack_latents
        given["hidden_states"] = folded.transpose(1, 2)
        given["timestep"] = given["timestep"] / 1000
        given["txt_ids"] = torch.zeros(given["encoder_hidden_states"].shape[1], 3)
        rows, columns = height // 2, width // 2
        given["img_ids"] = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
    with torch.no_grad():
        output = model(**given, return_dict=False)[0]
    if name == "flux":
        output = torch.nn.functional.fold(output.transpose(1, 2), (height, width), 2, stride=2)
    return output


def save(name: str, folder: Path, seed: int = 0, variant: str | None = None, **changes: Any) -> Path:
    """Saves `model(name)` under `folder`/`name` in diffusers' pipeline layout and returns that folder.

    It holds unet/ or transformer/ (config.json and safetensors, half precision with `variant="fp16"`),
    scheduler/scheduler_config.json and harness.json (the codec and the number of text tokens).
    """
    if name == "unet2d-17x23":
        raise ValueError("unet2d-17x23 exists in memory only")
    module = model(name, seed, **changes)
    part = "transformer" if CONFIGS[name][0].endswith(("Transformer2DModel", "DiT2DModel")) else "unet"
    root = Path(folder) / name
    if variant == "fp16":
        module = module.half()
    module.save_pretrained(root / part, variant=variant)
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text(json.dumps(SCHEDULER, indent=2) + "\n")
    harness = {"codec": "identity", "tokens": TOKENS}
    (root / "harness.json").write_text(json.dumps(harness, indent=2) + "\n")
    return root
