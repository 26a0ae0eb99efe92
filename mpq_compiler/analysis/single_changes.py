"""Changes whose losses are compared: one weight, one tensor edge or one attention quantized, all else in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from torch import Tensor, fx

from mpq_compiler.analysis.content_loss import ContentLoss
from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import attention_arguments
from mpq_compiler.ir.graph import operand, softmax
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.quantization.fitting import FitCache, Rounding, bias_of, corrected_bias

WEIGHT, STATIC, PER_TOKEN, SMALL_FLOAT, PROBABILITIES = "w", "a", "d", "f", "p"
"""What a task quantizes: a weight; an edge by time group, by row, or to small floats; an attention with probabilities.
"""


@dataclass(frozen=True)
class Task:
    """One measurement."""

    kind: str
    node: fx.Node
    """The call, edge or attention that is quantized."""
    choice: str | int
    """The format of a weight, or the bits of an activation."""
    name: str
    """The name of its result in the cache."""
    rounding: Rounding = Rounding.NEAREST
    """How a weight's codes are chosen."""
    content: ContentLoss | None = None
    """The metric, where it is not noise power."""


def quantized_weight(program: Program, fits: FitCache, task: Task) -> dict[fx.Node, Tensor]:
    """The values of a layer's weight, and of its bias where that is corrected, by node."""
    node, weight = task.node, operand(task.node, 1)
    name = str(weight.target)
    quantized = fits.fitted(program, node, name, str(task.choice), task.rounding)
    values = {weight: quantized.dequantize().reshape(program.tensors[name].shape)}
    bias, corrected = bias_of(node), corrected_bias(program, node, name, quantized)
    if bias is not None and corrected is not None:
        values[bias] = corrected
    return values


@dataclass(frozen=True)
class QuantizedEdge:
    """A change of an edge's value [B, ...], given the timesteps [B]: quantized with tables that were fitted."""

    kind: str
    bits: int
    boundaries: Tensor
    tables: tuple[Tensor, Tensor] | None = None
    """Scales and zero points of `STATIC`."""
    floats: tuple[int, Tensor] | None = None
    """Bits of exponent, and scales, of `SMALL_FLOAT`."""

    @staticmethod
    def of(program: Program, fits: FitCache, kind: str, edge: str, bits: int) -> QuantizedEdge:
        """The change of the edge of that name."""
        change = QuantizedEdge(kind, bits, program.facts[TIME_GROUPS])
        if kind == SMALL_FLOAT:
            return replace(change, floats=fits.float_parameters(program, edge, bits))
        return change if kind == PER_TOKEN else replace(change, tables=fits.activation_parameters(program, edge, bits))

    def __call__(self, value: Tensor, timestep: Tensor) -> Tensor:
        """The changed value, where the value is."""
        if self.kind == PER_TOKEN:
            return ops.dynamic_fake_quantize(value, self.bits)
        group = ops.time_group(timestep, self.boundaries).to(value.device)
        if self.floats is not None:
            exponent, table = self.floats
            return ops.fake_quantize_float(value, table.to(value.device), group, exponent, self.bits)
        assert self.tables is not None
        scale, zero = (table.to(value.device) for table in self.tables)
        return ops.fake_quantize(value, scale, zero, group, self.bits)


@dataclass(frozen=True)
class QuantizedAttention:
    """A change of an attention, given its arguments and the timesteps [B]: q, k, v and probabilities are quantized."""

    operands: tuple[QuantizedEdge, QuantizedEdge, QuantizedEdge]
    probabilities: tuple[Tensor, Tensor]
    """Scales and zero points."""

    @staticmethod
    def edges(node: fx.Node) -> list[str]:
        """The names of the edges that are quantized: q, k, v, the probabilities."""
        return [*(operand(node, i).name for i in range(3)), softmax(node.name)]

    @staticmethod
    def of(program: Program, fits: FitCache, node: fx.Node, bits: int) -> QuantizedAttention:
        """The change of the attention of that node."""
        *names, probabilities = QuantizedAttention.edges(node)
        q, k, v = (QuantizedEdge.of(program, fits, STATIC, name, bits) for name in names)
        return QuantizedAttention((q, k, v), fits.activation_parameters(program, probabilities, bits))

    def __call__(self, args: Sequence[Tensor], timestep: Tensor) -> Tensor:
        """The changed value, where the arguments are."""
        heads, scale, mask = attention_arguments(args)
        q, k, v = (change(value, timestep) for change, value in zip(self.operands, args[:3], strict=True))
        first = self.operands[0]
        group = ops.time_group(timestep, first.boundaries).to(q.device)
        scales, zeros = (table.to(q.device) for table in self.probabilities)
        return ops.fake_quantize_attention(q, k, v, group, scales, zeros, heads, scale, mask, first.bits)
