"""The figures that the product promises, on the bundled denoiser and this machine."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpq_compiler import schemas
from mpq_compiler.api import compile
from mpq_compiler.artifact import bundle
from mpq_compiler.cli import mpqc
from mpq_compiler.driver.report import Report
from mpq_compiler.evaluation import evaluate, painter
from mpq_compiler.frontend import denoiser
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

IMAGES, STEPS = 200, 10


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("figures")


def compiled(folder: Path, name: str, **options: Any) -> tuple[Path, Report]:
    output = folder / f"{name}.mpq"
    return output, compile.compile("fashion-unet", output, jobs=2, **options)


def judged(output: Path) -> dict[str, float]:
    """Metrics of the artifact, executed in the process that compiled it, against the float model on the same noise."""
    loaded = denoiser.load("fashion-unet")
    painters = painter.from_artifact(output), painter.from_denoiser(loaded)
    result = evaluate.evaluate(*painters, IMAGES, STEPS, seed=1, classifier=loaded.features)
    return {k: v["value"] if isinstance(v, dict) and "value" in v else v for k, v in result.items()}


def test_w8a8(folder: Path) -> None:
    output, report = compiled(folder, "w8a8", recipe="w8a8")
    assert report.quality["executed_by"] == "artifact"
    assert report.quality["inputs"] >= 64
    assert report.quality["sqnr_db"] >= 30
    figures = judged(output)
    assert figures["psnr_db"] >= 40
    assert figures["ssim"] >= 0.985


@pytest.mark.parametrize(("bits", "psnr"), [(4, 27.5), (3, 23.0)])
def test_budgets_in_true_bits(folder: Path, bits: int, psnr: float) -> None:
    """Payload within the budget and equal to the plan's bytes, the image as good as promised."""
    output, report = compiled(folder, f"w{bits}", weights=bits, activations=8)
    read = bundle.read(output)
    payload = sum(t.nbytes for t in tensorfile.load(output / bundle.WEIGHTS).values())
    assert payload == report.weights["bytes"] == read.manifest["plan"]["stored_bytes"]
    assert payload == read.manifest["weights"]["payload_bytes"]
    assert payload <= bits * read.manifest["model"]["parameters"] / 8
    assert report.weights["average_bits"] <= bits
    assert abs(report.quality["sqnr_db"] - read.manifest["quality"]["reference_sqnr_db"]) <= 0.1
    assert judged(output)["psnr_db"] >= psnr


@pytest.mark.parametrize(("recipe", "weights", "least"), [("packed", 2, r"2\.\d+"), ("default", 1, r"1\.\d+")])
def test_fewer_bits_than_any_format_has_are_refused(folder: Path, recipe: str, weights: float, least: str) -> None:
    """The error names the least, with packed formats and with entropy-coded ones; nothing is written."""
    message = rf"the least that the formats allow is \d+ bytes \({least} bits\)"
    with pytest.raises(UserError, match=message):
        compiled(folder, f"least-{recipe}", recipe=recipe, weights=weights)
    assert not (folder / f"least-{recipe}.mpq").exists()


def test_lower_activations(folder: Path) -> None:
    """A budget for activations mixes 2 to 8 bits, and the artifact still draws."""
    recipe = folder / "few.toml"  # of the weights' formats: seven widths of activations take long enough
    recipe.write_text('schema = 1\nextends = "default"\n[options.sensitivity]\nformats = ["int3", "int4", "int8"]\n')
    output, report = compiled(folder, "a6", recipe=str(recipe), weights=4, activations=6)
    assert report.activations["average_bits"] <= 6
    assert {row["activation"] for row in report.layers} <= {f"u{bits}/t4" for bits in range(2, 9)}
    assert len({row["activation"] for row in report.layers}) > 1
    assert report.quality["executed_by"] == "artifact"
    assert judged(output)["psnr_db"] >= 30


def test_the_demo(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The README's first command: a picture, a table and its JSON."""
    output = folder / "demo"
    assert mpqc.main(["demo", "-o", str(output), "--json", str(folder / "demo.json")]) == 0
    from PIL import Image

    pixels = np.asarray(Image.open(output / "samples.png").convert("L"))
    assert pixels.shape[1] > 500
    assert pixels.std() > 30
    result = json.loads((folder / "demo.json").read_text())
    assert schemas.check(result, "demo") is None
    assert result["psnr_db"] > 27.5
    assert "true average bits" in capsys.readouterr().out
