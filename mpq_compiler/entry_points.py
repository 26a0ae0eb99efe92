"""What installed packages bring along: entry points of a group."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint
from pathlib import Path


def of(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of that group in all packages on the path, in the order of their names."""
    return _scan(importlib.metadata.entry_points, tuple(sys.path), group)


def version(entry: EntryPoint) -> str:
    """A digest of the package behind an entry point: its release, and its modules as they are on disk."""
    spec = importlib.util.find_spec(entry.module.split(".")[0])
    folders = [Path(folder) for folder in (spec and spec.submodule_search_locations) or ()]
    files = [f for folder in folders for f in sorted(folder.rglob("*.py"))]
    if spec and not folders and spec.origin:
        files = [Path(spec.origin)]
    digest = hashlib.sha256(f"{entry.value} {entry.dist.version if entry.dist else ''}".encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


@functools.cache  # a scan takes ten milliseconds, and a compilation asks for passes and formats hundreds of times
def _scan(scan: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(scan(group=group), key=lambda e: (e.name, e.value)))
