"""Old dotted names, which go on working for one release with a DeprecationWarning that says the new one.

`moved.toml` has the table, docs/moved.md shows it. Modules that are gone are found by a finder on `sys.meta_path`;
packages that have the name of a former module ask `forward` for names they do not have.
"""

from __future__ import annotations

import functools
import sys
import tomllib
import warnings
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any

from mpq_compiler.support import plugins

_ROOT = "mpq_compiler."


@functools.cache
def table() -> dict[str, str]:
    """New dotted names by old ones, both without ``mpq_compiler.``: modules, and names that left their module."""
    known: dict[str, str] = tomllib.loads(Path(__file__).with_name("moved.toml").read_text(encoding="utf-8"))
    return known


def forward(package: str) -> Callable[[str], Any]:
    """``__getattr__`` of a module or package: the attribute where it is now. AttributeError: it never was here."""
    old = package.removeprefix(_ROOT)

    def attribute(name: str) -> Any:
        now = table().get(f"{old}.{name}") or (old in table() and f"{table()[old]}.{name}")
        # The import system asks for submodules here too, before it looks for their files.
        if not now or name.startswith("__") or _is_module(f"{old}.{name}"):
            raise AttributeError(f"module '{package}' has no attribute '{name}'")
        module, _, there = now.rpartition(".")
        try:
            found = plugins.attribute(f"{_ROOT}{module}:{there}")
        except AttributeError:
            raise AttributeError(f"module '{package}' has no attribute '{name}'") from None
        warnings.warn(
            f"{package}.{name} is now {_ROOT}{module}.{there}; the old name goes with the next release",
            DeprecationWarning,
            stacklevel=2,
        )
        return found

    return attribute


def _is_module(name: str) -> bool:
    """Whether there is a module of this dotted name today."""
    there = Path(__file__).parent.joinpath(*name.split("."))
    return (there / "__init__.py").exists() or there.with_suffix(".py").exists()


class _Moved(MetaPathFinder, Loader):
    """Finds modules of the table that no longer exist, as modules that forward every name."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        name = fullname.removeprefix(_ROOT)
        if name == fullname or name not in table() or _is_module(name):
            return None
        return ModuleSpec(fullname, self)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        module.__dict__["__getattr__"] = forward(module.__name__)


def install() -> None:
    """Puts the finder before the others, once: ``mpq_compiler.recipes`` is a folder of data now."""
    if not any(isinstance(finder, _Moved) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Moved())
