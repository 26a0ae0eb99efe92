"""Exports against what the other projects' own loaders make of them, and against the model that was compiled."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, UNet2DConditionModel
from safetensors.torch import save_file

import mpq_compiler
from mpq_compiler.artifact import bundle
from mpq_compiler.interchange.export import export
from mpq_compiler.interchange.original import read
from mpq_compiler.frontend import checkpoint
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

HEAD = "trace,layout,split-shortcut,equalize{rule=smoothquant},rotate{rule=everywhere},calibrate,time-groups"
TAIL = "insert-fake-quant,low-rank,round-weights,fold-fake-quant,fuse-epilogues"
WIDE = {"block_out_channels": (64, 64), "norm_num_groups": 8}


def sqnr(reference: torch.Tensor, found: torch.Tensor) -> float:
    return float(10 * torch.log10(reference.square().sum() / (reference - found).square().sum()))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    where = tmp_path_factory.mktemp("export")
    model = tiny.save("sd15", where, **WIDE)
    save_file({k: v.contiguous() for k, v in tiny.inputs("sd15", 8, **WIDE).items()}, where / "calls.safetensors")
    return model


@pytest.fixture(scope="module")
def compiled(folder):
    made = {}

    def artifact(uniform: str, rewritten: bool = True):
        key = (uniform, rewritten)
        if key not in made:
            head = HEAD if rewritten else "trace,layout,calibrate,time-groups"
            pipeline = f"{head},bit-allocation{{uniform={uniform}}},{TAIL}"
            made[key] = folder.parent / f"{uniform}-{rewritten}.mpq"
            calls = folder.parent / "calls.safetensors"
            mpq_compiler.compile(folder, made[key], target="reference", calibration=calls, pipeline=pipeline)
        return made[key]

    return artifact


def outputs(model, inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs, return_dict=False)[0]


@pytest.fixture(scope="module")
def float_model(folder):
    return UNet2DConditionModel.from_pretrained(folder / "unet")


def loaded(file, folder):
    quantization = GGUFQuantizationConfig(compute_dtype=torch.float32)
    return UNet2DConditionModel.from_single_file(
        str(file), config=str(folder), subfolder="unet", quantization_config=quantization, torch_dtype=torch.float32
    )


def test_rewrites_are_undone(compiled, folder, float_model):
    """Scaled, rotated and split channels come back as the model's own, as near as codes of 8 bits are."""
    found = bundle.read(compiled("int8"))
    kinds = {step["kind"] for entry in found.manifest["rewrites"] for step in entry["steps"]}
    assert kinds == {"inputs", "outputs", "rotate", "part"}
    model = {name: value.float() for name, value in checkpoint.read_weights(folder / "unet").items()}
    read_back = read(found, model)
    assert read_back.keys() == model.keys()
    for name, known in read_back.items():
        if name.endswith("weight"):
            assert known.value.shape == model[name].shape
            assert sqnr(model[name], known.value) > 25, name
    float_model.load_state_dict({name: known.value for name, known in read_back.items()})


@pytest.mark.parametrize(
    ("uniform", "rewritten", "types", "least"),
    [
        ("int8", True, {"Q8_0"}, 30),
        ("int8", False, {"Q8_0"}, 30),
        ("int4", False, {"Q4_1"}, 5),
        ("nf4", False, {"Q4_0", "Q4_1"}, 5),
        ("int4+r4", False, {"Q4_0", "Q4_1"}, 5),
        ("fp8", False, {"Q8_0"}, 30),
        ("ec3", True, {"Q3_K", "Q4_0", "Q4_1"}, 3),
    ],
)
def test_diffusers_computes_what_the_artifact_holds(compiled, folder, tmp_path, uniform, rewritten, types, least):
    made = export(compiled(uniform, rewritten), tmp_path / "unet.gguf", folder)
    assert {w.type for w in made.layers if w.layer.bits and w.layer.value.ndim == 2} <= types
    inputs = tiny.inputs("sd15", 4, seed=5, **WIDE)
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    reference = outputs(model, inputs)
    model.load_state_dict({w.layer.name: torch.from_numpy(np.array(w.layer.value)) for w in made.layers})
    ours, theirs = outputs(model, inputs), outputs(loaded(made.path, folder), inputs)
    print(uniform, rewritten, sqnr(reference, ours), sqnr(reference, theirs), sqnr(ours, theirs))
    assert sqnr(reference, theirs) > least
    assert sqnr(reference, theirs) > sqnr(reference, ours) - 3
