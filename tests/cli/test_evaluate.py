"""`mpqc eval` by functions of one's own: what it prints and writes, and the sentences on what is wrong with them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from mpq_compiler import schemas
from mpq_compiler.cli import mpqc
from tests.harness import once, own_module, tiny

JUDGES = """
import torch

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Conv2d(3, 6, 3, 4), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten())

def brightness(images, asked):
    assert asked == [None] * len(images)
    return images.mean((1, 2, 3))

def fails(images):
    raise OSError("no weights")
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.save("unet2d", tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def artifact(model: Path) -> Path:
    quick = ("--recipe", "w8a8", "--samples", "2", "--steps", "2", "--target", "reference")
    return once.made("unet2d-judged.mpq", lambda path: mpqc.main(["compile", str(model), "-o", str(path), *quick]))


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, where the module is."""
    own_module.write(tmp_path, "own_judges", JUDGES, monkeypatch)
    return tmp_path


def test_what_is_shown_and_written(model: Path, artifact: Path, here: Path) -> None:
    """In a process of its own, which finds the module in the current folder, in 80 columns."""
    own = ("--features", "own_judges:net", "--score", "own_judges:brightness", "--json", "result.json")
    command = [sys.executable, "-P", "-m", "mpq_compiler", "eval", artifact, "--against", model, "--images", "8"]
    done = subprocess.run([*command, "--eval-steps", "1", *own], capture_output=True, text=True, env=env(80))
    assert done.returncode == 0, done.stderr
    result = json.loads(Path("result.json").read_text())
    assert schemas.check(result, "eval") is None
    by = result["features"]["own_judges:net"]
    assert by["dimensions"] == 24 and by["precision"]["value"] > 0.5
    assert "the FID of 8 images by the 24 features" in done.stderr
    assert abs(result["scores"]["own_judges:brightness"]["difference"]["value"]) < 0.05
    cost = result["cost"]
    assert 4 * cost["bytes"] < 1.5 * cost["float_bytes"] and 8 * cost["bops"] < cost["float_bops"]
    assert max(len(line) for line in done.stdout.splitlines() if "unet2d-judged.mpq" not in line) <= 80
    for word in ("FID", "KID", "precision", "recall", "brightness", "BOPs", "what it stores"):
        assert word in done.stdout


def env(columns: int) -> dict[str, str]:
    return {**os.environ, "COLUMNS": str(columns), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ("own_judges", "--features 'own_judges' names no function: write MODULE:FUNCTION"),
        ("own_judges:nte", "--features 'own_judges:nte' cannot be imported: AttributeError"),
        ("own_judges:fails", "--features 'own_judges:fails' fails on images [2, 3, "),
    ],
)
def test_what_is_wrong_is_said_before_a_model_is_compiled(
    model: Path, here: Path, capsys: pytest.CaptureFixture[str], given: str, sentence: str
) -> None:
    assert mpqc.main(["eval", str(model), "--recipe", "w8a8", "--features", given]) == 1
    said = capsys.readouterr()
    assert said.out == "" and sentence in said.err.splitlines()[-1]
    assert "pass 1 of" not in said.err
