"""Changes whose losses are compared: one weight, one tensor edge or one attention quantized, all else in float."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import attention_arguments
from mpq_compiler.ir.graph import operand, softmax
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.quantization.fitting import FitCache, Rounding, bias_of, corrected_bias, fit_formats, moments, rows_of

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


def weight_errors(program: Program, fits: FitCache, task: Task) -> Tensor:
    """What a layer's weight [O, K] changes by."""
    name = str(operand(task.node, 1).target)
    fit = fits.fitted(program, task.node, name, str(task.choice), task.rounding)
    return fit.dequantize() - rows_of(program, name)


def row_errors(program: Program, tasks: Sequence[Task], picked: Tensor) -> dict[str, Tensor]:
    """What a layer's weight [O, K] changes by in ``picked`` rows alone, by the names of tasks, each a format of it."""
    if not tasks:
        return {}
    node, rounding = tasks[0].node, tasks[0].rounding
    some = program.tensors.some_rows(str(operand(node, 1).target), picked)
    found = fit_formats(some, [str(task.choice) for task in tasks], moments(program, node), rounding)
    return {task.name: found[str(task.choice)].dequantize() - some.flatten(1) for task in tasks}


def quantized_edge(
    program: Program, fits: FitCache, kind: str, edge: str, bits: int, value: Tensor, timestep: Tensor
) -> Tensor:
    """The value [B, ...] of an edge, quantized as ``kind`` says, given the timesteps [B]."""
    if kind == PER_TOKEN:
        return ops.dynamic_fake_quantize(value, bits)
    group = ops.time_group(timestep, program.facts[TIME_GROUPS])
    if kind == SMALL_FLOAT:
        exponent, table = fits.float_parameters(program, edge, bits)
        return ops.fake_quantize_float(value, table, group, exponent, bits)
    return ops.fake_quantize(value, *fits.activation_parameters(program, edge, bits), group, bits)


def quantized_attention(
    program: Program, fits: FitCache, node: fx.Node, bits: int, args: Sequence[Tensor], timestep: Tensor
) -> Tensor:
    """The value of an attention whose q, k, v and probabilities are quantized.

    args: the values of its arguments. timestep: [B].
    """
    heads, scale, mask = attention_arguments(args)
    q, k, v = (
        quantized_edge(program, fits, STATIC, operand(node, i).name, bits, args[i], timestep) for i in range(3)
    )
    group = ops.time_group(timestep, program.facts[TIME_GROUPS])
    tables = fits.activation_parameters(program, softmax(node.name), bits)
    return ops.fake_quantize_attention(q, k, v, group, *tables, heads, scale, mask, bits)
