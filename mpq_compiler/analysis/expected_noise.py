"""Expected and measured quantization noise: of weights, of quantized tensors, and at the output of a call.

The expected noise is always that of *plain rounding* at the planned width, computed here and not by the pass that is
judged: a weight on the levels that span its rows (`Format.start`), an activation between the extremes of calibration.
Passes search for something better. Noise of twice that power, half a bit, has lost what the plan paid for.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.formats import activation, contract
from mpq_compiler.formats.base import diagonal, output_error, stored_scale
from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import attention_arguments
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.graph import function_of, softmax, weight_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import TIME_GROUPS, ActivationPlan, Program
from mpq_compiler.quantization.fitting import moments
from mpq_compiler.quantization.statistics import CALIBRATION

HALF_ROUNDING = 2.0**-11
"""The unit roundoff of f16, the precision of stored scales and offsets."""
SUSPECTS = 8
"""The number of noisiest rows of a weight that are compared with all other rows."""


def rows(value: Tensor) -> Tensor:
    """Reshapes a weight [O, ...] to f32 [O, K]."""
    return value.reshape(len(value), -1).to(torch.float32)


def constant(program: Program, node: fx.Node) -> Tensor:
    """Evaluates a node that depends on stored tensors alone."""
    interpreter = Interpreter(program)
    env: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in env:
            for source in n.all_input_nodes:
                value(source)
            env[n] = interpreter.evaluate(n, env)
        return env[n]

    found: Tensor = value(node)
    return found


# --- weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Squared errors of a weight [O, K] in two measures: in the weight, in the layer's output over calibration."""

    rows: Tensor
    """The errors of each row, [O, 2]."""
    groups: Tensor
    """The errors that each K-group makes by itself, [J, 2]."""


def errors(difference: Tensor, gram: Tensor | None, segments: tuple[int, ...]) -> Errors:
    """The squared errors of a weight that is off by ``difference`` [O, K]; gram as in `Format.fit`."""
    found = _powers(difference, gram)
    return Errors(found, found.sum(0)[None] if len(segments) == 1 else _by_group(difference, gram, segments))


@dataclass(frozen=True)
class Plain:
    """The errors of a weight under plain rounding, on the levels of `Format.start`."""

    error: Errors
    signal: Errors
    """The power of the weight itself, in the same two measures."""
    segments: tuple[int, ...]
    """The channel counts of its K-groups."""
    missing: int
    """Bits that the start lacks: a residual format starts with its base alone."""

    def expected(self, settled: bool) -> Errors:
        """The expected errors: 6 dB less for each bit that a branch adds, but at least those of f16 parameters.

        settled: whether the codes are final and the branch is there.
        """
        gain = 4.0 ** (-self.missing if settled else 0)

        def of(error: Tensor, signal: Tensor) -> Tensor:
            return torch.maximum(error * gain, signal * HALF_ROUNDING**2).clamp_min(1e-30)

        groups = of(self.error.groups, self.signal.groups)
        groups = torch.maximum(groups, groups.mean(0))  # of a group that hardly counts nothing is expected
        return Errors(of(self.error.rows, self.signal.rows), groups)


def plain_rounding(weight: Tensor, format_name: str, gram: Tensor | None) -> Plain:
    """The errors of plain rounding of weight [O, ..., C] in a format; gram as in `Format.fit`."""
    chosen = formats.get(format_name)
    start, segments, own = chosen.start(weight), chosen.segments(weight.shape[-1]), rows(weight)
    lut = getattr(start, "lut", None)
    missing = chosen.index_bits - (lut.shape[1] - 1).bit_length() if lut is not None else 0
    error = errors(rows(start.dequantize()) - own, gram, segments)
    return Plain(error, errors(own, gram, segments), segments, missing)


