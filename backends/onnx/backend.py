"""The backend of ONNX models, which onnxruntime runs."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

from mpq_compiler.backends.onnx import lowering
from mpq_compiler.backends.onnx.build import build
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Capabilities
from mpq_compiler.targets.table import Target


class OnnxBackend:
    """Builds ONNX models of any batch size, one for each image size."""

    name = "onnx"

    def capabilities(self, target: Target) -> Capabilities:
        """What it can do besides building: the target's numerics."""
        return Capabilities(numerics=target.numerics, stages=lowering.names())

    def require(self, target: Target) -> None:
        """Accepts every target: importing the backend already needs all that it needs."""

    def standby(self, jobs: int) -> AbstractContextManager[None]:
        """A context that starts nothing."""
        return nullcontext()

    def build(self, program: Program, target: Target, request: BuildRequest) -> Built:
        """Builds the models, beside the stored tensors."""
        return build(program, request.others, request.instruments)


BACKEND: Backend = OnnxBackend()
