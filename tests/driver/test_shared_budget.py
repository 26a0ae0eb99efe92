"""One budget over parts: the integer program against all choices, and a pipeline whose parts share one."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler import schemas
from mpq_compiler.artifact import bundle
from mpq_compiler.artifact import pipeline as pipelines
from mpq_compiler.cli import mpqc
from mpq_compiler.driver import pipeline, shared_budget
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.pipeline import compile_pipeline
from mpq_compiler.ir.findings import SensitivityTable
from mpq_compiler.runtime.pipeline import load_pipeline
from mpq_compiler.support.errors import BudgetError
from tests.harness import packed, tiny_pipelines

FEW = """\
schema = 1
extends = "default"
[options.sensitivity]
formats = ["int2", "int3", "int4", "int8"]
inputs = 8
"""


@pytest.fixture
def few(tmp_path: Path) -> dict[str, object]:
    """Options that compile fast."""
    (tmp_path / "few.toml").write_text(FEW)
    return {
        "recipe": tmp_path / "few.toml",
        "samples": 2,
        "steps": 4,
        "effort": "none",
        "cache": packed.kernel_cache(),
    }


def table(losses: dict[str, dict[str, float]], fixed: int) -> SensitivityTable:
    sizes = {"int2": 20, "int4": 40, "int8": 80}
    return {
        "version": 1,
        "parameters": 80 * len(losses),
        "fixed_bytes": fixed,
        "layers": [
            {"name": name, "edges": [], "macs": 1, "formats": {f: {"bits": 1, "bytes": sizes[f]} for f in by_format}}
            for name, by_format in losses.items()
        ],
        "elements": {},
        "weights": losses,
        "activations": {},
    }


LOSSES = st.floats(1e-6, 1.0).map(lambda most: {"int2": most, "int4": most / 10, "int8": most / 1000})


@settings(deadline=None, max_examples=30)
@given(st.lists(LOSSES, min_size=2, max_size=2), st.lists(LOSSES, min_size=2, max_size=2), st.floats(0.01, 100.0),
       st.integers(80, 320))  # fmt: skip
def test_no_choice_of_formats_has_less_loss(first: list, second: list, gain: float, room: int) -> None:
    tables = {"a": table(dict(zip("xy", first, strict=True)), 7), "b": table(dict(zip("xy", second, strict=True)), 11)}
    gains, limit = {"a": 1.0, "b": gain}, room + 18
    found = shared_budget._plan(tables, gains, limit)
    assert sum(size for size, _ in found.values()) <= limit
    best = min(
        sum(gains[part] * tables[part]["weights"][layer][f] for (part, layer), f in zip(layers, chosen, strict=True))
        for layers in [list(itertools.product("ab", "xy"))]
        for chosen in itertools.product(("int2", "int4", "int8"), repeat=4)
        if 18 + sum({"int2": 20, "int4": 40, "int8": 80}[f] for f in chosen) <= limit
    )
    assert sum(loss for _, loss in found.values()) == pytest.approx(best, rel=1e-5)


def test_parts_share_a_budget(
    tmp_path: Path, few: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    report = compile_pipeline(source, tmp_path / "a.mpq", weights="700kB", **few)
    document = json.loads(json.dumps(report.to_json()))
    assert schemas.check(document, "compile-pipeline") is None
    assert [*report.shares] == ["text_encoder", "unet", "vae"]
    stored = {name: part.weights["bytes"] for name, part in report.parts.items()}
    assert sum(stored.values()) <= 700_000 and all(stored[n] <= s["bytes"] for n, s in report.shares.items())
    assert sum(stored.values()) > 690_000  # nothing that helps is left over
    assert all(share["gain"] > 0 for share in report.shares.values())
    together = sum(share["loss"] for share in report.shares.values())
    assert together < sum(share["equal_loss"] for share in report.shares.values())
    assert bundle.read(tmp_path / "a.mpq" / "vae").manifest["weights"]["payload_bytes"] == stored["vae"]
    assert pipelines.read(tmp_path / "a.mpq").document["shares"] == report.shares
    worths = [share["worth"] for share in report.shares.values()]
    assert max(worths) < 50 * min(worth for worth in worths if worth)  # none is starved for another
    assert mpqc.main(["inspect", str(tmp_path / "a.mpq"), "--why", "unet", "--json", str(tmp_path / "why.json")]) == 0
    why = json.loads((tmp_path / "why.json").read_text())
    assert schemas.check(why, "inspect") is None and why["worth"] == report.shares["unet"]["worth"]
    said = capsys.readouterr().out
    assert "what a byte is worth in 'unet'" in said and all(name in said for name in report.shares)
    pixels = load_pipeline(tmp_path / "a.mpq")("a red fox", steps=2).pixels
    assert np.isfinite(pixels).all()


def test_a_budget_that_no_part_could_share_names_what_each_takes(
    tmp_path: Path, few: dict[str, object]
) -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    with pytest.raises(BudgetError, match=r"cannot be met.*'text_encoder' takes \d+, 'unet' takes \d+, 'vae' takes"):
        compile_pipeline(source, tmp_path / "a.mpq", weights="100kB", **few)
    assert [entry.name for entry in tmp_path.iterdir()] == ["few.toml"]


def test_each_part_may_have_a_budget_of_its_own(tmp_path: Path, few: dict[str, object]) -> None:
    source = tiny_pipelines.pipeline("stable-diffusion")
    report = compile_pipeline(source, tmp_path / "a.mpq", weights="text=12, denoiser=5,decoder=150kB", **few)
    assert not report.shares
    bits = {name: part.weights["average_bits"] for name, part in report.parts.items()}
    assert bits["text_encoder"] <= 12 and bits["unet"] <= 5
    assert 140_000 < report.parts["vae"].weights["bytes"] <= 150_000


def test_bytes_of_a_role_are_shared_by_parameters() -> None:
    def part(parameters: int) -> Any:
        return SimpleNamespace(model=SimpleNamespace(parameters=parameters))

    both = [part(1000), part(3000)]
    assert [pipeline._of_role("4kB", each, both) for each in both] == ["1000B", "3000B"]
    assert [pipeline._of_role("4", each, both) for each in both] == ["4.0", "4.0"]


@pytest.mark.parametrize(
    ("recipe", "given", "budget"),
    [("default", None, 4.0), ("default", "3MB", "3MB"), ("w8a8", None, None), ("mixdq", 5, 5)],
)
def test_a_recipe_that_chooses_formats_has_a_budget_to_share(recipe: str, given: Any, budget: Any) -> None:
    assert pipeline._shared(Options(recipe=recipe, weights=given)) == budget
