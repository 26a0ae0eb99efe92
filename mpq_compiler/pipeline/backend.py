"""What a backend is: it turns a packed program into something that runs, for the targets that name it.

The built-in ones stand in `plugins.toml`, others come as entry points of the group `mpq_compiler.backends`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target

ENTRY_POINTS = "mpq_compiler.backends"
EXTRAS = {"tvm": "compile", "reference": "compile", "onnx": "onnx"}
"""What to install for the built-in backends."""

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""``with progress("compiling kernels", total) as advance: advance(1)``: a bar for work that takes its time."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do for a target besides building.

    numerics: those besides float32 that attentions and float layers can have under ``--numerics fast``
    tune:     it has a choice of kernels, and measures them (``--tune``)
    emit:     it writes programs that run without this package (``--emit c``, ``--standalone``)
    standby:  it has workers that take their time to start, and are started while the passes run
    times:    it says which kernels a program needs, so that a latency table can be measured (`TimedBackend`)
    """

    numerics: tuple[str, ...] = ()
    tune: bool = False
    emit: bool = False
    standby: bool = False
    times: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """How a program is to be built. Nothing but ``batches``, ``others``, ``tune`` and ``emit`` changes a byte.

    batches:  batch sizes with a specialization each
    others:   the program at other image sizes, with the batch sizes for each; they share the stored tensors
    jobs:     worker processes; ``workers`` are those of `Backend.standby`, in their place
    cache:    folder of what was built before; None: the user's
    tune:     search for the fastest kernels
    emit:     "c" or "machine": a program as well, without a runtime or with TVM's
    """

    batches: Sequence[int] = (1, 2)
    others: Sequence[Specialization] = ()
    jobs: int = 1
    workers: Any = None
    cache: Path | None = None
    progress: Progress | None = None
    tune: bool = False
    emit: str | None = None


@dataclass(frozen=True)
class Built:
    """What a backend adds to an artifact (`artifact.bundle.write`).

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


class Backend(Protocol):
    """Builds artifacts for the targets whose `Target.backend` is its name."""

    @property
    def name(self) -> str:
        """As targets and manifests have it."""

    def capabilities(self, target: Target) -> Capabilities:
        """What it can do for the target."""

    def require(self, target: Target) -> None:
        """UserError: something that building for the target needs is missing on this machine."""

    def standby(self, jobs: int) -> AbstractContextManager[Any]:
        """What takes its time to start, as `BuildRequest.workers`; None where there is nothing."""

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """The packed program, compiled. UserError: a node that the backend cannot compile, by name."""


class TimedBackend(Backend, Protocol):
    """A backend whose kernels have times of their own (`Capabilities.times`)."""

    def kernel_calls(self, program: Program, batch: int) -> list[Mapping[str, Any]]:
        """The calls of a packed program in order: ``node``, and ``kernel``, the text of the problem it solves."""

    def digest(self) -> str:
        """SHA-256 of what kernels are made from: times are those of kernels with the same one."""


def backend_of(target: Target) -> Backend:
    """The backend that builds for the target. UserError: there is none, or it needs what is not installed."""
    entry = plugins.find(ENTRY_POINTS, target.backend)
    if entry is None:
        raise UserError(f"target '{target.name}' names the backend '{target.backend}', which no package provides")
    try:
        backend: Backend = entry.load()
    except ModuleNotFoundError as error:
        package = f"mpq-compiler[{EXTRAS[target.backend]}]" if target.backend in EXTRAS else entry.value
        raise UserError(
            f"target '{target.name}' needs {error.name}, which is not installed: pip install '{package}'"
        ) from error
    return backend
