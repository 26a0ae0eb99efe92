"""Loading, checking and wrapping denoisers, and recording what they see while sampling."""

from __future__ import annotations

import json
import shutil
import struct
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.frontend import checkpoint
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import load, wrap
from mpq_compiler.frontend.trajectories import record_calibration
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

WEIGHTS = "diffusion_pytorch_model.safetensors"
TEXT = ("encoder_hidden_states", "encoder_attention_mask")


def unet(folder: Path) -> Path:
    """The denoiser's folder of a freshly saved tiny UNet."""
    return tiny.save("unet2d-class", folder) / "unet"


def edit_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def edit_weights(folder: Path, change) -> None:
    weights = load_file(folder / WEIGHTS)
    change(weights)
    save_file(weights, folder / WEIGHTS)


@pytest.fixture(scope="module")
def bundled() -> denoisers.Denoiser:
    return load("fashion-unet")


# Structure


@pytest.mark.parametrize("name", sorted(set(tiny.CONFIGS) - {"unet2d-17x23"}))
def test_loaded_computes_what_the_saved_module_does(name, tmp_path):
    loaded = load(tiny.save(name, tmp_path), size=tiny.SIZES.get(name))
    inputs = tiny.inputs(name, batch=3)
    assert list(loaded.input_specs) == list(inputs)
    assert {key: (spec.sample, spec.dtype) for key, spec in loaded.input_specs.items()} == {
        key: (tuple(value.shape[1:]), value.dtype) for key, value in inputs.items()
    }
    expected = tiny.call(name, tiny.model(name), inputs)
    assert torch.equal(loaded(**inputs), expected)
    assert torch.equal(loaded(**{key: value.numpy() for key, value in inputs.items()}), expected)
    assert not loaded.module.training and not any(p.requires_grad for p in loaded.module.parameters())


def test_a_module_in_memory_is_wrapped():
    odd = wrap(tiny.model("unet2d-17x23"), name="odd")
    assert odd.latent_shape == (3, 17, 23)
    assert odd(**odd.random_inputs(2)).shape == (2, 3, 17, 23)


def test_pixart_takes_size_conditions_where_its_configuration_asks_for_them():
    changes = {"use_additional_conditions": True, "num_attention_heads": 3, "cross_attention_dim": 48}
    model = wrap(tiny.model("pixart", **changes), tokens=tiny.TOKENS)
    assert model.conditions == (*TEXT, "resolution", "aspect_ratio")
    inputs = model.random_inputs(2)
    assert inputs["resolution"].tolist() == [[128.0, 128.0]] * 2
    assert model(**inputs).shape == (2, 8, 16, 16)


def test_size_and_tokens_can_be_chosen():
    model = wrap(tiny.model("sd15"), size=(8, 24), tokens=3)
    assert model.latent_shape == (4, 8, 24)
    assert model(**model.random_inputs(1)).shape == (1, 4, 8, 24)
    assert "77 tokens" in " ".join(wrap(tiny.model("sd15")).notes)


def test_times_of_another_scheduler_keep_their_fractions():
    """Those of Euler's method lie between the steps that the model was trained on."""
    unet = tiny.model("unet2d")
    model = wrap(unet)
    x = model.random_inputs(1)["sample"]
    exact = {t: unet(x, torch.tensor([t])).sample for t in (52, 52.58)}
    assert torch.equal(model(sample=x, timestep=np.array([52.58], np.float32)), exact[52.58])
    assert torch.equal(model(sample=x, timestep=np.array([52.0], np.float32)), exact[52])
    assert not torch.equal(exact[52], exact[52.58])


def test_flow_matching_shifts_by_the_size_it_is_given():
    given = {"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}
    small, large = (wrap(tiny.model("flux"), scheduler=given, tokens=tiny.TOKENS, size=(s, s)) for s in (8, 32))
    assert small.resized(32, 32).scheduler == large.scheduler != small.scheduler


def test_random_inputs_are_seeded_and_differ_within_a_batch(bundled):
    first, again, other = (
        bundled.random_inputs(8, 3),
        bundled.random_inputs(8, 3),
        bundled.random_inputs(8, 4),
    )
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["sample"], other["sample"])
    assert len(set(first["timestep"].tolist())) > 1 and len(set(first["class_labels"].tolist())) > 1


