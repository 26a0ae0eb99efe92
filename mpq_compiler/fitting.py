"""Quantized weights and activation parameters fitted on calibration statistics, kept once computed."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from mpq_compiler import formats, ops
from mpq_compiler.calibration import Calibration
from mpq_compiler.formats import activation, stored_type
from mpq_compiler.pass_manager import Session
from mpq_compiler.program import Program, operand

KEPT_ELEMENTS = 1 << 20
"""Larger weights are fitted again where they are asked for again, rather than held in every format."""


def rows_of(program: Program, weight: str) -> Tensor:
    """A stored weight as f32 [O, K]."""
    tensor = program.tensors.read(weight)
    return tensor.reshape(len(tensor), -1).contiguous()


def bias_of(call: fx.Node) -> fx.Node | None:
    """The node of a call's bias, where it is a stored tensor."""
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def fitted(program: Program, call: fx.Node, weight: str, format_name: str) -> formats.QuantizedWeight:
    """The weight of a call in a format, with the least error of the layer's output over the calibration's rows.

    Where the layer has a bias, the mean error is left to `corrected_bias`: moments are then taken about the mean.
    """
    kept = program.facts.setdefault("fits", {})
    if (weight, format_name) not in kept:
        calibration: Calibration = program.facts["calibration"]
        gram = calibration.grams.get(call.name)
        if gram is not None and bias_of(call) is not None:
            mean = calibration.means[call.name]
            gram = gram - (mean.square() if gram.dim() == 1 else torch.outer(mean, mean))
        fit = formats.get(format_name).fit(rows_of(program, weight), gram)
        if fit.codes.numel() > KEPT_ELEMENTS:
            return fit
        kept[weight, format_name] = fit
    return kept[weight, format_name]


def corrected_bias(program: Program, call: fx.Node, weight: str, quantized: formats.QuantizedWeight) -> Tensor | None:
    """The bias that takes up the mean of the output error, ``b + (W - W_q) E[x]`` (Nagel 2019, section 4.2)."""
    bias, mean = bias_of(call), program.facts["calibration"].means.get(call.name)
    if bias is None or mean is None:
        return None
    error = rows_of(program, weight) - quantized.dequantize()
    return program.tensors.read(str(bias.target)) + error @ mean


def unsettled(program: Program) -> list[tuple[fx.Node, fx.Node, str]]:
    """Fake-quantized weights whose codes are still open: (quantizer, first call that reads it, planned format)."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target is ops.fake_quantize_weight:
            path = str(operand(node, 0).target).split(":")[0]
            found.append((node, next(iter(node.users)), program.weights[path].format))
    return found


def fit_unsettled(
    program: Program, session: Session, title: str, kind: type[formats.Format] = formats.Format
) -> list[tuple[fx.Node, formats.QuantizedWeight]]:
    """(quantizer, fit) of the open weights whose planned format is of ``kind``, in graph order; fitted by all jobs."""
    chosen = [u for u in unsettled(program) if isinstance(formats.get(u[2]), kind)]
    with session.track(title, len(chosen)) as advance:

        def fit(open_weight: tuple[fx.Node, fx.Node, str]) -> tuple[fx.Node, formats.QuantizedWeight]:
            quantizer, call, name = open_weight
            found = fitted(program, call, str(operand(quantizer, 0).target), name)
            advance(1)
            return quantizer, found

        return session.map(fit, chosen)


def settle(program: Program, quantizer: fx.Node, value: fx.Node, quantized: formats.QuantizedWeight) -> None:
    """Replaces an open weight by ``value``, whose levels are ``quantized``, and corrects the bias of its calls."""
    weight = str(operand(quantizer, 0).target)
    for call in list(quantizer.users):
        corrected, bias = corrected_bias(program, call, weight, quantized), bias_of(call)
        if corrected is not None and bias is not None:
            name = str(bias.target).split(":")[0] + ":corrected"
            with program.graph.inserting_before(call):
                new = program.graph.get_attr(program.tensors.add(name, stored_type(corrected)))
            call.replace_input_with(bias, new)
    quantizer.replace_all_uses_with(value)
    name = quantizer.name
    program.graph.erase_node(quantizer)
    value.name = name


def activation_parameters(program: Program, edge: str, bits: int) -> tuple[Tensor, Tensor]:
    """Scale f16 [G] and zero point u8 [G] of an edge, by least squared error on its values of each time group."""
    kept = program.facts.setdefault("activation-fits", {})
    if (edge, bits) not in kept:
        calibration: Calibration = program.facts["calibration"]
        boundaries = program.facts["time-groups"]
        group = ops.time_group(calibration.inputs["timestep"], boundaries)
        statistics = calibration.edges[edge]
        found = []
        for g in range(len(boundaries) + 1):
            rows = group == g
            low, high = statistics.low[rows].min(), statistics.high[rows].max()
            found.append(activation.fit(statistics.values[rows].flatten(), low, high, bits))
        kept[edge, bits] = torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])
    return kept[edge, bits]
