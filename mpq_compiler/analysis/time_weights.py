"""Weights of calibration inputs: how much an error at their time costs the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.ir.facts import Fact

TIME_GAINS = Fact[list[tuple[float, float]]]("time-gains")
"""(timestep, gain) by ascending timestep: what an error at that time does to the images, at most 1."""


def by_gains(timesteps: Tensor, gains: Sequence[tuple[float, float]]) -> Tensor:
    """Interpolates gains at timesteps [N], in the logarithm: f64 [N].

    gains: (timestep, gain) by ascending timestep.
    """
    known = np.array(gains)
    return torch.from_numpy(np.exp(np.interp(timesteps.double().numpy(), known[:, 0], np.log(known[:, 1]))))
