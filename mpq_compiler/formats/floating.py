"""Small floats: FP4 and NF4 are tables of the weight contract; FP8 is not, and its layers compute in float.

E2M1 (OCP Microscaling, 2023; LLM-FP4, arXiv 2310.16836) doubled is a table of integers: {0, 1, 2, 3, 4, 6, 8, 12} and
their negatives. NF4 (QLoRA, arXiv 2305.14314, appendix E) is rounded to 127ths. FP8 is E2M5, E3M4, E4M3 or E5M2 without
infinities and NaNs (Kuzmin 2022, arXiv 2208.09225); encoding and largest value are searched (arXiv 2408.06995).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import Format, diagonal, output_error, stored_scale

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of the 16 codes of FP4: a sign, two bits of exponent, one of mantissa; zero is there twice."""

_QLORA = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
NF4 = tuple(round(contract.LUT_MAX * level) for level in _QLORA)
"""The levels of NF4 in 127ths of a row's largest magnitude: quantiles of the normal distribution, with zero."""

EXPONENTS = (2, 3, 4, 5)
"""The bits of exponent that a small float may have; fewer make an even grid, more leave no mantissa."""
FACTORS = tuple(0.1 + 0.01 * i for i in range(111))
"""Fractions of the largest magnitude to which the search maps the largest float (Kuzmin 2022, section 4)."""


@dataclass(frozen=True)
class Float8Weight:
    """FP8 codes u8 [O, K] and scales f16 [O]; see `contract.dequantize_float8`."""

    codes: Tensor
    scale: Tensor
    exponent: int

    def dequantize(self) -> Tensor:
        """The values that the codes stand for, f32 [O, K]."""
        return contract.dequantize_float8(self.codes, self.scale, self.codes.shape, self.exponent)


@dataclass(frozen=True)
class Float8Format(Format):
    """FP8 with ``exponent`` bits of exponent and one scale a row, for rows with outliers.

    Few bits of exponent make a nearly even grid, many make even relative steps. Neither is an int8 table. So the layer
    computes in float, and its weight is dequantized when the artifact is loaded: that saves bytes, not time.
    """

    exponent: int | None = None
    """Bits of exponent; None chooses those of least output error for each weight."""

    @property
    def integer(self) -> bool:
        return False

    @property
    def exponents(self) -> tuple[int, ...]:
        """The bits of exponent to choose from."""
        return EXPONENTS if self.exponent is None else (self.exponent,)

    def start(self, weight: Tensor) -> Float8Weight:
        rows = weight.flatten(1)
        found = [float8(rows, _scales(rows.abs().amax(1), e, 1.0), e) for e in self.exponents]
        return _least(found, rows, None)

    def form(self, weight: Tensor) -> Float8Weight:
        rows, exponent = weight.flatten(1), self.exponents[0]
        return float8(rows, _scales(rows.abs().amax(1), exponent, 1.0), exponent)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Float8Weight:
        """Quantizes; scales are searched under the gram's diagonal, and kept where the whole gram confirms them."""
        rows = weight.flatten(1)
        return _least([_searched(rows, gram, e) for e in self.exponents], rows, gram)


def _scales(peak: Tensor, exponent: int, factor: float) -> Tensor:
    """The scales f16 that map ``factor`` times the peaks [O] to the largest float."""
    return stored_scale(peak * (factor / contract.float_largest(exponent, 8)))


def _searched(rows: Tensor, gram: Tensor | None, exponent: int) -> Float8Weight:
    """Quantizes rows [O, K] at the scales of least error among `FACTORS`."""
    peak, importance = rows.abs().amax(1), None if gram is None else diagonal(gram)
    best = widest = _scales(peak, exponent, 1.0)
    least = torch.full((len(rows),), torch.inf)
    for factor in FACTORS:
        scale = _scales(peak, exponent, factor)
        s = scale.float()[:, None]
        error = output_error(contract.round_float(rows / s, exponent, 8) * s - rows, importance)
        best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
    found, whole = (output_error(float8(rows, s, exponent).dequantize() - rows, gram) for s in (best, widest))
    return float8(rows, torch.where(found < whole, best, widest), exponent)


def _least(found: list[Float8Weight], rows: Tensor, gram: Tensor | None) -> Float8Weight:
    """The fit with the least output error of the whole weight; the first of equal ones."""
    if len(found) == 1:
        return found[0]
    return min(found, key=lambda fit: float(output_error(fit.dequantize() - rows, gram).sum()))


def float8(rows: Tensor, scale: Tensor, exponent: int) -> Float8Weight:
    """Quantizes rows [O, K] to FP8 at given scales [O]: ties to even, saturating at the largest float."""
    value = contract.round_float(rows / scale.to(torch.float32)[:, None], exponent, 8)
    mantissa, smallest = 7 - exponent, 2.0 ** (1 - contract.float_bias(exponent))
    magnitude = value.abs()
    # exponent and mantissa stand side by side in f32 too, with another bias and more digits behind
    normal = (magnitude.view(torch.int32) >> (23 - mantissa)) - ((127 - contract.float_bias(exponent)) << mantissa)
    code = torch.where(magnitude < smallest, (magnitude * (2.0**mantissa / smallest)).to(torch.int32), normal)
    return Float8Weight((code | (value < 0).to(torch.int32) << 7).to(torch.uint8), scale, exponent)


FP8 = Float8Format("fp8", bits=8)
FP8E2, FP8E3, FP8E4, FP8E5 = (Float8Format(f"fp8e{exponent}", bits=8, exponent=exponent) for exponent in EXPONENTS)
