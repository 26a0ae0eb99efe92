"""LoRA: in the model before it is compiled, or in branches of the artifact; both do what it does in the float model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mpq_compiler
from mpq_compiler.cli import mpqc
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.resolve import resolve
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

RANK, ALPHA = 4, 2.0
QUICK = {"recipe": "w8a8", "target": "reference"}
SMALLER = {"block_out_channels": (16, 32), "sample_size": 8}
TARGETS = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "proj_in")


class Adapted(nn.Module):
    """A layer with an unfused LoRA, in the structure of PEFT."""

    def __init__(self, layer: nn.Module, down: torch.Tensor, up: torch.Tensor) -> None:
        super().__init__()
        self.base_layer = layer
        kind = nn.Linear if down.dim() == 2 else nn.Conv2d
        more = () if down.dim() == 2 else (1,)
        self.lora_A = nn.ModuleDict({"default": kind(down.shape[1], RANK, *more, bias=False)})
        self.lora_B = nn.ModuleDict({"default": kind(RANK, up.shape[0], *more, bias=False)})
        self.scaling = {"default": ALPHA / RANK}
        self.lora_A["default"].weight.data, self.lora_B["default"].weight.data = down, up

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        low = self.lora_A["default"](x)
        return self.base_layer(x) + self.lora_B["default"](low) * self.scaling["default"]


def layers(model: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in model.named_modules() if name.endswith(TARGETS) and not isinstance(m, nn.ModuleList)}


def factors() -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(down, up) of each layer, that change its weight by a fifth of its norm."""
    generator, made = torch.Generator().manual_seed(1), {}
    for name, layer in layers(tiny.model("sd15", **SMALLER)).items():
        rows, *columns = layer.weight.shape
        down = torch.randn((RANK, *columns), generator=generator)
        up = torch.randn((rows, RANK), generator=generator)
        up *= 0.2 * layer.weight.norm() / ((up @ down.flatten(1)).norm() * ALPHA / RANK)
        made[name] = down, up.reshape(rows, RANK, *[1] * (len(columns) - 1)).detach()
    return made


def unfused() -> nn.Module:
    model = tiny.model("sd15", **SMALLER)
    for name, (down, up) in factors().items():
        parent, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(parent), leaf, Adapted(model.get_submodule(name), down, up))
    return model


def fused() -> nn.Module:
    model = tiny.model("sd15", **SMALLER)
    with torch.no_grad():
        for name, (down, up) in factors().items():
            weight = model.get_submodule(name).weight
            weight += (up.flatten(1) @ down.flatten(1)).reshape(weight.shape) * ALPHA / RANK
    return model


def call(seed: int, batch: int = 16) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    text = torch.randn(batch, tiny.TOKENS, 32, generator=generator)
    sample, times = torch.randn(batch, 4, 8, 8, generator=generator), torch.linspace(20, 950, batch).round()
    return {"sample": sample, "timestep": times, "encoder_hidden_states": text}


def decibels(expected: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(expected.square().sum() / (expected - found).square().sum()))


@pytest.fixture(scope="module")
def expected() -> torch.Tensor:
    """The float model with the LoRA in its weights."""
    with torch.no_grad():
        return fused()(**call(5)).sample


@pytest.fixture(scope="module")
def of_the_fused(tmp_path_factory: pytest.TempPathFactory, expected: torch.Tensor) -> float:
    """SQNR of the compiled fused model."""
    path = tmp_path_factory.mktemp("fused") / "x.mpq"
    mpq_compiler.compile(fused(), path, example=call(0, 2), **QUICK)
    return decibels(expected, mpq_compiler.load(path)(**call(5)).sample)


@torch.no_grad()
def test_a_fused_and_an_unfused_lora_are_compiled_as_they_are(tmp_path: Path, expected, of_the_fused: float) -> None:
    plain = tiny.model("sd15", **SMALLER)(**call(5)).sample
    assert decibels(expected, plain) < 20
    model = unfused()
    assert decibels(expected, model(**call(5)).sample) > 90
    mpq_compiler.compile(model, tmp_path / "x.mpq", example=call(0, 2), **QUICK)
    assert of_the_fused > 22
    assert decibels(expected, mpq_compiler.load(tmp_path / "x.mpq")(**call(5)).sample) > of_the_fused - 1


@torch.no_grad()
def test_a_lora_in_branches_is_as_good_as_one_in_the_weights(tmp_path: Path, expected, of_the_fused: float) -> None:
    mpq_compiler.compile(tiny.model("sd15", **SMALLER), tmp_path / "x.mpq", example=call(0, 2), lora_rank=RANK, **QUICK)
    tensors = {}
    for name, (down, up) in factors().items():
        kohya = f"lora_unet_{name.replace('.', '_')}"
        tensors |= {f"{kohya}.lora_down.weight": down, f"{kohya}.lora_up.weight": up}
        tensors[f"{kohya}.alpha"] = torch.tensor(ALPHA)
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, tmp_path / "x.safetensors")
    artifact = mpq_compiler.load(tmp_path / "x.mpq")
    assert artifact.load_lora(tmp_path / "x.safetensors").layers == len(factors())
    assert decibels(expected, artifact(**call(5)).sample) > of_the_fused - 1


# --- options ------------------------------------------------------------------------------------------------


def test_the_pass_goes_where_it_can() -> None:
    for recipe in ("default", "w8a8", "mixdq"):
        plain = [step.text() for step in resolve(Options(recipe=recipe))]
        with_it = [step.text() for step in resolve(Options(recipe=recipe, lora_rank=8, lora_layers="*.to_q, *.to_k"))]
        assert with_it == [*plain[:-1], "lora{rank=8,layers=*.to_q/*.to_k}", plain[-1]]
        again = Options(pipeline=",".join(with_it), lora_rank=4)
        assert [step.text() for step in resolve(again)][-2] == "lora{rank=4,layers=*.to_q/*.to_k}"


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lora_layers": "*"}, "lora_layers says which layers have a branch of lora_rank: add that"),
        ({"lora_rank": 0}, "option 'rank' of pass 'lora' must be 1 or more, not 0"),
        ({"lora_rank": 4, "emit": "c", "target": "x86-64-avx2"}, "program that emit c makes cannot load a LoRA"),
        ({"lora_rank": 4, "target": "onnx"}, "lora_rank is for CPU targets and the reference, and 'onnx' is none"),
    ],
)
def test_what_cannot_have_branches_is_refused_at_once(tmp_path: Path, options: dict, said: str) -> None:
    with pytest.raises(UserError, match=said):
        mpq_compiler.compile("fashion-unet", tmp_path / "x.mpq", **options)


def test_the_command_has_the_options(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compile", "fashion-unet", "-o", str(tmp_path / "x.mpq"), "--target", "onnx", "--lora-rank", "4"]
    assert mpqc.main([*command, "--lora-layers", "*"]) != 0
    assert "--lora-rank is for CPU targets" in capsys.readouterr().err
