"""Estimates of a compilation, and the memory limit that they keep."""

from __future__ import annotations

import dataclasses
import json
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import mpq_compiler
from mpq_compiler import schemas
from mpq_compiler.cli import mpqc
from mpq_compiler.driver import estimate
from mpq_compiler.driver.compile import compile_denoiser
from mpq_compiler.driver.estimate import Workload, fit_jobs
from mpq_compiler.ir.sizes import HUGE, LARGE, Sizes
from mpq_compiler.passes.distill import Distill
from mpq_compiler.passes.sensitivity import Sensitivity
from mpq_compiler.pipeline.demand import SLOWER, Asked, Demand, Speed
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.quantization.requests import NONE
from mpq_compiler.support import usage
from mpq_compiler.support.errors import UserError
from tests.harness import programs, tiny

WORKLOAD = Workload([("one", Demand(products=100, held=3e9, disk=1e6)), ("two", Demand(shared=1e9))], 10**9, 10**8)
"""It takes 1 GB, 0.1 GB a job, and in its first step 3 GB a job."""


def test_work_adds_up_and_the_larger_memory_counts():
    first = Demand(products=1, traffic=2, steps=3, calls=6, held=4, shared=5, disk=6)
    both = first + Demand(products=10, traffic=20, steps=30, calls=60, held=40, shared=1, disk=60, serial=True)
    assert both == Demand(products=11, traffic=22, steps=33, calls=66, held=40, shared=5, disk=66)
    assert first * 3 == Demand(products=3, traffic=6, steps=9, calls=18, held=4, shared=5, disk=6)
    assert first.cpu_seconds(Speed(1, 2, 3)) == pytest.approx(SLOWER * (1 + 1 + 1 + 2))
    assert first.elapsed(Speed(1, 2, 3), 3) == pytest.approx(SLOWER * (1 + 2)), "calls of one interpreter take turns"
    assert [first.memory(jobs) for jobs in (1, 3)] == [5, 12]
    assert Demand(held=4, serial=True).memory(3) == 4


def test_jobs_are_as_many_as_fit(monkeypatch):
    monkeypatch.setattr(estimate, "RUNNING", 0)
    monkeypatch.setattr(estimate, "MARGIN", 1)
    assert fit_jobs(WORKLOAD, 2, "7.2GB") == (2, None)
    jobs, said = fit_jobs(WORKLOAD, 3, "7.2GB")
    assert jobs == 2
    assert said == "--memory-limit 7.2GB: 2 jobs in place of 3, which would take about 10.3GB"
    with pytest.raises(UserError, match=r"about 4\.1GB with jobs=1; give memory_limit=4\.1GB or more"):
        fit_jobs(WORKLOAD, 2, "4GB")
    assert fit_jobs(WORKLOAD, 2, "4.1GB")[0] == 1


def test_time_is_reckoned_by_the_speed_here_where_it_is_minutes(monkeypatch):
    slow = Speed(1e9, 1e9, 1e4)
    monkeypatch.setattr(Speed, "measured", staticmethod(lambda: slow))
    short, long = (Workload([("one", Demand(products=products))], 0, 0) for products in (1e12, 1e13))
    assert estimate.foreseen(short, 2) == short.estimate(2, estimate.NOMINAL)
    assert estimate.foreseen(long, 2) == long.estimate(2, slow)


