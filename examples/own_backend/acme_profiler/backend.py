"""The backend: from a packed program to what an artifact holds."""

from __future__ import annotations

import gzip
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace

from mpq_compiler.backends.reference import GRAPH
from mpq_compiler.backends.reference import build as reference
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Capabilities
from mpq_compiler.targets.table import Target

FILE = "graph.json.gz"


class ProfilerBackend:
    """Stores the packed graph, compressed. A backend with kernels would compile them here."""

    name = "acme-profiler"  # as the target names it

    def capabilities(self, target: Target) -> Capabilities:
        """Nothing besides building: no --tune, no --emit c, no latency tables."""
        return Capabilities()

    def require(self, target: Target) -> None:
        """Would raise a UserError where a tool that building needs is missing."""

    def standby(self, jobs: int) -> AbstractContextManager[None]:
        """Has no workers to start while the passes run."""
        return nullcontext()

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """Stored tensors and their entries in the manifest are those of the reference; the graph is a file of ours."""
        built = reference.build(program, request.others)
        graph = gzip.compress(built.files[GRAPH], mtime=0)  # without a time, so that equal programs give equal bytes
        return replace(built, files={FILE: graph})


BACKEND: Backend = ProfilerBackend()
