"""The benchmark of parts of recipes: that each can be taken away, or added."""

from __future__ import annotations

import pytest

from benchmarks.ablation import PARTS, Row
from mpq_compiler.driver import options, resolve
from mpq_compiler.pipeline import manager


@pytest.mark.parametrize("recipe, part", [(recipe, part) for recipe, parts in PARTS.items() for part in ("", *parts)])
def test_a_recipe_without_a_part_is_a_pipeline_that_differs(recipe, part):
    row = Row("fashion-unet", "W4A4", recipe, part=part)
    made, whole = (
        [step.text() for step in resolve.resolve(options.Options(**each.options(800_000)))]
        for each in (row, Row("fashion-unet", "W4A4", recipe))
    )
    assert (made == whole) == (not part)
    manager.check(resolve.resolve(options.Options(**row.options(800_000))))
