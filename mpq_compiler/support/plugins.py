"""The registry of plugins: passes, formats and backends, built in or from installed packages, are found by name here.

Both kinds are entry points of a group. The built-in ones are listed in `plugins.toml`, the others in the metadata of
their packages. Nothing else in the package imports by name.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import importlib.metadata
import importlib.util
import os
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

_BUILT_IN = Path(__file__).parents[1] / "plugins.toml"


@functools.cache
def built_in(group: str) -> tuple[EntryPoint, ...]:
    """The built-in entry points of a group, in the order of `plugins.toml`."""
    declared = tomllib.loads(_BUILT_IN.read_text(encoding="utf-8"))
    return tuple(EntryPoint(name, value, group) for name, value in declared[group].items())


def of(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of a group in all packages on `sys.path`, sorted by name."""
    return _scan(importlib.metadata.entry_points, tuple(sys.path), group)


def find(group: str, name: str) -> EntryPoint | None:
    """The entry point called `name`: a built-in one first, else a package's; None where there is none."""
    return next((entry for entry in (*built_in(group), *of(group)) if entry.name == name), None)


def attribute(path: str) -> Any:
    """The object at ``"package.module:name"``."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def module(name: str) -> Any:
    """The module with this dotted name, imported."""
    return importlib.import_module(name)


def requirement(entry: EntryPoint) -> str:
    """What pip installs for an entry point: its package, with the extras that its declaration ends in."""
    package = entry.dist.name if entry.dist else "mpq-compiler"
    return f"{package}[{','.join(entry.extras)}]" if entry.extras else package


def version(entry: EntryPoint) -> str:
    """A digest of the package behind an entry point: its release, and its modules as they are on disk."""
    release = entry.dist.version if entry.dist else ""
    return digest(entry.module.split(".")[0], f"{entry.value} {release}")


def digest(package: str, text: str = "") -> str:
    """A digest of a text and of the modules of a package as they are on disk, those behind links too."""
    spec = importlib.util.find_spec(package)
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = [
        Path(place, name)
        for folder in folders
        for place, _, names in os.walk(folder, followlinks=True)
        for name in names
        if name.endswith(".py")
    ]
    if spec and not folders and spec.origin:
        files = [Path(spec.origin)]
    state = hashlib.sha256(text.encode())
    for file in sorted(files):
        state.update(file.read_bytes())
    return state.hexdigest()[:16]


@functools.cache  # a scan takes ten milliseconds, and a compilation asks for passes and formats hundreds of times
def _scan(scan: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(scan(group=group), key=lambda e: (e.name, e.value)))
