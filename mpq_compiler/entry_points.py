"""What installed packages bring along: entry points of a group."""

from __future__ import annotations

import functools
import importlib.metadata
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import EntryPoint


def of(group: str) -> tuple[EntryPoint, ...]:
    """The entry points of that group in all packages on the path, in the order of their names."""
    return _scan(importlib.metadata.entry_points, tuple(sys.path), group)


@functools.cache  # a scan takes ten milliseconds, and a compilation asks for passes and formats hundreds of times
def _scan(scan: Callable[..., Iterable[EntryPoint]], path: tuple[str, ...], group: str) -> tuple[EntryPoint, ...]:
    return tuple(sorted(scan(group=group), key=lambda e: (e.name, e.value)))
