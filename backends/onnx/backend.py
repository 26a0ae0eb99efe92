"""The backend of ONNX models, which onnxruntime runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from mpq_compiler.backends.onnx import build
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Capabilities
from mpq_compiler.targets.table import Target


class OnnxBackend:
    """Writes graphs of any batch size, one an image size."""

    name = "onnx"

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


BACKEND: Backend = OnnxBackend()
