"""A low-rank branch beside any other format: ``W ~ base + U V`` with U [O, r] and V [r, K] in half precision.

SVDQuant (arXiv 2411.05007) fits branch and base in turn by truncated SVDs of the weight. Here the SVD is the one of the
layer's *output*. Let R be the rest that the base leaves, and G the second moments of the layer's input: U holds the
leading eigenvectors of ``R G R^T``, and ``V = U^T R`` is then the best branch of rank r (LoRC, arXiv 2303.08302, with
G = 1). Nothing is inverted.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mpq_compiler.formats.base import F16_MAX, Fit, Format, QuantizedWeight, output_error, weighted

ROUNDS = 4
"""Rounds of the fit: each fits the branch, then the base; the pair of least output error is kept."""


@dataclass(frozen=True)
class LowRankWeight:
    """A quantized base and a branch: ``up`` f16 [O, r] times ``down`` f16 [r, K]."""

    base: QuantizedWeight
    up: Tensor
    down: Tensor

    @property
    def codes(self) -> Tensor:
        """The codes of the base [O, K]."""
        return self.base.codes

    @property
    def branch(self) -> Tensor:
        """The branch ``up @ down``, f32 [O, K]."""
        return self.up.float() @ self.down.float()

    def dequantize(self) -> Tensor:
        """The values of base plus branch, f32 [O, K]."""
        return self.base.dequantize() + self.branch


@dataclass(frozen=True)
class LowRankFormat(Format):
    """A format ``base`` plus a float branch of ``rank``, which rows and columns of the weight bound.

    The branch takes the directions of the weight that the base quantizes worst. It is worth its bytes because it reads
    the unquantized activation.
    """

    base: Format
    rank: int

    @property
    def has_offset(self) -> bool:
        return self.base.has_offset

    @property
    def by_row(self) -> bool:
        return False

    def segments(self, channels: int) -> tuple[int, ...]:
        return self.base.segments(channels)

    def classes(self, rows: int) -> int:
        return self.base.classes(rows)

    @property
    def index_bits(self) -> int:
        return self.base.index_bits

    @property
    def operand_bits(self) -> int:
        return self.base.operand_bits

    def branch_elements(self, rows: int, columns: int) -> int:
        return min(self.rank, rows, columns) * (rows + columns)

    def stored_bytes(self, *shape: int) -> int:
        columns = 1
        for size in shape[1:]:
            columns *= size
        return self.base.stored_bytes(*shape) + 2 * self.branch_elements(shape[0], columns)

    def start(self, weight: Tensor) -> Fit:
        """Quantizes with the base alone."""
        return self.base.start(weight)

    def form(self, weight: Tensor) -> LowRankWeight:
        base, (rows, columns) = self.base.form(weight), weight.flatten(1).shape
        assert isinstance(base, QuantizedWeight)
        rank = min(self.rank, rows, columns)
        up, down = (torch.zeros(shape, dtype=torch.float16) for shape in ((rows, rank), (rank, columns)))
        return LowRankWeight(base, up, down)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> LowRankWeight:
        rows = weight.flatten(1)
        best: LowRankWeight | None = None
        least = torch.inf
        rest = rows
        for _ in range(ROUNDS):
            up, down = truncated(rest, gram, self.rank)
            base = self.base.fit((rows - up.float() @ down.float()).reshape(weight.shape), gram)
            assert isinstance(base, QuantizedWeight)
            found = LowRankWeight(base.merged(), up, down)
            error = float(output_error(found.dequantize() - rows, gram).sum())
            if error < least:
                best, least = found, error
            rest = rows - found.base.dequantize()
        assert best is not None
        return best


def truncated(rest: Tensor, gram: Tensor | None, rank: int) -> tuple[Tensor, Tensor]:
    """The branch up f16 [O, r], down f16 [r, K] of least output error of rest [O, K] - up @ down; deterministic."""
    wide = rest.double()
    moments = None if gram is None else gram.double()
    _, vectors = torch.linalg.eigh(weighted(wide, moments) @ wide.T)
    up = vectors[:, -min(rank, *rest.shape) :].flip(1)
    up = up * torch.where(up.abs().amax(0) == up.amax(0), 1.0, -1.0)  # eigenvectors have no sign of their own
    down = up.T @ wide
    balance = (down.norm(dim=1) / down.shape[1] ** 0.5 * up.shape[0] ** 0.5).sqrt().clamp_min(1e-6)
    return _half(up * balance), _half(down / balance[:, None])


def _half(value: Tensor) -> Tensor:
    return value.clamp(-F16_MAX, F16_MAX).to(torch.float16)
