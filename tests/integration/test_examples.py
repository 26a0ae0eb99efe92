"""Every example runs: the script as it stands, the packages installed by pip, the C program built by cmake."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mpq_compiler
from mpq_compiler import formats
from mpq_compiler.cli import mpqc
from mpq_compiler.formats.fixed_table import TableFormat
from mpq_compiler.pipeline import backend, registry
from mpq_compiler.targets import table as targets
from tests.harness import tiny
from tests.harness.tree import ROOT

EXAMPLES = ROOT / "examples"
PACKAGES = {"own_pass": "acme_crest_factors", "own_format": "acme_log4", "own_backend": "acme_profiler"}
PIPELINE = (
    "trace,layout,crest-factors{top=2},calibrate{samples=4,steps=4},time-groups,bit-allocation{uniform=log4},"
    "insert-fake-quant,round-weights,fold-fake-quant,fuse-epilogues"
)


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """All three packages on the path, as pip installs them without network."""
    copies = [shutil.copytree(EXAMPLES / name, tmp_path / name) for name in PACKAGES]
    command = [sys.executable, "-m", "pip", "install", "--no-build-isolation", "--no-deps", "--no-index", "--quiet"]
    site = tmp_path / "site"
    done = subprocess.run(
        [*command, "--disable-pip-version-check", "--target", site, *copies], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    monkeypatch.syspath_prepend(site)
    yield
    for name in [n for n in sys.modules if n.partition(".")[0] in PACKAGES.values()]:
        del sys.modules[name]


def test_every_example_is_listed():
    listed = re.findall(r"^\| \[[^]]*\]\(([^)]*)\)", (EXAMPLES / "README.md").read_text(), re.MULTILINE)
    assert {*listed} == {path.name for path in EXAMPLES.iterdir()} - {"README.md"}
    assert {*PACKAGES} == {path.parent.name for path in EXAMPLES.glob("*/pyproject.toml")}


def test_a_pipeline_is_compiled_and_drawn_with(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "pipeline.py", tmp_path / "out.mpq", "--target", "reference"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"PSNR against the float pipeline: ([\d.]+) dB", done.stdout)[1]) > 25
    assert mpq_compiler.verify(tmp_path / "out.mpq").manifest["name"] == "DDIMPipeline"


def test_a_model_nobody_has_seen_is_compiled_by_its_calls(tmp_path: Path) -> None:
    command = [sys.executable, EXAMPLES / "unseen_model.py", tmp_path / "out.mpq", "--target", "reference"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    assert float(re.search(r"not seen: ([\d.]+) dB", done.stdout)[1]) > 30


def test_a_pass_a_format_and_a_backend_of_packages_make_one_artifact(installed, tmp_path: Path, capsys) -> None:
    assert registry.find("crest-factors").name() == "crest-factors"
    assert isinstance(formats.get("log4"), TableFormat)
    assert backend.backend_of(targets.resolve("profiler")).name == "acme-profiler"
    assert mpqc.main(["targets", "--json", "-"]) == 0
    assert json.loads(capsys.readouterr().out)[-1]["name"] == "profiler"

    folder, output = tiny.save("unet2d", tmp_path / "model"), tmp_path / "out.mpq"
    report = mpq_compiler.compile(folder, output, target="profiler", pipeline=PIPELINE)
    assert [note for note in report.notes if "times the usual one" in note]
    assert {row["weight"] for row in report.layers} >= {"log4"}
    assert report.quality["executed_by"] == "artifact" and abs(report.quality["agreement_db"]) < 0.1
    layer = report.layers[0]["name"]
    assert "crest_factor" in json.dumps(why(output, layer, capsys))

    unet = mpq_compiler.load(output)
    inputs = {name: value.numpy() for name, value in tiny.inputs("unet2d", batch=2).items()}
    drawn = unet.run(inputs)
    assert drawn.shape == inputs["sample"].shape and torch.isfinite(torch.from_numpy(drawn)).all()
    assert {name for name, _ in unet.executor.slowest(2)} & {"quant_conv2d", "attention", "quant_linear"}


def why(path: Path, layer: str, capsys: pytest.CaptureFixture[str]) -> object:
    assert mpqc.main(["inspect", str(path), "--why", layer, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)


@pytest.mark.skipif(not shutil.which("cmake"), reason="cmake is not installed")
def test_a_c_program_draws(tmp_path: Path) -> None:
    artifact = tmp_path / "unet.mpq"
    folder = tiny.save("unet2d", tmp_path / "model")
    mpq_compiler.compile(folder, artifact, recipe="w8a8", emit="c", samples=4, steps=4)
    build = tmp_path / "build"
    for command in (
        ["cmake", "-S", EXAMPLES / "c_program", "-B", build, f"-DARTIFACT={artifact}"],
        ["cmake", "--build", build, "--target", "draw"],
    ):
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    drawn = subprocess.run([build / "draw", artifact / "weights.safetensors"], capture_output=True, text=True)
    assert drawn.returncode == 0, drawn.stderr
    assert float(re.search(r"root mean square ([\d.]+)", drawn.stdout)[1]) > 0
    refused = subprocess.run([build / "draw", folder / "config.json"], capture_output=True, text=True)
    assert refused.returncode == 1 and len(refused.stderr.splitlines()) == 1
