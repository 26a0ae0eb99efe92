"""docs/invariants.md: which tests hold which invariants, from `invariants.toml` and the markers of the tests.

    python -m tests.invariants                 # writes it

A marker names the invariants that a test holds: ``@pytest.mark.invariant("mixdq-1", ...)``. The tests are read, not
imported.
"""

from __future__ import annotations

import ast
import sys
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

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


def methods() -> list[Method]:
    """Those of the file, in its order."""
    found = []
    for name, method in tomllib.loads(SOURCE.read_text(encoding="utf-8")).items():
        invariants = {f"{name}-{number}": text for number, text in method["invariants"].items()}
        found.append(Method(method["title"], method["source"], invariants))
    return found


def marked() -> dict[str, list[str]]:
    """``file::function`` of the tests with a marker, by the ids that it names, in the order of files and lines.

    Files are read and not imported: markers stand as decorators, with their ids as literals.
    """
    found: dict[str, list[str]] = {}
    for path in sorted(SOURCE.parent.rglob("test_*.py")):
        text = path.read_text(encoding="utf-8")
        if "mark.invariant(" not in text:
            continue
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef) and node.name.startswith("test_"):
                for name in _names(node):
                    found.setdefault(name, []).append(f"{path.relative_to(ROOT).as_posix()}::{node.name}")
    return found


def _names(test: ast.FunctionDef) -> Iterator[str]:
    """The ids of a test's markers."""
    for decorator in test.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func) == "pytest.mark.invariant":
            yield from map(ast.literal_eval, decorator.args)


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
    known, tests = methods(), marked()
    if wrong := sorted(faults(known, tests)):
        raise SystemExit("\n".join(wrong))
    destination.write_text(page(known, tests), encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
