"""The protocol of backends, which build executable artifacts of packed programs for the targets that name them.

The built-in backends are listed in `plugins.toml`; others are entry points of the group `mpq_compiler.backends`.
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
from mpq_compiler.pipeline.stages import StageInstrument
from mpq_compiler.support import plugins
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets.table import Target

ENTRY_POINTS = "mpq_compiler.backends"

Progress = Callable[[str, int], AbstractContextManager[Callable[..., None]]]
"""Opens a progress bar: ``with progress("compiling kernels", total) as advance: advance(1)``."""


@dataclass(frozen=True)
class Capabilities:
    """What a backend can do for a target besides building.

    Attributes:
        numerics: numerics besides float32 that attentions and float layers can have under ``--numerics fast``.
        tune: whether it can choose kernels by measuring them (``--tune``).
        emit: whether it writes programs that run without this package (``--emit c``, ``--standalone``).
        standby: whether it has workers that are slow to start, and are started while the passes run.
        times: whether it lists the kernels of a program, so that a latency table can be measured (`TimedBackend`).
        lora: whether its executor changes stored tensors of a loaded artifact (``--lora-rank``).
        stages: the names of the stages of its lowering, in order (`pipeline.stages`).
        decodes: whether its artifacts decode entropy-coded weights (`formats.entropy`) when they are loaded.
    """

    numerics: tuple[str, ...] = ()
    tune: bool = False
    emit: bool = False
    standby: bool = False
    times: bool = False
    lora: bool = False
    stages: tuple[str, ...] = ()
    decodes: bool = False


@dataclass(frozen=True)
class BuildRequest:
    """How a program is built; ``jobs``, ``workers``, ``cache``, ``progress`` and ``instruments`` change no byte.

    Attributes:
        batches: the batch sizes, each of which gets a specialization.
        others: the program at other image sizes, each with its batch sizes; they share the stored tensors.
        jobs: the number of worker processes.
        workers: the workers of `Backend.standby`, in place of new ones.
        cache: the cache folder; None takes the user's.
        progress: opens a progress bar, or None.
        tune: whether to search for the fastest kernels.
        emit: "c" or "machine" adds a C program, without a runtime or with TVM's; None adds none.
        instruments: look at every stage of the lowering.
        owner: the public key, in hexadecimal, whose owner has to have signed what that program opens; "": nobody.
        fresh: whether nothing that the cache holds is taken from there.
    """

    batches: Sequence[int] = (1, 2)
    others: Sequence[Specialization] = ()
    jobs: int = 1
    workers: Any = None
    cache: Path | None = None
    progress: Progress | None = None
    tune: bool = False
    emit: str | None = None
    instruments: Sequence[StageInstrument] = ()
    owner: str = ""
    fresh: bool = False


@dataclass(frozen=True)
class Built:
    """The results of a backend, for an artifact (`artifact.bundle.write`).

    Attributes:
        files: the content of each file, by name.
        tensors: the stored tensors by name, in their stored form.
        entries: the manifest's entry for each tensor.
        functions: the manifest's list of specializations.
        prepare: the manifest's entry on preparing tensors at load, where that is needed.
        facts: counts for the report, such as kernels and how many of them came from the cache.
        features: the CPU features that its kernels need beyond the target's.
        parts: the manifest's list of parts that functions share between calls (docs/artifact.md).
        memory: the manifest's entry on memory, where the backend knows it.
        stages: the names of the lowering's stages, in order.
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
    stages: tuple[str, ...] = ()

    @property
    def payload_bytes(self) -> int:
        """The bytes of the stored tensors alone."""
        return sum(tensor.nbytes for tensor in self.tensors.values())


class Backend(Protocol):
    """Builds artifacts for the targets whose `Target.backend` is its name."""

    @property
    def name(self) -> str:
        """Its name in targets and manifests."""

    def capabilities(self, target: Target) -> Capabilities:
        """What it can do for the target."""

    def require(self, target: Target) -> None:
        """Raises a UserError where this machine lacks something that building for the target needs."""

    def standby(self, jobs: int) -> AbstractContextManager[Any]:
        """Starts workers that are slow to start, for `BuildRequest.workers`; the context yields None without any."""

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """Builds a packed program. UserError: a node that the backend cannot compile; the sentence names it."""


class TimedBackend(Backend, Protocol):
    """A backend whose kernels can be timed one by one (`Capabilities.times`)."""

    def kernel_calls(self, program: Program, batch: int) -> list[Mapping[str, Any]]:
        """The kernel calls of a packed program in order: ``node``, and ``kernel``, the text of its problem."""

    def digest(self) -> str:
        """The SHA-256 of the kernels' sources; times hold for kernels with this digest."""


class EmittingBackend(Backend, Protocol):
    """A backend that writes programs (`Capabilities.emit`)."""

    def join(self, parts: Sequence[Path], digests: bytes, target: Target) -> dict[str, bytes]:
        """The files of one program that draws with the parts of a pipeline, artifacts with a program each.

        ``digests``: the SHA-256 of each artifact, which a file of tokens is held against. UserError: no compiler.
        """


def backend_of(target: Target) -> Backend:
    """Loads the backend that builds for a target. UserError: there is none, or it needs a missing package."""
    entry = plugins.find(ENTRY_POINTS, target.backend)
    if entry is None:
        raise UserError(f"target '{target.name}' names the backend '{target.backend}', which no package provides")
    try:
        backend: Backend = entry.load()
    except ModuleNotFoundError as error:
        raise UserError(
            f"target '{target.name}' needs {error.name}, which is not installed: "
            f"pip install '{plugins.requirement(entry)}'"
        ) from error
    return backend
