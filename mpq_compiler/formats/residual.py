"""Base + binary residual: ``scale[i] * (LUT[code] +- alpha) + offset[i]``, with one alpha a layer.

MPQ-DMv2's residual quantizer (arXiv 2507.04290) in a form that folds into one int8 table: the ratio of branch to base
is a fraction p/2^m shared by the layer. Base and branch are fitted together, as the nearest of their 2^(b+1) joint
levels, with alternating least squares from several starts. A branch fitted greedily to what the base left would be
worse than one more uniform bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq_compiler.formats.base import (
    F16_TINY,
    Format,
    QuantizedWeight,
    diagonal,
    fit_by_parts,
    output_error,
    stored_scale,
    stored_type,
)
from mpq_compiler.formats.contract import entries, nearest_codes
from mpq_compiler.formats.uniform import UniformFormat

RATIOS = (0.25, 0.375, 0.5, 0.625, 0.75, 1.0)
"""The ratios of alpha to a step of the base: 1/4 gives the even levels of one more bit, above 1/2 the range widens."""
RATIO_ROWS = 64
"""The fewest rows by which a layer's ratio is chosen; of a weight with more than twice as many, some stand for all."""
STARTS = (0.6, 0.8, 1.0)
"""Fractions of a row's range that the levels span where a fit starts."""
ROUNDS = 6
"""Rounds of alternating least squares from each start."""


@dataclass(frozen=True)
class ResidualFormat(Format):
    """A uniform base of ``base_bits`` plus one binary branch: ``bits`` = base_bits + 1 in all."""

    base_bits: int = 2

    @property
    def searches(self) -> bool:
        return True

    @property
    def trials(self) -> int:
        return 2 * len(STARTS) * ROUNDS

    @property
    def has_offset(self) -> bool:
        return True

    def tables(self, ratio: float) -> tuple[Tensor, Tensor]:
        """The base's int8 table [1, 2^base_bits] and alpha int8 [1] on its grid."""
        unit = 64 // 2 ** (self.base_bits - 1) // 2  # the largest power of two that leaves room for the branch
        half = 2 ** (self.base_bits - 1)
        base = torch.arange(-half, half, dtype=torch.int16) * unit
        return base.to(torch.int8)[None], torch.tensor([round(ratio * unit)], dtype=torch.int8)

    def start(self, weight: Tensor) -> QuantizedWeight:
        """Quantizes with the base alone; the branch adds its bit later."""
        return UniformFormat("base", self.base_bits).start(weight)

    def form(self, weight: Tensor) -> QuantizedWeight:
        """Quantizes with one table for base and branch, as packed programs have it."""
        return UniformFormat("merged", self.bits).start(weight)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        weight = weight.flatten(1)
        tried = weight if len(weight) <= 2 * RATIO_ROWS else weight[:: len(weight) // RATIO_ROWS]
        fits = {ratio: self._fit_ratio(tried, gram, ratio) for ratio in RATIOS}
        errors = {ratio: float(output_error(fits[ratio].dequantize() - tried, gram).sum()) for ratio in RATIOS}
        best = min(RATIOS, key=errors.__getitem__)
        if tried is weight:
            return fits[best]
        return fit_by_parts(weight, lambda rows: self._fit_ratio(rows, gram, best))

    def _fit_ratio(self, weight: Tensor, gram: Tensor | None, ratio: float) -> QuantizedWeight:
        lut, alpha = self.tables(ratio)
        joint = torch.stack([lut[0].to(torch.int16) - alpha, lut[0].to(torch.int16) + alpha], -1).flatten()
        fit = alternating(weight, gram, joint.to(torch.int8)[None])
        return replace(fit, codes=fit.codes >> 1, lut=lut, signs=fit.codes & 1, alpha=alpha)


def alternating(
    weight: Tensor, gram: Tensor | None, table: Tensor, *starts: tuple[Tensor, Tensor]
) -> QuantizedWeight:
    """Fits rows [O, K] to a table int8 [1, entries]: levels for scales and scales for levels, in turn.

    It begins with levels that span fractions of the range of a row. Of all that is met on the way each row keeps what
    has the least output error, so that no start is better.

    Args:
        weight: the rows.
        gram: as in `Format.fit`.
        table: the levels.
        starts: further scales and offsets [O, 1] to begin with.
    """
    importance = torch.ones(weight.shape[1]) if gram is None else diagonal(gram).clamp_min(1e-12)
    low, high = weight.amin(1, keepdim=True), weight.amax(1, keepdim=True)
    span, centre = float(table.max()) - float(table.min()), (float(table.max()) + float(table.min())) / 2
    scales = [((high - low) * start / span).clamp_min(F16_TINY) for start in STARTS]
    kept: tuple[Tensor, Tensor] | None = None
    least = torch.full((len(weight),), torch.inf)
    for scale, offset in [*starts, *((scale, (low + high) / 2 - scale * centre) for scale in scales)]:
        for _ in range(ROUNDS):
            stored = stored_scale(scale), stored_type(offset[:, 0])
            level = entries(nearest_codes(weight, *stored, table, None), table, None)
            error = output_error(level * stored[0].float() + stored[1].float()[:, None] - weight, gram)
            better = error < least
            kept = stored if kept is None else _where(better, stored, kept)
            least = torch.minimum(error, least)
            scale, offset = _least_squares(level, weight, importance)
    assert kept is not None
    return QuantizedWeight(nearest_codes(weight, *kept, table, None), *kept, table)


def _where(better: Tensor, new: tuple[Tensor, Tensor], old: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    return torch.where(better[:, None], new[0], old[0]), torch.where(better, new[1], old[1])


def _least_squares(level: Tensor, weight: Tensor, importance: Tensor) -> tuple[Tensor, Tensor]:
    """The scale and offset [O, 1] that minimize ``sum_k h_k (scale * level + offset - w)^2`` for given levels."""
    h = importance / importance.sum()
    mean_level, mean_weight = (level * h).sum(1, keepdim=True), (weight * h).sum(1, keepdim=True)
    spread = ((level - mean_level).square() * h).sum(1, keepdim=True)
    slope = ((level - mean_level) * (weight - mean_weight) * h).sum(1, keepdim=True) / spread.clamp_min(1e-12)
    scale = torch.where(spread > 0, slope, torch.zeros_like(slope)).clamp_min(F16_TINY)
    return scale, mean_weight - scale * mean_level


INT1_B = ResidualFormat("int1+b", bits=2, base_bits=1)
INT2_B = ResidualFormat("int2+b", bits=3, base_bits=2)
INT3_B = ResidualFormat("int3+b", bits=4, base_bits=3)
