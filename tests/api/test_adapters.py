"""Adapters of a UNet, each by its call: ControlNet and its residuals, T2I-Adapter, IP-Adapter."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import pytest
import torch
from torch import Tensor

import mpq_compiler
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

QUICK: dict[str, Any] = {"recipe": "w8a8", "target": "reference"}
TOKENS_OF_AN_IMAGE = 4


def call(batch: int = 2, seed: int = 0) -> dict[str, Any]:
    return tiny.inputs("sd15", batch, seed)


def normal(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def tensors(value: Any) -> list[Tensor]:
    return [value] if isinstance(value, Tensor) else [tensor for part in value for tensor in tensors(part)]


def require_close(model: torch.nn.Module, path: Path, make: Any) -> mpq_compiler.CompiledDenoiser:
    """Compiles a model by one call of eight conditions, and compares it in another."""
    mpq_compiler.compile(model, path, example=make(8, 0), **QUICK)
    compiled = mpq_compiler.load(path)
    with torch.no_grad():
        expected = tensors(model(**make(3, 5), return_dict=False))
    found = tensors(compiled(**make(3, 5), return_dict=False))
    assert [t.shape for t in found] == [t.shape for t in expected]
    for one, other in zip(expected, found, strict=True):
        assert float(10 * torch.log10(one.square().sum() / (one - other).square().sum())) > 20
    return compiled


def control() -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        unet = tiny.model("sd15")
        model = diffusers.ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(8, 16)).eval()
        for weight in model.parameters():
            if not weight.any():
                torch.nn.init.normal_(weight.data, std=0.1)
    return model.requires_grad_(False)


def test_a_controlnet_is_a_model_that_compiles(tmp_path: Path) -> None:
    """Its results are a list and a tensor."""
    require_close(control(), tmp_path / "x.mpq", lambda b, s: call(b, s) | {"controlnet_cond": normal(s, b, 3, 32, 32)})


def test_residuals_of_a_controlnet_are_inputs(tmp_path: Path) -> None:
    network = control()

    def make(batch: int, seed: int) -> dict[str, Any]:
        given = call(batch, seed)
        down, mid = network(**given, controlnet_cond=normal(seed, batch, 3, 32, 32), return_dict=False)
        return given | {"down_block_additional_residuals": tuple(down), "mid_block_additional_residual": mid}

    compiled = require_close(tiny.model("sd15"), tmp_path / "x.mpq", make)
    lacking = {k: v for k, v in make(2, 1).items() if k != "mid_block_additional_residual"}
    with pytest.raises(UserError, match="'mid_block_additional_residual'"):
        compiled(**lacking)
    with pytest.raises(UserError, match="'down_block_additional_residuals' is missing"):
        compiled(**call())


def test_residuals_of_a_t2i_adapter_are_inputs(tmp_path: Path) -> None:
    """The model takes them out of the list that it is given: neither compiling nor a call does."""
    adapter = diffusers.T2IAdapter(in_channels=3, channels=[32, 64], num_res_blocks=1, downscale_factor=2).eval()

    def make(batch: int, seed: int) -> dict[str, Any]:
        with torch.no_grad():
            features = adapter(normal(seed, batch, 3, 32, 32))
        return call(batch, seed) | {"down_intrablock_additional_residuals": list(features)}

    compiled = require_close(tiny.model("sd15"), tmp_path / "x.mpq", make)
    given = make(2, 1)
    compiled(**given)
    assert len(given["down_intrablock_additional_residuals"]) == 2


def adapted() -> Any:
    """A UNet with an IP-Adapter: a projection of an image's embedding, and keys and values of its tokens."""
    model = tiny.model("sd15")
    names = [name for name in model.attn_processors if "attn2" in name]
    state: dict[str, Tensor] = {}
    for number, name in enumerate(names):
        width = model.get_submodule(name.removesuffix(".processor")).to_k.weight.shape[0]
        for kind in ("k", "v"):
            state[f"{2 * number + 1}.to_{kind}_ip.weight"] = 0.1 * normal(number, width, 32)
    image = {
        "proj.weight": 0.1 * normal(1, 32 * TOKENS_OF_AN_IMAGE, 24),
        "proj.bias": torch.zeros(32 * TOKENS_OF_AN_IMAGE),
    }
    image |= {"norm.weight": torch.ones(32), "norm.bias": torch.zeros(32)}
    model._load_ip_adapter_weights([{"image_proj": image, "ip_adapter": state}])
    return model.eval().requires_grad_(False)


def test_an_ip_adapter_is_compiled_with_the_model(tmp_path: Path) -> None:
    model = adapted()
    compiled = require_close(
        model,
        tmp_path / "x.mpq",
        lambda b, s: call(b, s) | {"added_cond_kwargs": {"image_embeds": [normal(s, b, 1, 24)]}},
    )
    with pytest.raises(UserError, match="'added_cond_kwargs'"):
        compiled(**call())