def test_a_command_that_takes_minutes_says_so_before_it_begins(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(estimate, "LONG", 0.0)
    model = tiny.save("dit", tmp_path / "model")
    options = ["--recipe", "w8a8", "--samples", "2", "--steps", "2", "--target", "reference", "--jobs", "1", "-v"]
    place = tmp_path / "report.json"
    assert mpqc.main(["compile", str(model), "-o", str(tmp_path / "out"), "--json", str(place), *options]) == 0
    said = capsys.readouterr().err
    assert re.search(r"this will take about [\d.]+ s on 1 idle core: \S+ [\d.]+ s, .*; --estimate has all passes", said)
    assert said.index("this will take") < said.index("calibrating")
    assert re.search(r"^done in .+ \(estimated .+\)$", said, re.MULTILINE)
    report = json.loads(place.read_text(encoding="utf-8"))
    taken = [step["name"] for step in (*report["passes"], *report["after"])]
    assert [step["name"] for step in report["estimate"]["steps"]] == taken
    assert schemas.check(report["estimate"], "estimate") is None


def test_without_a_limit_it_is_a_share_of_what_is_free(monkeypatch):
    monkeypatch.setattr(estimate, "RUNNING", 0)
    monkeypatch.setattr(estimate, "MARGIN", 1)
    monkeypatch.setattr(usage, "free_memory", lambda: int(4.3e9))
    jobs, said = fit_jobs(WORKLOAD, 2, None)
    assert jobs == 1
    assert said is not None
    assert said.startswith("80% of the free memory (4.2GB): 1 job in place of 2")


def test_a_disk_that_is_too_small_is_foreseen(monkeypatch):
    monkeypatch.setattr(estimate.shutil, "disk_usage", lambda place: type("Usage", (), {"free": 10}))
    with pytest.raises(UserError, match=r"free some space there, or name another folder with TMPDIR"):
        fit_jobs(WORKLOAD, 1, "8GB")


def test_sizes_are_those_of_the_program():
    program = programs.after("unet2d", "layout")
    sizes = Sizes.of(program)
    known = {str(node.args[1].target) for node in program.quantizable}
    assert sizes.numbers == sum(program.tensors[name].numel() for name in known)
    assert 0 < sizes.live_bytes < sizes.value_bytes
    assert sizes.products >= sum(layer.products for layer in sizes.layers) > 0


def test_large_models_are_measured_on_fewer_inputs():
    """Half above 500 M parameters, a quarter above 2 B, by default; a number that is given counts at any size."""
    sizes = Sizes.of(programs.after("unet2d", "layout"))
    large, huge = (dataclasses.replace(sizes, parameters=parameters + 1) for parameters in (LARGE, HUGE))
    assert sizes.parameters < LARGE

    def products(step: Pass, of: Sizes) -> float:
        return step.demand(Asked(of, 64, NONE)).products

    whole, half, quarter = (products(Sensitivity(), of) for of in (sizes, large, huge))
    assert (whole, half, quarter) == tuple(products(Sensitivity(inputs=count), sizes) for count in (32, 16, 8))
    assert quarter < half < whole
    assert products(Sensitivity(inputs=32), huge) == whole


def test_every_pass_is_estimated(tmp_path):
    found = mpq_compiler.estimate(tiny.save("unet2d", tmp_path), weights=4, samples=2, steps=3)
    names = [step.name for step in found.steps]
    assert names[:3] == ["trace", "layout", "equalize"]
    assert names[-3:] == ["fuse-epilogues", "kernels", "judging"]
    assert len(names) == len(set(names))
    assert all(step.peak_bytes > 0 for step in found.steps)
    assert [s.disk_bytes for s in found.steps] == sorted(s.disk_bytes for s in found.steps)
    assert schemas.check(json.loads(json.dumps(found.to_json())), "estimate") is None


def test_training_is_estimated_by_its_minutes(tmp_path):
    model, options = tiny.save("unet2d", tmp_path), {"weights": 4, "samples": 2, "steps": 3}
    steps = {step.name: step for step in mpq_compiler.estimate(model, minutes=3, **options).steps}
    assert steps["distill"].cpu_seconds == pytest.approx(360)
    assert steps["distill"].peak_bytes > steps["numerics"].peak_bytes


def test_training_holds_less_of_weights_that_keep_their_codes():
    asked = Asked(Sizes.of(programs.after("unet2d", "layout")), 64, NONE)

    def held(**more: object) -> float:
        return Distill().demand(dataclasses.replace(asked, **more)).shared

    trained = held(earlier=[Sensitivity(formats=("int2", "int4"))])
    assert held() == held(uniform="int4") == trained
    assert held(earlier=[Sensitivity(formats=("ec2", "int8"))]) == held(uniform="ec2") < trained


def test_passes_run_in_the_jobs_that_fit(tmp_path, monkeypatch):
    """A limit that one job fits in lowers the jobs, says so, and changes no byte."""
    model, heard, made = tiny.save("dit", tmp_path / "model"), [], {}
    options = {"recipe": "w8a8", "samples": 2, "steps": 2, "jobs": 3, "cache": tmp_path / "cache"}
    monkeypatch.setattr(estimate, "WORKER", 10**9)
    limits = {"free": "99GB", "limited": f"{usage.own_memory() / 1e9 + 2.3:.1f}GB"}  # whatever tests have left here
    for name, limit in limits.items():
        report = compile_denoiser(
            model, tmp_path / name, planned=lambda *said: heard.append(said), memory_limit=limit, **options
        )
        assert any("in place of 3" in note for note in report.notes) == (name == "limited")
        made[name] = {path.name: path.read_bytes() for path in (tmp_path / name).iterdir()}
    assert made["free"] == made["limited"]
    assert [(plan.jobs, said is None) for plan, said in heard] == [(3, True), (plan_of(heard).jobs, False)]
    assert plan_of(heard).jobs < 3


def plan_of(heard: list) -> estimate.Estimate:
    """The last estimate that was heard."""
    return heard[-1][0]


@pytest.mark.parametrize(
    ("limit", "sentence"),
    [("much", "--memory-limit 'much' is no amount of memory: write 8GB or 800MB"), ("0GB", "is no amount of memory")],
)
def test_limits_that_are_none(limit, sentence, capsys, tmp_path):
    assert mpqc.main(["compile", "fashion-unet", "-o", str(tmp_path / "out"), "--memory-limit", limit]) == 1
    assert sentence in capsys.readouterr().err


def test_an_artifact_needs_a_place(capsys):
    assert mpqc.main(["compile", "fashion-unet"]) == 1
    assert "add -o OUT, or --estimate" in capsys.readouterr().err


def watched(model: Path, out: Path, limit: str) -> tuple[int, str, int]:
    """Exit code and output of a compilation in a process of its own, and the most memory that the system counted."""
    command = [sys.executable, "-m", "mpq_compiler", "compile", str(model), "-o", str(out), "--samples", "2"]
    command += ["--steps", "4", "--weights", "4", "--jobs", "2", "--memory-limit", limit, "--cache", str(out.parent)]
    most = 0
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while process.poll() is None:
            most = max(most, usage.memory(process.pid))
            time.sleep(0.02)
        assert process.stdout is not None
        return process.returncode, process.stdout.read(), most


def test_the_limit_is_kept(tmp_path):
    """Three limits, by the system's own accounting: what is refused names the least, and the least does."""
    model = tiny.save("unet2d", tmp_path)
    code, said, _ = watched(model, tmp_path / "refused", "100MB")
    found = re.search(r"give --memory-limit ([0-9.]+)GB or more", said)
    assert code == 1
    assert found is not None
    assert not (tmp_path / "refused").exists()
    least = float(found[1])
    for limit in (least, least + 0.2, least + 1):
        code, said, most = watched(model, tmp_path / str(limit), f"{limit}GB")
        assert code == 0, said
        assert most <= limit * 1e9
    code, said, _ = watched(model, tmp_path / "refused", f"{least - 0.1:.1f}GB")
    assert code == 1
    assert found[0] in said
