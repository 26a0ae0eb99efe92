"""The backend of the interpreter: the packed graph as it is."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from mpq_compiler.backends.reference import build
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Capabilities
from mpq_compiler.targets.table import Target


class ReferenceBackend:
    """Writes graphs of any batch size, one an image size."""

    name = "reference"

    def capabilities(self, target: Target) -> Capabilities:
        """None besides building."""
        return Capabilities(numerics=target.numerics)

    def require(self, target: Target) -> None:
        """Nothing is needed that importing it does not ask for."""

    def standby(self, jobs: int) -> AbstractContextManager[None]:
        """Nothing takes its time to start."""
        return nullcontext()

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """The graphs, beside the stored tensors."""
        return build.build(program, request.others)


BACKEND: Backend = ReferenceBackend()
