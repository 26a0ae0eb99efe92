"""The benchmark of parts of recipes: that each can be taken away, or added."""

from __future__ import annotations

import json
import shlex

import pytest

from benchmarks import ablation, quality_cells
from benchmarks.ablation import PARTS, Row
from benchmarks.quality_cells import Budget
from mpq_compiler.driver import options, resolve
from mpq_compiler.pipeline import manager


@pytest.mark.parametrize("recipe, part", [(recipe, part) for recipe, parts in PARTS.items() for part in ("", *parts)])
def test_a_recipe_without_a_part_is_a_pipeline_that_differs(recipe, part):
    row = Row("fashion-unet", "W4A4", recipe, part=part)
    made, whole = (
        [step.text() for step in resolve.resolve(options.Options(**each.options(Budget(800_000, 4.15))))]
        for each in (row, Row("fashion-unet", "W4A4", recipe))
    )
    assert (made == whole) == (not part)
    manager.check(resolve.resolve(options.Options(**row.options(Budget(800_000, 4.15)))))


def test_a_part_is_compared_by_the_seeds_that_the_whole_recipe_has_too(tmp_path, monkeypatch):
    monkeypatch.setattr(ablation, "RESULTS", tmp_path)
    monkeypatch.setattr(quality_cells, "RESULTS", tmp_path)
    known = {"": (10.0, 40.0), "GPTQ": (20.0, 80.0, 1.0), "training": (10.0,)}
    for part, seed, error in ((part, *each) for part, errors in known.items() for each in enumerate(errors)):
        row = {"sqnr_db": 30.0 - error, "image_sqnr_db": 20.0 + seed, "psnr_db": 25.0 + seed, "errors": [error] * 50}
        quality_cells.write(Row("fashion-unet", "W4A4", "default", seed=seed, part=part).file, row)
    parts = ("", "GPTQ", "training", "rotation")
    rows = [Row("fashion-unet", "W4A4", "default", seed=seed, part=part) for part in parts for seed in range(3)]
    whole, gptq, training = ablation.compared(rows)
    assert whole[2:] == ["the whole recipe", "2", "5.0", "20.5", "", "25.5", ""]
    half, none = "-3.01 (-3.01 .. -3.01)", "+0.00 (+0.00 .. +0.00)"
    assert gptq[2:] == ["without GPTQ", "2", "-20.0", "20.5", half, "25.5", half]
    assert training[2:] == ["without training", "1", "20.0", "20.0", none, "25.0", none]


def test_a_result_says_what_computes_it():
    """With the rows that it is compared with, of fewer seeds."""
    rows = [json.loads(path.read_text()) for path in ablation.RESULTS.glob("*.json")]
    assert rows
    later = Row("fashion-unet", "W4A4", "default", minutes=0, seed=2, images=50, part="several paths")
    for command, row in [*((row["command"], Row(**row["cell"])) for row in rows), (later.command, later)]:
        program, words = command.split(" --all ")
        asked = ablation.rows_of(ablation.arguments().parse_args(shlex.split(words)))
        assert program == "python -m benchmarks.ablation" and asked[-1] == row
        assert {each.part for each in asked} == {"", row.part}
