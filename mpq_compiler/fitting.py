"""Quantized weights and activation parameters fitted on calibration statistics, kept once computed."""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import calls, formats, ops
from mpq_compiler.calibration import GPTQ, GRAM_COLUMNS, IN_ORDER, LEARNED, Calibration
from mpq_compiler.costs import stored_dtype
from mpq_compiler.formats import activation
from mpq_compiler.gptq import gptq
from mpq_compiler.learned_rounding import learned
from mpq_compiler.pass_manager import Session
from mpq_compiler.program import Program, operand, part_of

KEPT_ELEMENTS = 1 << 20
"""Larger weights are fitted again where they are asked for again, rather than held in every format."""

CONSTANT = 1e-5
"""Share of the second moments up to which those about the mean are taken for rounding."""

REST = "rest"
"""The part of a weight that is left to the base of a low-rank format: the weight less its branch."""


def rows_of(program: Program, weight: str) -> Tensor:
    """A stored weight as f32 [O, K]."""
    tensor = program.tensors.read(weight)
    return tensor.reshape(len(tensor), -1).contiguous()


def bias_of(call: fx.Node) -> fx.Node | None:
    """The node of a call's bias, where it is a stored tensor."""
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def moments(program: Program, call: fx.Node) -> Tensor | None:
    """The gram that a call's weight is fitted under; None where calibration has none.

    Where the layer has a bias, the mean error is left to `corrected_bias`: moments are then taken about the mean.
    """
    calibration: Calibration = program.facts["calibration"]
    gram = calibration.grams.get(call.name)
    if gram is None or bias_of(call) is None:
        return gram
    return _about(gram, calibration.means[call.name])


@functools.lru_cache(maxsize=1)  # the same tensor for all formats of a layer: `gptq` keeps what it makes of it
def _about(gram: Tensor, mean: Tensor) -> Tensor:
    """Second moments about the mean; the gram itself where nothing but rounding would be left of it.

    So it is with a layer that always reads the same, as the time embedding of a model of one step does.
    """
    squares = gram if gram.dim() == 1 else gram.diagonal()
    if float((squares - mean.square()).sum()) <= CONSTANT * float(squares.sum()):
        return gram
    return gram - (mean.square() if gram.dim() == 1 else torch.outer(mean, mean))


class Rounding(StrEnum):
    """How codes are chosen at the levels of a fit (`passes/round_weights.py`)."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    GPTQ_IN_ORDER = "gptq-in-order"
    LEARNED = "learned"

    @property
    def quick(self) -> Rounding:
        """What stands for it where many roundings are compared: GPTQ comes close to learning, in a fraction of time."""
        return Rounding.GPTQ if self == Rounding.LEARNED else self

    @classmethod
    def asked(cls, statistics: frozenset[str]) -> Rounding:
        """What the pipeline's `round-weights` asks for."""
        if LEARNED in statistics:
            return cls.LEARNED
        if GPTQ not in statistics:
            return cls.NEAREST
        return cls.GPTQ_IN_ORDER if IN_ORDER in statistics else cls.GPTQ

    def __call__(self, fit: formats.Fit, rows: Tensor, gram: Tensor | None) -> formats.Fit:
        """The fit of rows [O, K] with other codes; those of FP8, and where the gram is not whole, stay the nearest."""
        if self == Rounding.NEAREST or gram is None or gram.dim() == 1:
            return fit
        if isinstance(fit, formats.LowRankWeight):
            base = self(fit.base, rows - fit.branch, gram)
            assert isinstance(base, formats.QuantizedWeight)
            return replace(fit, base=base)
        if not isinstance(fit, formats.QuantizedWeight):
            return fit
        if self == Rounding.LEARNED:
            codes = learned(rows, fit.merged(), gram).codes
        else:
            codes = gptq(rows, fit.merged(), gram, order=self == Rounding.GPTQ).codes
        return replace(fit, codes=codes) if fit.signs is None else replace(fit, codes=codes >> 1, signs=codes & 1)


def fitted(
    program: Program, call: fx.Node, weight: str, format_name: str, rounding: Rounding = Rounding.NEAREST
) -> formats.Fit:
    """The weight of a call in a format, with the least error of the layer's output over the calibration's rows."""
    kept, key = program.facts.setdefault("fits", {}), (weight, format_name, rounding)
    if key in kept:
        return kept[key]
    gram = moments(program, call)
    fit = formats.get(format_name).fit(program.tensors.read(weight), gram)
    fit = rounding(fit, rows_of(program, weight), gram)
    if fit.codes.numel() <= KEPT_ELEMENTS:
        kept[key] = fit
    return fit


def corrected_bias(program: Program, call: fx.Node, weight: str, quantized: formats.Fit) -> Tensor | None:
    """The bias that takes up the mean of the output error, ``b + (W - W_q) E[x]`` (Nagel 2019, section 4.2)."""
    bias, mean = bias_of(call), program.facts["calibration"].means.get(call.name)
    if bias is None or mean is None:
        return None
    error = rows_of(program, weight) - quantized.dequantize()
    return program.tensors.read(str(bias.target)) + error @ mean


