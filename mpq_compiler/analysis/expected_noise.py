"""The noise that a plan stands for, and the noise there is: in weights, in quantized tensors, at the output of a call.

What is expected is always *plain rounding* at the planned width, done here and not taken from the pass that is judged:
a weight on the levels that span its rows (`Format.start`), an activation between the extremes of calibration. Passes
look for something better; what is worse by half a bit (twice the power) has lost what the plan paid for.
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
from mpq_compiler.formats.base import output_error, stored_scale
from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import attention_arguments
from mpq_compiler.ir.graph import function_of, softmax, weight_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import ActivationPlan, Program
from mpq_compiler.quantization.fitting import moments
from mpq_compiler.quantization.statistics import Calibration

HALF_ROUNDING = 2.0**-11
"""Unit roundoff of f16: scales and offsets are known no better."""
SUSPECTS = 8
"""Rows of a weight that are compared with all other rows."""


def rows(value: Tensor) -> Tensor:
    """A weight [O, ...] as f32 [O, K]."""
    return value.reshape(len(value), -1).to(torch.float32)


def constant(program: Program, node: fx.Node) -> Tensor:
    """The value of a node that depends on stored tensors alone."""
    interpreter = Interpreter(program)
    env: dict[fx.Node, Any] = {}

    def value(n: fx.Node) -> Any:
        if n not in env:
            for source in n.all_input_nodes:
                value(source)
            env[n] = interpreter.evaluate(n, env)
        return env[n]

    return value(node)


# --- weights ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Errors:
    """Squared errors of a weight [O, K], in the weight itself and in the layer's output over calibration."""

    rows: Tensor
    """[O, 2]"""
    groups: Tensor
    """[J, 2], what each K-group makes by itself."""


def errors(difference: Tensor, gram: Tensor | None, segments: tuple[int, ...]) -> Errors:
    """Those of ``difference`` [O, K]."""
    found = _powers(difference, gram)
    return Errors(found, found.sum(0)[None] if len(segments) == 1 else _by_group(difference, gram, segments))


@dataclass(frozen=True)
class Plain:
    """Plain rounding of a weight: the levels of `Format.start`."""

    error: Errors
    signal: Errors
    """Of the weight against nothing."""
    segments: tuple[int, ...]
    missing: int
    """Bits that are still to come: the start of a residual format is its base alone."""

    def expected(self, settled: bool) -> Errors:
        """The errors to expect: 6 dB less for each bit that came with a branch, no less than f16 parameters make."""
        gain = 4.0 ** (-self.missing if settled else 0)

        def of(error: Tensor, signal: Tensor) -> Tensor:
            return torch.maximum(error * gain, signal * HALF_ROUNDING**2).clamp_min(1e-30)

        groups = of(self.error.groups, self.signal.groups)
        groups = torch.maximum(groups, groups.mean(0))  # of a group that hardly counts nothing is expected
        return Errors(of(self.error.rows, self.signal.rows), groups)


def plain_rounding(weight: Tensor, format_name: str, gram: Tensor | None) -> Plain:
    """Of weight [O, ..., C] in a format."""
    chosen = formats.get(format_name)
    start, segments, own = chosen.start(weight), chosen.segments(weight.shape[-1]), rows(weight)
    lut = getattr(start, "lut", None)
    missing = chosen.index_bits - (lut.shape[1] - 1).bit_length() if lut is not None else 0
    error = errors(rows(start.dequantize()) - own, gram, segments)
    return Plain(error, errors(own, gram, segments), segments, missing)


@dataclass(frozen=True)
class WeightNoise:
    """What a quantized weight has of it, and what it should have."""

    measured: Errors
    expected: Errors
    signal: Errors
    suspects: tuple[tuple[int, float, int, float], ...]
    """(row, times the expected noise, the other row it is nearest to, its distance from that over that from its own) of
    the noisiest rows."""

    @property
    def ratio(self) -> float:
        """How many times the expected noise there is, in the measure that is kinder: a fit may trade one for other."""
        return float((self.measured.rows.sum(0) / self.expected.rows.sum(0)).min())

    @property
    def groups(self) -> Tensor:
        """The same of each K-group, [J]."""
        return (self.measured.groups / self.expected.groups).amin(1)

    def relative(self, measure: int) -> tuple[float, float]:
        """Noise over signal, measured and expected: in the weight (0), in the layer's output (1)."""
        power = float(self.signal.rows[:, measure].sum().clamp_min(1e-30))
        measured, expected = (float(e.rows[:, measure].sum()) / power for e in (self.measured, self.expected))
        return measured, expected


def weight_noise(
    weight: Tensor, quantized: Tensor, gram: Tensor | None, plain: Plain, settled: bool
) -> WeightNoise:
    """Of ``quantized`` against ``weight`` [O, ..., C]; ``settled``: its codes are final, and its branch is there."""
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
    """Of the static quantizer of an edge, by time group [G]: relative to the power of its calibration values."""

    scale: Tensor
    zero_point: Tensor
    measured: Tensor
    expected: Tensor
    """Of the range between the extremes, shrunken where that is better."""


def table_noise(program: Program, edge: str, plan: ActivationPlan) -> TableNoise | None:
    """The noise of an edge's tables on the values that calibration kept; None where it kept none."""
    calibration: Calibration | None = program.facts.get("calibration")
    if calibration is None or edge not in calibration.edges or plan.scale is None:
        return None
    scale = program.tensors[plan.scale]
    zero = torch.zeros_like(scale) if plan.zero_point is None else program.tensors[plan.zero_point]
    group = ops.time_group(calibration.inputs["timestep"], program.facts["time-groups"])
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
    """``value`` as its plan says, in f32."""
    if plan.scale is None:
        return ops.dynamic_fake_quantize(value, plan.bits)
    group, scale = ops.time_group(timestep, program.facts["time-groups"]), program.tensors[plan.scale]
    if plan.exponent is not None:
        return ops.fake_quantize_float(value, scale, group, plan.exponent, plan.bits)
    return ops.fake_quantize(value, scale, program.tensors[str(plan.zero_point)], group, plan.bits)


# --- calls --------------------------------------------------------------------------------------------------


def expected_of_call(
    planned: Program, node: fx.Node, values: Mapping[str, Any], timestep: Tensor
) -> float | None:
    """Relative noise power at the output of a float call when what it reads is quantized as planned.

    ``planned`` has the plans, ``values`` are those of its run. None where nothing that the call reads has a plan, and
    it is no attention that computes coarsely.
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
    if (kind := planned.facts.get("numerics", {}).get(node.name)) is not None:
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
    """The second moments under which the errors of a call's weight count (`fitting.moments`)."""
    return moments(program, call) if "calibration" in program.facts else None
