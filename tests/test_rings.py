"""The first ring of tests has a part of every suite, and touches every pass, format, target, command and error."""

from __future__ import annotations

import inspect
import itertools
import re
import tomllib
from pathlib import Path

import pytest

from mpq_compiler import formats
from mpq_compiler.cli import mpqc
from mpq_compiler.pipeline import registry
from mpq_compiler.targets.table import TARGETS
from tests import moved
from tests.harness import rings
from tests.harness.rings import FIXTURES, Case, Durations, Rules
from tests.harness.tree import ROOT

SUITES = {path.relative_to(ROOT).as_posix() for path in ROOT.glob("tests/**/test_*.py")}


@pytest.fixture(scope="module")
def first(request) -> list[pytest.Item]:
    """The tests of the first ring, where all suites have been collected."""
    items = request.config.stash[rings.FIRST]
    if len({item.path for item in items}) < len(SUITES) / 2:
        pytest.skip("a part of the tests was asked for")
    return items


@pytest.fixture(scope="module")
def text(first) -> str:
    """The ids and the code of those tests, the constants beside it, and the names of files as passes are written."""
    files = (path.stem.removeprefix("test_").replace("_", "-") for path in {item.path for item in first})
    functions = {item.function: None for item in first}
    constants = {
        repr(value) for item in first for value in vars(item.module).values() if isinstance(value, str | tuple | list)
    }
    ids = (item.nodeid for item in first)
    return "\n".join([*files, *ids, *map(inspect.getsource, functions), *constants])


def test_every_sampled_suite_has_a_part(first):
    missing = Rules.read().share.keys() - {item.path.relative_to(ROOT).as_posix() for item in first}
    assert not missing, f"none of their cases fits: {sorted(missing)}"


@pytest.mark.parametrize("kind", ["passes", "formats", "targets", "commands"])
def test_every_name_is_touched(text, capsys, kind):
    if kind == "commands":
        with pytest.raises(SystemExit):
            mpqc.main(["--help"])
        names = re.findall(r"^    ([a-z]+)  ", capsys.readouterr().out, re.MULTILINE)
    else:
        names = {"passes": registry.all_names(), "formats": formats.names(), "targets": [*TARGETS]}[kind]
    assert len(names) > 5
    untouched = [name for name in names if not re.search(rf"(?<![\w+]){re.escape(name)}(?![\w+])", text)]
    assert not untouched


def cases(suite: str, function: str, *counts: int, refuses: bool = False) -> list[Case]:
    """A case for every combination of that many values of parameters."""
    return [
        Case(suite, function, tuple(zip("abc", values, strict=False)), f"{suite}::{function}{values}", refuses)
        for values in itertools.product(*map(range, counts))
    ]


RULES = Rules(
    whole=20,
    unmeasured=5,
    share={"large": 30, "unknown": 10},
    always=frozenset({"large::kept"}),
    never={"large::slow": "it is slow"},
)
SECONDS = Durations(
    {
        "small": {FIXTURES: 4, "f": 1},
        "large": {FIXTURES: 6, "f": 1, "g": 2, "slow": 9, "kept": 3, "error": 1},
        "unlisted": {"f": 21},
    }
)
SMALL = cases("small", "f", 4, 4)
LARGE = [
    *cases("large", "f", 4, 4),
    *cases("large", "g", 3),
    *cases("large", "slow", 2),
    *cases("large", "kept", 2),
    *cases("large", "error", 3, refuses=True),
]


def chosen(given: list[Case], seed: int = 0) -> list[Case]:
    return [given[i] for i in sorted(rings.first_ring(given, RULES, SECONDS, seed))]


def test_small_and_unmeasured_suites_are_whole():
    assert chosen(SMALL) == SMALL
    new = cases("new", "f", 30)
    assert chosen(new) == new


def test_sampled_suites_are_small_until_they_are_measured():
    assert len(chosen([*cases("unknown", "f", 30), *cases("unknown", "g", 30)])) == 2


def test_large_suites_that_are_not_listed_are_in_the_second_ring():
    assert chosen(cases("unlisted", "f")) == []


@pytest.mark.parametrize("seed", range(5))
def test_a_sample_has_every_function_and_every_error_within_its_share(seed):
    found = chosen(LARGE, seed)
    assert [case.function for case in found if case.function in ("kept", "error")] == ["kept"] * 2 + ["error"] * 3
    assert {case.function for case in found} == {"f", "g", "kept", "error"}
    assert 25 <= SECONDS.total(found) <= 30
    values = {pair for case in found if case.function == "f" for pair in case.parameters}
    assert len(values) == 8  # each value of both parameters
    assert chosen(LARGE, seed) == found


def test_seeds_choose_other_cases():
    assert len({tuple(case.id for case in chosen(LARGE, seed)) for seed in range(5)}) > 1


def test_a_shard_fits_and_commits_choose_others():
    rest = range(len(SMALL + LARGE))
    found = [rings.shard(SMALL + LARGE, rest, commit, 25, SECONDS) for commit in ("a", "a", "b", "c", "d")]
    assert found[0] == found[1]
    assert len({*map(frozenset, found)}) > 2
    for each in found:
        assert 15 < SECONDS.total((SMALL + LARGE)[i] for i in each) <= 25
    assert rings.shard(SMALL, range(len(SMALL)), "a", float("inf"), SECONDS) == {*range(len(SMALL))}


def test_rules_name_suites_and_functions_that_are_there():
    rules = Rules.read()
    for name in {*rules.share, *rules.always, *rules.never}:
        suite, _, function = name.partition("::")
        assert suite in SUITES
        assert f"def {function.rpartition('.')[2]}" in Path(ROOT, suite).read_text(encoding="utf-8")


def test_ids_are_followed_to_where_tests_are_now():
    table = {"files": {"tests/test_a.py": "tests/b/test_c.py"}, "ids": {"tests/b/test_c.py::f": "tests/b/test_c.py::g"}}
    before = ["tests/test_a.py::f[x-1]", "tests/test_a.py::h", "tests/d/test_e.py::i"]
    now = ["tests/b/test_c.py::g[x-1]", "tests/b/test_c.py::h", "tests/d/test_e.py::new"]
    assert moved.lost(before, now, table) == ["tests/d/test_e.py::i"]


def test_a_new_parameter_moves_the_numbers_behind_it():
    before = ["tests/a.py::f[arguments0-x]", "tests/a.py::f[arguments1-y]"]
    now = ["tests/a.py::f[arguments0-x]", "tests/a.py::f[arguments1-new]", "tests/a.py::f[arguments2-y]"]
    table = {"files": {}, "ids": {}}
    assert moved.lost(before, now, table) == []
    assert moved.lost(before, now[:2], table) == ["tests/a.py::f[arguments1-y]"]


def test_the_table_of_moved_tests_leads_to_files():
    table = tomllib.loads(moved.TABLE.read_text(encoding="utf-8"))
    files = {*table["files"].values(), *(test.partition("::")[0] for test in table["ids"].values())}
    assert files and not [file for file in files if not (ROOT / file).exists()]
