"""Epilogues as expressions: `apply` for one vector of a result, `Finish` with the buffers of a kernel."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from tvm.ir import Expr
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common import vmath
from mpq_compiler.backends.tvm.kernels.common.template import Buffers, Index, span
from mpq_compiler.backends.tvm.kernels.problems.epilogue import Epilogue


def apply(
    epilogue: Epilogue,
    value: Expr,
    load: Callable[[int], Expr],
    quant: tuple[Expr, Expr] | None = None,
) -> Expr:
    """The stored value: `value` after all steps.

    value:  float32 expression of L lanes (neighbouring output channels)
    load:   operand index -> float32 expression, of L lanes or scalar (broadcast here)
    quant:  where the epilogue quantizes, what `quantizer` gives. Either may also have L lanes.
    """
    count = vmath.lanes(value)
    for step in epilogue.steps:
        if step.op == "quantize":
            if quant is None:
                raise ValueError("the epilogue quantizes, but no scale and zero point were given")
            return vmath.quantize(value, *quant, int(step.value or 0))
        if step.op in vmath.UNARY:
            value = vmath.UNARY[step.op](value)
        else:
            right = vmath.f32(step.value, count) if step.value is not None else load(step.operand or 0)
            value = vmath.BINARY[step.op](value, vmath.splat(right, count))
    return value


@dataclass(frozen=True)
class Finish:
    """An epilogue bound to the buffers of a kernel."""

    epilogue: Epilogue
    buffers: Buffers

    def quantizer(self, sample: Any) -> tuple[Expr, Expr] | None:
        """The `quantizer` of a sample; None where nothing quantizes."""
        return quantizer(self.buffers, sample) if self.epilogue.bits is not None else None

    def __call__(
        self, value: Expr, sample: Any, row: Sequence[Any], channel: Any, quant: tuple[Expr, Expr] | None
    ) -> Expr:
        """Apply the epilogue to `value`, the lanes from `channel` on of output row [sample, *row]."""
        lanes = vmath.lanes(value)

        def load(i: int) -> Expr:
            kind, buffer = self.epilogue.operands[i].kind, self.buffers[f"operand{i}"]
            if kind == "scalar":
                return buffer[0]
            if kind == "channel":
                return buffer[span(channel, lanes)]
            if kind == "sample":
                return buffer[sample, span(channel, lanes)]
            return buffer[(sample, *row, span(channel, lanes))]

        return apply(self.epilogue, value, lambda i: vmath.cast(load(i), "float32"), quant)


def quantizer(buffers: Buffers, sample: Any) -> tuple[Expr, Expr]:
    """What values of a sample are multiplied by, f32, and the zero point, i32, bound to variables."""
    group = T.bind(T.cast(buffers["group"][sample], "int32"))
    return quantizer_of(buffers, group)


def quantizer_of(buffers: Buffers, group: Index, kind: str = "q") -> tuple[Expr, Expr]:
    """What values of a time group are multiplied by, and the zero point; names of buffers begin with ``kind``."""
    return T.bind(vmath.reciprocal(buffers[f"{kind}scale"][group])), T.bind(buffers[f"{kind}zero"][group])
