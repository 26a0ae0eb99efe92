"""Exports against what the other projects' own loaders make of them, and against the model that was compiled."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import GGUFQuantizationConfig, UNet2DConditionModel
from safetensors.torch import load_file, save_file

import mpq_compiler
from mpq_compiler import schemas
from mpq_compiler.artifact import bundle
from mpq_compiler.cli import mpqc
from mpq_compiler.frontend import checkpoint
from mpq_compiler.interchange import names
from mpq_compiler.interchange.export import export
from mpq_compiler.interchange.original import read
from mpq_compiler.support.errors import UserError
from tests.harness import tiny
from tests.harness.sdnq import sdnq

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
    inputs = tiny.inputs("sd15", 4, seed=5, **WIDE)
    reference = outputs(float_model, inputs)
    ours = UNet2DConditionModel.from_config(float_model.config)
    ours.load_state_dict({name: known.value for name, known in read_back.items()})
    assert sqnr(reference, outputs(ours, inputs)) > 28


@pytest.mark.parametrize(("uniform", "least"), [("int2+b", 16), ("km2", 9), ("nf4", 19), ("int4g64", 21), ("ec3", 15)])
def test_every_kind_of_table_is_decoded(tmp_path, uniform, least):
    """Branches, tables of a row class, groups of channels and entropy-coded codes give what the format promises."""
    model = tiny.save("dit", tmp_path)
    tail = f"bit-allocation{{uniform={uniform}}},insert-fake-quant,residual-branch,round-weights,fold-fake-quant"
    pipeline = f"trace,layout,calibrate,time-groups,{tail},fuse-epilogues"
    mpq_compiler.compile(model, tmp_path / "a.mpq", target="reference", pipeline=pipeline, samples=2, steps=3)
    parameters = checkpoint.read_weights(model / "transformer").items()
    weights = {name: value.float() for name, value in parameters}
    quantized = {n: k for n, k in read(bundle.read(tmp_path / "a.mpq"), weights).items() if k.format == uniform}
    assert len(quantized) > 5
    joined = [torch.cat([part.flatten() for part in parts]) for parts in zip(
        *((weights[name], known.value) for name, known in quantized.items()), strict=True
    )]  # fmt: skip
    assert sqnr(*joined) > least


@pytest.mark.parametrize(
    ("uniform", "rewritten", "types", "least"),
    [
        ("int8", True, {"Q8_0"}, 30),
        ("int8", False, {"Q8_0"}, 30),
        ("int4", False, {"Q4_1"}, 5),
        ("int4+r4", False, {"Q4_0", "Q4_1"}, 5),
        ("fp8", False, {"Q8_0"}, 30),
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
    assert sqnr(reference, theirs) > least
    assert sqnr(reference, theirs) > sqnr(reference, ours) - 3


def test_grids_stay_exact_in_gguf(compiled, folder, tmp_path):
    """Whole numbers of a row's scale stay what they are, to the bit."""
    made = export(compiled("int8", False), tmp_path / "unet.gguf", folder)
    linear = [w for w in made.layers if w.layer.bits and w.layer.value.ndim == 2]
    assert linear and all(w.sqnr_db == float("inf") for w in linear)
    names = {w.layer.name for w in made.layers}
    assert names == {*UNet2DConditionModel.from_pretrained(folder / "unet").state_dict()}


def test_comfy_kitchen_computes_what_the_artifact_holds(compiled, folder, tmp_path):
    kitchen = pytest.importorskip("comfy_kitchen.tensor")
    made = export(compiled("int8", False), tmp_path / "unet.safetensors", folder, "comfy")
    tensors = load_file(made.path)
    called = {w.layer.name: w.layer for w in made.layers}
    marks = [name for name in tensors if name.endswith(".comfy_quant")]
    assert marks and all(json.loads(bytes(tensors[m].tolist())) == {"format": "int8_tensorwise"} for m in marks)
    back = names.original("UNet2DConditionModel", made_config(folder), [*called])
    for name, layer in called.items():
        module = back[name].removesuffix(".weight")
        if f"{module}.comfy_quant" not in tensors:
            continue
        scale = tensors[f"{module}.weight_scale"]
        layout = kitchen.TensorWiseINT8Layout
        params = layout.Params(scale=scale, orig_dtype=torch.float32, orig_shape=tuple(layer.value.shape))
        weight = kitchen.QuantizedTensor(tensors[f"{module}.weight"], "TensorWiseINT8Layout", params)
        assert torch.equal(weight.dequantize(), torch.from_numpy(np.array(layer.value))), name
        x = torch.randn(16, layer.value.shape[1])
        wanted = torch.nn.functional.linear(x, torch.from_numpy(np.array(layer.value)))
        assert sqnr(wanted, torch.nn.functional.linear(x, weight)) > 35  # their activations have 8 bits


@pytest.mark.parametrize(
    ("uniform", "rewritten", "type_", "least"),
    [
        ("int8", True, "int8", 30),
        ("int8", False, "int8", 30),
        ("int4", False, "uint4", 5),
        ("int4+r4", False, "uint4", 5),
        ("fp8", False, "float8_e2m5fn", 30),
    ],
)
def test_sdnq_computes_what_the_artifact_holds(compiled, folder, tmp_path, uniform, rewritten, type_, least):
    """Diffusers loads the folder with SDNQ; grids are the same to the bit, branches and convolutions among them."""
    sdnq()
    made = export(compiled(uniform, rewritten), tmp_path / "unet", folder, "sdnq")
    theirs = UNet2DConditionModel.from_pretrained(made.path, torch_dtype=torch.float32)
    quantized = [w for w in made.layers if w.layer.bits]
    assert {w.type for w in quantized} == {type_}
    assert {w.sqnr_db == float("inf") for w in quantized} == {not rewritten}
    model = UNet2DConditionModel.from_pretrained(folder / "unet")
    inputs = tiny.inputs("sd15", 4, seed=5, **WIDE)
    reference = outputs(model, inputs)
    model.load_state_dict({w.layer.name: torch.from_numpy(np.array(w.layer.value)) for w in made.layers})
    ours, found = outputs(model, inputs), outputs(theirs, inputs)
    modules = [theirs.get_submodule(written.layer.name.removesuffix(".weight")) for written in quantized]
    assert {module.svd_up is not None for module in modules} == {uniform == "int4+r4"}
    if not rewritten:
        for written, module in zip(quantized, modules, strict=True):
            assert torch.equal(module.dequantize().weight, torch.from_numpy(np.array(written.layer.value)))
    assert sqnr(reference, found) > least
    assert sqnr(reference, found) > sqnr(reference, ours) - 3