def test_loading_leaves_the_random_state_alone(tmp_path):
    folder = tiny.save("unet2d", tmp_path)
    before = torch.random.get_rng_state()
    load(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


# Where models lie


def test_bundled_model(bundled):
    assert checkpoint.bundled().keys() == {"fashion-dit", "fashion-text", "fashion-unet"}
    assert bundled.parameters == 1_578_196
    assert {name: str(spec) for name, spec in bundled.input_specs.items()} == {
        "sample": "f32[B,4,14,14]",
        "timestep": "f32[B]",
        "class_labels": "i64[B]",
    }
    assert bundled.codec == "pixel_unshuffle2" and bundled.scheduler.prediction_type == "v_prediction"
    assert (bundled.classes, bundled.null_class, len(bundled.class_names)) == (10, 10, 10)
    assert bundled.default_conditions(12)["class_labels"].tolist() == [*range(10), 0, 1]
    assert bundled.null_conditions(2)["class_labels"].tolist() == [10, 10]
    with pytest.raises(UserError, match=r"classes 0 to 9 \(10: no class\), and 11 is none of them"):
        bundled.conditions_for([11])


def test_denoiser_folder_finds_its_pipelines_scheduler_and_harness(tmp_path):
    assert load(unet(tmp_path)).scheduler == load(tmp_path / "unet2d-class").scheduler


def test_without_a_scheduler_ddim_is_assumed_and_said(tmp_path):
    folder = unet(tmp_path)
    shutil.rmtree(folder.parent / "scheduler")
    model = load(folder, prediction_type="v_prediction")
    assert model.scheduler.prediction_type == "v_prediction"
    assert any("DDIM" in note for note in model.notes)
    assert not wrap(tiny.model("sd15")).scheduler.clip_sample  # a VAE's latents are not confined to [-1, 1]


def test_half_precision_files_are_read_as_float32(tmp_path):
    folder = tiny.save("unet2d", tmp_path, variant="fp16")
    assert (folder / "unet" / "diffusion_pytorch_model.fp16.safetensors").is_file()
    module = load(folder).module
    assert {parameter.dtype for parameter in module.parameters()} == {torch.float32}
    assert torch.equal(module.model.conv_in.weight, tiny.model("unet2d").conv_in.weight.half().float())


@pytest.mark.parametrize("variant", [None, "fp16"])
def test_sharded_weights(tmp_path, variant):
    model = tiny.model("unet2d")
    (model.half() if variant else model).save_pretrained(tmp_path, variant=variant, max_shard_size="1MB")
    assert len(list(tmp_path.glob("*.safetensors"))) > 1
    loaded = load(tmp_path).module.model
    assert all(torch.equal(a, b.float()) for a, b in zip(loaded.parameters(), model.parameters(), strict=True))


def test_old_names_of_attention_layers(tmp_path):
    folder = tiny.save("unet2d", tmp_path) / "unet"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    weights = {}
    for name, value in load_file(folder / WEIGHTS).items():
        for new, before in old.items():
            name = name.replace(new, before)
        weights[name] = value
    save_file(weights, folder / WEIGHTS)
    expected = tiny.model("unet2d").state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in load(folder).module.model.state_dict().items())


# Bad input: one clear sentence each


def refused(model: object, *parts: str) -> None:
    with pytest.raises(UserError) as caught:
        load(model)
    message = str(caught.value)
    assert "\n" not in message and all(part in message for part in parts), message


def test_no_such_model():
    refused("fashion-unett", "no folder and no bundled model 'fashion-unett'", "did you mean 'fashion-unet'?")
    refused("/no/such/folder", "'/no/such/folder'")


def test_hub_that_cannot_be_asked(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refused("somebody/some-model", "no folder 'somebody/some-model'", "hub could not be asked")


def test_folder_without_config_or_weights(tmp_path):
    refused(tmp_path, "no config.json")
    folder = unet(tmp_path)
    refused(folder / WEIGHTS, "is a file")
    (folder / WEIGHTS).rename(folder / "diffusion_pytorch_model.bin")
    refused(folder, "diffusion_pytorch_model.bin", "could run code", "safetensors")
    (folder / "diffusion_pytorch_model.bin").unlink()
    refused(folder, "has a config.json but no weights")
    (folder / "config.json").write_text("{")
    refused(folder, "config.json", "not valid JSON")
    (folder / "config.json").write_text("[]")
    refused(folder, "config.json", "JSON object")


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "NaN"), (float("inf"), "infinity")])
def test_weights_that_are_not_finite(tmp_path, value, word):
    folder = unet(tmp_path)
    edit_weights(folder, lambda weights: weights["conv_out.bias"].fill_(value))
    refused(folder, "'conv_out.bias'", word)


