"""Calibration files: recorded from a diffusers pipeline, read with one sentence for every fault, split for judging."""

from __future__ import annotations

import json
import types
from pathlib import Path

import diffusers
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from mpq_compiler.api import compile
from mpq_compiler.cli import mpqc
from mpq_compiler.evaluation import painter as evaluation_painter
from mpq_compiler.frontend import calibration_file, denoiser, record
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError
from tests.harness import tiny

Tensors = dict[str, torch.Tensor]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("sd15", tmp_path_factory.mktemp("text"))


@pytest.fixture(scope="module")
def loaded(model: Path) -> denoiser.Denoiser:
    return denoiser.load(model)


def written(tensors: Tensors, folder: Path) -> Path:
    path = folder / "calibration.safetensors"
    save_file({name: value.contiguous().clone() for name, value in tensors.items()}, path)
    return path


def test_a_pipeline_is_recorded_and_compiled(loaded: denoiser.Denoiser, model: Path, tmp_path: Path) -> None:
    unet = tiny.model("sd15")
    pipeline = types.SimpleNamespace(unet=unet)  # record_inputs asks a pipeline for nothing else
    given = tiny.inputs("sd15", batch=2)
    path = tmp_path / "recorded.safetensors"
    with record.record_inputs(pipeline, path, every=2):
        for step in range(999, -1, -100):  # as StableDiffusionPipeline calls it
            unet(
                given["sample"],
                torch.tensor(step),
                encoder_hidden_states=given["encoder_hidden_states"],
                timestep_cond=None,
                cross_attention_kwargs=None,
                added_cond_kwargs=None,
                return_dict=False,
            )
    assert tensorfile.metadata(path) == {}  # this pipeline says nothing of how it samples
    recorded = load_file(path)
    assert set(recorded) == set(loaded.input_specs)
    assert recorded["timestep"].tolist() == [step for step in range(999, -1, -200) for _ in range(2)]
    assert torch.equal(recorded["sample"][:2], given["sample"])
    arguments = ["compile", str(model), "-o", str(tmp_path / "out.mpq"), "--target", "reference", "--recipe", "w8a8"]
    assert mpqc.main([*arguments, "--calibration", str(path)]) == 0


def test_nothing_is_written_without_a_call_or_after_an_error(tmp_path: Path) -> None:
    unet, path = tiny.model("sd15"), tmp_path / "recorded.safetensors"
    with pytest.raises(UserError, match="was not called"), record.record_inputs(unet, path):
        pass
    with pytest.raises(ZeroDivisionError), record.record_inputs(unet, path):
        raise ZeroDivisionError
    assert not path.exists()


def test_what_cannot_be_recorded_is_said_at_once(tmp_path: Path) -> None:
    unet, path = tiny.model("unet2d"), tmp_path / "recorded.safetensors"
    with pytest.raises(UserError, match="create it first"), record.record_inputs(unet, tmp_path / "no" / "x"):
        raise AssertionError("nothing is drawn")
    x = torch.randn(1, *tiny.inputs("unet2d", batch=1)["sample"].shape[1:])
    with record.record_inputs(unet, path):
        unet(x, 5)
    whole = path.read_bytes()
    with pytest.raises(UserError, match="are of 9 kinds, and an artifact holds 8"), record.record_inputs(unet, path):
        for times in range(1, 10):
            unet(torch.cat([x] * times, -1), 5)
    assert path.read_bytes() == whole


def test_a_model_of_fewer_channels_than_its_latents(tmp_path: Path) -> None:
    """Super-resolution: half of the channels are the small image's; it cannot be sampled alone, and is compiled."""
    few = tmp_path / "few.toml"
    few.write_text('schema = 1\nextends = "default"\n[options.sensitivity]\nformats = ["int4", "int8"]\n')
    model = tiny.model("unet2d", in_channels=6)
    loaded = denoiser.wrap(model, name="larger")
    assert not loaded.whole and not loaded.conditioning.possible
    with pytest.raises(UserError, match="cannot be sampled alone: give recorded inputs with calibration=FILE"):
        compile.compile(loaded, tmp_path / "out.mpq", target="reference")
    given = loaded.random_inputs(16)
    given["timestep"] = torch.arange(999, 0, -63)[:16]
    report = compile.compile(
        loaded, tmp_path / "out.mpq", target="reference", calibration=written(given, tmp_path), weights=6, recipe=few
    )
    assert any("nothing can be drawn here" in note for note in report.notes)
    told = "calibrated on 12 inputs only, which can cost several dB: record 86 rows or more, a quarter of which is held"
    assert any(note.startswith(told) for note in report.notes)
    painter = evaluation_painter.from_artifact(tmp_path / "out.mpq")
    with pytest.raises(UserError, match="3 channels for 6 that it takes"):
        painter.draw(painter.conditioning.varied(1), 1, 2, 0)


