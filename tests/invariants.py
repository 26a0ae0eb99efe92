"""docs/invariants.md: which tests hold which invariants, from `invariants.toml` and the markers of the tests.

    python -m tests.invariants                 # writes it

A marker names the invariants that a test holds: ``@pytest.mark.invariant("mixdq-1", ...)``. Tests and markers are found
by pytest's own collection.
"""

from __future__ import annotations

import contextlib
import io
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness.tree import ROOT

SOURCE = Path(__file__).with_suffix(".toml")
DOCUMENT = ROOT / "docs" / "invariants.md"
HEAD = """\
# Invariants

What must hold of each method, and the tests that hold it. `python -m tests.invariants` writes this page, from
[tests/invariants.toml](../tests/invariants.toml) and the markers `@pytest.mark.invariant` of the tests; a test fails
where an invariant has no test, and where the page is another.
"""


@dataclass(frozen=True)
class Method:
    """A published method, or what all of them share."""

    title: str
    source: str
    """The paper, or what else the invariants are about."""
    invariants: Mapping[str, str]
    """Sentences, by id."""


@dataclass
class Collector:
    """A plugin of pytest."""

    tests: dict[str, list[str]] = field(default_factory=dict)
    """``file::function``, by the ids that markers name, in the order of collection."""

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        for item in session.items:
            assert isinstance(item, pytest.Function)
            test = f"{item.path.relative_to(ROOT).as_posix()}::{item.originalname}"
            for marker in item.iter_markers("invariant"):
                for name in marker.args:
                    found = self.tests.setdefault(name, [])
                    found += [] if test in found else [test]


def methods() -> list[Method]:
    """Those of the file, in its order."""
    found = []
    for name, method in tomllib.loads(SOURCE.read_text(encoding="utf-8")).items():
        invariants = {f"{name}-{number}": text for number, text in method["invariants"].items()}
        found.append(Method(method["title"], method["source"], invariants))
    return found


def collected() -> dict[str, list[str]]:
    """The tests of all files with a marker, by id; in a process of its own, since it imports them."""
    files = [str(path) for path in sorted(SOURCE.parent.rglob("test_*.py")) if "mark.invariant(" in path.read_text()]
    collector, said = Collector(), io.StringIO()
    with contextlib.redirect_stdout(said):
        status = pytest.main(["--collect-only", "-q", "-p", "no:cacheprovider", *files], plugins=[collector])
    if status != pytest.ExitCode.OK:
        raise SystemExit(f"the tests cannot be collected:\n{said.getvalue()}")
    return collector.tests


def faults(known: Sequence[Method], tests: Mapping[str, Sequence[str]]) -> Iterator[str]:
    """Invariants without a test, and markers that name none."""
    names = [name for method in known for name in method.invariants]
    yield from (f"the invariant '{name}' has no test" for name in names if not tests.get(name))
    yield from (f"'{name}' is no invariant, and {tests[name][0]} is marked with it" for name in tests.keys() - {*names})


def page(known: Sequence[Method], tests: Mapping[str, Sequence[str]]) -> str:
    """The document."""
    parts = [HEAD]
    for method in known:
        rows = [f"| `{name}` | {text} | {_cell(tests[name])} |" for name, text in method.invariants.items()]
        table = "\n".join(["| | invariant | tests |", "| --- | --- | --- |", *rows])
        parts.append(f"## {method.title}\n\n{method.source}\n\n{table}\n")
    return "\n".join(parts)


def _cell(tests: Sequence[str]) -> str:
    return "<br>".join(f"`{test}`" for test in tests)


def main(destination: Path = DOCUMENT) -> None:
    known, tests = methods(), collected()
    if wrong := sorted(faults(known, tests)):
        raise SystemExit("\n".join(wrong))
    destination.write_text(page(known, tests), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
