"""Held-out inputs, which calibration has not seen: a compilation is judged on them, and dumps run on some."""

from __future__ import annotations

from torch import Tensor

from mpq_compiler.driver.options import Options
from mpq_compiler.frontend import calibration_file, trajectories
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.sizes import LARGE
from mpq_compiler.quantization.statistics import spread

HELD_OUT = 64
"""The number of teacher-forced inputs on which a compiled denoiser is judged."""
HELD_OUT_LARGE = 16
"""Their number for models of more than `LARGE` parameters, whose images have many values each."""
HELD_OUT_STEPS = 8
"""The most steps of the trajectories that these inputs come from."""


def judged_on(denoiser: Denoiser) -> int:
    """The number of inputs on which a compiled model is judged, where there are as many."""
    return HELD_OUT_LARGE if denoiser.parameters > LARGE else HELD_OUT


def held_out(denoiser: Denoiser, options: Options) -> dict[str, Tensor]:
    """Collects held-out inputs over all time steps: `HELD_OUT` of them, or fewer where a calibration file has fewer.

    Of models with more than `LARGE` parameters `HELD_OUT_LARGE`.
    """
    count = judged_on(denoiser)
    if options.calibration is not None:
        inputs = calibration_file.split(calibration_file.load(denoiser, options.calibration))[1]
        return spread(inputs, count)
    steps = min(HELD_OUT_STEPS, options.steps or HELD_OUT_STEPS)
    return trajectories.record_calibration(denoiser, -(-count // steps), steps, options.seed + 1)
