"""The power of an error beside that of the signal: of one output, of a part of the inputs, of a whole program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.analysis.time_weights import by_gains
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization.statistics import fingerprint
from mpq_compiler.support.execution import RunContext, batches

HELD_BYTES = 4 << 30
"""Memory for the values of the unchanged program, from which each measurement starts."""
DIGITS = 6
"""Significant digits kept of a loss, so that the last bits of a sum never decide an allocation."""


def rounded(value: float) -> float:
    """The value in `DIGITS` significant digits, as losses are kept and compared."""
    return float(f"{value:.{DIGITS - 1}e}")


def noise_power(output: Tensor, reference: Tensor, weights: Tensor | None = None) -> float:
    """Squared error summed over everything, relative to the squared reference: the inverse of the SQNR.

    ``weights`` [N] say how much each of the N outputs counts, in both.
    """
    squares = [(output.double() - reference.double()).square(), reference.double().square()]
    error, power = (x.sum() if weights is None else x.flatten(1).sum(1) @ weights.double() for x in squares)
    return float(error / power.clamp_min(1e-300))


def mean_power(powers: Sequence[float], sizes: Sequence[float]) -> float:
    """The mean of noise powers of parts of the inputs, weighted by the sizes of the parts, rounded."""
    return rounded(sum(power * size for power, size in zip(powers, sizes, strict=True)) / sum(sizes))


def input_weights(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """How much each input counts, f64 [N]: by what errors at its time do to images, where that is known, else 1."""
    timesteps = inputs["timestep"]
    if "time-gains" not in program.facts:
        return torch.ones(len(timesteps), dtype=torch.float64)
    return by_gains(timesteps, program.facts["time-gains"])


def inputs_held(program: Program) -> int:
    """How many inputs' values fit in `HELD_BYTES` at once; a measurement is split where that is not all of them."""
    values = [v for v in shapes(program, 1).values() if isinstance(v, Tensor)]
    return max(1, HELD_BYTES // sum(v.numel() * v.element_size() for v in values))


def measurement_key(program: Program, inputs: dict[str, Tensor], count: int) -> str:
    """The key of measured noise powers on ``count`` inputs: everything that they depend on but the change itself."""
    gains = program.facts.get("time-gains", "")
    return fingerprint(program, inputs, f"2 {min(count, inputs_held(program))}{gains}")


def noise_of_program(program: Program, changed: Program, inputs: int, context: RunContext) -> float:
    """The relative noise power of a ``changed`` program, measured as those of single changes to ``program`` are.

    inputs: so many of its calibration inputs are run.
    """
    parts = list(batches(program.facts["calibration"].select(inputs), inputs_held(program)))

    def power(part: dict[str, Tensor]) -> float:
        return noise_power(run(changed, part), run(program, part), input_weights(program, part))

    return mean_power(context.map(power, parts), [float(input_weights(program, part).sum()) for part in parts])
