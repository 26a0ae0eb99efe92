"""`benchmarks/cuda.py` on the emulator's driver: all of it but what torch does on a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("tvm")
from benchmarks import cuda_cases
from mpq_compiler.api import compile
from tests.harness import families
from tests.harness.cuda import emulator, nvcc
from tests.harness.shapes import make_case, quantize, reference
from tests.harness.tree import ROOT

DENOISER = """
import json, sys
from pathlib import Path
from benchmarks import cuda, cuda_cases
if __name__ == "__main__":
    source, path = sys.argv[1:]
    broken = cuda.Task("broken", cuda_cases.CASES[0], 1, {"library": Path(path, "none.so")})
    whole = cuda.Task("whole", "pixart", 2, dict.fromkeys(cuda.cuda_models.OURS, Path(path)), source)
    print(json.dumps(list(cuda.measured([broken, whole], 2))))
"""


def run(*command: str, **variables: str) -> subprocess.CompletedProcess[str]:
    environment = emulator.environment(PYTHONPATH=str(ROOT), MPQ_EMULATED_SM="90", **variables)
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600
    )


def test_kernels_take_turns(tmp_path):
    emulator.needs()
    home, found = nvcc.install(tmp_path / "cuda"), tmp_path / "found.json"
    options = ("--size", "0.05", "--only", "sd15 51x", "--batch", "2", "--rounds", "2", "--model", "--jobs", "1")
    done = run("-m", "benchmarks.cuda", *options, "--json", str(found), CUDA_HOME=str(home))
    assert done.returncode == 0, done.stderr[-3000:]
    written = json.loads(found.read_text())
    assert written["gpu"]["level"] == 90 and "TileLang int8" in written["missing"]
    (linear,) = written["tasks"]
    assert not linear["failed"] and not linear["wrong"]
    assert [row["name"] for row in linear["rows"]] == [*cuda_cases.products(90), cuda_cases.WEIGHT_ONLY, "control"]
    assert all(row["ungraphed"] is None and row["us"] > 0 for row in linear["rows"])
    (goal,) = written["goals"]
    assert goal["goal"] == "W4A8 as fast as W8A8" and goal["met"] == (goal["value"] >= 1)
    assert f"{goal['goal']}: {goal['value']:.2f} x, goal 1.0 x" in done.stdout


def test_denoisers_take_turns_and_a_crash_ends_one_case(tmp_path):
    """The artifact is one for the interpreter: those for GPUs run in `backends/cuda/test_artifact.py`."""
    emulator.needs()
    model = families.denoiser("pixart")
    source = tmp_path / "pixart"
    model.module.model.save_pretrained(source / "transformer")
    (source / "harness.json").write_text(json.dumps({"codec": "identity", "tokens": 7}))
    calibration = families.calibration(model, tmp_path / "calibration.safetensors", 16)
    path = tmp_path / "pixart.mpq"
    compile.compile(model, path, target="reference", recipe="w8a8", calibration=calibration)
    script = tmp_path / "script.py"
    script.write_text(DENOISER)
    done = run(str(script), str(source), str(path))
    assert done.returncode == 0, done.stderr[-3000:]
    broken, whole = json.loads(done.stdout.splitlines()[-1])
    assert broken["crashed"] == 1 and not broken["rows"]
    assert not whole["failed"] and [row["name"] for row in whole["rows"]] == ["W8A8", "W4A8", "control"]
    for row in whole["rows"]:
        assert row["sqnr_db"] > 15 and row["us"] > 0 and row["gpu_bytes"] == 0 < row["bytes"]


@pytest.mark.parametrize("case", [cuda_cases.Layer("x", 40, 1, 32, 16), cuda_cases.Layer("x", 30, 8, 16, 32, 3)])
def test_a_wrong_result_is_told(case):
    product = make_case(case.problem(4), 2, 0)
    expected, d = reference(product), product.data
    if not case.linear:
        expected = quantize(expected, d["qscale"], d["qzero"], d["group"], 8)
    assert cuda_cases._wrong_product(product, expected) is None
    for at in (0, -1):  # in the first line, in the last
        wrong = expected.copy()
        wrong.reshape(-1)[at] = np.bitwise_xor(wrong.view(f"u{wrong.itemsize}").reshape(-1)[at], 1).view(wrong.dtype)
        assert "1 of" in str(cuda_cases._wrong_product(product, wrong))


def test_without_a_gpu(tmp_path):
    results = tmp_path / "cuda.json"
    results.write_text("of another run")
    command = [sys.executable, "-m", "benchmarks.cuda", "--json", str(results)]
    environment = emulator.environment(MPQ_EMULATED_DEVICES="0", PYTHONPATH=str(ROOT))
    done = subprocess.run(command, cwd=ROOT, env={**os.environ, **environment}, capture_output=True, text=True)
    assert done.returncode == 1 and done.stderr.count("\n") == 1
    assert "the NVIDIA driver finds no GPU on this machine" in done.stderr
    assert results.read_text() == "of another run"