@dataclass(frozen=True)
class WeightNoise:
    """Measured and expected noise of a quantized weight."""

    measured: Errors
    expected: Errors
    signal: Errors
    """The power of the weight itself."""
    suspects: tuple[tuple[int, float, int, float], ...]
    """The noisiest rows: (row, measured over expected noise, nearest other row, its distance over the own row's).

    A quantized row that is nearer to another row of the weight than to its own has probably been swapped.
    """

    @property
    def ratio(self) -> float:
        """Measured over expected noise, in the measure where it is smaller, since a fit may trade one for the other."""
        return float((self.measured.rows.sum(0) / self.expected.rows.sum(0)).min())

    @property
    def groups(self) -> Tensor:
        """The `ratio` of each K-group, [J]."""
        return (self.measured.groups / self.expected.groups).amin(1)

    def relative(self, measure: int) -> tuple[float, float]:
        """Measured and expected noise over signal, in one measure: in the weight (0), in the layer's output (1)."""
        power = float(self.signal.rows[:, measure].sum().clamp_min(1e-30))
        measured, expected = (float(e.rows[:, measure].sum()) / power for e in (self.measured, self.expected))
        return measured, expected


def weight_noise(
    weight: Tensor, quantized: Tensor, gram: Tensor | None, plain: Plain, settled: bool
) -> WeightNoise:
    """Compares a quantized weight with its float weight [O, ..., C] and with plain rounding.

    Args:
        weight: in float.
        quantized: dequantized, of the same shape.
        gram: as in `Format.fit`.
        plain: the errors of plain rounding.
        settled: whether the codes are final and the branch is there.
    """
    own, other = rows(weight), rows(quantized)
    measured, expected = errors(other - own, gram, plain.segments), plain.expected(settled)
    ratios = (measured.rows / expected.rows).amin(1)
    worst = torch.argsort(ratios, descending=True, stable=True)[:SUSPECTS]
    suspects = []
    if len(own) > 1:
        distances = torch.cdist(other[worst].double(), own.double()).square()
        mine = distances.gather(1, worst[:, None])[:, 0]
        distances.scatter_(1, worst[:, None], torch.inf)
        least, index = distances.min(1)
        suspects = [
            (int(row), float(ratios[row]), int(i), float(d / m.clamp_min(1e-30)))
            for row, i, d, m in zip(worst, index, least, mine, strict=True)
        ]
    return WeightNoise(measured, expected, plain.signal, tuple(suspects))


def _by_group(difference: Tensor, gram: Tensor | None, segments: tuple[int, ...]) -> Tensor:
    group = contract.column_segments(segments, difference.shape[1])
    if gram is not None and gram.dim() == 3:
        gram = diagonal(gram)  # K-groups lie across its blocks
    found = []
    for j in range(len(segments)):
        columns = torch.nonzero(group == j).flatten()
        own = gram if gram is None else gram[columns] if gram.dim() == 1 else gram[columns][:, columns]
        found.append(_powers(difference[:, columns], own).sum(0))
    return torch.stack(found)


def _powers(difference: Tensor, gram: Tensor | None) -> Tensor:
    found = difference.square().sum(1)
    output = found if gram is None else output_error(difference, gram).clamp_min(0)
    return torch.stack([found, output], 1).double()


# --- activations --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class TableNoise:
    """Noise of an edge's static quantizer by time group [G], relative to the power of its calibration values."""

    scale: Tensor
    zero_point: Tensor
    measured: Tensor
    expected: Tensor
    """The noise under the range between the extremes, or under a shrunken one where that is better."""


