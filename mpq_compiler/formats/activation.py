"""Static activation quantizers: an f16 scale and a u8 zero point for each time group of a tensor edge.

Quantizers to small floats have no zero point, and one encoding for all groups (arXiv 2408.06995).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import stored_scale
from mpq_compiler.formats.floating import EXPONENTS, FACTORS

SHRINK = tuple(1 - 0.06 * i for i in range(12))
"""Fractions of the observed range that the search tries, first for both ends together, then for each alone."""

COHERENT = 20.0
"""How often the power counts that a quantizer takes off its tensor as a whole, beside that of its other errors.

What is cut off at the ends makes a tensor a little quieter. That is a small part of its error, but it has the same sign
in all layers and steps, and adds up in the images, where other errors do not.
"""
AT_ONCE = 1 << 16
"""Values whose errors the search computes at once: as many as the CPU's cache holds."""


def parameters(low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Computes scale f16 and zero point u8 of ranges [low, high] (any shape), widened to contain zero.

    Zero is a code, so padding and the tails of SiLU are exact.
    """
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = stored_scale((high - low) / (2**bits - 1))
    zero = torch.round(-low / scale.to(torch.float32)).clamp(0, 2**bits - 1)
    return scale, zero.to(torch.uint8)


def error(values: Tensor, scale: Tensor, zero: Tensor, bits: int) -> Tensor:
    """What values [..., S] lose under scale and zero [...]: the sum of squared errors over the last dimension.

    Of 8 bits that is all. Of fewer, the part along the values themselves counts `COHERENT` times more.
    """
    s, z = scale.to(torch.float32)[..., None], zero.to(torch.float32)[..., None]
    codes = torch.maximum(torch.minimum(torch.round(values / s), (2**bits - 1) - z), -z)
    errors = codes * s - values
    if bits >= 8:
        return errors.square().sum(-1)
    along = (errors * values).sum(-1).square() / values.square().sum(-1).clamp_min(1e-30)
    return errors.square().sum(-1) + COHERENT * along


def least_error(values: Tensor, low: Tensor, high: Tensor, bits: int) -> Tensor:
    """Estimates the error [...] of `fit` quickly: the least on values [..., S] when both ends of the ranges shrink."""
    return torch.stack([error(values, *parameters(low * s, high * s, bits), bits) for s in SHRINK[::2]]).amin(0)


BULK, TAIL = 1 << 13, 1 << 11
"""Sizes of the sample of a time group's magnitudes on which small floats are searched.

The sample has `BULK` magnitudes evenly spaced by rank, and all of the `TAIL` largest, which decide the range. A search
tries 444 pairs of encoding and scale.
"""
LEAST_FLOAT_BITS = 4
"""The fewest bits of a small float: a sign, two of exponent, one of mantissa (one of exponent would be an integer)."""


def exponents(bits: int) -> tuple[int, ...]:
    """The possible bits of exponent of small floats of ``bits``: those that leave a mantissa."""
    return tuple(e for e in EXPONENTS if e < bits - 1)


def float_error(values: Tensor, scale: Tensor, exponent: int, bits: int) -> Tensor:
    """Sum of squared errors over the last dimension of values [..., S] under scale [...]."""
    s = scale.to(torch.float32)[..., None]
    return (contract.round_float(values / s, exponent, bits) * s - values).square().sum(-1)


def fit_floats(values: Sequence[Tensor], peaks: Tensor, bits: int) -> tuple[int, Tensor]:
    """Chooses the small-float encoding of least squared error over all time groups, each with its best scale.

    Every scale maps the largest float to one of 111 fractions of the group's peak (Kuzmin 2022, arXiv 2208.09225,
    section 4).

    Args:
        values: sampled values [S] of each of the G groups.
        peaks: the largest magnitude of each group, f32 [G].
        bits: of a float, the sign among them.

    Returns:
        The bits of exponent, and the scales f16 [G].
    """
    sampled = [_ranked(v) for v in values]
    found: list[tuple[float, int, Tensor]] = []
    for exponent in exponents(bits):
        scales = [stored_scale(peaks * (f / contract.float_largest(exponent, bits))) for f in FACTORS]
        errors = [[_weighed(v, s[g], exponent, bits) for g, v in enumerate(sampled)] for s in scales]
        least = torch.tensor(errors).min(0)
        chosen = torch.stack([scales[i][g] for g, i in enumerate(least.indices.tolist())])
        found.append((float(least.values.sum()), exponent, chosen))
    _, exponent, scale = min(found, key=lambda f: f[0])
    return exponent, scale


def _ranked(values: Tensor) -> tuple[Tensor, Tensor, float]:
    """Samples magnitudes of values [S]: the bulk evenly by rank, the whole tail, and the weight of a bulk sample."""
    magnitudes = values.abs().sort().values
    bulk, tail = magnitudes[:-TAIL], magnitudes[-TAIL:]
    every = max(1, -(-len(bulk) // BULK))
    return bulk[every // 2 :: every], tail, float(every)


def _weighed(ranked: tuple[Tensor, Tensor, float], scale: Tensor, exponent: int, bits: int) -> float:
    """The squared error on all values, estimated on the sample of `_ranked`."""
    bulk, tail, every = ranked
    return every * float(float_error(bulk, scale, exponent, bits)) + float(float_error(tail, scale, exponent, bits))


def fit(values: Tensor, low: Tensor, high: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Searches shrunken ranges for the quantizer of least `error` on ``values`` [..., S].

    Args:
        values: samples of each of [...] edges and groups.
        low: the observed minimum [...].
        high: the observed maximum [...].
        bits: of a code.

    Returns:
        Scale f16 [...], zero point u8 [...] and error [...].
    """
    scale, zero = parameters(low, high, bits)
    least = error(values, scale, zero, bits)
    shrunken = torch.tensor(SHRINK[1:]).reshape(-1, *[1] * low.dim())
    whole = torch.ones_like(shrunken)
    together = max(1, AT_ONCE // values.numel())
    for shrink_low, shrink_high in ((shrunken, shrunken), (shrunken, whole), (whole, shrunken)):
        lows, highs = low * shrink_low, high * shrink_high
        scales, zeros = parameters(lows, highs, bits)
        pieces = zip(scales.split(together), zeros.split(together), strict=True)
        errors = torch.cat([error(values, s, z, bits) for s, z in pieces])
        first = errors.argmin(0, keepdim=True)
        e, s, z, lo, hi = (table.gather(0, first)[0] for table in (errors, scales, zeros, lows, highs))
        better = e < least
        least = torch.where(better, e, least)
        scale, zero = torch.where(better, s, scale), torch.where(better, z, zero)
        low, high = torch.where(better, lo, low), torch.where(better, hi, high)
    return scale, zero, least
