"""A compilation that was killed goes on in the next one, which gives the same bytes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mpq_compiler.analysis.rewrite_search import RewriteSearch
from mpq_compiler.driver import stage_files
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.formats import FORMATS
from mpq_compiler.frontend import denoiser
from mpq_compiler.frontend.trajectories import record_calibration
from mpq_compiler.ir import scratch
from mpq_compiler.passes.calibrate import Calibrate
from mpq_compiler.passes.rotate import Rotate
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.quantization import fit_files, fitting, kept_files
from mpq_compiler.quantization.calibration_files import CalibrationFiles
from mpq_compiler.quantization.fit_files import FitFiles
from mpq_compiler.quantization.rewrite_gain import Samples
from mpq_compiler.quantization.row_files import RowFiles
from mpq_compiler.quantization.statistics import Calibration, EdgeStatistics, Statistic
from tests.harness import packed, tiny

OPTIONS = {"weights": 4.5, "samples": 2, "steps": 3, "effort": "none", "target": "reference"}


class Killed(BaseException):
    """The end of a process, as far as a test can have it."""


def test_fits_of_a_killed_run_are_those_of_the_next(tmp_path, monkeypatch):
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    whole = compile_denoiser(model, tmp_path / "whole", cache=tmp_path / "other", **OPTIONS)
    monkeypatch.setattr(fit_files, "LEAST", 1)
    fit, made = fitting.fit_rows, []

    def killed(weight, name, gram, rounding=fitting.Rounding.NEAREST):
        made.append(name)
        if len(made) > 5:
            raise Killed
        return fit(weight, name, gram, rounding)

    # sensitivities are known: what is fitted is the plan
    compile_denoiser(model, tmp_path / "known", cache=cache, **OPTIONS)
    monkeypatch.setattr(fitting, "fit_rows", killed)
    with pytest.raises(Killed):
        compile_denoiser(model, tmp_path / "killed", cache=cache, **OPTIONS)
    assert not (tmp_path / "killed").exists()
    left = [*(cache / "fits").iterdir()]
    assert left

    again = []

    def counted(*given, **options):
        again.append(given[1])
        return fit(*given, **options)

    monkeypatch.setattr(fitting, "fit_rows", counted)
    monkeypatch.setattr(FitFiles, "load", later(FitFiles.load))
    report = compile_denoiser(model, tmp_path / "next", cache=cache, **OPTIONS)
    assert any("an earlier run had left in the cache: " in note and "fits of weights" in note for note in report.notes)
    assert again
    assert not [*(cache / "fits").iterdir()]
    assert files(tmp_path / "next") == files(tmp_path / "whole")
    assert report.artifact == whole.artifact


def later(load):
    """Loads fits as if each had taken a minute."""

    def loaded(self, place):
        found = load(self, place)
        return found and (found[0], 60.0)

    return loaded


def files(folder: Path) -> dict[str, bytes]:
    """The files of an artifact."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize("name", [name for name, found in FORMATS.items() if found.integer])
def test_a_fit_comes_back_as_it_was(name, tmp_path):
    weight, gram = torch.randn(32, 48, generator=torch.Generator().manual_seed(0)), torch.eye(48)
    fits = FitFiles(tmp_path)
    place = fits.place(weight, (gram, None), name, "gptq")
    assert fits.load(place) is None
    fit = FORMATS[name].fit(weight, gram)
    fits.save(place, fit, 2.5)
    found = fits.load(place)
    assert found is not None
    assert found[1] == 2.5
    assert torch.equal(found[0].dequantize(), fit.dequantize())
    assert found[0].segments == fit.segments
    assert place == fits.place(weight.clone(), (gram, None), name, "gptq")
    others = {fits.place(weight, (gram, gram), name, "gptq"), fits.place(weight, (gram, None), name, "nearest")}
    assert len({place, *others}) == 3
    place.write_bytes(place.read_bytes()[:100])
    assert fits.load(place) is None
    fits.forget()
    assert not place.exists()


def with_inputs(model: Path, given: bool, folder: Path) -> dict:
    """The options of a compilation whose calibration inputs are recorded before it, or in it."""
    options = dict(OPTIONS)
    if given:
        calls = record_calibration(denoiser.load(model), options.pop("samples"), options.pop("steps"))
        options["calibration"] = folder / "calls.safetensors"
        save_file(calls, options["calibration"])
    return options


@pytest.mark.parametrize("given", (True, False), ids=("recorded", "sampled"))
def test_the_calibration_of_a_killed_run_is_that_of_the_next(given, tmp_path, monkeypatch):
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    options = with_inputs(model, given, tmp_path)
    whole = compile_denoiser(model, tmp_path / "whole", cache=tmp_path / "other", **options)
    monkeypatch.setattr(kept_files, "LEAST_SECONDS", 0)
    monkeypatch.setattr(stage_files, "LEAST_SECONDS", math.inf)  # with the program of that stage none is needed
    with monkeypatch.context() as killing:
        killing.setattr(Sensitivity, "run", kill)
        with pytest.raises(Killed):
            compile_denoiser(model, tmp_path / "killed", cache=cache, **options)
    assert [*(cache / "calibration").iterdir()]
    monkeypatch.setattr(Calibrate, "_measured", kill)  # nothing is measured again
    report = compile_denoiser(model, tmp_path / "next", cache=cache, **options)
    assert not [*(cache / "calibration").iterdir()]
    assert files(tmp_path / "next") == files(tmp_path / "whole")
    assert report.artifact == whole.artifact
    with pytest.raises(Killed):
        compile_denoiser(model, tmp_path / "seeded", cache=cache, **{**options, "seed": 1})


