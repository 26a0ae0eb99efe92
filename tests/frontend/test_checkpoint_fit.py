from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.frontend import checkpoint, checkpoint_fit, checkpoint_module, stored_weights
from mpq_compiler.frontend.denoiser import load
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

STEM = "diffusion_pytorch_model"
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Weights = dict[str, torch.Tensor]


@pytest.fixture
def unet(tmp_path: Path) -> Path:
    """The folder of a tiny UNet."""
    return tiny.save("unet2d", tmp_path) / "unet"


def edited(folder: Path, change: Callable[[Weights], object]) -> Weights:
    """The weights of the folder, changed and written back."""
    path = folder / f"{STEM}.safetensors"
    weights = load_file(path)
    change(weights)
    path.unlink()
    save_file(weights, path)
    return weights


def scaled(weights: Weights) -> None:
    """Makes matrices 8-bit floats with scales (one number, one a row, one a block, in turn), and kernels halves."""
    for index, (name, value) in enumerate(list(weights.items())):
        if value.dim() == 2:
            rows, columns = value.shape
            shape = [(), (rows,), (-(-rows // 128), -(-columns // 128))][index % 3]
            kind = ["scale_weight", "weight_scale", "weight_scale_inv"][index % 3]
            scale = value.abs().amax() / 400 * torch.linspace(1, 1.5, max(1, torch.Size(shape).numel())).reshape(shape)
            each = scale[:, None] if len(shape) == 1 else scale
            if len(shape) == 2:
                each = scale.repeat_interleave(128, 0).repeat_interleave(128, 1)[:rows, :columns]
            weights[name] = (value / each).to(E4M3)
            weights[name.removesuffix("weight") + kind] = scale
            weights[name.removesuffix("weight") + "input_scale"] = torch.tensor(1.0)
        elif value.dim() == 4:
            weights[name] = value.to(torch.bfloat16)


def test_a_checkpoint_of_mixed_types_is_the_model_that_its_tensors_stand_for(unet: Path) -> None:
    model = tiny.model("unet2d")
    edited(unet, scaled)
    weights = checkpoint.read_weights(unet)
    assert {t.dtype for t in weights.values()} >= {torch.float32, torch.bfloat16}
    loaded = load(unet)
    assert all(torch.equal(p.float(), weights[n].float()) for n, p in loaded.module.model.named_parameters())
    assert all((p - weights[n].float()).abs().max() <= p.abs().max() / 16 for n, p in model.named_parameters())
    assert any("scales of activations" in note and "left aside" in note for note in loaded.notes)


@pytest.mark.parametrize("dtype", [E4M3, E5M2])
def test_8_bit_floats_without_scales_are_what_they_are(unet: Path, dtype: torch.dtype) -> None:
    given = edited(unet, lambda weights: weights.update({n: t.to(dtype) for n, t in weights.items()}))
    module = checkpoint_module.read(checkpoint.locate(unet))
    assert all(torch.equal(p.float(), given[n].float()) for n, p in module.named_parameters())


def refused(folder: Path, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        checkpoint_module.read(checkpoint.locate(folder))
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_missing_and_unused_tensors_are_named_with_their_number(unet: Path) -> None:
    names = sorted(load_file(unet / f"{STEM}.safetensors"))
    edited(unet, lambda weights: [weights.pop(name) for name in names[:5]])
    first = ", ".join(f"'{name}'" for name in names[:3])
    refused(unet, f"lack 5 tensors: {first} and 2 more; config.json")
    edited(unet, lambda w: w.update({n: torch.ones(1) for n in names[:5]} | {f"x{i}": torch.ones(i) for i in range(2)}))
    refused(unet, "have, beyond what the model takes, 2 tensors: 'x0', 'x1'; config.json")


def test_whole_numbers_in_the_place_of_floats_are_named_before_what_comes_with_them(unet: Path) -> None:
    """A checkpoint in 4 bits has other shapes and further tensors, and none of those is what is wrong."""

    def quantized(weights: Weights) -> None:
        weights["time_embedding.linear_1.weight"] = torch.zeros(64, 16, dtype=torch.uint8)
        weights["time_embedding.linear_1.weight.absmax"] = torch.ones(32)

    edited(unet, quantized)
    refused(unet, "'time_embedding.linear_1.weight'", "is uint8", "not quantized")


def test_what_headers_tell_is_found_before_a_weight_is_read(unet: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def read(found: object) -> Weights:
        raise AssertionError("weights were read")

    monkeypatch.setattr(stored_weights, "read", read)
    faults: list[tuple[Callable[[Weights], object], str]] = [
        (lambda weights: weights.update(extra=torch.ones(1)), "'extra'"),
        (lambda weights: weights.update({"conv_in.bias": torch.ones(3)}), "is [3]"),
        (lambda weights: weights.update({"conv_in.bias": torch.ones(32, dtype=torch.int8)}), "is int8"),
        (lambda weights: weights.pop("conv_in.bias"), "lack the tensor 'conv_in.bias'"),
    ]
    whole = (unet / f"{STEM}.safetensors").read_bytes()
    for change, part in faults:
        edited(unet, change)
        refused(unet, part)
        (unet / f"{STEM}.safetensors").unlink()
        (unet / f"{STEM}.safetensors").write_bytes(whole)
    with pytest.raises(AssertionError, match="weights were read"):
        checkpoint_module.read(checkpoint.locate(unet))


def test_tensors_that_a_class_allows_and_does_not_take_are_left_aside(unet: Path, monkeypatch) -> None:
    """As Wan's transformers allow `norm_added_q`, which published checkpoints have."""
    edited(unet, lambda weights: weights.update({"mid.norm_added_q.weight": torch.ones(3)}))
    refused(unet, "'mid.norm_added_q.weight'")
    cls = type(tiny.model("unet2d"))
    monkeypatch.setattr(cls, "_keys_to_ignore_on_load_unexpected", ["norm_added_q"])
    assert any("'mid.norm_added_q.weight'" in note for note in load(unet).notes)


# Code of a repository


def write(path: Path, **changes: object) -> None:
    value = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(value | changes))


ADVICE = ("code of a repository is never executed", "compile(module, out, example=...)")
RUNS = "from pathlib import Path\nPath(__file__).with_suffix('.ran').touch()\n"


def test_code_that_a_configuration_names_is_never_run(unet: Path) -> None:
    (unet / "own_unet.py").write_text(RUNS)
    (unet.parent / "own_unet.py").write_text(RUNS)
    before = (unet / "config.json").read_text()
    for changes in (
        {"auto_map": {"AutoModel": "own_unet.OwnUNet"}},
        {"_class_name": ["own_unet", "OwnUNet"]},
        {"_class_name": "OwnUNet"},
    ):
        write(unet / "config.json", **changes)
        refused(unet, "config.json", *ADVICE)
        refused(unet.parent, "config.json", *ADVICE)
        (unet / "config.json").write_text(before)
    write(unet.parent / "model_index.json", unet=["own_unet", "UNet2DModel"])
    refused(unet.parent, "model_index.json", "'own_unet'", *ADVICE)
    assert not list(unet.parent.rglob("*.ran"))


def test_code_beside_a_model_that_needs_none_is_left_alone_and_named(unet: Path) -> None:
    (unet / "convert.py").write_text(RUNS)
    write(unet.parent / "model_index.json", unet=["diffusers", "UNet2DModel"])
    assert any("'convert.py'" in note and "was not run" in note for note in load(unet.parent).notes)
    assert not list(unet.parent.rglob("*.ran"))


def test_a_class_that_diffusers_does_not_have_can_be_given_as_a_module(unet: Path) -> None:
    write(unet / "config.json", _class_name="SomethingElse")
    refused(unet, "'SomethingElse'", "compile(module, out, example=...)")


def test_renaming_leaves_the_given_weights_alone() -> None:
    weights = {"conv_in.weight": torch.ones(1)}
    assert checkpoint_fit.renamed(torch.nn.Linear(1, 1), weights) == weights
