"""Small floats. FP4 and NF4 are tables of the weight contract; FP8 is not, and its layers compute in float.

E2M1 (OCP Microscaling, 2023; LLM-FP4, arXiv 2310.16836) doubled is a table of integers: {0, 1, 2, 3, 4, 6, 8, 12} and
their negatives. NF4 (QLoRA, arXiv 2305.14314, appendix E) is rounded to 127ths. FP8 is E4M3 or E5M2 (arXiv 2209.05433).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler import ops
from mpq_compiler.formats.base import Format, output_error, stored_scale

E2M1 = (0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12)
"""Twice the values of the 16 codes of FP4: sign, two bits of exponent, one of mantissa. Zero is there twice."""

_QLORA = (
    -1.0, -0.6961928, -0.5250731, -0.3949175, -0.2844414, -0.1847734, -0.0910500, 0.0,
    0.0795803, 0.1609302, 0.2461123, 0.3379152, 0.4407098, 0.5626170, 0.7229568, 1.0,
)  # fmt: skip
NF4 = tuple(round(ops.LUT_MAX * level) for level in _QLORA)
"""Quantiles of the normal distribution over the largest magnitude of a row, zero among them."""

LARGEST = {4: 448.0, 5: 57344.0}
"""The largest finite value by the bits of the exponent."""
OCTAVES = tuple(2 ** (i / 4) for i in range(16))
"""By how much the scale search enlarges the smallest scale: relative steps only matter within an octave, beyond that
small values fall below the normal range."""


@dataclass(frozen=True)
class Float8Weight:
    """FP8 codes u8 [O, K] and scales f16 [O]; see `ops.dequantize_float8`."""

    codes: Tensor
    scale: Tensor
    exponent: int

    def dequantize(self) -> Tensor:
        """f32 [O, K]."""
        return ops.dequantize_float8(self.codes, self.scale, self.codes.shape, self.exponent)


@dataclass(frozen=True)
class Float8Format(Format):
    """Eight bits with ``exponent`` bits of exponent and a scale a row: eight bits for rows with outliers.

    There is no int8 table of it. The layer reads unquantized activations and computes in float; its weight is
    dequantized when the artifact is loaded, so it saves bytes of the artifact and not time.
    """

    exponent: int = 4

    @property
    def integer(self) -> bool:
        return False

    def start(self, weight: Tensor) -> Float8Weight:
        rows = weight.flatten(1)
        return self._quantize(rows, stored_scale(rows.abs().amax(1) / LARGEST[self.exponent]))

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> Float8Weight:
        rows = weight.flatten(1)
        smallest = rows.abs().amax(1) / LARGEST[self.exponent]
        best, least = stored_scale(smallest), torch.full((len(rows),), torch.inf)
        for factor in OCTAVES:
            scale = stored_scale(smallest * factor)
            error = output_error(self._quantize(rows, scale).dequantize() - rows, gram)
            best, least = torch.where(error < least, scale, best), torch.minimum(error, least)
        return self._quantize(rows, best)

    def _quantize(self, rows: Tensor, scale: Tensor) -> Float8Weight:
        return Float8Weight(float8_codes(rows, scale, self.exponent), scale, self.exponent)


def float8_codes(rows: Tensor, scale: Tensor, exponent: int) -> Tensor:
    """Codes u8 of rows [O, K] at scales [O]: nearest, ties to even, the largest value beyond the range."""
    kind = {4: torch.float8_e4m3fn, 5: torch.float8_e5m2}[exponent]
    t = rows / scale.to(torch.float32)[:, None]
    return t.clamp(-LARGEST[exponent], LARGEST[exponent]).to(kind).view(torch.uint8)
