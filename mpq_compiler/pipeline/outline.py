"""What built-in passes are for, read from their sources: importing them takes torch, and seconds."""

from __future__ import annotations

import ast
from importlib.metadata import EntryPoint
from importlib.util import find_spec
from pathlib import Path

from mpq_compiler.support import plugins

ENTRY_POINTS = "mpq_compiler.passes"
"""The group of entry points."""


def built_in() -> list[tuple[str, str, str]]:
    """The name, contract and summary of every built-in pass, in the order of the default recipe."""
    return [(entry.name, *_outline(entry)) for entry in plugins.built_in(ENTRY_POINTS)]


def others() -> bool:
    """Whether installed packages bring passes, too."""
    return bool(plugins.of(ENTRY_POINTS))


def _outline(entry: EntryPoint) -> tuple[str, str]:
    """The contract that the class of a pass declares, and the first paragraph of its docstring."""
    spec = find_spec(entry.module)
    assert spec is not None and spec.origin is not None
    tree = ast.parse(Path(spec.origin).read_text(encoding="utf-8"))
    (found,) = (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == entry.attr)
    (contract,) = (
        node.value.attr.lower()
        for node in found.body
        if isinstance(node, ast.AnnAssign) and ast.unparse(node.target) == "contract"
        if isinstance(node.value, ast.Attribute)
    )
    return contract, " ".join((ast.get_docstring(found) or "").split("\n\n")[0].split())
