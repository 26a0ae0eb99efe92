"""A compilation that was killed goes on in the next one, which gives the same bytes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.formats import FORMATS
from mpq_compiler.quantization import fit_files, fitting
from mpq_compiler.quantization.fit_files import FitFiles
from tests.harness import tiny

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
    assert any("saved: an earlier run had left results" in note for note in report.notes)
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
