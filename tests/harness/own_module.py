"""A module of the user's in the current folder, as Python finds it when an option names one of its functions."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest


def write(folder: Path, name: str, source: str, patch: pytest.MonkeyPatch) -> None:
    """Writes the module and makes its folder the current one; what is imported of it is forgotten behind the test."""
    (folder / f"{name}.py").write_text(source, encoding="utf-8")
    patch.chdir(folder)
    patch.setattr(sys, "path", [*sys.path])
    patch.delitem(sys.modules, name, raising=False)
    patch.setattr(sys, "dont_write_bytecode", True)