def test_without_a_file_the_command_says_what_to_give(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert mpqc.main(["compile", str(model), "-o", str(tmp_path / "out.mpq")]) == 1
    error = capsys.readouterr().err
    for part in ("--calibration FILE", "sample f32[N,4,16,16]", "encoder_hidden_states f32[N,7,32]", "record_inputs"):
        assert part in error
    _, refusal = error.splitlines()  # what it compiles is said before it is known
    assert refusal.startswith("mpqc: ")


def test_rows_are_ordered_by_time_and_half_precision_is_read(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    given = tiny.inputs("sd15", batch=9)
    given["sample"] = given["sample"].half()
    found = calibration_file.load(loaded, written(given, tmp_path))
    assert found["timestep"].tolist() == sorted(given["timestep"].tolist(), reverse=True)
    assert found["sample"].dtype == torch.float32
    row = given["timestep"].argmax()
    assert torch.equal(found["sample"][0], given["sample"][row].float())


class Pipeline:
    """As much of a diffusers pipeline as `record_inputs` looks at."""

    def __init__(self, steps: int, guidance: float) -> None:
        self.unet = tiny.model("sd15")
        self.scheduler = diffusers.EulerDiscreteScheduler(timestep_spacing="trailing")
        self.scheduler.set_timesteps(steps)
        self._guidance_scale = guidance

    def draw(self, calls: int) -> None:
        given = tiny.inputs("sd15", batch=2)
        for step in self.scheduler.timesteps[:calls]:
            self.unet(given["sample"], step, encoder_hidden_states=given["encoder_hidden_states"])


def test_a_file_says_how_it_was_sampled_and_what_differs_is_named(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    pipeline, path = Pipeline(25, 7.5), tmp_path / "recorded.safetensors"
    with record.record_inputs(pipeline, path):
        pipeline.draw(calls=4)
    metadata = tensorfile.metadata(path)
    assert (metadata["steps"], metadata["guidance"]) == ("25", "7.5")
    scheduler = tmp_path / "scheduler_config.json"
    scheduler.write_text(json.dumps(loaded.scheduler.to_config()))
    assert calibration_file.notes(loaded, path) == calibration_file.notes(loaded, path, steps=25, guidance=7.5) == []
    said = " ".join(calibration_file.notes(loaded, path, 20, 2.0, scheduler))
    for part in (
        "a number of steps of 25, and 20 is asked for",
        "a guidance of 7.5, and 2 is asked for",
        "a class_name of EulerDiscreteScheduler, and DDIMScheduler is asked for",
        "a beta_schedule of linear, and squaredcos_cap_v2 is asked for",
    ):
        assert part in said
    assert "timestep_spacing" not in said


def test_inputs_that_no_sampling_gives_are_named(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    path, inputs = tmp_path / "recorded.safetensors", tiny.inputs("sd15", batch=4)
    inputs["timestep"] = torch.tensor([-3, 0, 999, 5000])
    inputs["sample"][1:] = 0
    save_file(inputs, path)
    (times, zeros, steps, guidance, scheduler) = calibration_file.notes(loaded, path, 20, 7.5, "scheduler_config.json")
    assert "2 of 4 rows at timesteps outside 0 to 999, such as 5000" in times
    assert "3 of 4 rows in which 'sample' is all zeros" in zeros
    assert "does not say that it was recorded with a guidance of 7.5" in steps
    assert "does not say that it was recorded with a number of steps of 20" in guidance
    assert "does not say with which scheduler" in scheduler


def test_what_changes_between_the_calls_is_not_stated(tmp_path: Path) -> None:
    pipeline, path = Pipeline(25, 7.5), tmp_path / "recorded.safetensors"
    with record.record_inputs(pipeline, path):
        pipeline.draw(calls=1)
        pipeline._guidance_scale = 3.0
        pipeline.draw(calls=1)
    assert set(tensorfile.metadata(path)) == {"steps", "scheduler"}


def test_latents_of_another_size_are_cut_or_repeated_and_said(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    given = tiny.inputs("sd15", batch=9)
    given["sample"] = torch.randn(9, 4, 8, 24)
    path = written(given, tmp_path)
    found = calibration_file.load(loaded, path)["sample"]
    row = int(given["timestep"].argmax())
    assert torch.equal(found[0], torch.cat([given["sample"][row]] * 2, dim=1)[:, :, :16])
    (note,) = calibration_file.notes(loaded, path)
    assert "a resolution of 8x24, and 16x16 is asked for" in note


def test_masks_and_timesteps_are_read_as_they_are_made(tmp_path: Path) -> None:
    loaded = denoiser.wrap(tiny.model("sana"), tokens=tiny.TOKENS)
    given = tiny.inputs("sana", batch=4)
    expected = {name: value.clone() for name, value in given.items()}
    given["encoder_attention_mask"] = given["encoder_attention_mask"].bool()
    given["timestep"] = given["timestep"].long()
    found = calibration_file.load(loaded, written(given, tmp_path))
    order = expected["timestep"].argsort(descending=True, stable=True)
    for name, value in expected.items():
        assert found[name].dtype == torch.float32
        assert torch.equal(found[name], value[order])


def test_fractions_of_a_time_that_a_table_embeds(tmp_path: Path) -> None:
    learned = denoiser.wrap(tiny.model("unet2d", time_embedding_type="learned", num_train_timesteps=1000))
    given = tiny.inputs("unet2d", batch=4)
    assert calibration_file.load(learned, written(given, tmp_path))["timestep"].dtype == torch.int64
    given["timestep"] += 0.5
    with pytest.raises(UserError, match=r"'timestep' .* holds fractions, and must hold whole numbers"):
        calibration_file.load(learned, written(given, tmp_path))


def test_bfloat16_is_read(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    given = tiny.inputs("sd15", batch=2)
    given["sample"] = given["sample"].bfloat16()
    found = calibration_file.load(loaded, written(given, tmp_path))["sample"]
    row = int(given["timestep"].argmax())
    assert torch.equal(found[0], given["sample"][row].float())


def _replace(name: str, value: torch.Tensor | None) -> Tensors:
    given: dict[str, torch.Tensor | None] = dict(tiny.inputs("sd15", batch=4))
    given[name] = value
    return {n: v for n, v in given.items() if v is not None}


@pytest.mark.parametrize(
    ("name", "value", "sentence"),
    [
        ("timestep", None, "lacks the input 'timestep'"),
        ("timesteps", torch.zeros(4), "did you mean 'timestep'"),
        ("sample", torch.zeros(4, 3, 8, 8), r"is \[4, 3, 8, 8\], where .* takes f32\[B,4,16,16\]"),
        ("timestep", torch.tensor(3), r"'timestep' .* is \[\]"),
        ("timestep", torch.arange(3), "equally many rows of every input, and holds 3 of 'timestep' and 4 of '"),
        ("sample", torch.zeros(4, 4, 16, 16, dtype=torch.int32), "is int32, and must be float32"),
        ("sample", torch.full((4, 4, 16, 16), torch.nan), "holds NaN or infinity"),
    ],
)
def test_faults_are_named(
    loaded: denoiser.Denoiser, tmp_path: Path, name: str, value: torch.Tensor | None, sentence: str
) -> None:
    with pytest.raises(UserError, match=sentence):
        calibration_file.load(loaded, written(_replace(name, value), tmp_path))


def test_weights_are_no_calibration_and_the_sentence_is_short(loaded: denoiser.Denoiser, tmp_path: Path) -> None:
    weights = {f"down_blocks.{i}.resnets.0.conv1.weight": torch.zeros(1) for i in range(120)}
    with pytest.raises(UserError, match=r"lacks the input 'sample' .*0\.conv1\.weight' and 117 more, which") as refused:
        calibration_file.load(loaded, written(weights, tmp_path))
    assert len(str(refused.value)) < 400


@pytest.mark.parametrize("label", [-1, 11])
def test_labels_that_there_are_not(label: int, tmp_path: Path) -> None:
    loaded = denoiser.wrap(tiny.model("unet2d-class"), name="classes")
    given = tiny.inputs("unet2d-class", batch=4)
    given["class_labels"][2] = label
    with pytest.raises(UserError, match=r"'class_labels' .* goes from .* where classes takes 0 to \d+"):
        calibration_file.load(loaded, written(given, tmp_path))


def test_what_judges_has_not_been_seen() -> None:
    kept, held = calibration_file.split({"timestep": torch.arange(16), "sample": torch.randn(16, 2)})
    assert held["timestep"].tolist() == [2, 6, 10, 14]
    assert sorted([*kept["timestep"].tolist(), *held["timestep"].tolist()]) == list(range(16))
    few = {"timestep": torch.arange(7), "sample": torch.randn(7, 2)}
    assert all(part.keys() == few.keys() and len(part["sample"]) == 7 for part in calibration_file.split(few))


@pytest.mark.parametrize("trajectories", [4, 6, 10])
def test_whole_trajectories_are_held_out(trajectories: int) -> None:
    """What judges is no step beside one that was trained on; latest times come first, as a file is read."""
    generator = torch.Generator().manual_seed(0)
    times = torch.arange(20).flip(0).repeat_interleave(trajectories)
    owner = torch.arange(trajectories).repeat(20)
    inputs = {"timestep": times, "sample": torch.randn(len(times), 3, generator=generator), "owner": owner}
    parts = calibration_file.split(inputs)
    kept, held = ({*part["owner"].tolist()} for part in parts)
    assert kept and held and not kept & held and kept | held == {*range(trajectories)}
    for part, owners in zip(parts, (kept, held), strict=True):
        assert len(part["owner"]) == 20 * len(owners)
    chosen = calibration_file.held_out_rows(calibration_file.latent_numbers(inputs), times, 8)
    assert len({*owner[chosen].tolist()} & {*owner[~chosen].tolist()}) == 0 < int(chosen.sum())


@pytest.mark.parametrize("images", [1, 2])
def test_both_sides_of_guidance_are_judged(images: int) -> None:
    """A guided call holds its latents twice, for the empty prompt and for the prompt; neither is split off."""
    generator, rows = torch.Generator().manual_seed(0), []
    for step in range(10):
        for _ in range(4):
            latents = torch.randn(images, 3, generator=generator)
            rows += [(step, x, guided) for guided in (0, 1) for x in latents]
    names = ("timestep", "sample", "guided")
    inputs = {name: torch.stack([torch.as_tensor(row[i]) for row in rows]) for i, name in enumerate(names)}
    kept, held = calibration_file.split(inputs)
    for part in (kept, held):
        assert float(part["guided"].double().mean()) == 0.5 and part["timestep"].unique().tolist() == list(range(10))
    seen = {x.numpy().tobytes() for x in kept["sample"]}
    assert len(held["sample"]) == len(rows) // 4 and not any(x.numpy().tobytes() in seen for x in held["sample"])


def test_timesteps_of_a_scheduler_that_another_stands_in_for(tmp_path: Path) -> None:
    """Heun's have fractions; the network takes them, and DDIM with whole ones draws with the artifact."""
    from mpq_compiler.evaluation import painter as evaluation_painter
    from mpq_compiler.runtime import compiled_denoiser

    made = tiny.inputs("unet2d", batch=8)
    made["timestep"] = torch.linspace(999, 0.5, 8)
    loaded = denoiser.wrap(tiny.model("unet2d"), name="unet2d")
    options = {"recipe": "w8a8", "target": "reference", "calibration": written(made, tmp_path)}
    compile.compile(loaded, tmp_path / "out.mpq", **options)
    artifact = compiled_denoiser.load(tmp_path / "out.mpq")
    (spec,) = (s for s in artifact.manifest["functions"][0]["inputs"] if s["name"] == "timestep")
    assert spec["dtype"] == "float32"
    kept, _ = calibration_file.split(made)
    stated = artifact.manifest["calibration"]["ranges"]
    assert {n: (np.float32(x["low"]), np.float32(x["high"])) for n, x in stated.items()} == {
        n: (x.min(), x.max()) for n, x in kept.items()
    }
    x = {name: value.numpy() for name, value in made.items()}
    assert not (artifact.run(x) == artifact.run(x | {"timestep": x["timestep"].round()})).all()
    painter = evaluation_painter.from_artifact(tmp_path / "out.mpq")
    assert painter.draw(painter.conditioning.varied(1), 1, 2, seed=3).shape == (1, *loaded.latent_shape)
