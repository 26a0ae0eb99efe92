"""Checkpoints in half precision, with every weight left in its file, beside the same weights in float32."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.frontend import widened
from mpq_compiler.ir import scratch
from tests.harness import tiny

STEM = "diffusion_pytorch_model.safetensors"
SETTINGS = {
    "w8a8": {"recipe": "w8a8"},
    "default": {"weights": 4.5, "effort": "none"},
}


def files(folder: Path, out: Path, cache: Path, **options) -> dict[str, bytes | dict]:
    """The files of an artifact, the manifest read."""
    compile_denoiser(folder, out, cache=cache, samples=2, steps=3, **options)
    found: dict[str, bytes | dict] = {path.name: path.read_bytes() for path in out.iterdir()}
    found["manifest.json"] = json.loads(found["manifest.json"])
    return found


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["unet2d", "dit"])
def test_artifacts_are_those_of_the_same_weights_in_float32(family, setting, dtype, tmp_path, monkeypatch):
    """With a cache of its own each: measurements are of the same numbers, whatever they are stored as."""
    made = {}
    for kind in (dtype, torch.float32):
        folder = tiny.save(family, tmp_path / str(kind) / "model")
        (path,) = folder.rglob(STEM)
        tensors = {name: tensor.to(dtype).to(kind) for name, tensor in load_file(path).items()}
        save_file(tensors, path)
        monkeypatch.setattr(widened, "LEAST", 1 if kind == dtype else 1 << 30)
        monkeypatch.setattr(scratch, "LEAST", 256 if kind == dtype else 1 << 30)
        out, cache = (tmp_path / str(kind) / name for name in ("out.mpq", "cache"))
        made[kind] = files(folder, out, cache, **SETTINGS[setting])
    ours, theirs = made[dtype], made[torch.float32]
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if ours[name] != theirs[name]] == []
