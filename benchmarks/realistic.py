"""Writes checkpoints of real models' shapes, with weights that resemble theirs, and calls to calibrate on.

    python -m benchmarks.realistic sd15 FOLDER          # FOLDER/config.json, its safetensors, FOLDER/calls.safetensors
    python -m benchmarks.realistic sdxl FOLDER --rows 64 --size 32

Where no weights can be had, time, memory, formats and allocation are tried on these. Configurations are the published
ones; the weights have what was published of such models:

- *spectra*: the first 32 singular values fall steeply, the others slowly (SVDQuant, arXiv 2411.05007, section 4.2 and
  figure 5), so each matrix is a sum of 32 products whose strength falls as a power of their number, and of noise;
- *outlier channels*: a hundredth of the channels of what a layer reads is many times as loud as the others, the same
  ones for every input (SmoothQuant, arXiv 2211.10438, section 3), which the weights of norms make here. Transformers
  whose norms have no weights have them too (PTQ4DiT, arXiv 2405.16005; ViDiT-Q, arXiv 2406.02540, on PixArt-Sigma and
  video models), by what modulates behind the norm: here in the scales of PixArt's and Wan's tables, and in those that
  FLUX.2 computes from the time, so that they come and go with it (arXiv 2503.06930);
- *ranges that change with the time*: what is added to and multiplied by in each block comes from the timestep's
  embedding (Q-Diffusion, arXiv 2302.04304, section 4.1), and latents are drawn at times spread over all there are;
- *ranges that differ from row to row* of a weight (Q-Diffusion, arXiv 2302.04304, section 4.2): lognormal row scales.

Tensors are written as they are drawn, in shards, each from a seed of its own name: memory holds one of them. One thread
draws them, for sums of matrix products depend on the number.
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

from mpq_compiler.bench.baselines import torch_threads
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
EMBEDDED = 0.2
"""How loud the embedding of a time is behind its activation; what it is multiplied by must be so much louder."""
SHARD = 1 << 30
"""The most bytes of a file."""
STEM = "diffusion_pytorch_model"
DEPTHS = ("num_layers", "num_single_layers", "n_layers", "n_refiner_layers")
"""The numbers of layers in configurations of transformers."""


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


def checkpoint_bytes(folder: Path) -> int:
    """The bytes of a checkpoint's shards."""
    return sum(file.stat().st_size for file in folder.glob(f"{STEM}*.safetensors"))


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


def macs(name: str, size: int) -> int:
    """The multiply-accumulates of a call on one sample of latents of a size, attentions included."""
    from torch.utils import _pytree
    from torch.utils.flop_counter import FlopCounterMode

    calls, target = _calls(name, 1, size), empty(name)
    inputs: Any = calls and calls[0]
    if calls is None:
        wrapped = denoiser.wrap(target, name=name, size=size)
        target, inputs = wrapped.module, wrapped.random_inputs(1)
    inputs = _pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), inputs)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        target(**inputs)
    return int(counter.get_total_flops()) // 2


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

    with torch_threads(1, True):
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
        return _loud(torch.exp(0.2 * normal(*shape)), OUTLIERS if "Norm" in kind else 0, generator)
    rows, columns = shape[0], math.prod(shape[1:])
    rank = min(RANK, rows, columns)
    strength = torch.arange(1, rank + 1) ** -0.7
    strength *= math.sqrt(SHARE * rows / strength.square().sum())
    weight = normal(rows, columns).mul_(math.sqrt((1 - SHARE) / columns))
    left, right = torch.linalg.qr(normal(rows, rank))[0], torch.linalg.qr(normal(columns, rank))[0]
    weight.addmm_(left * strength, right.T)
    weight.mul_(torch.exp(0.25 * normal(rows, 1)))
    if path.endswith("scale_shift_table"):  # shift, scale and gate of each channel, once or twice; or shift and scale
        table = weight.view(shape)
        for row in range(1, shape[-2], 3):
            table[..., row, :] += _loud(torch.ones(shape[-1]), OUTLIERS, generator) - 1
    elif "stream_modulation" in path:  # the same, computed from the time
        for row in range(1, rows // columns, 3):
            part = weight[row * columns : (row + 1) * columns]
            part.mul_(_loud(torch.ones(columns, 1), OUTLIERS, generator, LOUDER / EMBEDDED))
    return weight.reshape(shape)


def _loud(scales: Tensor, share: float, generator: torch.Generator, by: float = LOUDER) -> Tensor:
    """Scales of channels, a share of which is louder by a factor around ``by``."""
    loud = torch.rand(scales.shape, generator=generator) < share
    return torch.where(loud, scales * by * torch.exp(0.5 * torch.randn(scales.shape, generator=generator)), scales)


def write_calls(name: str, path: Path, rows: int, size: int) -> None:
    """Writes random calls of a model on latents of a size: ``rows`` samples, at times spread over all there are."""
    calls = _calls(name, rows, size)
    if calls is not None:
        call_file.write(path, _shallow(name), calls)
        return
    module = empty(name)
    inputs = denoiser.wrap(module, name=name, size=size).random_inputs(rows)
    inputs["timestep"] = torch.linspace(1, 999, rows).round().to(inputs["timestep"].dtype)
    with path.open("wb") as file:
        tensorfile.save(file, {key: tensor.numpy() for key, tensor in inputs.items()}, {})


def _shallow(name: str) -> torch.nn.Module:
    """The model with a layer of each kind, which is called as the whole is: the form of calls is found by calling."""
    import diffusers

    shape = MODELS[name]
    config = shape.config | dict.fromkeys([key for key in DEPTHS if key in shape.config], 1)
    module: torch.nn.Module = getattr(diffusers, shape.cls).from_config(config).eval()
    kinds = {path: type(part).__name__ for path, part in module.named_modules()}
    for path, tensor in module.state_dict().items():
        tensor.copy_(value(path, tuple(tensor.shape), kinds[path.rpartition(".")[0]]))
    return module


def _calls(name: str, rows: int, size: int) -> list[Arguments] | None:
    """Calls of a model that is taken by its calls; None for one whose inputs are known."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    times, config = np.linspace(0.999, 0.001, rows), MODELS[name].config
    if name == "wan-1.3b":
        return [
            {"hidden_states": normal(1, config["in_channels"], 1, size, size),
             "timestep": torch.tensor([round(999 * t)]),
             "encoder_hidden_states": normal(1, 512, config["text_dim"])}
            for t in times
        ]  # fmt: skip
    if name == "z-image":
        return [
            {"x": [normal(config["in_channels"], 1, size, size)], "t": torch.tensor([1 - t], dtype=torch.float32),
             "cap_feats": [normal(128, config["cap_feat_dim"])]}
            for t in times
        ]  # fmt: skip
    if name == "flux2-klein-4b":
        side = size // 2
        places = torch.cartesian_prod(torch.arange(1), torch.arange(side), torch.arange(side), torch.arange(1))
        words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(512))
        return [
            {"hidden_states": normal(1, side * side, config["in_channels"]),
             "encoder_hidden_states": normal(1, 512, config["joint_attention_dim"]),
             "timestep": torch.tensor([t], dtype=torch.float32), "img_ids": places.float(), "txt_ids": words.float()}
            for t in times
        ]  # fmt: skip
    return None


if __name__ == "__main__":
    main()
