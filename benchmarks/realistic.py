"""Writes checkpoints of real models' shapes, with weights that resemble theirs, and calls to calibrate on.

    python -m benchmarks.realistic sd15 FOLDER          # FOLDER/config.json, its safetensors, FOLDER/calls.safetensors
    python -m benchmarks.realistic sdxl FOLDER --rows 64 --size 32

Where no weights can be had, time, memory, formats and allocation are tried on these. Configurations are the published
ones; the weights have what was published of such models:

- *spectra*: the first 32 singular values fall steeply, the others slowly (SVDQuant, arXiv 2411.05007, section 4.2 and
  figure 5), so each matrix is a sum of 32 products whose strength falls as a power of their number, and of noise;
- *outlier channels*: a hundredth of the channels of what a layer reads is many times as loud as the others, the same
  ones for every input (SmoothQuant, arXiv 2211.10438, section 3), which the weights of norms make here; channels of
  skip connections are louder still (DMQ, arXiv 2507.12933);
- *ranges that differ from row to row* of a weight (Q-Diffusion, arXiv 2302.04304, section 4.2): lognormal row scales.

Tensors are written as they are drawn, in shards, each from a seed of its own name: memory holds one of them.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

from mpq_compiler.frontend import call_file, denoiser
from mpq_compiler.sampling.call_tree import Arguments
from mpq_compiler.support import tensorfile

RANK = 32
"""The number of steep singular values."""
SHARE = 0.5
"""Of a weight's power, the part that the steep singular values have."""
OUTLIERS = 0.01
"""The part of a norm's channels that are loud."""
LOUDER = 8.0
"""How many times as loud these are, at the median."""
SHARD = 1 << 30
"""The most bytes of a file."""
STEM = "diffusion_pytorch_model"


@dataclass(frozen=True)
class Shape:
    """A published model's class and configuration."""

    cls: str
    config: dict[str, Any]
    dtype: torch.dtype = torch.float16
    """The type of the published checkpoint."""


def _unet(width: int) -> Shape:
    """The UNet of Stable Diffusion 1.5, whose first level has 320 channels, at another width."""
    channels = [width, 2 * width, 4 * width, 4 * width]
    return Shape("UNet2DConditionModel", {"sample_size": 64, "block_out_channels": channels,
                                          "cross_attention_dim": 768, "attention_head_dim": 8})  # fmt: skip


