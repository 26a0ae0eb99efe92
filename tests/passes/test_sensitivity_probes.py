"""Sensitivities by probes: what backward passes estimate is what runs of each change measure."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import scipy.stats

from mpq_compiler.analysis.estimated_losses import LossEstimator
from mpq_compiler.analysis.probes import Probes
from mpq_compiler.ir import segments
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.program import Program
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.support import cache
from tests.harness import programs

MODEL = "pixart"
PASS = Sensitivity(inputs=3, formats=("int2", "int8"), activations=(4, 8))


def losses(step: Sensitivity, program: Program, folder, jobs: int = 1, **more) -> dict[tuple[str, str, str], float]:
    """The losses by kind, place and choice."""
    table = step.run(program, Session(cache=folder, jobs=jobs, **more)).facts[SENSITIVITY]
    return {
        (kind, place, choice): loss
        for kind in ("weights", "activations", "attention")
        for place, found in table[kind].items()
        for choice, loss in found.items()
    }


def decibels(estimated: dict, measured: dict, kind: str, choice: str) -> np.ndarray:
    keys = [key for key in measured if key[0] == kind and key[2] == choice]
    return np.array([10 * math.log10(estimated[key] / measured[key]) for key in keys])


def test_small_errors_are_estimated_without_bias(tmp_path):
    """With many probes: the error of a layer at 8 bits is so small that its first order is all there is."""
    program = programs.after(MODEL, "time-groups")
    estimated = losses(dataclasses.replace(PASS, probes=200), program, tmp_path)
    measured = losses(dataclasses.replace(PASS, method="ablation"), program, tmp_path)
    for kind, choice, most in (("weights", "int8", 1.0), ("activations", "8", 1.5)):
        found = decibels(estimated, measured, kind, choice)
        assert abs(found.mean()) < 0.3 and found.std() < most


def test_ranks_are_those_of_ablation_on_a_bundled_model(tmp_path):
    program = programs.after(programs.BUNDLED, "time-groups")
    step = Sensitivity(inputs=6, formats=("int2", "int8"))
    estimated = losses(step, program, tmp_path)
    measured = losses(dataclasses.replace(step, method="ablation"), program, tmp_path)
    assert estimated.keys() == measured.keys()
    for kind in ("weights", "activations"):
        found = [(measured[key], estimated[key]) for key in measured if key[0] == kind]
        assert scipy.stats.spearmanr(*zip(*found, strict=True)).statistic >= 0.95


def test_segments_estimate_the_same_bits(tmp_path, monkeypatch):
    """Whatever activations may take: an edge that layers of several segments read counts once, with all of them."""
    program = programs.after("unet2d", "time-groups", f"{programs.FRONT},bit-allocation{{uniform=int8,attention=8}}")
    step = dataclasses.replace(PASS, inputs=2, formats=("int4",))
    requests = Requests(attention=True)
    whole = losses(step, program, tmp_path / "whole", requests=requests)
    counted = []

    def leanest(program, costs, bound):
        counted.append(segments.ends(program, costs, bound))
        return segments.Plan(counted[-1], 0)

    monkeypatch.setattr(segments, "leanest", leanest)
    for held in (1 << 18, 1 << 12):
        monkeypatch.setattr(segments, "HELD", held)
        assert losses(step, program, tmp_path / str(held), requests=requests) == whole
    assert 1 < len(counted[0]) < len(counted[1])


def test_some_rows_stand_for_all(tmp_path):
    program = programs.after(MODEL, "time-groups")
    step = dataclasses.replace(PASS, formats=("int4",), probes=64)
    whole, some = (losses(dataclasses.replace(step, sampled=count), program, tmp_path) for count in (1 << 23, 1))
    layers = [key for key in whole if key[0] == "weights"]
    assert some != whole
    assert scipy.stats.spearmanr([some[key] for key in layers], [whole[key] for key in layers]).statistic >= 0.95


def test_attentions_and_rows_with_scales_of_their_own_are_estimated(tmp_path):
    program = programs.after(MODEL, "time-groups", f"{programs.FRONT},bit-allocation{{uniform=int8,attention=8}}")
    requests = Requests(attention=True)
    step = dataclasses.replace(PASS, activations=(8,), probes=100)
    estimated = losses(step, program, tmp_path, requests=requests)
    measured = losses(dataclasses.replace(step, method="ablation"), program, tmp_path, requests=requests)
    found = decibels(estimated, measured, "attention", "8")
    assert len(found) == len(program.attentions) and np.abs(found).max() < 3


def test_jobs_change_nothing(tmp_path):
    program = programs.after(MODEL, "time-groups")
    assert losses(PASS, program, tmp_path / "1") == losses(PASS, program, tmp_path / "2", jobs=2)


def test_inputs_that_are_known_are_not_run_again(tmp_path, monkeypatch):
    program = programs.after(MODEL, "time-groups")
    runs = []
    powers = Probes.powers

    def counting(self, *arguments):
        runs.append(arguments[1])
        return powers(self, *arguments)

    monkeypatch.setattr(Probes, "powers", counting)
    first = losses(PASS, program, tmp_path)
    assert sorted(runs) == [0, 1, 2]
    (file,) = (tmp_path / "sensitivity").glob("*.results")
    lines = file.read_text().splitlines()
    file.write_text("\n".join(line for line in lines if json.loads(line[17:])[0].endswith("input 0")) + '\n["torn')
    runs.clear()
    assert losses(PASS, program, tmp_path) == first and sorted(runs) == [1, 2]
    runs.clear()
    more = dataclasses.replace(PASS, formats=("int2", "int4", "int8"))
    assert {key: loss for key, loss in losses(more, program, tmp_path).items() if key in first} == first
    assert sorted(runs) == [0, 1, 2]
    assert {kind for kind, *_ in cache.entries(tmp_path)} == {"sensitivity"}


def test_more_inputs_where_widths_are_chosen_for_a_small_model():
    mixed, one = (LossEstimator(("int8",), widths, None, 8, 1 << 23) for widths in ((4, 8), (8,)))
    sizes = (10**6, 10**8, 10**9, 10**10)
    assert [mixed.count(size) for size in sizes] == [128, 32, 16, 8]
    assert [one.count(size) for size in sizes] == [32, 32, 16, 8]
    assert dataclasses.replace(mixed, inputs=5).count(10**6) == 5
