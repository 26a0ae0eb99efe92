"""The denoisers of this process by number, for graphs, which hold no objects (`operator`)."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from typing import Protocol
from weakref import WeakValueDictionary

from mpq_compiler.sampling.call_tree import Value


class Denoiser(Protocol):
    """What a graph asks of a compiled denoiser."""

    signature: list[str]

    @property
    def manifest(self) -> Mapping[str, Value]: ...

    def __call__(self, *args: Value, return_dict: bool = True, **kwargs: Value) -> Value: ...


INSTANCES: WeakValueDictionary[int, Denoiser] = WeakValueDictionary()
_numbers = itertools.count()


def numbered(denoiser: Denoiser) -> int:
    """The number of a denoiser, which lives no longer for having one."""
    number = next(_numbers)
    INSTANCES[number] = denoiser
    return number
