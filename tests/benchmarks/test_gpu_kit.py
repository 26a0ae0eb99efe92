"""`benchmarks.gpu_kit` built with the emulator's compiler, its steps on the emulated driver, beside no other package.

The machine's Python sees NumPy and what the kit carries: no TVM, no torch, none of this checkout.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("tvm")
from benchmarks.gpu_kit import cases, models, report
from benchmarks.gpu_kit.there import bits, data, tables
from mpq_compiler.api import compile
from mpq_compiler.runtime import compiled_denoiser
from tests.harness import families
from tests.harness.cuda import emulator, nvcc
from tests.harness.shapes import make_case, quantize, reference
from tests.harness.tree import ROOT

HERE = "{}.{}".format(*sys.version_info[:2])
SMALL = ("--size", "0.05", "--only", "sd15 4096", "--batch", "2", "--levels", "90", "--jobs", "1", "--pythons", HERE)


@pytest.fixture(scope="module")
def kit(tmp_path_factory):
    emulator.needs()
    folder = tmp_path_factory.mktemp("kit")
    home = nvcc.install(folder / "cuda")
    command = [sys.executable, "-m", "benchmarks.gpu_kit", "--build", str(folder / "kit"), *SMALL]
    done = subprocess.run(
        [*command, "--tests", "test_fast_attention.py", "--models"],
        cwd=ROOT, env={**os.environ, "CUDA_HOME": str(home)}, capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "MB packed, 3 libraries of step 1" in done.stdout
    return folder / "kit"


def run(kit: Path, out: Path, *options: str) -> subprocess.CompletedProcess[str]:
    """A step on a machine that has Python and NumPy."""
    site = kit.parent / "site"
    site.mkdir(exist_ok=True)
    for package in ("numpy", "numpy.libs", "typing_extensions.py"):
        source = Path(np.__file__).parents[1] / package
        if source.exists() and not (site / package).exists():
            (site / package).symlink_to(source)
    environment = emulator.environment(MPQ_EMULATED_SM="90", PYTHONPATH=str(site), PYTHONNOUSERSITE="1")
    command = [sys.executable, "-S", str(kit / "run.py"), "--out", str(out), *options]
    return subprocess.run(command, cwd=out.parent, env=environment, capture_output=True, text=True, timeout=600)


def test_every_call_has_its_bits(kit, tmp_path):
    done = run(kit, tmp_path / "out", "--step", "1")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    found = json.loads((tmp_path / "out" / "bits.json").read_text())
    calls = [call for own in found["libraries"].values() for call in own]
    assert found["level"] == 90 and len(calls) > 30 and all(bits.right(call) and call["off"] == 0 for call in calls)
    again = run(kit, tmp_path / "out", "--step", "1")
    assert again.returncode == 0 and "calls" not in again.stdout  # what is there is not redone


def test_a_wrong_result_and_a_crash_are_told(kit, tmp_path):
    other = tmp_path / "kit"
    subprocess.run(["cp", "-r", str(kit), str(other)], check=True)
    first, second, _ = sorted((other / "bits").glob("*.json"))
    told = json.loads(first.read_text())
    results = next(call["results"] for call in told["calls"] if call["results"])
    output, name = next(iter(results.items()))
    wrong_one = np.load(first.parent / name)
    wrong_one.reshape(-1).view(np.uint8)[3] ^= 64
    np.save(first.parent / "spoiled.npy", wrong_one)
    results[output] = "spoiled.npy"
    first.write_text(json.dumps(told))
    second.with_suffix(".so").write_bytes(b"no library")
    done = run(other, tmp_path / "out", "--step", "1")
    assert done.returncode == 1 and "crashed" in done.stdout
    found = json.loads((tmp_path / "out" / "bits.json").read_text())["libraries"]
    wrong = [call for own in found.values() for call in own if not bits.right(call)]
    assert sum(not call.get("crashed") for call in wrong) == 1
    assert f"{len(wrong)} wrong" in done.stdout


def test_kernels_take_turns(kit, tmp_path):
    done = run(kit, tmp_path / "out", "--step", "3")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert "torch is not installed here: nothing is compared with it" in done.stdout
    found = json.loads((tmp_path / "out" / "tables.json").read_text())
    assert len(found["cases"]) == 5
    others = {"attention": cases.ATTENTION, "groupnorm": cases.NORM, "layernorm": cases.NORM}
    for name, row in found["cases"].items():
        assert not row["wrong"] and not row["failed"] and not row["ungraphed"]
        other = others.get(name.split()[0])
        gated = name.startswith("geglu")
        ours = [other] if other else [n for n, (bits, _) in cases.products(90).items() if bits or not gated]
        assert [one["name"] for one in row["rows"]] == [*ours, tables.CONTROL]
        assert all(one["us"] > 0 for one in row["rows"])


def test_a_whole_denoiser(kit, tmp_path, monkeypatch):
    """Its large weights drawn there; with the artifact as it is, what another target computes is met."""
    model = families.denoiser("pixart")
    calibration = families.calibration(model, tmp_path / "calibration.safetensors", 16)
    monkeypatch.setenv("CUDA_HOME", str(kit.parent / "cuda"))
    folder = kit / "models"
    for target, path in (("cuda-sm90", folder / "pixart-own"), ("reference", tmp_path / "reference")):
        compile.compile(model, path, target=target, recipe="w8a8", calibration=calibration)
    inputs = {name: value.numpy() for name, value in model.random_inputs(1, 0).items()}
    expected = {"expected.reference": compiled_denoiser.load(tmp_path / "reference").run(inputs)}
    np.savez(folder / "pixart.npz", **{f"input.{name}": array for name, array in inputs.items()}, **expected)
    described = models.described(folder / "pixart-drawn", folder / "pixart-own", 1 << 10)
    assert described == 90 and not (folder / "pixart-drawn" / "weights.safetensors").exists()
    artifacts = {"own": "pixart-own", "drawn": "pixart-drawn"}
    (folder / "models.json").write_text(json.dumps([models._row("pixart", 90, 1, "pixart.npz", artifacts, None)]))
    done = run(kit, tmp_path / "out", "--step", "5")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    row = json.loads((tmp_path / "out" / "whole.json").read_text())["pixart, batch 1"]
    assert not row["failed"] and [one["name"] for one in row["rows"]] == ["own, host to host", "drawn, host to host"]
    assert row["sqnr_db"]["own to reference"] > 40 > row["sqnr_db"]["drawn to reference"]


@pytest.mark.parametrize(("step", "program"), [("2", "compute-sanitizer"), ("4", "ncu")])
def test_what_is_missing_is_told(kit, tmp_path, step, program):
    done = run(kit, tmp_path / "out", "--step", step)
    assert done.returncode == 0 and f"{program} is not installed here" in done.stdout


def test_refusals(kit, tmp_path):
    done = run(kit, tmp_path / "out")
    assert done.returncode == 2 and "name a step: --step 1 to 5" in done.stderr
    command = [sys.executable, "-m", "benchmarks.gpu_kit", "--build", str(kit)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert f"{kit} exists; remove it, or choose another folder" in done.stderr
    command[-1] = str(tmp_path / "new")
    done = subprocess.run([*command, "--models", "sdxl"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "--models sdxl: name some of fashion-unet" in done.stderr
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("case", [cases.Layer("x", 40, 1, 32, 16), cases.Layer("x", 30, 8, 16, 32, 3)])
def test_the_edges_are_those_of_the_whole(case):
    """And a wrong value there is told."""
    product = make_case(case.problem(4), 2, 0)
    expected, d = reference(product), product.data
    if not case.linear:
        expected = quantize(expected, d["qscale"], d["qzero"], d["group"], 8)
    lines = cases.edges(product)
    whole = expected.reshape(2, case.height, -1)
    np.testing.assert_array_equal(lines, data.edges(whole, lines.shape[1] // 2))


def test_the_report_shows_what_was_measured():
    """Of the results that are kept: all tables, and no cell of a wrong result as if it were right."""
    folder = ROOT / "benchmarks" / "results" / "gpu-h200"
    text = report.text(folder)
    found = json.loads((folder / "bits.json").read_text())
    assert f"of {sum(map(len, found['libraries'].values()))} calls" in text and "0 are wrong" in text
    next(iter(found["libraries"].values()))[0]["same"] = False
    assert "1 are wrong" in report._bits(found)
    assert f"<!-- gpu: begin -->\n{text}\n<!-- gpu: end -->" in (ROOT / "docs" / "targets.md").read_text()


def test_drawn_alike():
    what = {"shape": [3, 5], "dtype": "uint8", "seed": 4, "low": 0, "high": 256}
    np.testing.assert_array_equal(data.drawn(what), data.drawn(what))
    floats = data.drawn({"shape": [400], "dtype": "float32", "seed": 4, "deviation": 2.0})
    assert floats.dtype == np.float32 and 1.8 < floats.std() < 2.2
