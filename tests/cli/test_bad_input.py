"""Every bad input ends in one sentence and exit code 1 (130 for Ctrl-C), and leaves nothing half-written."""

from __future__ import annotations

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.api import compile as driver_compile
from mpq_compiler.cli import mpqc
from mpq_compiler.frontend.denoiser import wrap
from mpq_compiler.pipeline import recipes
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from tests.harness import once, tiny

QUICK = ("--recipe", "w8a8", "--samples", "2", "--steps", "2")


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("unet2d", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def few_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with less than half of the layers, where it matters only that it is compiled."""
    return tiny.save("dit", tmp_path_factory.mktemp("few"))


def made(model: Path, name: str, *options: str) -> Path:
    """An artifact of the model."""

    def make(path: Path) -> None:
        assert mpqc.main(["compile", str(model), "-o", str(path), *options, *QUICK]) == 0

    return once.made(name, make)


@pytest.fixture(scope="module")
def compiled(model: Path) -> Path:
    """A tiny artifact for the `reference` target."""
    return made(model, "unet2d-reference.mpq", "--target", "reference")


@pytest.fixture(scope="module")
def native(model: Path) -> Path:
    """A tiny artifact for this machine."""
    return made(model, "unet2d-native.mpq")


@pytest.fixture(scope="module")
def few(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    """The default recipe with less than half of its formats to measure, where it matters only that it measures."""
    recipe = tmp_path_factory.mktemp("recipe") / "few.toml"
    recipe.write_text(
        'schema = 1\nextends = "default"\n[options.sensitivity]\nformats = ["int2", "int4", "int8"]\n'
    )
    return "--recipe", str(recipe), "--samples", "2", "--steps", "2"


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    """The one sentence with which the command refuses."""
    capsys.readouterr()
    assert mpqc.main([str(a) for a in arguments]) == 1
    error = capsys.readouterr().err
    sentences = [line for line in error.splitlines() if line.startswith("mpqc: ")]
    assert len(sentences) == 1, error
    assert "Traceback" not in error
    assert "internal error" not in error
    return sentences[0]


def edited(model: Path, folder: Path, change: object) -> Path:
    """A copy of the model with its weights passed through ``change(tensors)``."""
    copy = folder / "edited"
    shutil.copytree(model, copy)
    (file,) = copy.glob("**/*.safetensors")
    tensors = load_file(file)
    change(tensors)  # type: ignore[operator]
    save_file(tensors, file)
    return copy


def nothing_in(folder: Path) -> bool:
    return not folder.exists() or not any(folder.iterdir())


# --- models -------------------------------------------------------------------------------------------------


def test_no_such_model_names_the_nearest(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert "fashion-unet" in refused(capsys, "compile", "fashion-unett", "-o", tmp_path / "x.mpq")


@pytest.mark.parametrize("missing", ["config.json", "*.safetensors"])
def test_a_folder_without_config_or_weights(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, missing: str
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    for file in copy.glob(f"**/{missing}"):
        file.unlink()
    refused(capsys, "compile", copy, "-o", tmp_path / "x.mpq")
    assert not (tmp_path / "x.mpq").exists()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_in_weights_are_named(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, value: float
) -> None:
    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"].view(-1)[7] = value

    sentence = refused(capsys, "compile", edited(model, tmp_path, change), "-o", tmp_path / "x.mpq")
    assert "mid_block.resnets.0.conv1.weight" in sentence


def test_a_safetensors_file_with_a_huge_header(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    copy = tmp_path / "model"
    shutil.copytree(model, copy)
    (file,) = copy.glob("**/*.safetensors")
    file.write_bytes((2**62).to_bytes(8, "little") + b"{}")
    assert "header" in refused(capsys, "compile", copy, "-o", tmp_path / "x.mpq")


def test_a_model_with_no_quantizable_layer(tmp_path: Path) -> None:
    from mpq_compiler.api.compile import compile

    class Nothing(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = {"in_channels": 1, "out_channels": 1, "sample_size": 4, "_class_name": "Nothing"}
            self.gain = torch.nn.Parameter(torch.ones(1))

        def forward(self, sample: torch.Tensor, timestep: torch.Tensor, return_dict: bool = True) -> tuple:
            return (sample * self.gain + timestep.float()[:, None, None, None] * 1e-3,)

    with pytest.raises(UserError, match="no linear or conv2d layer"):
        compile(wrap(Nothing(), name="nothing"), tmp_path / "x.mpq", recipe="w8a8", target="reference")
    assert nothing_in(tmp_path)


def test_constant_rows_have_a_scale(
    capsys: pytest.CaptureFixture[str], model: Path, few: tuple[str, ...], tmp_path: Path
) -> None:
    """A row of zeros, and one of a single value, compile and run; their scale is the smallest positive half."""

    def change(tensors: dict[str, torch.Tensor]) -> None:
        tensors["mid_block.resnets.0.conv1.weight"][0] = 0
        tensors["mid_block.resnets.0.conv1.weight"][1] = 0.25

    output = tmp_path / "x.mpq"
    arguments = ["compile", str(edited(model, tmp_path, change)), "-o", str(output), "--target", "reference"]
    assert mpqc.main([*arguments, "--weights", "6", *few]) == 0
    inputs = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=2).items()}
    assert np.isfinite(compiled_denoiser.load(output).run(inputs)).all()


def test_layers_that_never_run_are_listed(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    from mpq_compiler.api.compile import compile

    module = tiny.model("unet2d")
    module.register_module("spare", torch.nn.Linear(3, 5))
    report = compile(
        wrap(module, name="with-a-spare"), tmp_path / "x.mpq", recipe="w8a8", target="reference", samples=2, steps=2
    )
    assert "never" in report.fallbacks["spare.weight"]


def test_another_kind_of_model_is_told_so(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    copy = tmp_path / "vae"
    shutil.copytree(model, copy)
    (config,) = (c for c in copy.glob("**/config.json"))
    config.write_text(json.dumps({**json.loads(config.read_text()), "_class_name": "AutoencoderKL"}))
    assert "AutoencoderKL is no denoiser" in refused(capsys, "compile", copy, "-o", tmp_path / "x.mpq", *QUICK)


# --- options ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--target", "x86-64-avx3"), "x86-64-avx2"),
        (("--recipe", "defualt"), "default"),
        (("--pipeline", "trace,layuot"), "layout"),
        (("--pipeline", "trace,layout,calibrate{sampels=3}"), "samples"),
        (("--pipeline", "trace,calibrate"), "layout"),
        (("--pipeline", "trace,layout -> fuse-everything"), "leave out what follows '->'"),
        (("--pipeline", "trace,layout,calibrate{samples=many}"), "int"),
        (("--weights", "4bit"), "40MB"),
        (("--shapes", "1x3x16"), "1x4x64x64"),
        (("--shapes", "1x3x16x16,1x4x32x32"), "4 channels"),
        (("--shapes", "1x3x16x16,1x3x18x17"), "cannot be traced"),
        (("--target", "cuda-sm80", "--tune"), "--tune"),
        (("--recipe", "w8a8", "--weights", "4"), "budget"),
        (("--calibration", "absent.safetensors"), "absent.safetensors"),
        (("--sensitivity", "absent.json"), "absent.json"),
        (("--plan", "absent.json"), "cannot read 'absent.json'"),
        (("--plan", "plan.json", "--weights", "4"), "--weights and --plan exclude each other"),
        (("--plan", "plan.json", "--recipe", "w8a8"), "take a recipe without bit-allocation{uniform}"),
        (("--recipe", "w8a8", "--sensitivity", "absent.json"), "has no pass 'sensitivity'"),
        (("--jobs", "0"), "--jobs"),
        (("--weights", "0"), "--weights 0 leaves no room at all"),
        (("--weights=-1",), "--weights -1 leaves no room at all"),
        (("--weights", "nan"), "neither bits (3.7) nor bytes"),
        (("--activations", "nan"), "'activations' of pass 'bit-allocation' must be 2 or more, not nan"),
        (("--samples", "0"), "'samples' of pass 'calibrate' must be 1 or more, not 0"),
        (("--guidance", "nan"), "--guidance nan must be 0 or more"),
        (("--guidance", "-2"), "--guidance -2 must be 0 or more"),
        (("--json", "{folder}/absent/x.json"), "there is no folder"),
        (("--json", "{folder}"), "is a folder; name a file"),
        (("--log", "{folder}/absent/x.log"), "there is no folder"),
        (("--log", "{folder}"), "is a folder; name a file"),
        (("--log", "/proc/x.log"), "cannot write /proc/x.log"),
        (("--seed", "-1"), "--seed -1 must be 0 to 2147483647"),
        (("--seed", "5000000000"), "--seed 5000000000 must be 0 to 2147483647"),
        (("--dumps", "{folder}/x.mpq/dumps"), "lies within the output"),
        (("--target", "cuda-sm80", "--latency", "5ms"), "times are those of kernels for CPUs"),
        (("--pipeline", "trace,layout,equalize{rule=dilation},equalize"), "'equalize' stands twice in the pipeline"),
    ],
)
def test_unknown_and_wrong_options(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, arguments: tuple[str, ...], hint: str
) -> None:
    arguments = tuple(a.format(folder=tmp_path) if a.startswith("{folder}") else a for a in arguments)
    quick = () if {"--pipeline", "--samples"} & {*arguments} else ("--samples", "2", "--steps", "2")
    assert hint in refused(capsys, "compile", model, "-o", tmp_path / "x.mpq", *quick, *arguments)
    assert nothing_in(tmp_path)


def test_unknown_flags_exit_with_2() -> None:
    with pytest.raises(SystemExit) as raised:
        mpqc.main(["compile", "fashion-unet", "-o", "x", "--wieghts", "3"])
    assert raised.value.code == 2


def test_a_budget_that_cannot_be_met_names_the_least(
    capsys: pytest.CaptureFixture[str], few_layers: Path, few: tuple[str, ...], tmp_path: Path
) -> None:
    arguments = ("--weights", "1.5", *few, "--cache", tmp_path / "cache")
    sentence = refused(capsys, "compile", few_layers, "-o", tmp_path / "x.mpq", *arguments)
    least = float(sentence.split("(")[-1].split(" bits")[0])
    assert "the least" in sentence
    assert not (tmp_path / "cache").exists()  # refused before the long measurement
    arguments = ("--weights", str(least + 0.01), *arguments[2:], "--target", "reference")
    assert mpqc.main(["compile", str(few_layers), "-o", str(tmp_path / "x.mpq"), *map(str, arguments)]) == 0


@pytest.mark.parametrize(("recipe", "weights"), [("w8a8", "3"), ("default", "1.2"), ("packed", "1.2")])
def test_a_budget_below_what_shapes_take_is_refused_before_anything_runs(
    capsys: pytest.CaptureFixture[str], few_layers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    recipe: str, weights: str,
) -> None:  # fmt: skip
    for step in ("equalize.Equalize", "calibrate.Calibrate"):
        monkeypatch.setattr(f"mpq_compiler.passes.{step}.run", lambda *given: pytest.fail("inputs are run"))
    given = ("compile", few_layers, "--recipe", recipe, "--weights", weights)
    for more in (("-o", tmp_path / "x.mpq"), ("--estimate",)):
        sentence = refused(capsys, *given, *more)
        assert "cannot be met: the least that the formats allow is" in sentence
        assert ("use the default recipe" in sentence) == (recipe == "w8a8")


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("sensitivity", "formats", "[]"),
        ("sensitivity", "activations", "[]"),
        ("sensitivity", "activations", "[8, 0]"),
        ("sensitivity", "inputs", "0"),
        ("calibrate", "steps", "0"),
        ("time-groups", "bits", "0"),
        ("bit-allocation", "weights", "nan"),
        ("bit-allocation", "bytes", "-1"),
        ("bit-allocation", "activations", "0"),
        ("numerics", "inputs", "0"),
    ],
)
def test_empty_options_of_passes_name_file_and_key(tmp_path: Path, name: str, option: str, value: str) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_text(f"schema = 1\nextends = 'default'\n[options.{name}]\n{option} = {value}")
    with pytest.raises(UserError, match=f"mine.toml: option '{option}' of pass '{name}' must "):
        recipes.load(recipe)


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("schema = 2", "schema = 1"),
        ("schema = 1\npipelin = []", "did you mean 'pipeline'"),
        ("schema = 1\npipeline = [", "not valid TOML"),
        ("schema = 1", "'pipeline'"),
        ("schema = 1\nextends = 3", "'extends'"),
        ("schema = 1\nextends = 'defualt'", "mine.toml: 'extends': unknown recipe 'defualt': did you mean 'default'"),
        ("schema = 1\nextends = 'w8a8'\ndescription = 3", "mine.toml: 'description' must be a text"),
        ("schema = 1\nextends = '{recipe}'", "'extends' leads back"),
        ("schema = 1\nextends = 'w8a8'\n[options]\ncalibrate = 3", "[options.calibrate]"),
        ("schema = 1\nextends = 'w8a8'\n[options.calibrate]\nsampels = 3", "mine.toml: pass 'calibrate' has no option"),
        ("schema = 1\nextends = 'w8a8'\n[options.calibrate]\nsamples = 3.5", "mine.toml: option 'samples' of pass"),
        ("schema = 1\nextends = 'w8a8'\n[options.equalize]\nrows = 3", "'equalize', which is not in its pipeline"),
        ("schema = 1\nextends = 'w8a8'\n[options.sensitivity]\nrounds = 3", "'sensitivity'"),
        ("schema = 1\ndescription = '\udcff'", "not valid TOML"),
    ],
)
def test_malformed_recipes_name_the_key(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, text: str, key: str
) -> None:
    recipe = tmp_path / "mine.toml"
    recipe.write_bytes(text.format(recipe=recipe).encode(errors="surrogateescape"))
    assert key in refused(capsys, "compile", model, "-o", tmp_path / "x.mpq", "--recipe", recipe)
    assert not (tmp_path / "x.mpq").exists()


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ('{"a": 1}', "no scheduler configuration: it lacks the key '_class_name'"),
        ('{"_class_name": "DDIMScheduler", "num_train_timesteps": "abc"}', "num_train_timesteps must be a whole"),
        ('{"_class_name": "DDIMScheduler", "beta_start": 5, "beta_end": -3}', "beta_start is 5"),
        ('{"_class_name": "PNDMScheduler", "beta_end": -3}', "beta_end is -3"),
    ],
)
def test_files_of_schedulers_are_named_with_the_key(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, text: str, key: str
) -> None:
    scheduler = tmp_path / "mine.json"
    scheduler.write_text(text)
    sentence = refused(capsys, "compile", model, "-o", tmp_path / "x.mpq", "--scheduler", scheduler, *QUICK)
    assert "mine.json" in sentence and key in sentence


@pytest.fixture(scope="module")
def table(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sensitivity table of the model, of two formats."""
    output = tmp_path_factory.mktemp("table") / "table.json"
    measure = f"{MEASURE},sensitivity{{inputs=2,formats=int4/int8}},bit-allocation"
    assert mpqc.main(["sensitivity", str(model), "-o", str(output), "--pipeline", measure]) == 0
    return output


MEASURE = "trace,layout,calibrate{samples=2,steps=2},time-groups"
PACK = "insert-fake-quant,residual-branch,low-rank,round-weights,fold-fake-quant,fuse-epilogues"
TABLED = f"{MEASURE},sensitivity,bit-allocation,{PACK}"


@pytest.mark.parametrize(
    ("change", "key"),
    [
        (lambda t, first: t["weights"].pop(first), "'weights' lacks the layer '{first}'"),
        (lambda t, first: t["weights"].update(zz=t["weights"].pop(first)), "'weights' lacks the layer '{first}'"),
        (lambda t, first: t["weights"].update(zz={"int4": 0.1}), "'weights.zz' is no layer of 'layers'"),
        (lambda t, first: t["weights"][first].update(foo5=0.1), "'layers[0].formats' of '{first}' lacks 'foo5'"),
        (lambda t, first: t["weights"][first].update(int4=float("nan")), "'weights.{first}.int4' must be a finite"),
        (lambda t, first: t["weights"].update({first: {}}), "'weights.{first}' holds no loss"),
        (lambda t, first: t["activations"].popitem(), "'activations' lacks"),
        (lambda t, first: t["elements"].popitem(), "'elements' lacks"),
        (lambda t, first: t["activations"].popitem()[1].update(eight=1.0), "'activations' lacks"),
        (lambda t, first: next(iter(t["activations"].values())).update(eight=1.0), "by number of bits, not by 'eight'"),
        (lambda t, first: t["layers"].append(t["layers"][0]), "'layers' has '{first}' twice"),
        (lambda t, first: t.update(attention={"a": {"8": 0.1}}), "'attention_costs' lacks 'a'"),
    ],
)
def test_tables_that_do_not_fit_together_name_the_key(
    capsys: pytest.CaptureFixture[str], table: Path, tmp_path: Path, change: Callable[..., object], key: str
) -> None:
    damaged, document = tmp_path / "mine.json", json.loads(table.read_text())
    first = document["layers"][0]["name"]
    change(document, first)
    damaged.write_text(json.dumps(document))
    sentence = refused(capsys, "allocate", damaged, "--weights", "5")
    assert "mine.json" in sentence and key.format(first=first) in sentence


def test_the_table_of_another_model(
    capsys: pytest.CaptureFixture[str], model: Path, table: Path, tmp_path: Path
) -> None:
    """Refused by what it holds, not by its name."""
    mine, place = tmp_path / "mine.json", ("-o", tmp_path / "x.mpq", "--target", "reference", "--pipeline", TABLED)
    document = json.loads(table.read_text())
    mine.write_text(json.dumps(document | {"model": "other", "parameters": 7}))
    sentence = refused(capsys, "compile", model, *place, "--sensitivity", mine)
    assert f"is that of 'other' with 7 parameters, and '{model.name}' has" in sentence
    renamed = json.dumps(document).replace("conv_in.weight", "conv_inn.weight")
    mine.write_text(renamed)
    sentence = refused(capsys, "compile", model, *place, "--sensitivity", mine)
    assert f"lacks 'conv_in.weight' of '{model.name}'" in sentence
    uniform = TABLED.replace("bit-allocation", "bit-allocation{uniform=int8}")
    sentence = refused(capsys, "compile", model, *place[:-1], uniform, "--sensitivity", mine)
    assert "--sensitivity changes nothing" in sentence
    assert not (tmp_path / "x.mpq").exists()
    mine.write_text(json.dumps(document | {"model": "other"}))
    arguments = ["compile", model, *place, "--sensitivity", mine, "--weights", "6"]
    assert mpqc.main([str(a) for a in arguments]) == 0


# --- what is asked for --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def text_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that is conditioned on text, without its encoder."""
    return tiny.save("sd15", tmp_path_factory.mktemp("text"), sample_size=8)


@pytest.mark.parametrize(
    ("arguments", "hint"),
    [
        (("--class", "3"), "has no classes: it is unconditional"),
        (("--prompt", "a boat"), "has no prompts: it is unconditional"),
        (("--guidance", "2"), "is unconditional: leave --guidance out"),
        (("--conditions", "absent.safetensors"), "absent.safetensors"),
        (("--images", "0"), "1 or more"),
        (("--steps", "0"), "1 or more"),
        (("--guidance", "nan"), "--guidance nan must be 0 or more"),
        (("--guidance", "-1"), "--guidance -1 must be 0 or more"),
        (("--json", "{folder}/absent/x.json"), "there is no folder"),
        (("-o", "{folder}/x.jpg"), "written as PNG; name it x.png"),
        (("-o", "{folder}/absent/x.png"), "there is no folder"),
    ],
)
def test_what_a_model_does_not_know_is_not_drawn(
    capsys: pytest.CaptureFixture[str], compiled: Path, tmp_path: Path, arguments: tuple[str, ...], hint: str
) -> None:
    arguments = tuple(a.format(folder=tmp_path) for a in arguments)
    assert hint in refused(capsys, "generate", compiled, "-o", tmp_path / "x.png", *arguments)
    assert nothing_in(tmp_path)


def test_guidance_away_from_nothing(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    sentence = refused(capsys, "compile", model, "-o", tmp_path / "x.mpq", "--guidance", "2", *QUICK)
    assert "is unconditional: leave --guidance out" in sentence
    assert nothing_in(tmp_path)


def test_a_text_model_without_encoder_or_file(
    capsys: pytest.CaptureFixture[str], text_model: Path, tmp_path: Path
) -> None:
    """What can be given instead is named, for compiling and for drawing."""
    output, quick = tmp_path / "x.mpq", ("--target", "reference", *QUICK)
    sentence = refused(capsys, "compile", text_model, "-o", output, *quick)
    assert "--calibration FILE" in sentence and "--conditions FILE" in sentence
    conditions = tmp_path / "conditions.safetensors"
    text = tiny.inputs("sd15", batch=8)["encoder_hidden_states"]
    save_file({"encoder_hidden_state": text}, conditions)
    sentence = refused(capsys, "compile", text_model, "-o", output, "--conditions", conditions, *quick)
    assert "must hold 'encoder_hidden_states'" in sentence
    save_file({"encoder_hidden_states": text[:, :3].contiguous()}, conditions)
    sentence = refused(capsys, "compile", text_model, "-o", output, "--conditions", conditions, *quick)
    assert "[8, 3, 32], and must be [8, 7, 32]" in sentence
    save_file({"encoder_hidden_states": text}, conditions)
    sentence = refused(
        capsys, "compile", text_model, "-o", output, "--conditions", conditions, "--guidance", "2", *quick
    )
    assert "'null.encoder_hidden_states'" in sentence
    assert not output.exists()
    arguments = ["compile", str(text_model), "-o", str(output), "--conditions", str(conditions), *quick]
    assert mpqc.main(arguments) == 0
    picture = tmp_path / "x.png"
    assert "--conditions" in refused(capsys, "generate", output, "-o", picture)
    assert "cannot be made without its encoders" in refused(capsys, "generate", output, "-o", picture, "--prompt", "x")
    few = ("--images", "2", "--steps", "2")
    capsys.readouterr()
    assert mpqc.main(["generate", str(output), "-o", str(picture), "--conditions", str(conditions), *few]) == 0
    assert "draws latents of 4 channels and has no decoder" in capsys.readouterr().err
    against = ("--against", str(text_model), "--images", "2", "--eval-steps", "2")
    assert mpqc.main(["eval", str(output), "--conditions", str(conditions), *against]) == 0
    assert "metrics of images are those of latents" in capsys.readouterr().err


def test_looking_into_what_is_not_there(capsys: pytest.CaptureFixture[str], compiled: Path, tmp_path: Path) -> None:
    absent = tmp_path / "absent.mpq"
    for arguments in ([absent], [absent, "--layers"], [compiled, absent, "--html", tmp_path / "x.html"]):
        assert f"there is no '{absent}': name an artifact" in refused(capsys, "inspect", *arguments)


def test_options_of_a_compilation_with_what_is_compiled(capsys: pytest.CaptureFixture[str], compiled: Path) -> None:
    sentence = refused(capsys, "eval", compiled, "--weights", "3", "--steps", "4", "--against", "fashion-unet")
    assert "is compiled already, and --weights, --steps would change nothing" in sentence


def test_what_cannot_be_drawn_is_refused_first(
    capsys: pytest.CaptureFixture[str], compiled: Path, tmp_path: Path
) -> None:
    picture = tmp_path / "x.png"
    assert "noise of seed -1" in refused(capsys, "generate", compiled, "-o", picture, "--seed", "-1")
    assert "cannot draw -1 images" in refused(capsys, "generate", compiled, "-o", picture, "--images", "-1")
    assert "noise of seed -2" in refused(capsys, "eval", "fashion-unet", "--eval-seed", "-2")
    assert "cannot draw 0 images" in refused(capsys, "eval", "fashion-unet", "--images", "0")
    assert "cannot draw 0 images" in refused(capsys, "demo", "--images", "0", "-o", tmp_path / "demo")
    assert nothing_in(tmp_path)


def test_a_recipe_is_not_looked_for_in_the_folder(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "w8a8").mkdir()
    assert recipes.load("w8a8").name == "w8a8"


def test_an_empty_cache_variable_names_no_folder(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPQ_CACHE", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "training").mkdir()
    (tmp_path / "training" / "mine").write_text("mine")
    assert mpqc.main(["cache", "clear"]) == 0
    assert (tmp_path / "training" / "mine").read_text() == "mine"


def test_a_demo_of_what_is_not_bundled(capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path) -> None:
    for name, hint in (("fashion-txt", "did you mean 'fashion-text'"), (str(model), "no bundled model")):
        assert hint in refused(capsys, "demo", "--model", name, "-o", tmp_path / "demo")
    assert nothing_in(tmp_path)


def test_a_hub_id_without_a_network(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    sentence = refused(capsys, "compile", "somebody/some-model", "-o", tmp_path / "x.mpq")
    assert "no folder 'somebody/some-model'" in sentence and "network" in sentence


# --- outputs ------------------------------------------------------------------------------------------------


def test_an_existing_output_is_refused_and_kept(
    capsys: pytest.CaptureFixture[str], model: Path, compiled: Path, tmp_path: Path
) -> None:
    before = {f.name: f.read_bytes() for f in compiled.iterdir()}
    assert "--overwrite" in refused(capsys, "compile", model, "-o", compiled, *QUICK)
    assert before == {f.name: f.read_bytes() for f in compiled.iterdir()}
    (tmp_path / "dumps").mkdir()
    (tmp_path / "dumps" / "mine").write_text("mine")
    place = ("-o", tmp_path / "new.mpq", "--dumps", tmp_path / "dumps")
    assert "--overwrite" in refused(capsys, "compile", model, *place, *QUICK)
    picture = tmp_path / "grid.png"
    picture.write_text("mine")
    assert "--overwrite" in refused(capsys, "generate", compiled, "-o", picture)
    assert picture.read_text() == "mine"


def test_what_this_machine_cannot_make_is_refused_before_a_model_is_read(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpq_compiler.driver.compile.load_denoiser", lambda *asked: pytest.fail("the model is read"))
    for option in ("-o", "--json", "--log"):
        place = () if option == "-o" else ("-o", tmp_path / "x.mpq")
        assert "cannot write /proc/x" in refused(capsys, "compile", model, option, "/proc/x", *place, *QUICK)
    monkeypatch.setattr("shutil.which", lambda name: None)
    for more in ((), ("--emit", "c")):
        sentence = refused(capsys, "compile", model, "-o", tmp_path / "x.mpq", "--target", "aarch64-dotprod", *more)
        assert "cannot link for 'aarch64-dotprod'" in sentence


def test_ctrl_c_leaves_nothing_but_the_cache(few_layers: Path, few: tuple[str, ...], tmp_path: Path) -> None:
    """Interrupted in the sensitivity measurement: exit code 130, no output, and the cache serves the next run."""
    cache, output = tmp_path / "cache", tmp_path / "x.mpq"
    arguments = ["compile", str(few_layers), "-o", str(output), "--target", "reference", "--cache", str(cache)]
    arguments += [*few, "--weights", "7", "--jobs", "1", "--samples", "8", "--steps", "4"]
    command = [sys.executable, "-m", "mpq_compiler", *arguments]
    # A shell that starts a test run in its background lets it ignore Ctrl-C, and its children inherit that.
    listening = functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=listening)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        done = list(cache.glob("sensitivity/*.results"))
        if done and len(done[0].read_text().splitlines()) > 2:
            break
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=120)
    assert process.returncode == 130, error
    assert "Traceback" not in error
    assert not output.exists()
    assert {p.name for p in tmp_path.iterdir()} == {"cache"}
    (file,) = cache.glob("sensitivity/*.results")
    before = len(file.read_text().splitlines())
    assert mpqc.main(arguments) == 0
    names = [json.loads(line[17:])[0] for line in file.read_text().splitlines()]
    assert len(names) == len(set(names)) > before


def test_two_compiles_on_one_cache_give_the_same_bytes(few_layers: Path, few: tuple[str, ...], tmp_path: Path) -> None:
    """At the same time, in two processes and folders, with one job and with two."""
    processes = []
    for jobs in ("1", "2"):
        output = tmp_path / jobs / "x.mpq"
        arguments = ["compile", str(few_layers), "-o", str(output), "--cache", str(tmp_path / "cache")]
        arguments += [*few, "--weights", "7", "--jobs", jobs]
        (tmp_path / jobs).mkdir()
        command = [sys.executable, "-m", "mpq_compiler", *arguments]
        processes.append(subprocess.Popen(command, cwd=tmp_path / jobs, env=dict(os.environ)))
    assert [p.wait(timeout=600) for p in processes] == [0, 0]
    first, second = ({f.name: f.read_bytes() for f in (tmp_path / jobs / "x.mpq").iterdir()} for jobs in ("1", "2"))
    assert first == second


# --- artifacts ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["truncated", "altered"])
def test_damaged_artifacts(capsys: pytest.CaptureFixture[str], compiled: Path, tmp_path: Path, damage: str) -> None:
    copy = tmp_path / "x.mpq"
    shutil.copytree(compiled, copy)
    file = copy / "weights.safetensors"
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data[: len(data) // 2] if damage == "truncated" else data)
    refused(capsys, "verify", copy)
    refused(capsys, "generate", copy, "-o", tmp_path / "grid.png")
    assert not (tmp_path / "grid.png").exists()


def test_a_target_that_this_machine_cannot_run(
    capsys: pytest.CaptureFixture[str], model: Path, tmp_path: Path
) -> None:
    """It compiles; running is refused naming what is missing."""
    import platform

    foreign = "aarch64-dotprod" if platform.machine() == "x86_64" else "x86-64-avx2"
    output = tmp_path / "foreign.mpq"
    assert mpqc.main(["compile", str(model), "-o", str(output), "--target", foreign, *QUICK]) == 0
    assert foreign in refused(capsys, "generate", output, "-o", tmp_path / "grid.png")


def test_what_cannot_be_loaded_here_is_judged_by_the_reference(
    model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As with a GPU whose driver is too old, or whose memory is full: the compilation is not lost."""

    def refuse(path: Path) -> None:
        raise UserError("the GPU is full")

    monkeypatch.setattr(compiled_denoiser, "load", refuse)
    report = driver_compile.compile(model, tmp_path / "x.mpq", recipe="w8a8", samples=2, steps=2)
    assert report.quality["executed_by"] == "reference" and report.quality["agreement_db"] is None
    assert "the artifact was not executed here: the GPU is full" in report.notes
    assert (tmp_path / "x.mpq").is_dir()


def test_features_are_those_that_the_artifact_states(native: Path, tmp_path: Path) -> None:
    """Fast numerics may want more of the CPU than the target of that name does."""
    from mpq_compiler.artifact import bundle

    path = tmp_path / "demanding.mpq"
    shutil.copytree(native, path)
    manifest = json.loads((path / "manifest.json").read_bytes())
    manifest["target"]["features"].append("telepathy")
    manifest["artifact_sha256"] = bundle.digest(manifest)
    (path / "manifest.json").write_bytes(bundle.canonical(manifest))
    assert mpqc.main(["verify", str(path), "--json", str(tmp_path / "said.json")]) == 0
    assert json.loads((tmp_path / "said.json").read_text())["missing_features"] == ["telepathy"]


def test_run_refuses_wrong_inputs(native: Path) -> None:
    denoiser = compiled_denoiser.load(native)
    good = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=2).items()}
    expected = denoiser.run(good)
    sample = good["sample"]
    for change, words in (
        ({"sample": sample.astype(np.float64)}, "float64"),
        ({"sample": sample[:, :, :8]}, "sample"),
        ({"sample": sample[:0], "timestep": good["timestep"][:0]}, "batch"),
        ({"timestep": np.arange(3)}, "timestep"),
        ({"sampel": sample}, "sampel"),
    ):
        with pytest.raises(UserError, match=words):
            denoiser.run(good | change)
    with pytest.raises(UserError, match="timestep"):
        denoiser.run({"sample": sample})
    strided = np.ascontiguousarray(sample.transpose(0, 2, 3, 1)).transpose(0, 3, 1, 2)
    assert np.array_equal(denoiser.run(good | {"sample": strided}), expected)
    with pytest.raises(UserError, match="meta"):
        denoiser.run({**good, "sample": torch.empty(sample.shape, device="meta")})


def test_non_finite_values_are_errors(native: Path) -> None:
    denoiser = compiled_denoiser.load(native)
    inputs = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=1).items()}
    inputs["sample"][0, 0, 0, 0] = np.nan
    with pytest.raises(UserError, match="NaN"):
        denoiser.run(inputs)


def test_run_writes_its_output_whole_or_not_at_all(
    capsys: pytest.CaptureFixture[str], native: Path, tmp_path: Path
) -> None:
    source, output = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    inputs = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=1).items()}
    with source.open("wb") as stream:
        tensorfile.save(stream, inputs)
    assert mpqc.main(["run", str(native), "--input", str(source), "--output", str(output)]) == 0
    assert np.array_equal(tensorfile.load(output)["output"], compiled_denoiser.load(native).run(inputs))
    refused(capsys, "run", native, "--input", source, "--output", output)
    refused(capsys, "run", native, "--input", tmp_path / "absent", "--output", tmp_path / "new")
    assert {p.name for p in tmp_path.iterdir()} == {"in.safetensors", "out.safetensors"}


def test_malformed_allocation_problems(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    problem = tmp_path / "problem.json"
    layer = {"name": "a", "choices": [{"name": "int4", "loss": 0.1, "costs": {"bits": 4}}]}
    for change, key in (
        ({"layers": [{"name": "a", "choises": []}]}, "'choises'"),
        ({"version": 2}, "'version'"),
        ({"layerz": []}, "'layerz'"),
        ({"budgets": [{"cost": "bits", "maxx": 3}]}, "'maxx'"),
        ({"budgets": [{"cost": "bytes", "max": 3}]}, "budgets[0].cost"),
        ({"ties": [["a", "b"]]}, "ties[0]"),
        ({"fixed": {"a": "int8"}}, "fixed.a"),
        ({"budgets": [{"cost": "bits", "max": 3, "group": "q"}]}, "'q' has no layers; there is none"),
        ({"layers": [{**layer, "choices": [{"name": "x", "loss": "low", "costs": {}}]}]}, "layers[0].choices[0].loss"),
    ):
        problem.write_text(json.dumps({"version": 1, "layers": [layer], **change}))
        assert key in refused(capsys, "allocate", problem)
        assert key in refused(capsys, "allocate", problem, "--weights", "3")  # what is wrong with the file, first
    problem.write_text(json.dumps({"version": 1, "layers": [layer]}))
    assert "has budgets of its own" in refused(capsys, "allocate", problem, "--weights", "3")
    problem.write_text("{")
    refused(capsys, "allocate", problem)
    assert "No such file" in refused(capsys, "allocate", tmp_path / "absent.json", "--weights", "3")
