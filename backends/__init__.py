"""What turns a packed program into something that runs: one package a kind of target.

Every backend has ``build(program, target, ...) -> Built``.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Progress = Callable[[str, int], AbstractContextManager[Callable[[int], None]]]
"""``with progress("compiling kernels", total) as advance: advance(1)``: a bar for work that takes its time."""


@dataclass(frozen=True)
class Built:
    """What a backend adds to an artifact (`mpq_compiler.artifact.write`).

    files:      content by file name
    tensors:    the stored tensors by name, in their stored form
    entries:    what the manifest says of each tensor
    functions:  the manifest's list of specializations
    prepare:    the manifest's entry on preparing tensors at load, where that is needed
    facts:      counts for the report: kernels, how many of them came from the cache, ...
    features:   what its kernels ask of a CPU beyond the target
    parts:      the manifest's list of what functions share between calls (docs/artifact.md), where there is any
    memory:     the manifest's entry on memory, where the backend knows
    """

    files: dict[str, bytes]
    tensors: dict[str, np.ndarray]
    entries: list[dict[str, Any]]
    functions: list[dict[str, Any]]
    prepare: dict[str, Any] | None
    facts: dict[str, Any]
    features: tuple[str, ...] = ()
    parts: list[dict[str, Any]] = field(default_factory=list)
    memory: dict[str, Any] | None = None

    @property
    def payload_bytes(self) -> int:
        """Bytes of the stored tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors.values())