def test_tensors_that_do_not_belong(tmp_path):
    folder = unet(tmp_path)
    edit_weights(folder, lambda weights: weights.pop("conv_in.bias"))
    refused(folder, "lack the tensor 'conv_in.bias';")
    edit_weights(folder, lambda weights: weights.update({"conv_in.bias": torch.zeros(3)}))
    refused(folder, "'conv_in.bias'", "is [3]", "asks for [32]")
    edit_weights(folder, lambda weights: weights.update({"conv_in.bias": torch.zeros(32), "extra": torch.ones(1)}))
    refused(folder, "beyond what the model takes", "'extra'")


@pytest.mark.parametrize("dtype", [torch.int32, torch.complex64])
def test_weights_of_another_type(tmp_path, dtype):
    folder = unet(tmp_path)
    edit_weights(folder, lambda weights: weights.update({"conv_in.weight": weights["conv_in.weight"].to(dtype)}))
    refused(folder, "'conv_in.weight'", f"is {str(dtype).removeprefix('torch.')}", "the model has float32 there")


def test_safetensors_with_a_false_header(tmp_path):
    folder = unet(tmp_path)
    path = folder / WEIGHTS
    whole = path.read_bytes()
    for damaged in (
        whole[:-7],
        whole[:50],
        whole[:5],
        b"",
        whole + b"x",
        struct.pack("<Q", 1 << 62) + whole[8:],
    ):
        path.write_bytes(damaged)
        refused(folder, WEIGHTS)


def test_shards_outside_the_folder_are_refused(tmp_path):
    folder = unet(tmp_path)
    (folder / WEIGHTS).rename(tmp_path / "x.safetensors")
    index = {"weight_map": {"conv_in.bias": "../../x.safetensors"}}
    (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(index))
    refused(folder, "../../x.safetensors", "not in that folder")


def test_classes_that_are_no_denoisers(tmp_path):
    folder = unet(tmp_path)
    edit_config(folder, _class_name="UNet2DModle")
    refused(folder, "'UNet2DModle'", "did you mean 'UNet2DModel'?")
    edit_config(folder, _class_name="DDIMScheduler")
    refused(folder, "'DDIMScheduler'")
    edit_config(folder, _class_name=None)
    refused(folder, "no _class_name")
    edit_config(folder, _class_name="UNet2DModel", block_out_channels="many")
    refused(folder, "does not describe a UNet2DModel")


def test_structures_that_are_not_supported():
    import diffusers

    vae = diffusers.AutoencoderKL(block_out_channels=(32,), norm_num_groups=8)
    with pytest.raises(UserError, match="AutoencoderKL is no denoiser"):
        wrap(vae)
    model = tiny.model("sd15")
    for key, value in (("addition_embed_type", "image"), ("encoder_hid_dim_type", "ip_image_proj")):
        model.register_to_config(**{key: value})
        with pytest.raises(UserError, match=f"{key} '{value}'"):
            wrap(model)
        model.register_to_config(**{key: None})


def test_inputs_and_sizes_that_a_model_does_not_take():
    class Strange(torch.nn.Module):
        def forward(self, sample, timestep, depth_map):
            return sample

    with pytest.raises(UserError, match="Strange takes the input 'depth_map', which is not supported"):
        wrap(Strange())
    with pytest.raises(UserError, match="FluxTransformer2DModel does not say the size of its latents"):
        wrap(tiny.model("flux"))
    with pytest.raises(UserError, match="2x2 pixels a token, and 16x15 is no multiple"):
        wrap(tiny.model("flux"), size=(16, 15))
    with pytest.raises(UserError, match="HunyuanDiT2DModel is 7 tokens long, and 8 are asked for"):
        wrap(tiny.model("hunyuan"), tokens=8)


# Calibration


