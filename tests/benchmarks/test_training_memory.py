"""The benchmark of training's memory: its ways of training, and what each takes beyond none."""

from __future__ import annotations

import pytest

from benchmarks import training_memory
from benchmarks.training_memory import PARTED, WAYS
from mpq_compiler.driver import resolve
from mpq_compiler.pipeline import manager


@pytest.mark.parametrize("way", [*WAYS, *PARTED])
def test_a_way_is_a_pipeline_that_ends_with_training(way):
    asked = training_memory.options(None, (WAYS | PARTED)[way])
    steps = resolve.resolve(asked)
    manager.check(steps)
    assert steps[-1].name() == "distill" and bool(steps[-1].updates) == (way != "nothing")


def test_memory_is_more_than_that_of_a_process_that_trains_nothing():
    ways = {name: {"peak_bytes": peak * 10**6, "cpu_seconds": 2.5} for name, peak in (("nothing", 500), ("whole", 900))}
    assert training_memory.lines({"a": {"ways": ways, "cpu": "a CPU"}}) == [
        ["a", "nothing", "500", "0", "2"],
        ["a", "whole", "900", "400", "2"],
    ]
