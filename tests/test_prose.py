"""Docstrings and notes name their subject first, and nothing public goes without one. ruff holds their form."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

import pytest

from tests.harness.tree import ROOT

DANGLING = re.compile(r"(Of|The same|As) ")
"""First words whose subject is the name above, which a reader of the docstring alone does not see."""


@pytest.fixture(scope="module")
def modules() -> dict[str, ast.Module]:
    """The modules of the package by path, those behind its links where they lie."""
    files = (path for room in ("mpq_compiler", "passes", "backends") for path in sorted((ROOT / room).rglob("*.py")))
    return {path.relative_to(ROOT).as_posix(): ast.parse(path.read_text()) for path in files}


def notes(path: str, tree: ast.Module) -> Iterator[tuple[int, str]]:
    """(line, text) of docstrings and of notes behind attributes, without those of passes and of their options.

    `mpqc passes` prints the latter, each behind the name of what it is of.
    """
    for node in ast.walk(tree):
        is_class = isinstance(node, ast.ClassDef) and not path.startswith("passes/")
        if isinstance(node, ast.Module | ast.FunctionDef) or is_class:
            for statement in node.body:
                value = statement.value if isinstance(statement, ast.Expr) else None
                if isinstance(value, ast.Constant) and isinstance(value.value, str):
                    yield value.lineno, value.value


def undocumented(tree: ast.Module) -> Iterator[str]:
    """The module, and public classes and functions in it, that have no docstring."""
    if not ast.get_docstring(tree):
        yield "the module"
    for node in tree.body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef) and not node.name.startswith("_"):
            overload = any(isinstance(by, ast.Name) and by.id == "overload" for by in node.decorator_list)
            if not overload and not ast.get_docstring(node):
                yield node.name


def test_docstrings_name_their_subject(modules):
    assert len(modules) > 200
    dangling = [
        f"{path}:{line}: {text.splitlines()[0]}"
        for path, tree in modules.items()
        for line, text in notes(path, tree)
        if DANGLING.match(text)
    ]
    assert not dangling


def test_everything_public_has_a_docstring(modules):
    missing = [f"{path}: {name}" for path, tree in modules.items() for name in undocumented(tree)]
    assert not missing