def table_noise(program: Program, edge: str, plan: ActivationPlan) -> TableNoise | None:
    """The noise of an edge's scales on the values that calibration sampled; None where there are none."""
    calibration = program.facts.get(CALIBRATION)
    if calibration is None or edge not in calibration.edges or plan.scale is None:
        return None
    scale = program.tensors[plan.scale]
    zero = torch.zeros_like(scale) if plan.zero_point is None else program.tensors[plan.zero_point]
    group = ops.time_group(calibration.inputs["timestep"], program.facts[TIME_GROUPS])
    statistics = calibration.edges[edge]
    measured, expected = [], []
    for g in range(len(scale)):
        chosen = group == g
        values = statistics.values[chosen].flatten()
        if not len(values):
            measured.append(0.0)
            expected.append(0.0)
            continue
        power = float(values.square().sum().clamp_min(1e-30))
        ends = statistics.low[chosen].min(), statistics.high[chosen].max()
        if plan.exponent is not None:
            largest = max(-ends[0], ends[1]) / contract.float_largest(plan.exponent, plan.bits)
            tried = (scale[g], *(stored_scale(largest * shrink) for shrink in activation.SHRINK[::2]))
            errors = [float(activation.float_error(values, s, plan.exponent, plan.bits)) / power for s in tried]
            measured.append(errors[0])
            expected.append(min(errors[1:]))
            continue
        measured.append(float(activation.error(values, scale[g], zero[g], plan.bits)) / power)
        expected.append(float(activation.least_error(values, *ends, plan.bits)) / power)
    return TableNoise(scale, zero, torch.tensor(measured), torch.tensor(expected))


def quantized_by_plan(program: Program, plan: ActivationPlan, value: Tensor, timestep: Tensor) -> Tensor:
    """Quantizes and dequantizes ``value`` [B, ...] by its plan, given the timesteps [B]."""
    if plan.scale is None:
        return ops.dynamic_fake_quantize(value, plan.bits)
    group, scale = ops.time_group(timestep, program.facts[TIME_GROUPS]), program.tensors[plan.scale]
    if plan.exponent is not None:
        return ops.fake_quantize_float(value, scale, group, plan.exponent, plan.bits)
    return ops.fake_quantize(value, scale, program.tensors[str(plan.zero_point)], group, plan.bits)


# --- calls --------------------------------------------------------------------------------------------------


def expected_of_call(
    planned: Program, node: fx.Node, values: Mapping[str, Any], timestep: Tensor
) -> float | None:
    """The relative noise power at the output of a float call whose operands are quantized as planned.

    Args:
        planned: the program with the plans.
        node: the call.
        values: the value of every node in a run of it.
        timestep: of that run, [B].

    Returns:
        The power; None where no operand has a plan and no reduced-precision numerics are planned for the call.
    """
    weight = weight_of(node)
    path = None if weight is None else weight.split(":")[0]
    any_plan = False

    def value(source: fx.Node) -> Any:
        nonlocal any_plan
        if source.op == "get_attr":
            tensor = planned.tensors.read(str(source.target))
            if str(source.target) == weight and path in planned.weights:
                any_plan = True
                start = formats.get(planned.weights[str(path)].format).start(tensor)
                return start.dequantize().reshape(tensor.shape)
            return tensor
        known = values[source.name]
        if source.name in planned.activations:
            any_plan = True
            return quantized_by_plan(planned, planned.activations[source.name], known, timestep)
        return known

    args: Any = fx.map_arg(node.args, value)
    kwargs = fx.map_arg(node.kwargs, value)
    if (kind := planned.facts.get(ATTENTION_NUMERICS, {}).get(node.name)) is not None:
        any_plan, kwargs = True, {**kwargs, "numerics": kind}
    if not any_plan or not isinstance(values.get(node.name), Tensor):
        return None
    probabilities = planned.activations.get(softmax(node.name))
    if probabilities is None:
        function = function_of(node)
        output = (function if kind is None else ops.NUMERICAL.get(function, function))(*args, **kwargs)
    else:
        q, k, v, *_ = args
        heads, scale, mask = attention_arguments(args)
        p = quantized_by_plan(planned, probabilities, ops.attention_probabilities(q, k, heads, scale, mask), timestep)
        output = ops.join_heads(p @ ops.split_heads(v, heads))
    return noise_power(output, values[node.name])


def gram_of(program: Program, call: fx.Node) -> Tensor | None:
    """The gram under which the errors of a call's weight count (`fitting.moments`); None without calibration."""
    return moments(program, call) if CALIBRATION in program.facts else None
