"""The backend of the interpreter: the packed graph as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from mpq_compiler.backends.reference import build
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Capabilities
from mpq_compiler.targets.table import Target


class ReferenceBackend:
    """Builds graphs of any batch size, one for each image size."""

    name = "reference"

    def capabilities(self, target: Target) -> Capabilities:
        """What it can do besides building: the target's numerics, and other tensors."""
        return Capabilities(numerics=target.numerics, lora=True, decodes=True)

    def require(self, target: Target) -> None:
        """Accepts every target: importing the backend already needs all that it needs."""

    def standby(self, jobs: int) -> AbstractContextManager[None]:
        """A context that starts nothing."""
        return nullcontext()

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """Builds the graphs, beside the stored tensors."""
        return build.build(program, request.others)


BACKEND: Backend = ReferenceBackend()