def kill(*given):
    raise Killed


@pytest.mark.parametrize("given", (True, False), ids=("recorded", "sampled"))
def test_rows_of_a_killed_run_are_those_of_the_next(given, tmp_path, monkeypatch):
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    options = with_inputs(model, given, tmp_path)
    monkeypatch.setattr(kept_files, "LEAST_SECONDS", 0)
    monkeypatch.setattr(RewriteSearch, "_share", lambda *numbers: 0.5)  # as of a large model
    whole = compile_denoiser(model, tmp_path / "whole", cache=tmp_path / "other", **options)
    assert not [*(tmp_path / "other" / "rows").iterdir()]
    with monkeypatch.context() as killing:
        killing.setattr(Rotate, "run", kill)
        with pytest.raises(Killed):
            compile_denoiser(model, tmp_path / "killed", cache=cache, **options)
    assert [*(cache / "rows").iterdir()]
    monkeypatch.setattr(RewriteSearch, "_sampled", kill)  # nothing is sampled again
    report = compile_denoiser(model, tmp_path / "next", cache=cache, **options)
    assert not [*(cache / "rows").iterdir()]
    assert files(tmp_path / "next") == files(tmp_path / "whole")
    assert report.artifact == whole.artifact
    with pytest.raises(Killed):
        compile_denoiser(model, tmp_path / "seeded", cache=cache, **{**options, "seed": 1})


def test_rows_come_back_as_they_were(tmp_path):
    program = packed.program("dit").laid_out
    inputs, window = {"timestep": torch.arange(3.0)}, ((3, 3), (1, 1), (0, 0, 0, 0))
    first, second = program.quantizable[:2]
    windows = {first: [()], second: [(), window]}
    made = {
        first.name: Samples(torch.rand(4), {(): [torch.randn(5, 4), torch.randn(3, 4)]}),
        second.name: Samples(torch.rand(2), {(): [torch.randn(2, 2)], window: [torch.randn(200, 18_000)]}),
    }
    kept = RowFiles(tmp_path)
    place = kept.place(program, inputs, windows, "8")
    assert kept.load(place) is None
    assert kept.save(place, made, 40.0)
    found, seconds = kept.load(place)
    assert seconds == 40.0
    assert [*found] == [*made]
    for one, other in zip(found.values(), made.values(), strict=True):
        assert torch.equal(one.largest, other.largest)
        assert [*one.joined()] == [*other.joined()]
        assert all(map(torch.equal, one.joined().values(), other.joined().values()))
    assert scratch.is_mapped(found[second.name].parts[window][0])

    assert place == kept.place(program, {"timestep": torch.arange(3.0)}, windows, "8")
    others = [(inputs, windows, "9"), (inputs, {first: [()], second: [()]}, "8"),
              ({"timestep": torch.ones(3)}, windows, "8")]  # fmt: skip
    assert len({place, *(kept.place(program, *other) for other in others)}) == 4
    (place / "edge-1").write_bytes(b"torn")
    assert kept.load(place) is None
    kept.forget()
    assert not place.exists()


def test_a_calibration_comes_back_as_it_was(tmp_path):
    program = packed.program("dit").laid_out
    inputs, wanted = {"timestep": torch.arange(3.0)}, frozenset({Statistic.RANGE, Statistic.GRAM})
    edge = EdgeStatistics(torch.arange(3.0), torch.arange(3.0) + 1, torch.randn(3, 200_000), 7)
    gram, mean = torch.randn(2, 4, 4), torch.randn(8)
    made = Calibration(inputs, {"a": edge}, {"q": gram, "k": gram}, {"q": mean, "k": mean}, torch.randn(3, 2))
    kept = CalibrationFiles(tmp_path)
    place = kept.place(program, inputs, wanted, False, "0 cpu")
    assert kept.load(place) is None
    assert kept.save(place, made, 40.0)
    found, seconds = kept.load(place)
    assert seconds == 40.0
    assert found.grams["q"] is found.grams["k"]
    assert scratch.is_mapped(found.edges["a"].values)
    assert found.edges["a"].elements == 7
    pairs = [(found.edges["a"].values, edge.values), (found.edges["a"].high, edge.high), (found.grams["k"], gram),
             (found.means["q"], mean), (found.inputs["timestep"], inputs["timestep"]),
             (found.outputs, made.outputs)]  # fmt: skip
    assert all(torch.equal(*pair) for pair in pairs)

    assert place == kept.place(program, {"timestep": torch.arange(3.0)}, wanted, False, "0 cpu")
    text, other = "0 cpu", {"timestep": torch.ones(3)}
    others = [(inputs, wanted, True, text), (inputs, wanted, False, "1 cpu"),
              (inputs, {Statistic.GRAM}, False, text), (other, wanted, False, text)]  # fmt: skip
    assert len({place, *(kept.place(program, *other) for other in others)}) == 5
    (place / "moments-0").write_bytes(b"torn")
    assert kept.load(place) is None
    kept.forget()
    assert not place.exists()


def test_a_calibration_is_not_kept_where_there_is_no_room_for_it(tmp_path, monkeypatch):
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(kept_files, "LEAST_SECONDS", 0)
    monkeypatch.setattr(kept_files, "SPARED", 1e12)
    report = compile_denoiser(model, tmp_path / "made", cache=cache, **OPTIONS)
    assert any("was not kept for a run that would go on" in note for note in report.notes)
