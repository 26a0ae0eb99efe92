"""Weights of calibration inputs by what an error at their time costs the images."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def by_gains(timesteps: Tensor, gains: Sequence[tuple[float, float]]) -> Tensor:
    """The gains at timesteps [N] as f64 [N], of (timestep, gain) by ascending timestep; logarithms are interpolated."""
    known = np.array(gains)
    return torch.from_numpy(np.exp(np.interp(timesteps.double().numpy(), known[:, 0], np.log(known[:, 1]))))