def made_config(folder):
    return checkpoint.read_json(folder / "unet" / "config.json")


@pytest.mark.parametrize("family", ["sd15", "sdxl"])
def test_original_names_are_those_that_diffusers_reads(family):
    """Blocks with and without attentions, upsamplers and added embeddings."""
    model = tiny.model(family)
    called = names.original("UNet2DConditionModel", model.config, [*model.state_dict()])
    assert called is not None and len({*called.values()}) == len(called)
    assert called["conv_in.weight"] == "model.diffusion_model.input_blocks.0.0.weight"
    assert called["mid_block.attentions.0.proj_in.weight"] == "model.diffusion_model.middle_block.1.proj_in.weight"


def test_bad_input(compiled, folder, tmp_path):
    artifact, file = compiled("int8", False), tmp_path / "unet.gguf"
    with pytest.raises(UserError, match="there is no format 'onnx'; formats are gguf, comfy, sdnq"):
        export(artifact, file, folder, "onnx")
    other = tiny.save("sd15", tmp_path, seed=1, **WIDE)
    with pytest.raises(UserError, match="made of another model: its weights are not the model's"):
        export(artifact, file, other)
    with pytest.raises(UserError, match="made of another model: a UNet2DConditionModel, not a UNet2DModel"):
        export(artifact, file, "fashion-unet")
    wider = tiny.save("sd15", tmp_path / "wider")
    with pytest.raises(UserError, match="made of another model"):
        export(artifact, file, wider)
    assert not [path for path in tmp_path.iterdir() if path.is_file()]
    file.write_text("mine")
    with pytest.raises(UserError, match="exists"):
        export(artifact, file, folder)
    with pytest.raises(UserError, match=r"exists; choose another name$"):
        export(artifact, file, folder, "sdnq", overwrite=True)
    assert file.read_text() == "mine"
    with pytest.raises(UserError, match=r"exists; choose another name$"):  # a folder of others is not replaced
        export(artifact, other, folder, "sdnq", overwrite=True)
    with pytest.raises(UserError, match=r"has no config\.json"):
        export(artifact, tmp_path / "out", tmp_path, "sdnq")
    assert (other / "unet" / "config.json").is_file() and not (tmp_path / "out").exists()


def test_an_artifact_that_does_not_say_what_passes_rewrote_is_refused(compiled, folder, tmp_path):
    older = shutil.copytree(compiled("int8", False), tmp_path / "older.mpq")
    document = json.loads((older / bundle.MANIFEST).read_text())
    assert document.pop("rewrites") == []
    document["artifact_sha256"] = bundle.digest(document)
    (older / bundle.MANIFEST).write_bytes(bundle.canonical(document))
    with pytest.raises(UserError, match="does not say how passes rewrote channels"):
        export(older, tmp_path / "unet.gguf", folder)


def test_comfy_takes_no_model_whose_original_names_nobody_knows(tmp_path):
    model, made = tiny.save("dit", tmp_path), tmp_path / "dit.mpq"
    options = {"target": "reference", "samples": 2, "steps": 3}
    mpq_compiler.compile(model, made, recipe="w8a8", **options)
    with pytest.raises(UserError, match="those of a DiTTransformer2DModel are not known here: export to gguf or sdnq"):
        export(made, tmp_path / "dit.safetensors", model, "comfy")
    assert not (tmp_path / "dit.safetensors").exists()


def test_command(compiled, folder, tmp_path, capsys):
    arguments = ["export", str(compiled("int8", False)), "--model", str(folder), "-o", str(tmp_path / "unet.gguf")]
    assert mpqc.main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert schemas.check(result, "export") is None
    assert {row["type"] for row in result["layers"] if row["weight"] == "int8"} == {"Q8_0", "F16"}
    assert "exact" in capsys.readouterr().out
    assert mpqc.main(arguments) == 1
    assert "exists" in capsys.readouterr().err


def test_command_writes_a_folder(compiled, folder, tmp_path, capsys):
    output = tmp_path / "unet"
    arguments = ["export", str(compiled("int8", False)), "--model", str(folder), "-o", str(output), "--format", "sdnq"]
    assert mpqc.main([*arguments, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert schemas.check(result, "export") is None
    files = {file.name: file.read_bytes() for file in output.iterdir()}
    assert {*files} == {"config.json", "diffusion_pytorch_model.safetensors"}
    assert result["bytes"] == sum(len(content) for content in files.values())
    quantized = [row for row in result["layers"] if row["weight"] == "int8"]
    said = capsys.readouterr().out
    assert {row["type"] for row in quantized} == {"int8"} and f"{len(quantized)} of {len(quantized)} exact" in said
    assert mpqc.main(arguments) == 1
    assert "exists" in capsys.readouterr().err
    assert mpqc.main([*arguments, "--overwrite"]) == 0
    assert {file.name: file.read_bytes() for file in output.iterdir()} == files
