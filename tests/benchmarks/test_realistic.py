"""Checkpoints that resemble real ones: their shapes, spectra, loud channels, bytes and calls."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks import realistic
from mpq_compiler.bench.baselines import torch_threads
from mpq_compiler.frontend import calibration_file, call_file
from mpq_compiler.frontend import denoiser as denoisers

PUBLISHED = {"sd15": 859.5, "pixart-sigma": 610.9, "sdxl": 2567.5, "wan-1.3b": 1419.0, "flux2-klein-4b": 3875.5,
             "z-image": 6154.9}  # fmt: skip
"""Millions of parameters of the models that have weights to download."""
BLOCKS = {"down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"], "block_out_channels": [32, 64],
          "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"], "layers_per_block": 1}  # fmt: skip
SMALL = {
    "sd15": BLOCKS | {"cross_attention_dim": 64, "attention_head_dim": 2},
    "pixart-sigma": {"num_layers": 2, "num_attention_heads": 4, "cross_attention_dim": 288, "caption_channels": 64},
    "sdxl": BLOCKS | {"cross_attention_dim": 64, "attention_head_dim": 2, "transformer_layers_per_block": 1,
                      "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 112},
    "wan-1.3b": {"num_layers": 2, "num_attention_heads": 2, "ffn_dim": 512, "text_dim": 64},
    "flux2-klein-4b": {"num_layers": 1, "num_single_layers": 1, "num_attention_heads": 2, "in_channels": 32,
                       "joint_attention_dim": 64},
    "z-image": {"n_layers": 1, "n_refiner_layers": 1, "dim": 256, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": 64},
}  # fmt: skip
"""What is smaller in a small model than in the published one."""
READS = {
    "sd15": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "pixart-sigma": "transformer_blocks.1.attn1.to_q",
    "sdxl": "down_blocks.0.attentions.0.transformer_blocks.0.ff.net.0.proj",
    "wan-1.3b": "blocks.1.attn1.to_q",
    "flux2-klein-4b": "single_transformer_blocks.0.attn.to_qkv_mlp_proj",
    "z-image": "layers.0.attention.to_q",
}
"""A layer that reads what a norm gives."""


@pytest.fixture(params=SMALL)
def small(request, monkeypatch) -> str:
    """A model of few and narrow layers in the place of a published one."""
    shape = realistic.MODELS[request.param]
    monkeypatch.setitem(realistic.MODELS, request.param, replace(shape, config=shape.config | SMALL[request.param]))
    return str(request.param)


def files(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("name", PUBLISHED)
def test_models_have_as_many_parameters_as_published(name):
    count = sum(parameter.numel() for parameter in realistic.empty(name).parameters())
    assert count / 1e6 == pytest.approx(PUBLISHED[name], abs=0.1)


def test_singular_values_fall_steeply_and_then_slowly():
    weight = realistic.value("block.to_q.weight", (512, 384), "Linear")
    values = torch.linalg.svdvals(weight)
    assert 0.4 < float(values[: realistic.RANK].square().sum() / values.square().sum()) < 0.65
    assert float(values[0] / values[realistic.RANK - 1]) > 5
    assert float(values[realistic.RANK] / values[2 * realistic.RANK]) < 1.3


def test_rows_of_a_weight_differ_in_range():
    norms = realistic.value("block.to_q.weight", (512, 384), "Linear").norm(dim=1).log()
    assert 0.15 < float(norms.std()) < 0.4


def test_a_hundredth_of_the_channels_is_loud():
    scales = realistic.value("block.norm1.weight", (20_000,), "LayerNorm")
    loud = scales > 3
    assert 0.005 < float(loud.float().mean()) < 0.015
    assert float(scales[loud].median() / scales[~loud].median()) == pytest.approx(realistic.LOUDER, rel=0.3)
    assert float(realistic.value("block.other.weight", (20_000,), "Linear").max()) < 3


@pytest.mark.parametrize("shape", [(6, 20_000), (1, 6, 20_000), (2, 20_000)])
def test_tables_are_loud_in_their_scales_alone(shape):
    table = realistic.value("block.scale_shift_table", shape, "Block").reshape(shape[-2], -1).abs()
    loud = (table > 2).float().mean(1)
    scales = [row % 3 == 1 for row in range(len(table))]
    assert [float(share) > 0.005 for share in loud] == scales
    assert float(loud.max()) < 0.015


def test_bytes_are_always_the_same(small, tmp_path):
    for threads, folder in enumerate(("once", "again"), 1):
        with torch_threads(threads, True):
            realistic.write(small, tmp_path / folder)
            realistic.write_calls(small, tmp_path / folder / "calls.safetensors", 4, 8)
    once, again = (files(tmp_path / folder) for folder in ("once", "again"))
    assert len(once) == 4 and once == again


def test_calls_are_accepted_and_layers_read_loud_channels(small, tmp_path):
    realistic.write(small, tmp_path)
    realistic.write_calls(small, tmp_path / "calls.safetensors", 16, 8)
    calls = tmp_path / "calls.safetensors"
    denoiser = denoisers.load_calls(tmp_path, calls) if call_file.has_call(calls) else denoisers.load(tmp_path, size=8)
    rows = calibration_file.load(denoiser, calls)
    calibration, held_out = calibration_file.split(rows)
    assert [len(part["timestep"]) for part in (calibration, held_out)] == [12, 4]
    seen: list[torch.Tensor] = []
    layer = denoiser.module.model.get_submodule(READS[small])
    layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].flatten(0, -2).abs().amax(0)))
    output = denoiser(**{name: value[:2] for name, value in rows.items()})
    assert bool(torch.isfinite(output).all()) and float(output.std()) > 0
    ranges = np.concatenate([each.numpy() for each in seen])
    assert ranges.max() > 2.5 * np.median(ranges)


def test_multiply_accumulates_are_those_of_all_products(small):
    module = realistic.empty(small)
    weights = sum(p.numel() for n, p in module.named_parameters() if p.ndim > 1 and "table" not in n)
    assert realistic.macs(small, 8) > 0.3 * weights
    assert realistic.macs(small, 16) > realistic.macs(small, 8)
