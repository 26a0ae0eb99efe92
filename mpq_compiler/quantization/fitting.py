"""Fits weights and activation quantizers on calibration statistics; a fit is cached once computed."""

from __future__ import annotations

import functools
from dataclasses import replace
from enum import StrEnum

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats import activation, low_rank
from mpq_compiler.formats.base import Fit, QuantizedWeight
from mpq_compiler.ir import ops
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization.adaround import adaround
from mpq_compiler.quantization.gptq import gptq
from mpq_compiler.quantization.statistics import Calibration

KEPT_ELEMENTS = 1 << 20
"""The most elements of a weight whose fits are cached; larger weights are fitted again on every request."""

CONSTANT = 1e-5
"""Share of the second moments below which the moments about the mean count as rounding errors."""

REST = "rest"
"""The part of a weight that the base of a low-rank format quantizes: the weight minus its branch."""


def rows_of(program: Program, weight: str) -> Tensor:
    """Reads a stored weight as f32 [O, K]."""
    tensor = program.tensors.read(weight)
    return tensor.reshape(len(tensor), -1).contiguous()


def bias_of(call: fx.Node) -> fx.Node | None:
    """The node of a call's bias where it is a stored tensor, else None."""
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def moments(program: Program, call: fx.Node) -> Tensor | None:
    """The gram under which a call's weight is fitted; None where calibration has none.

    Where the layer has a bias, the gram is taken about the mean, because `corrected_bias` removes the mean error.
    """
    calibration: Calibration = program.facts["calibration"]
    gram = calibration.grams.get(call.name)
    if gram is None or bias_of(call) is None:
        return gram
    return _about(gram, calibration.means[call.name])


@functools.lru_cache(maxsize=1)  # the same tensor for all formats of a layer: `gptq` keeps what it makes of it
def _about(gram: Tensor, mean: Tensor) -> Tensor:
    """The second moments about the mean; the gram itself where only rounding errors would be left.

    This happens for a layer whose input never changes, such as the time embedding of a one-step model.
    """
    squares = gram if gram.dim() == 1 else gram.diagonal()
    if float((squares - mean.square()).sum()) <= CONSTANT * float(squares.sum()):
        return gram
    return gram - (mean.square() if gram.dim() == 1 else torch.outer(mean, mean))


class Rounding(StrEnum):
    """How codes are chosen among the levels of a fit (`passes/round_weights.py`)."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    GPTQ_IN_ORDER = "gptq-in-order"
    LEARNED = "learned"

    @property
    def quick(self) -> Rounding:
        """The rounding that replaces it where many are compared: GPTQ comes close to learning in a fraction of time."""
        return Rounding.GPTQ if self == Rounding.LEARNED else self

    def __call__(self, fit: Fit, rows: Tensor, gram: Tensor | None) -> Fit:
        """Chooses the codes of a fit of rows [O, K]; FP8, and fits without a whole gram, keep the nearest codes."""
        if self == Rounding.NEAREST or gram is None or gram.dim() == 1:
            return fit
        if isinstance(fit, low_rank.LowRankWeight):
            base = self(fit.base, rows - fit.branch, gram)
            assert isinstance(base, QuantizedWeight)
            return replace(fit, base=base)
        if not isinstance(fit, QuantizedWeight):
            return fit
        if self == Rounding.LEARNED:
            codes = adaround(rows, fit.merged(), gram).codes
        else:
            codes = gptq(rows, fit.merged(), gram, order=self == Rounding.GPTQ).codes
        return replace(fit, codes=codes) if fit.signs is None else replace(fit, codes=codes >> 1, signs=codes & 1)


def fitted(
    program: Program, call: fx.Node, weight: str, format_name: str, rounding: Rounding = Rounding.NEAREST
) -> Fit:
    """Fits a call's weight in a format, with the least error of the layer's output over the calibration's rows.

    Args:
        program: has the calibration; its caches keep the fit.
        call: the layer.
        weight: the store name of its weight.
        format_name: the format.
        rounding: how codes are chosen.
    """
    kept, key = program.facts.setdefault("fits", {}), (weight, format_name, rounding)
    if key in kept:
        return kept[key]
    gram = moments(program, call)
    fit = formats.get(format_name).fit(program.tensors.read(weight), gram)
    fit = rounding(fit, rows_of(program, weight), gram)
    if fit.codes.numel() <= KEPT_ELEMENTS:
        kept[key] = fit
    return fit


def corrected_bias(program: Program, call: fx.Node, weight: str, quantized: Fit) -> Tensor | None:
    """The bias that removes the mean output error, ``b + (W - W_q) E[x]`` (Nagel 2019, arXiv 1906.04721, section 4.2).

    None where the layer has no stored bias or no statistics.
    """
    bias, mean = bias_of(call), program.facts["calibration"].means.get(call.name)
    if bias is None or mean is None:
        return None
    error = rows_of(program, weight) - quantized.dequantize()
    return program.tensors.read(str(bias.target)) + error @ mean


def float_parameters(program: Program, edge: str, bits: int) -> tuple[int, Tensor]:
    """Fits small floats to an edge by least squared error: bits of exponent, and scales f16 [G] by time group."""
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
    """Fits an integer quantizer to an edge by least squared error: scale f16 [G], zero point u8 [G] by time group."""
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
