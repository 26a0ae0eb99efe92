"""Describes passes from their docstrings and options, for ``mpqc passes NAME``."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import itertools
import re
import textwrap
import typing
from types import UnionType
from typing import Any

from mpq_compiler.pipeline.passes import Pass

# --- passes -------------------------------------------------------------------------------------------------


def describe_pass(cls: type[Pass]) -> dict[str, Any]:
    """Describes a pass: name, purpose, excerpt, options (type, default, meaning), contract, requires and provides."""
    doc = inspect.getdoc(cls) or ""
    summary = " ".join(doc.split("\n\n")[0].split())
    before, after = excerpt(cls)
    hints = typing.get_type_hints(cls)
    meanings = _field_docs(cls)
    options = [
        {
            "name": f.name,
            "type": _type_name(hints[f.name]),
            "default": list(f.default) if isinstance(f.default, tuple) else f.default,
            "meaning": meanings.get(f.name, ""),
        }
        for f in dataclasses.fields(cls)
    ]
    purpose = re.split(r"\n\n(?=    )", doc, maxsplit=1)[0]
    return {
        "name": cls.name(),
        "summary": summary,
        "purpose": purpose,
        "contract": str(cls.contract),
        "requires": sorted(cls.requires),
        "provides": sorted(cls.provides),
        "options": options,
        "before": before,
        "after": after,
    }


def excerpt(cls: type[Pass]) -> tuple[str, str]:
    """The excerpts before and after the pass: the docstring's indented block, divided by a line ``=>``."""
    block = re.search(r"\n\n((?: {4}.*\n)+) {2}=>\n((?: {4}.*(?:\n|$))+)", (inspect.getdoc(cls) or "") + "\n")
    if block is None:
        return "", ""
    return textwrap.dedent(block[1]).strip("\n"), textwrap.dedent(block[2]).strip("\n")


def pass_text(described: dict[str, Any], width: int = 110) -> str:
    """Formats the description of a pass for reading, with lines broken at `width`."""

    def filled(text: str, indent: str) -> str:
        paragraphs = (" ".join(paragraph.split()) for paragraph in text.split("\n\n"))
        return "\n\n".join(
            textwrap.fill(p, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
            for p in paragraphs
        )

    lines = [f"{described['name']}  ({described['contract']})", "", filled(described["purpose"], "  "), ""]
    for title in ("requires", "provides"):
        if described[title]:
            lines.append(f"{title}: {', '.join(described[title])}")
    if described["options"]:
        lines += ["", "options:"]
        for option in described["options"]:
            lines.append(f"  {option['name']}={option['default']}  ({option['type']})")
            if option["meaning"]:
                lines.append(filled(option["meaning"], "      "))
    if described["before"]:
        lines += ["", textwrap.indent(described["before"], "    "), "  =>", textwrap.indent(described["after"], "    ")]
    return "\n".join(lines)


def _type_name(hint: Any) -> str:
    if typing.get_origin(hint) is typing.Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if isinstance(hint, UnionType):
        return " | ".join(_type_name(h) for h in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        return f"{_type_name(typing.get_args(hint)[0])}/..."
    return "none" if hint is type(None) else getattr(hint, "__name__", str(hint))


def _field_docs(cls: type[Pass]) -> dict[str, str]:
    """The note below each field in the source of the class, or of a base class."""
    found: dict[str, str] = {}
    for each in reversed(cls.__mro__):
        if issubclass(each, Pass):
            found |= field_docs(each)
    return found


def field_docs(cls: type) -> dict[str, str]:
    """The note below each field in the source of a class; none where there is no source."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(cls)))
    except (OSError, SyntaxError):
        return {}
    (body,) = (node.body for node in tree.body if isinstance(node, ast.ClassDef))
    found: dict[str, str] = {}
    for node, following in itertools.pairwise(body):
        if (
            isinstance(node, ast.AnnAssign)
            and isinstance(node.target, ast.Name)
            and isinstance(following, ast.Expr)
            and isinstance(following.value, ast.Constant)
            and isinstance(following.value.value, str)
        ):
            found[node.target.id] = inspect.cleandoc(following.value.value)
    return found
