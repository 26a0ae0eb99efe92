"""Whole denoisers for a GPU: the bundled ones, and Stable Diffusion's and PixArt's with random weights.

    python -m benchmarks.gpu_kit.models sdxl W8A8 DIR [LEVEL]     compiles one, which takes minutes and memory
"""

from __future__ import annotations

import inspect
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mpq_compiler.api import compile
from mpq_compiler.artifact import bundle
from mpq_compiler.frontend import denoiser
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import nvidia
from mpq_compiler.targets.table import TARGETS
from tests.harness import families

PIPELINE = (
    "trace,layout,calibrate{{samples=8,steps=4}},time-groups,bit-allocation{{uniform={}}},{}numerics{{mode=fast}},"
    "insert-fake-quant,residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
)
OURS = {"W8A8": "int8", "W4A8": "int4", "W4A16": "int4,activations=16"}
REUSING = {"W8A8": "keep-values{every=2,steps=10},"}
"""Behind `bit-allocation` of the bundled models: calls by themselves are as without."""
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


def compiled(source: str, name: str, folder: Path, target: str, jobs: int) -> Path:
    """The artifact in one of our precisions.

    A model without its text encoder is calibrated on smaller images, of random latents: it is as fast on others.
    """
    path = folder / f"{Path(source).name}-{name}-{target}.mpq"
    if path.exists():
        return path
    model = denoiser.load(source)
    keeping = REUSING.get(name, "") if model.conditioning.possible else ""
    chosen: dict[str, Any] = {"pipeline": PIPELINE.format(OURS[name], keeping), "jobs": jobs, "target": target}
    if not model.conditioning.possible:
        channels, height, width = model.latent_shape
        sizes = [(1, channels, height // 4, width // 4), *((batch, channels, height, width) for batch in (1, 2))]
        chosen["shapes"] = ",".join("x".join(map(str, shape)) for shape in sizes)
        chosen["calibration"] = families.calibration(
            model.resized(height // 4, width // 4), path.with_suffix(".safetensors"), ROWS
        )
    compile.compile(model, path, **chosen)
    return path


# --- for the kit --------------------------------------------------------------------------------------------

KEPT = 64 << 10
"""Bytes up to which a stored tensor of a large model travels; larger ones are drawn there."""
BATCHES = (1, 2)


def asked(named: Sequence[str]) -> dict[str, dict[str, Path]]:
    """The artifacts of each denoiser by precision, none of what is bundled; large ones are `sdxl=W8A8:ARTIFACT`.

    Raises:
        UserError: there is no such model, or no such artifact.
    """
    found: dict[str, dict[str, Path]] = {}
    for text in named:
        name, _, given = text.partition("=")
        precision, _, path = given.partition(":")
        if name not in MODELS or bool(path) == (MODELS[name] is None):
            known = ", ".join(n if make is None else f"{n}=NAME:ARTIFACT" for n, make in MODELS.items())
            raise UserError(f"--models {text}: name some of {known}")
        found.setdefault(name, {}).update({precision: Path(path)} if path else {})
        if path:
            bundle.read(path)
    return found


def put(folder: Path, artifacts: Mapping[str, Mapping[str, Path]], levels: Sequence[int], jobs: int) -> None:
    """The denoisers of a kit."""
    folder.mkdir()
    found: list[dict[str, Any]] = []
    for name, paths in artifacts.items():
        if paths:
            found += _large(folder, name, paths)
        else:
            found += [row for level in levels for row in _bundled(folder, name, level, jobs)]
    (folder / "models.json").write_text(json.dumps(found) + "\n")


def _bundled(folder: Path, name: str, level: int, jobs: int) -> list[dict[str, Any]]:
    """With the output of the float model and that of x86's artifact of the same plan."""
    targets = [t.name for t in TARGETS.values() if t.is_cuda and not t.is_cuda12 and list(t.levels) == [level]]
    if not targets:
        return []
    model, rows = denoiser.load(name), []
    paths = {precision: compiled(name, precision, folder, targets[0], jobs) for precision in OURS}
    with tempfile.TemporaryDirectory(prefix="mpq-kit-") as beside:
        others = {precision: compiled(name, precision, Path(beside), "x86-64-avx2", jobs) for precision in OURS}
        runs = {precision: compiled_denoiser.load(path) for precision, path in others.items()}
    for batch in BATCHES:
        inputs = model.random_inputs(batch, 0)
        arrays = {f"input.{n}": t.numpy() for n, t in inputs.items()}
        with torch.no_grad():
            arrays["expected.float"] = model.module(**inputs).float().numpy()
        for precision, other in runs.items():
            arrays[f"expected.{precision} of x86"] = other.run({n: t.numpy() for n, t in inputs.items()})
        kept, artifacts = f"{name}-{level}-{batch}.npz", {precision: path.name for precision, path in paths.items()}
        np.savez_compressed(folder / kept, **arrays)  # type: ignore[arg-type]
        rows.append(_row(name, level, batch, kept, artifacts, None))
    return rows


def _row(
    name: str, level: int, batch: int, arrays: str, artifacts: Mapping[str, str], peer: Mapping[str, Any] | None
) -> dict[str, Any]:
    return {"name": name, "level": level, "batch": batch, "arrays": arrays, "artifacts": artifacts, "peer": peer}


def described(folder: Path, path: Path, most: int = KEPT) -> int:
    """An artifact without its large tensors, whose shapes and spread are told; returns the compute capability."""
    artifact = bundle.read(path)
    kept, drawn = {}, {}
    folder.mkdir()
    for name, array in artifact.tensors().items():
        if array.nbytes <= most:
            kept[name] = array
        else:
            deviation = {"deviation": float(array.astype(np.float32).std())} if array.dtype.kind == "f" else {}
            drawn[name] = {"shape": array.shape, "dtype": str(array.dtype), **deviation}
    np.savez_compressed(folder / "kept.npz", **kept)
    (folder / "drawn.json").write_text(json.dumps(drawn))
    for file in artifact.folder.iterdir():
        if file.name not in (bundle.WEIGHTS, bundle.DECISIONS):
            shutil.copy2(file, folder / file.name)
    (level,) = nvidia.stated(artifact.manifest["target"]["features"])
    return level


def _large(folder: Path, name: str, paths: Mapping[str, Path]) -> list[dict[str, Any]]:
    """Without their large tensors."""
    make, rows = MODELS[name], []
    assert make is not None
    levels = {described(folder / f"{name}-{precision}", path) for precision, path in paths.items()}
    (level,) = levels
    with torch.device("meta"):
        module = make(1)
    parameters = list(inspect.signature(type(module).forward).parameters)
    peer = {"class": type(module).__name__, "config": dict(module.config), "parameters": parameters}
    peer["config"] = {key: value for key, value in peer["config"].items() if not key.startswith("_")}
    manifest = bundle.read(next(iter(paths.values()))).manifest
    draw = np.random.default_rng(0)
    for batch in BATCHES:
        arrays = {}
        fitting = [f for f in manifest["functions"] if f["batch"] == batch]
        function = max(fitting, key=lambda f: f["inputs"][0]["shape"][1:])  # not the one to calibrate on
        for value in function["inputs"]:
            shape = tuple(int(extent) for extent in value["shape"])
            array = draw.standard_normal(shape) if len(shape) > 1 else np.full(shape, 500)
            arrays[f"input.{value['name']}"] = array.astype(value["dtype"])
        np.savez_compressed(folder / f"{name}-{batch}.npz", **arrays)  # type: ignore[arg-type]
        artifacts = {precision: f"{name}-{precision}" for precision in paths}
        rows.append(_row(name, level, batch, f"{name}-{batch}.npz", artifacts, peer))
    return rows


if __name__ == "__main__":
    model_name, precision_, folder_, *level_ = sys.argv[1:]
    begin = time.perf_counter()
    made = save(model_name, 1.0, Path(folder_))
    print(compiled(made, precision_, Path(folder_), f"cuda-sm{(level_ or ['90'])[0]}", 1))
    print(f"{time.perf_counter() - begin:.0f} s")
