"""Writes docs/moved.md from `mpq_compiler/moved.toml`: ``python -m tests.harness.moved``."""

from __future__ import annotations

import tomllib

from tests.harness.tree import ROOT

PAGE = ROOT / "docs" / "moved.md"
TABLE = ROOT / "mpq_compiler" / "moved.toml"

HEAD = """\
# Where modules went

Up to commit 329b67b the package was one flat folder of 85 modules. They live in rooms now
([architecture.md](architecture.md)). Old dotted names go on working for one release, with a `DeprecationWarning` that
says the new one. All names stand below `mpq_compiler.`; a module stands for all its names but those listed beside it.

Tests moved too: from `tests/test_<module>.py` to `tests/<room>/test_<module>.py`, tests of many rooms to
`tests/integration/`, and what tests share (`programs`, `packed`, `tiny`, `tree`, ...) to `tests/harness/`;
`tests/moved.toml` has them all.

Public names of the package (`mpq_compiler.compile`, `mpq_compiler.load`, ...), commands, passes and recipes have the
names they had. This page is written by `python -m tests.harness.moved` from `mpq_compiler/moved.toml`.

| old module | new module | names that went elsewhere |
|---|---|---|
"""


def page() -> str:
    """The page as it should be: a row for each old module, with the names that went elsewhere by their new module."""
    table = tomllib.loads(TABLE.read_text(encoding="utf-8"))
    modules = {old: new for old, new in table.items() if _is_module(new)}
    elsewhere: dict[str, dict[str, list[str]]] = {}
    for old in table.keys() - modules.keys():
        module, _, name = old.rpartition(".")
        there, _, called = table[old].rpartition(".")
        names = elsewhere.setdefault(module, {}).setdefault(there, [])
        names.append(f"`{name}`" if called == name else f"`{name}` as `{called}`")
    rows = []
    for old in sorted(modules.keys() | elsewhere.keys()):
        places = sorted(elsewhere.get(old, {}).items())
        moved = "<br>".join(f"`{there}`: {', '.join(sorted(names))}" for there, names in places)
        rows.append(f"| `{old}` | `{modules.get(old, old)}` | {moved} |\n")
    return HEAD + "".join(rows)


def _is_module(name: str) -> bool:
    there = ROOT.joinpath("mpq_compiler", *name.split("."))
    return there.is_dir() or there.with_suffix(".py").exists()


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
