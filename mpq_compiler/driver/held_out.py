"""Inputs that calibration has not seen: what a compilation is judged on, and what dumps sample."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq_compiler.driver.options import Options
from mpq_compiler.frontend import calibration_file, trajectories
from mpq_compiler.frontend.denoiser import Denoiser

HELD_OUT = 64
"""Teacher-forced inputs on which a compiled denoiser is judged, none of them seen in calibration."""
HELD_OUT_STEPS = 8
"""Of the trajectories that they are of, at most."""


def held_out(denoiser: Denoiser, options: Options) -> dict[str, Tensor]:
    """Inputs over all time steps that calibration has not seen: `HELD_OUT`, or what the calibration file holds."""
    if options.calibration is not None:
        inputs = calibration_file.split(calibration_file.load(denoiser, options.calibration))[1]
        return spread(inputs, HELD_OUT)
    steps = min(HELD_OUT_STEPS, options.steps or HELD_OUT_STEPS)
    return trajectories.record_calibration(denoiser, -(-HELD_OUT // steps), steps, options.seed + 1)


def spread(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most ``count`` rows, evenly spread."""
    rows = len(next(iter(inputs.values())))
    index = torch.linspace(0, rows - 1, min(count, rows)).round().long()
    return {name: value[index] for name, value in inputs.items()}