@pytest.mark.invariant("qdiffusion-9")
def test_calibration_covers_all_steps_and_classes(bundled):
    calls = []
    recorded = record_calibration(bundled, 22, 4, seed=1, progress=lambda *call: calls.append(call), batch=8)
    assert {name: tuple(value.shape) for name, value in recorded.items()} == {
        "sample": (88, 4, 14, 14),
        "timestep": (88,),
        "class_labels": (88,),
    }
    steps = bundled.scheduler.timesteps(4).tolist()
    assert recorded["timestep"].tolist() == [step for step in steps for _ in range(22)]
    labels = recorded["class_labels"].reshape(4, 22)
    assert (labels == labels[0]).all() and set(labels[0].tolist()) == set(range(11))
    assert calls == [(done, 12) for done in range(1, 13)]
    # The recorded inputs are a trajectory: the noise first, and each step follows from the one before.
    latents = recorded["sample"].reshape(4, 22, 4, 14, 14).numpy()
    assert np.array_equal(latents[0], sampling.gaussian(22, (4, 14, 14), 1))
    output = bundled(sample=latents[0], timestep=np.full(22, steps[0]), class_labels=labels[0])
    np.testing.assert_allclose(bundled.scheduler.step(output.numpy(), 0, 4, latents[0]), latents[1], atol=1e-5)


def test_calibration_is_seeded(bundled):
    one, same, other = (record_calibration(bundled, 3, 2, seed) for seed in (0, 0, 1))
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert not torch.equal(one["sample"], other["sample"])


def test_guided_calibration_records_both_calls(bundled):
    labels = bundled.conditions_for([3, 4])
    recorded = record_calibration(bundled, 2, 3, conditions=labels, guidance=2.0)
    assert recorded["class_labels"].tolist() == [3, 4, 10, 10] * 3


def test_text_conditions_are_asked_for(tmp_path):
    model = load(tiny.save("sd15", tmp_path))
    with pytest.raises(UserError, match="encoder_hidden_states"):
        record_calibration(model, 2, 2)
    text = {"encoder_hidden_states": tiny.inputs("sd15")["encoder_hidden_states"]}
    assert record_calibration(model, 2, 2, conditions=text)["encoder_hidden_states"].shape == (
        4,
        tiny.TOKENS,
        32,
    )
    with pytest.raises(UserError, match="1 or more"):
        record_calibration(model, 0, 2, conditions=text)


def test_pixart_samples_although_it_also_predicts_a_variance(tmp_path):
    model = load(tiny.save("pixart", tmp_path))
    given = tiny.inputs("pixart")
    text = {name: given[name] for name in model.conditions}
    assert record_calibration(model, 2, 2, conditions=text)["hidden_states"].shape == (4, 4, 16, 16)


def test_models_that_are_called_in_another_way():
    """Positions of tokens that are not Flux's are refused; a model that multiplies its time by 1000 gets fractions."""
    ovis = getattr(diffusers, "OvisImageTransformer2DModel", None)
    if ovis is not None:
        with pytest.raises(UserError, match="how its pipeline numbers tokens is not known; that of Flux is"):
            wrap(ovis(num_layers=1, num_single_layers=1, num_attention_heads=2, axes_dims_rope=(16, 56, 56)))
    small = {"num_mmdit_layers": 1, "num_single_dit_layers": 1, "attention_head_dim": 8, "num_attention_heads": 4}
    model = diffusers.AuraFlowTransformer2DModel(
        sample_size=8, joint_attention_dim=16, caption_projection_dim=32, pos_embed_max_size=16, **small
    )
    wrapped = wrap(model, tokens=5)
    assert wrapped.module.convention.timestep_unit == 1000 and wrapped.input_specs["timestep"].dtype == torch.float32
    assert wrapped.scheduler.solver == "FlowMatchEulerDiscreteScheduler"
    x = wrapped.random_inputs(2)
    exact = model(x["hidden_states"], x["encoder_hidden_states"], x["timestep"] / 1000).sample
    assert torch.equal(wrapped(**x), exact)


@pytest.mark.parametrize("size", ["x", -1, 0, 1.5, [], {}, [1, "x"], [4], [4, 4, 4], 10**9, True])
def test_sizes_that_are_none(size, tmp_path):
    folder = tiny.save("unet2d", tmp_path)
    (config,) = folder.rglob("config.json")
    config.write_text(json.dumps(json.loads(config.read_text()) | {"sample_size": size}))
    with pytest.raises(UserError, match=r"sample_size|no whole model|size"):
        load(folder)


@pytest.mark.parametrize(
    "said", [{"features": 3}, {"tokens": "x"}, {"class_names": 5}, {"null_class": "x"}, {"text": 5}, {"text": {}}]
)
def test_a_harness_that_says_something_else(said, tmp_path):
    folder = tiny.save("unet2d", tmp_path)
    (folder / "harness.json").write_text(json.dumps(said))
    with pytest.raises(UserError, match=f"harness.json.*{next(iter(said))}"):
        load(folder)
