"""Relative noise power, error over signal: of one output, of a part of the inputs, of a whole program."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.analysis.time_weights import TIME_GAINS, by_gains
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.sizes import HUGE, LARGE
from mpq_compiler.quantization.statistics import CALIBRATION, fingerprint
from mpq_compiler.support.execution import BATCH, RunContext, batches

INPUTS, INPUTS_LARGE, INPUTS_HUGE = 32, 16, 8
"""The calibration inputs on which losses are measured, and of models with more than `LARGE` and `HUGE` parameters."""
INPUTS_MIXED, SMALL = 128, 10_000_000
"""Those where widths of activations are chosen, of models with up to so many parameters: losses of few bits differ more
from one input to the next. On `fashion-unet` at W4A4 plans by 128 inputs draw images of 16.8 dB, by 32 of 14.3."""
HELD_BYTES = 4 << 30
"""Bytes of memory for the values of the unchanged program, from which each measurement starts."""
PIECE = 4
"""The inputs that run together where those of all parts are many."""
DIGITS = 6
"""The significant digits of a loss, so few that the last bits of a sum never decide an allocation."""


def rounded(value: float) -> float:
    """Rounds a value to `DIGITS` significant digits, in which losses are kept and compared."""
    return float(f"{value:.{DIGITS - 1}e}")


def usual_inputs(parameters: int, mixed: bool = False) -> int:
    """The number of calibration inputs that measure the losses of a model with so many parameters.

    mixed: widths of activations are chosen by them.
    """
    if mixed and parameters <= SMALL:
        return INPUTS_MIXED
    return INPUTS_HUGE if parameters > HUGE else INPUTS_LARGE if parameters > LARGE else INPUTS


def noise_power(output: Tensor, reference: Tensor, weights: Tensor | None = None) -> float:
    """The summed squared error over the summed squared reference: the inverse of the SQNR.

    Args:
        output: [N, ...].
        reference: [N, ...].
        weights: [N], how much each of the N outputs counts, in error and reference both; None counts all alike.
    """
    squares = [(output.double() - reference.double()).square(), reference.double().square()]
    error, power = (x.sum() if weights is None else x.flatten(1).sum(1) @ weights.double() for x in squares)
    return float(error / power.clamp_min(1e-300))


def mean_power(powers: Sequence[float], sizes: Sequence[float]) -> float:
    """Averages the noise powers of parts of the inputs, weighted by the parts' sizes; the result is `rounded`."""
    return rounded(sum(power * size for power, size in zip(powers, sizes, strict=True)) / sum(sizes))


def input_weights(program: Program, inputs: dict[str, Tensor]) -> Tensor:
    """The weight of each input, f64 [N]: how much an error at its time costs images, where that is known, else 1."""
    timesteps = inputs["timestep"]
    if TIME_GAINS not in program.facts:
        return torch.ones(len(timesteps), dtype=torch.float64)
    gains = program.facts[TIME_GAINS]
    return by_gains(timesteps, gains)


def inputs_held(program: Program) -> int:
    """The number of inputs all of whose values fit in `HELD_BYTES`; a measurement on more inputs is split."""
    values = [v for v in shapes(program, 1).values() if isinstance(v, Tensor)]
    return max(1, HELD_BYTES // sum(v.numel() * v.element_size() for v in values))


def measurement_key(program: Program, inputs: dict[str, Tensor], count: int, device: str = "cpu") -> str:
    """The cache key of noise powers on ``count`` inputs: a digest of all that they depend on but the change itself."""
    gains, where = program.facts.get(TIME_GAINS, ""), "" if device == "cpu" else f" {device}"
    return fingerprint(program, inputs, f"7 {min(count, inputs_held(program))}{gains}{where}")


def noise_of_program(program: Program, changed: Program, inputs: int, context: RunContext) -> float:
    """The relative noise power of a changed program, measured like the losses of single changes.

    Args:
        program: the unchanged program, with calibration, which has its outputs.
        changed: the changed program.
        inputs: the number of calibration inputs to run.
        context: runs the parts on its jobs and its device.
    """
    calibration, size = program.facts[CALIBRATION], inputs_held(program)
    parts = list(batches(calibration.select(inputs), size))
    expected = calibration.select_outputs(inputs).split(size)
    together = BATCH if len(parts) == 1 else PIECE

    def power(of: tuple[dict[str, Tensor], Tensor]) -> float:
        part, reference = of
        output = torch.cat([run(changed, piece, device=context.device) for piece in batches(part, together)])
        return noise_power(output, reference, input_weights(program, part))

    powers = context.map(power, zip(parts, expected, strict=True))
    return mean_power(powers, [float(input_weights(program, part).sum()) for part in parts])
