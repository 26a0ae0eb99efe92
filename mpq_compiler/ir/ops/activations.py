"""Time groups, and activations quantized by the tables of a group or by the range of each row."""

from __future__ import annotations

import torch
from torch import Tensor

from mpq_compiler.formats.contract import float_largest, round_float
from mpq_compiler.ir.ops.registry import op

SMALLEST_SCALE = 2.0**-24
"""Lower bound of a scale that is measured at run time: the smallest positive half, as for stored scales."""


@op("time_group")
def time_group(timestep: Tensor, boundaries: Tensor) -> Tensor:
    """The group of each sample: how many of the ascending ``boundaries`` [G-1] are <= its timestep [B] -> i64 [B].

    Timesteps outside the calibrated range fall into the first or the last group.
    """
    return (timestep.to(torch.float32)[:, None] >= boundaries[None, :]).sum(1)


def per_sample(table: Tensor, group: Tensor | None, like: Tensor) -> Tensor:
    """``table[group]`` [B], reshaped to broadcast over ``like`` [R, ...] whose R rows are batch-major.

    Without a group the table has an entry for each row of ``like`` [..., K] (`dynamic_quantize`).
    """
    if group is None:
        return table.reshape(*like.shape[:-1], 1)
    values = table[group]
    if like.shape[0] != values.shape[0]:
        values = values.repeat_interleave(like.shape[0] // values.shape[0])
    return values.reshape(-1, *[1] * (like.dim() - 1))


def _clamped(
    x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor | None, bits: int
) -> tuple[Tensor, Tensor, Tensor]:
    """``clamp(x / scale, -z, 2^bits-1-z)``, before it is rounded, with the scale and zero point z of each value."""
    s = per_sample(scale.to(torch.float32), group, x)
    z = per_sample(zero_point.to(torch.float32), group, x)
    inverse = torch.ones((), dtype=torch.float32, device=x.device) / s
    return torch.maximum(torch.minimum(x * inverse, (2**bits - 1) - z), -z), s, z


@op("quantize")
def quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> Tensor:
    """Codes u8 of x: ``rint(clamp(x * (1/scale[g]), -z, 2^bits-1-z)) + z``; scale, zero_point [G], group i64 [B]."""
    clamped, _, z = _clamped(x, scale, zero_point, group, bits)
    return (torch.round(clamped) + z).to(torch.uint8)


@op("fake_quantize")
def fake_quantize(x: Tensor, scale: Tensor, zero_point: Tensor, group: Tensor, bits: int) -> Tensor:
    """``scale * (quantize(x) - z)`` in f32; straight-through gradients to x and scale (Esser 2020, eq. 2-3)."""
    clamped, s, _ = _clamped(x, scale, zero_point, group, bits)
    return (clamped + (torch.round(clamped) - clamped).detach()) * s


@op("fake_quantize_float")
def fake_quantize_float(x: Tensor, scale: Tensor, group: Tensor, exponent: int, bits: int) -> Tensor:
    """Move x to the nearest of ``scale[g]`` times the floats of `round_float`, in f32; scale [G], group i64 [B].

    ``round_float(x / scale) * scale``; straight-through gradients to x within the range, and to the scale.
    """
    s = per_sample(scale.to(torch.float32), group, x)
    t = x / s
    largest = float_largest(exponent, bits)
    clamped = t.clamp(-largest, largest)
    return (round_float(t.detach(), exponent, bits) + (clamped - clamped.detach())) * s


def row_ranges(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Scale f32 [R] and zero point f32 [R] of the range of each of the R rows of x [..., K], widened to contain zero.

    With n = 2^bits - 1, low = min(0, min_k x) and high = max(0, max_k x), all in f32:
    ``scale = max((high - low) / n, SMALLEST_SCALE)`` and ``z = clamp(rint(-low / scale), 0, n)``.
    """
    low, high = x.detach().flatten(0, -2).to(torch.float32).aminmax(dim=-1)
    low, high = low.clamp_max(0.0), high.clamp_min(0.0)
    scale = ((high - low) / (2**bits - 1)).clamp_min(SMALLEST_SCALE)
    return scale, torch.round(-low / scale).clamp(0, 2**bits - 1)


@op("dynamic_quantize")
def dynamic_quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor, Tensor]:
    """Codes u8 of x [..., K] by the range of each row, with scale f32 [R] and zero point u8 [R] of `row_ranges`.

    The codes are those of `quantize` with these tables, a row its own group.
    """
    scale, zero = row_ranges(x, bits)
    clamped, _, z = _clamped(x, scale, zero, None, bits)
    return (torch.round(clamped) + z).to(torch.uint8), scale, zero.to(torch.uint8)


@op("dynamic_fake_quantize")
def dynamic_fake_quantize(x: Tensor, bits: int) -> Tensor:
    """``scale * (codes - z)`` of `dynamic_quantize` in f32; the gradient passes straight through, at the ends too."""
    scale, zero = row_ranges(x, bits)
    clamped, s, _ = _clamped(x.detach(), scale, zero, None, bits)
    return torch.round(clamped) * s + (x - x.detach())
