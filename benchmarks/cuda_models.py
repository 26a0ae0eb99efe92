"""Whole denoisers for a GPU: the bundled ones, and Stable Diffusion's and PixArt's with random weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from mpq_compiler.api import compile
from mpq_compiler.frontend import denoiser
from tests.harness import families

PIPELINE = (
    "trace,layout,calibrate{{samples=8,steps=4}},time-groups,bit-allocation{{uniform={}}},numerics{{mode=fast}},"
    "insert-fake-quant,residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
)
OURS = {"W8A8": "int8", "W4A8": "int4"}
ROWS = 16
"""To calibrate on where there is no text encoder; every fourth is kept to judge by."""


def _widths(size: float, *widths: int) -> tuple[int, ...]:
    """Of multiples of 64, which heads and groups of norms divide."""
    return tuple(max(64, round(width * size / 64) * 64) for width in widths)


def sd15(size: float) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=_latents(64, size), cross_attention_dim=768, attention_head_dim=8,
        block_out_channels=_widths(size, 320, 640, 1280, 1280),
    )  # fmt: skip


def sdxl(size: float) -> torch.nn.Module:
    from diffusers import UNet2DConditionModel

    widths = _widths(size, 320, 640, 1280)
    cross = "CrossAttn{}Block2D".format
    return UNet2DConditionModel(
        sample_size=_latents(128, size), cross_attention_dim=2048, block_out_channels=widths,
        attention_head_dim=tuple(width // 64 for width in widths), use_linear_projection=True,
        down_block_types=("DownBlock2D", cross("Down"), cross("Down")),
        up_block_types=(cross("Up"), cross("Up"), "UpBlock2D"),
        transformer_layers_per_block=(1, max(1, round(2 * size)), max(1, round(10 * size))),
        addition_embed_type="text_time", addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816,
    )  # fmt: skip


def pixart(size: float) -> torch.nn.Module:
    from diffusers import PixArtTransformer2DModel

    heads = max(1, round(16 * size))
    return PixArtTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=72, in_channels=4, out_channels=8, patch_size=2,
        num_layers=max(1, round(28 * size)), cross_attention_dim=72 * heads, caption_channels=4096,
        sample_size=_latents(128, size), use_additional_conditions=False,
    )  # fmt: skip


def _latents(side: int, size: float) -> int:
    return max(16, round(side * size / 16) * 16)


MODELS: Mapping[str, Callable[[float], torch.nn.Module] | None] = {
    "fashion-unet": None, "fashion-dit": None, "fashion-text": None, "sd15": sd15, "sdxl": sdxl, "pixart": pixart,
}  # fmt: skip
"""By name; None where it is bundled."""


def save(name: str, size: float, folder: Path) -> str:
    """The model as a folder, with random weights that are always the same; its name where it is bundled."""
    make = MODELS[name]
    if make is None:
        return name
    path = folder / f"{name}-{size:g}"
    if not path.exists():
        torch.manual_seed(0)
        model = make(size)
        model.save_pretrained(path / ("transformer" if "Transformer" in type(model).__name__ else "unet"))
    return str(path)


def compiled(source: str, name: str, level: int, folder: Path, jobs: int) -> tuple[Path, float]:
    """(the artifact in one of our precisions, seconds that it took to compile; 0 where it was there).

    A model without its text encoder is calibrated on smaller images, of random latents: it is as fast on others.
    """
    path = folder / f"{Path(source).name}-{name}-sm{level}.mpq"
    if path.exists():
        return path, 0.0
    model = denoiser.load(source)
    chosen: dict[str, Any] = {"pipeline": PIPELINE.format(OURS[name]), "jobs": jobs, "target": f"cuda-sm{level}"}
    if not model.conditioning.possible:
        channels, height, width = model.latent_shape
        sizes = [(1, channels, height // 4, width // 4), *((batch, channels, height, width) for batch in (1, 2))]
        chosen["shapes"] = ",".join("x".join(map(str, shape)) for shape in sizes)
        chosen["calibration"] = families.calibration(
            model.resized(height // 4, width // 4), path.with_suffix(".safetensors"), ROWS
        )
    start = time.perf_counter()
    compile.compile(model, path, **chosen)
    return path, time.perf_counter() - start
