"""The power of an error beside that of the signal."""

from __future__ import annotations

from torch import Tensor


def noise_power(output: Tensor, reference: Tensor, weights: Tensor | None = None) -> float:
    """Squared error summed over everything, relative to the squared reference: the inverse of the SQNR.

    ``weights`` [N] say how much each of the N outputs counts, in both.
    """
    squares = [(output.double() - reference.double()).square(), reference.double().square()]
    error, power = (x.sum() if weights is None else x.flatten(1).sum(1) @ weights.double() for x in squares)
    return float(error / power.clamp_min(1e-300))