@dataclass(frozen=True)
class Open:
    """A weight whose codes are still open: its quantizer, the first call that reads it, the format it is to have."""

    quantizer: fx.Node
    call: fx.Node
    format: str

    @property
    def weight(self) -> str:
        """Store name of the float weight."""
        return str(operand(self.quantizer, 0).target)

    @property
    def path(self) -> str:
        """The parameter's name in the model."""
        return self.weight.split(":")[0]


def unsettled(program: Program) -> list[Open]:
    """The fake-quantized weights, in graph order. Of a low-rank format whose branch is there, the base is left."""
    found = []
    for node in program.graph.nodes:
        if node.op == "call_function" and node.target in calls.OPEN_LEVELS:
            name = str(operand(node, 0).target)
            planned = formats.get(program.weights[name.split(":")[0]].format)
            if part_of(name) == REST and isinstance(planned, formats.LowRankFormat):
                planned = planned.base
            found.append(Open(node, next(iter(node.users)), planned.name))
    return found


def fit_unsettled(
    program: Program, session: Session, title: str, kind: type[formats.Format] = formats.Format
) -> list[tuple[Open, Any]]:
    """The open weights whose planned format is of ``kind``, with their fits, in graph order; fitted by all jobs.

    Codes are rounded as the pipeline asks for; where that needs more than is known, there is a note.
    """
    chosen = [u for u in unsettled(program) if isinstance(formats.get(u.format), kind)]
    rounding = Rounding.asked(session.statistics)
    if rounding != Rounding.NEAREST:
        _note_nearest(program, chosen, rounding)
    with session.track(title, len(chosen)) as advance:

        def fit(weight: Open) -> tuple[Open, Any]:
            found = fitted(program, weight.call, weight.weight, weight.format, rounding)
            advance(1)
            return weight, found

        return session.map(fit, chosen)


def _note_nearest(program: Program, chosen: list[Open], rounding: Rounding) -> None:
    grams = program.facts["calibration"].grams
    left = [weight.path for weight in chosen if weight.call.name not in grams or grams[weight.call.name].dim() == 1]
    if left:
        method = "learned rounding" if rounding == Rounding.LEARNED else "GPTQ"
        program.note(
            f"{method} needs the second moments of all pairs of inputs, which are kept up to {GRAM_COLUMNS} inputs: "
            f"codes are those of the nearest levels in {', '.join(left)}"
        )


def attributes(program: Program, prefix: str, **tensors: Tensor | None) -> list[fx.Node | None]:
    """Reads of new stored tensors ``prefix + name``, at the place of insertion; None where there is none."""
    add, read = program.tensors.add, program.graph.get_attr
    return [None if tensor is None else read(add(prefix + name, tensor)) for name, tensor in tensors.items()]


def settle(program: Program, weight: Open, value: fx.Node, quantized: formats.Fit) -> None:
    """Replaces an open weight by ``value``, whose levels are ``quantized``, and corrects the bias of its calls.

    Calls that share weight and bias share the corrected bias: the mean of what each would have. facts["latents"] keeps
    the store name of the float weight by that of the value's node, for training.
    """
    quantizer = weight.quantizer
    readers: dict[fx.Node, list[fx.Node]] = {}
    for call in quantizer.users:
        if (bias := bias_of(call)) is not None:
            readers.setdefault(bias, []).append(call)
    for bias, sites in readers.items():
        found = [corrected_bias(program, call, weight.weight, quantized) for call in sites]
        corrections = [c for c in found if c is not None]
        if corrections and set(bias.users) == set(sites):  # else other layers read it as it is
            corrected = torch.stack(corrections).mean(0)
            name = str(bias.target).split(":")[0] + ":corrected"
            with program.graph.inserting_before(bias):
                new = program.graph.get_attr(program.tensors.add(name, corrected.to(stored_dtype(name, corrected))))
            bias.replace_all_uses_with(new)
    name = quantizer.name
    program.facts["latents"] = {**program.facts.get("latents", {}), name: weight.weight}
    quantizer.replace_all_uses_with(value)
    program.graph.erase_node(quantizer)
    value.name = name


def float_parameters(program: Program, edge: str, bits: int) -> tuple[int, Tensor]:
    """Bits of exponent and scales f16 [G] of an edge in small floats, by least squared error on its values."""
    kept = program.facts.setdefault("activation-fits", {})
    if (edge, bits, "floating") not in kept:
        calibration: Calibration = program.facts["calibration"]
        boundaries = program.facts["time-groups"]
        group, statistics = ops.time_group(calibration.inputs["timestep"], boundaries), calibration.edges[edge]
        chosen = [group == g for g in range(len(boundaries) + 1)]
        magnitude = torch.maximum(-statistics.low, statistics.high)
        peaks = torch.stack([magnitude[rows].max() for rows in chosen])
        values = [statistics.values[rows].flatten() for rows in chosen]
        kept[edge, bits, "floating"] = activation.fit_floats(values, peaks, bits)
    return kept[edge, bits, "floating"]


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
