"""Powers and differences in decibels."""

from __future__ import annotations

import math

import numpy as np


def decibels(power: float) -> float | None:
    """A power relative to 1 in dB; None where it is zero or not finite."""
    return 10 * math.log10(power) if 0 < power < math.inf else None


def sqnr(reference: np.ndarray, value: np.ndarray) -> float:
    """The SQNR in dB, 10 log10(sum y^2 / sum (y - yq)^2), over all elements together, in f64.

    Infinite where both are equal, and minus infinity where there is no signal, or no finite noise.
    """
    y, yq = np.asarray(reference, np.float64), np.asarray(value, np.float64)
    signal, noise = float(np.square(y).sum()), float(np.square(y - yq).sum())
    if noise == 0:
        return math.inf
    return 10 * math.log10(signal / noise) if signal > 0 and math.isfinite(noise) else -math.inf
