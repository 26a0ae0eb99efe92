"""Static activation quantizers: an f16 scale and a u8 zero point for each time group of a tensor edge."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq_compiler.formats.base import stored_scale

SHRINK = tuple(1 - 0.06 * i for i in range(12))
"""Fractions of the observed range that the search tries, first for both ends, then for each."""


def parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale f16 and zero point u8 of the ranges [low, high] (any shape), widened to contain zero.

    Real zero is a code, so padding and the tails of SiLU are exact.
    """
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = stored_scale((high - low) / (2**bits - 1))
    zero = torch.round(-low / scale.to(torch.float32)).clamp(0, 2**bits - 1)
    return scale, zero.to(torch.uint8)


def error(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """Sum of squared errors over the last dimension of values [..., S] under scale and zero [...]."""
    s, z = scale.to(torch.float32)[..., None], zero.to(torch.float32)[..., None]
    codes = torch.maximum(torch.minimum(torch.round(values / s), (2**bits - 1) - z), -z)
    return (codes * s - values).square().sum(-1)


def least_error(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """A quick bound [...]: the least error on values [..., S] when both ends of the ranges [low, high] [...] shrink."""
    return torch.stack([error(values, *parameters(low * s, high * s, bits), bits) for s in SHRINK[::2]]).amin(0)


def fit(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """The quantizer of least squared error on ``values`` [..., S] among shrunken ranges.

    Returns scale f16 [...], zero point u8 [...] and the error [...].
    """
    ends = low.clone(), high.clone()
    scale, zero = parameters(*ends, bits)
    least = error(values, scale, zero, bits)
    for shrink_low, shrink_high in ((True, True), (True, False), (False, True)):
        start = ends[0].clone(), ends[1].clone()
        for shrink in SHRINK[1:]:
            lo = start[0] * shrink if shrink_low else start[0]
            hi = start[1] * shrink if shrink_high else start[1]
            s, z = parameters(lo, hi, bits)
            e = error(values, s, z, bits)
            better = e < least
            least = torch.where(better, e, least)
            scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
            ends = torch.where(better, lo, ends[0]), torch.where(better, hi, ends[1])
    return scale, zero, least
