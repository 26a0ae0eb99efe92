"""Options that several commands share reach what they are for."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from mpq_compiler.allocation.problem import Problem
from mpq_compiler.cli import allocate, options

FORMATS = {
    "int4": {"bits": 4, "bytes": 50, "microseconds": 1.0},
    "int8": {"bits": 8, "bytes": 100, "microseconds": 2.0},
}
TABLE = {
    "version": 1,
    "parameters": 100,
    "fixed_bytes": 0,
    "fixed_microseconds": 1.0,
    "layers": [{"name": "a", "group": "quality", "weights": 100, "edges": ["x"], "macs": 9, "formats": FORMATS}],
    "weights": {"a": {"int4": 0.1, "int8": 0.001}},
    "activations": {"x": {"4": 0.1, "8": 0.01}},
    "elements": {"x": 10},
}
BUDGETS = {"weights": "4", "activations": "6", "bops": "1e12", "latency": "5ms", "objective": "paper-db"}
"""A value of each option of `options.add_budgets`."""


def command_line() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("problem")
    options.add_budgets(parser)
    return parser


def posed(path: Path, *arguments: str) -> Problem:
    return allocate.problem_of(command_line().parse_args([str(path), *arguments]))


def test_every_budget_has_a_value_here() -> None:
    given = vars(command_line().parse_args(["x.json"])).keys()
    assert given - {"problem"} == BUDGETS.keys()


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_changes_the_problem(tmp_path: Path, name: str) -> None:
    path = tmp_path / "table.json"
    path.write_text(json.dumps(TABLE))
    assert posed(path, f"--{name}", BUDGETS[name]) != posed(path)


@pytest.mark.parametrize("name", BUDGETS)
def test_every_budget_is_an_option_of_a_compilation(name: str) -> None:
    parser = command_line()
    options.add_machine(parser)
    given = options.of_compilation(parser.parse_args(["x.json", f"--{name}", BUDGETS[name]]))
    assert given[name] is not None