MODELS = {
    "unet-70m": _unet(96),
    "unet-420m": _unet(224),
    "sd15": _unet(320),
    "pixart-sigma": Shape(
        "PixArtTransformer2DModel",
        {
            "sample_size": 64, "num_layers": 28, "attention_head_dim": 72, "in_channels": 4, "out_channels": 8,
            "patch_size": 2, "attention_bias": True, "num_attention_heads": 16, "cross_attention_dim": 1152,
            "activation_fn": "gelu-approximate", "num_embeds_ada_norm": 1000, "norm_type": "ada_norm_single",
            "norm_elementwise_affine": False, "norm_eps": 1e-6, "caption_channels": 4096,
            "use_additional_conditions": False, "interpolation_scale": 1,
        },
    ),
    "sdxl": Shape(
        "UNet2DConditionModel",
        {
            "sample_size": 128, "block_out_channels": [320, 640, 1280], "layers_per_block": 2,
            "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
            "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
            "transformer_layers_per_block": [1, 2, 10], "attention_head_dim": [5, 10, 20],
            "cross_attention_dim": 2048, "use_linear_projection": True, "addition_embed_type": "text_time",
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
    ),
    "wan-1.3b": Shape(
        "WanTransformer3DModel",
        {
            "patch_size": [1, 2, 2], "num_attention_heads": 12, "attention_head_dim": 128, "in_channels": 16,
            "out_channels": 16, "text_dim": 4096, "freq_dim": 256, "ffn_dim": 8960, "num_layers": 30,
            "cross_attn_norm": True, "qk_norm": "rms_norm_across_heads", "eps": 1e-6, "rope_max_seq_len": 1024,
        },
        torch.bfloat16,
    ),
    "flux2-klein-4b": Shape(
        "Flux2Transformer2DModel",
        {
            "patch_size": 1, "in_channels": 128, "num_layers": 5, "num_single_layers": 20, "attention_head_dim": 128,
            "num_attention_heads": 24, "joint_attention_dim": 7680, "timestep_guidance_channels": 256,
            "mlp_ratio": 3.0, "axes_dims_rope": [32, 32, 32, 32], "rope_theta": 2000, "guidance_embeds": False,
        },
        torch.bfloat16,
    ),
    "z-image": Shape(
        "ZImageTransformer2DModel",
        {
            "all_patch_size": [2], "all_f_patch_size": [1], "in_channels": 16, "dim": 3840, "n_layers": 30,
            "n_refiner_layers": 2, "n_heads": 30, "n_kv_heads": 30, "norm_eps": 1e-5, "qk_norm": True,
            "cap_feat_dim": 2560, "rope_theta": 256.0, "t_scale": 1000.0, "axes_dims": [32, 48, 48],
            "axes_lens": [1536, 512, 512],
        },
        torch.bfloat16,
    ),
}  # fmt: skip
"""The models by name; all but the first two are published ones."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=MODELS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--rows", type=int, default=64, help="samples of the calls (default: 64)")
    parser.add_argument("--size", type=int, default=32, help="height and width of the latents (default: 32)")
    options = parser.parse_args()
    write(options.model, options.folder)
    write_calls(options.model, options.folder / "calls.safetensors", options.rows, options.size)


def empty(name: str) -> torch.nn.Module:
    """The module of a model, whose parameters have shapes and no memory."""
    import diffusers

    shape = MODELS[name]
    with torch.device("meta"):
        module: torch.nn.Module = getattr(diffusers, shape.cls).from_config(shape.config)
    return module.eval()


def write(name: str, folder: Path) -> None:
    """Writes config.json and the weights of a model, unless they are there."""
    if (folder / f"{STEM}.safetensors.index.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    module, dtype = empty(name), MODELS[name].dtype
    module.save_config(folder)  # type: ignore[operator]
    kinds = {path: type(part).__name__ for path, part in module.named_modules()}
    places: dict[str, str] = {}
    part: dict[str, Tensor] = {}

    def flush() -> None:
        file = f"{STEM}-{len(set(places.values())):05}.safetensors"
        places.update(dict.fromkeys(part, file))
        save_file(part, folder / file)
        part.clear()

    for path, tensor in module.state_dict().items():
        part[path] = value(path, tuple(tensor.shape), kinds[path.rpartition(".")[0]]).to(dtype)
        if sum(t.numel() * t.element_size() for t in part.values()) > SHARD:
            flush()
    flush()
    index = {"metadata": {}, "weight_map": places}
    (folder / f"{STEM}.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")


def value(path: str, shape: tuple[int, ...], kind: str) -> Tensor:
    """The parameter of a name and shape, f32; ``kind`` is the class of the module that has it."""
    generator = torch.Generator().manual_seed(int(hashlib.sha256(path.encode()).hexdigest()[:15], 16))

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator)

    if len(shape) < 2:
        if not path.endswith("weight"):
            return 0.02 * normal(*shape)
        scales = torch.exp(0.2 * normal(*shape))
        loud = torch.rand(shape, generator=generator) < (OUTLIERS if "Norm" in kind else 0)
        return torch.where(loud, scales * LOUDER * torch.exp(0.5 * normal(*shape)), scales)
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(RANK, rows, columns)
    strength = torch.arange(1, rank + 1) ** -0.7
    strength *= math.sqrt(SHARE * rows / strength.square().sum())
    weight = normal(rows, columns).mul_(math.sqrt((1 - SHARE) / columns))
    left, right = torch.linalg.qr(normal(rows, rank))[0], torch.linalg.qr(normal(columns, rank))[0]
    weight.addmm_(left * strength, right.T)
    return weight.mul_(torch.exp(0.25 * normal(rows, 1))).reshape(shape)


def write_calls(name: str, path: Path, rows: int, size: int) -> None:
    """Writes random calls of a model on latents of a size: ``rows`` samples, at times spread over all there are."""
    calls = _calls(name, rows, size)
    if calls is not None:
        call_file.write(path, empty(name), calls)
        return
    module = empty(name)
    inputs = denoiser.wrap(module, name=name, size=size).random_inputs(rows)
    inputs["timestep"] = torch.linspace(1, 999, rows).round().to(inputs["timestep"].dtype)
    with path.open("wb") as file:
        tensorfile.save(file, {key: tensor.numpy() for key, tensor in inputs.items()}, {})


def _calls(name: str, rows: int, size: int) -> list[Arguments] | None:
    """Calls of a model that is taken by its calls; None for one whose inputs are known."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    times = np.linspace(0.999, 0.001, rows)
    if name == "wan-1.3b":
        return [
            {"hidden_states": normal(1, 16, 1, size, size), "timestep": torch.tensor([round(999 * t)]),
             "encoder_hidden_states": normal(1, 512, 4096)}
            for t in times
        ]  # fmt: skip
    if name == "z-image":
        return [
            {"x": [normal(16, 1, size, size)], "t": torch.tensor([1 - t], dtype=torch.float32),
             "cap_feats": [normal(128, 2560)]}
            for t in times
        ]  # fmt: skip
    if name == "flux2-klein-4b":
        side = size // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1))
        words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(512))
        return [
            {"hidden_states": normal(1, side * side, 128), "encoder_hidden_states": normal(1, 512, 7680),
             "timestep": torch.tensor([t], dtype=torch.float32), "img_ids": places.float(), "txt_ids": words.float()}
            for t in times
        ]  # fmt: skip
    return None


if __name__ == "__main__":
    main()
