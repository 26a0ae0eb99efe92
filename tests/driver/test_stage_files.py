"""Another budget begins where budgets begin to matter, and gives the bytes that it gives alone."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mpq_compiler.driver import stage_files
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.stage_files import StageFiles, before_budget
from mpq_compiler.ir import printer
from mpq_compiler.ir.program import TensorStore
from mpq_compiler.passes.calibrate import Calibrate
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import kept_files
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import CALIBRATION, Statistic
from mpq_compiler.sampling.conditioning import Conditions
from tests.harness import programs, tiny

OPTIONS = {"samples": 2, "steps": 3, "effort": "none", "target": "reference"}
FREE = "equalize, rotate, calibrate, time-groups, time-gains"


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Programs are kept that took no time."""
    monkeypatch.setattr(stage_files, "LEAST_SECONDS", 0.0)


def files(folder: Path) -> dict[str, bytes]:
    """The files of an artifact."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_second_budget_begins_behind_the_first_ones_calibration(tmp_path: Path) -> None:
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    first = compile_denoiser(model, tmp_path / "first", weights=4, cache=cache, **OPTIONS)
    assert not any("earlier run" in note for note in first.notes)
    second = compile_denoiser(model, tmp_path / "second", weights=5, cache=cache, **OPTIONS)
    alone = compile_denoiser(model, tmp_path / "alone", weights=5, cache=tmp_path / "other", **OPTIONS)
    assert [note for note in second.notes if note.startswith(f"an earlier run had left in the cache: {FREE}")]
    assert files(tmp_path / "second") == files(tmp_path / "alone")
    assert second.artifact == alone.artifact
    reused = {taken["name"] for taken in second.passes if taken["cpu_seconds"] == 0.0}
    assert reused == {*FREE.split(", ")}
    assert {taken["name"] for taken in alone.passes} == {taken["name"] for taken in second.passes}


def test_a_run_that_is_killed_behind_the_stage_leaves_its_program_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, cache = tiny.save("dit", tmp_path / "model"), tmp_path / "cache"
    monkeypatch.setattr(kept_files, "LEAST_SECONDS", 0.0)
    with monkeypatch.context() as killing, pytest.raises(KeyboardInterrupt):
        killing.setattr(Sensitivity, "run", interrupt)
        compile_denoiser(model, tmp_path / "killed", weights=4, cache=cache, **OPTIONS)
    assert not [*(cache / "calibration").iterdir()]
    monkeypatch.setattr(Calibrate, "run", interrupt)
    report = compile_denoiser(model, tmp_path / "next", weights=4, cache=cache, **OPTIONS)
    assert any(FREE in note for note in report.notes)


def interrupt(*given: object) -> None:
    raise KeyboardInterrupt


def test_dumps_have_every_stage_though_the_cache_has_them(tmp_path: Path) -> None:
    model, cache, dumps = tiny.save("dit", tmp_path / "model"), tmp_path / "cache", tmp_path / "dumps"
    compile_denoiser(model, tmp_path / "first", weights=4, cache=cache, **OPTIONS)
    compile_denoiser(model, tmp_path / "second", weights=4, cache=cache, dumps=dumps, **OPTIONS)
    assert {path.name.partition("-")[2].split(".")[0] for path in dumps.iterdir()} >= {*FREE.split(", ")}


def of(tmp_path: Path, passes: Sequence[Pass] = (), model: str = "unet2d", **changes: Any) -> StageFiles:
    """The file of a program that passes make of a laid-out one, with the tensors of that one alone."""
    laid_out = programs.after(model, "layout")
    names = dict.fromkeys(str(n.target) for n in laid_out.graph.nodes if n.op == "get_attr")
    own = replace(laid_out, tensors=TensorStore({name: laid_out.tensors[name] for name in names}))
    session = Session(denoiser=programs.denoiser(model), cache=tmp_path / "cache")
    return StageFiles(own, passes, replace(session, **changes))


def test_all_that_decides_on_a_program_decides_on_its_file(tmp_path: Path) -> None:
    sampled = programs.denoiser("unet2d")
    others = [
        of(tmp_path, model="dit"),
        of(tmp_path, parser.parse("trace, calibrate")[1:]),
        of(tmp_path, parser.parse("trace, calibrate{samples=3}")[1:]),
        of(tmp_path, seed=1),
        of(tmp_path, steps=7),
        of(tmp_path, device="cuda:0"),
        of(tmp_path, requests=Requests(frozenset({Statistic.GRAM}))),
        of(tmp_path, calibration={"sample": torch.zeros(2, 3)}),
        of(tmp_path, calibration={"sample": torch.ones(2, 3)}),
        of(tmp_path, denoiser=replace(sampled, guidance=3.0)),
        of(tmp_path, denoiser=replace(sampled, given=Conditions({"x": np.zeros(2)}))),
        of(tmp_path, denoiser=replace(sampled, given=Conditions({"x": np.zeros(2)}, {"x": np.zeros(2)}))),
    ]
    assert len({stage.place for stage in [of(tmp_path), *others]}) == 1 + len(others)
    turned = [frozenset(order) for order in permutations([Statistic.GRAM, Statistic.RANGE, Statistic.VALUES])]
    assert len({of(tmp_path, requests=Requests(found)).place for found in turned}) == 1
    assert of(tmp_path).place == of(tmp_path, jobs=2, progress=None).place


def test_a_program_comes_back_as_it_was(tmp_path: Path) -> None:
    program = programs.after("unet2d", "time-groups")
    stage = of(tmp_path)
    assert stage.load() is None
    stage.save(program, 7.0)
    left = stage.load()
    assert left is not None
    found, seconds = left
    assert seconds == 7.0
    assert printer.text(found) == printer.text(program)
    assert [*found.tensors] == [*program.tensors]
    assert all(found.tensors[name] is program.tensors[name] for name in stage.known)
    assert all(torch.equal(found.tensors[name], program.tensors[name]) for name in program.tensors)
    grams, kept = (p.facts[CALIBRATION].grams for p in (found, program))
    assert grams.keys() == kept.keys() and all(torch.equal(grams[name], kept[name]) for name in kept)


def test_compilations_that_write_a_program_at_a_time_leave_no_mixture(tmp_path: Path) -> None:
    """The order of what a program has may differ from process to process: a reader gets one of both programs, whole."""
    program = programs.after("unet2d", "time-groups")
    calibration = program.facts[CALIBRATION]
    turned = replace(calibration, edges=dict(reversed(calibration.edges.items())),
                     grams=dict(reversed(calibration.grams.items())))  # fmt: skip
    stage = of(tmp_path)
    stage.save(program, 7.0)
    rest = (stage.place / stage_files.REST).read_bytes()
    other = program.fork()
    other.facts[CALIBRATION] = turned
    stage.save(other, 7.0)
    (stage.place / stage_files.REST).write_bytes(rest)  # the one that had begun first ends last
    left = stage.load()
    assert left is not None
    found = left[0].facts[CALIBRATION]
    assert all(torch.equal(found.edges[name].values, edge.values) for name, edge in calibration.edges.items())
    assert all(torch.equal(found.grams[name], gram) for name, gram in calibration.grams.items())


def test_a_program_of_which_a_part_is_gone_or_torn_is_made_again(tmp_path: Path) -> None:
    stage = of(tmp_path)
    stage.save(programs.after("unet2d", "time-groups"), 7.0)
    parts = sorted(stage.place.iterdir())
    assert len(parts) > 2
    tensors = [path for path in parts if path.name != stage_files.REST]
    tensors[-1].unlink()
    assert stage.load() is None
    stage.save(programs.after("unet2d", "time-groups"), 7.0)
    tensors[0].write_bytes(tensors[0].read_bytes()[:-1])
    with pytest.warns(UserWarning, match="was damaged"):
        assert stage.load() is None


def test_the_program_that_nobody_used_for_longest_makes_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = programs.after("unet2d", "time-groups")
    stages = [of(tmp_path, seed=seed) for seed in range(3)]
    for age, stage in enumerate(stages[:2]):
        stage.save(program, 7.0)
        os.utime(stage.place, (1000 + age, 1000 + age))
    assert stages[0].load() is not None  # which is a use
    size = sum(path.stat().st_size for path in stages[0].place.iterdir())
    monkeypatch.setattr(stage_files, "MOST", 5 * size // 2)
    stages[2].save(program, 7.0)
    assert [stage.load() is not None for stage in stages] == [True, False, True]
    monkeypatch.setattr(stage_files, "MOST", size // 2)
    stages[1].save(program, 7.0)
    assert stages[1].load() is None


def test_passes_before_a_budget_are_those_that_none_can_change() -> None:
    passes = parser.parse("trace, layout, equalize, calibrate, time-groups, sensitivity, bit-allocation")
    assert [step.name() for step in before_budget(passes[2:])] == ["equalize", "calibrate", "time-groups"]
    assert before_budget(passes[2:5]) == []

    class Foreign(type(passes[2])):  # type: ignore[misc]
        """A pass of somebody else's package."""

    foreign = Foreign()
    assert type(foreign).__module__ == __name__
    assert before_budget([foreign, *passes[3:]]) == []
    assert replace(passes[2]) == passes[2]
