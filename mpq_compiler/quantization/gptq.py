"""GPTQ: chooses codes one column after another, and compensates each column's error in the columns behind it.

Frantar 2022, "GPTQ: accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323),
on any table of the weight contract. Activation order, largest second moment first (``act_order`` in the authors' code),
orders the updates alone: codes stay in the columns where they are.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.formats.contract import rising
from mpq_compiler.support.memo import last_result

BLOCK = 128
"""The number of columns whose updates to the columns behind the block are applied together."""


def gptq(
    rows: Tensor, nearest: QuantizedWeight, gram: Tensor, order: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """Chooses codes by GPTQ; rows keep the nearest codes where GPTQ's have no smaller output error.

    Args:
        rows: the weight, f32 [O, K].
        nearest: its fit with the nearest codes.
        gram: the whole second moments [K, K] of the layer's input.
        order: whether columns go by descending second moment, else as they stand.
        damping: what is added to the gram's diagonal, relative to its mean.

    Returns:
        The fit with other codes; scales, offsets and tables stay.
    """
    permutation, upper = _updates(gram, order, damping)
    places, pivots = permutation.tolist(), upper.diagonal().unbind()
    quantizer = _Columns(nearest)
    left = rows[:, permutation].clone()
    codes = torch.empty_like(nearest.codes)
    for start in range(0, len(gram), BLOCK):
        end = min(start + BLOCK, len(gram))
        part, errors = left[:, start:end], torch.empty(len(rows), end - start)
        for i in range(end - start):
            column = places[start + i]
            code, level = quantizer(part[:, i], column)
            codes[:, column] = code
            errors[:, i] = (part[:, i] - level) / pivots[start + i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[start + i, start + i + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]
    found = dataclasses.replace(nearest, codes=codes)
    before, after = (output_error(q.dequantize() - rows, gram) for q in (nearest, found))
    return dataclasses.replace(nearest, codes=torch.where((after < before)[:, None], codes, nearest.codes))


@last_result  # one layer is rounded to many formats, one after the other
def _updates(gram: Tensor, order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """The order of the columns, and the matrix [K, K] that carries a column's error to the columns behind it."""
    permutation = torch.argsort(gram.diagonal(), descending=True, stable=True) if order else torch.arange(len(gram))
    return permutation, _inverse_factor(gram[permutation][:, permutation], damping)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped gram, f32 [K, K].

    Where inputs hardly vary, rounding errors may make the gram indefinite; the damping then grows until it is definite.
    """
    wide = gram.double()
    step = (damping * wide.diagonal().mean()).clamp_min(1e-30)
    factor, failed = torch.linalg.cholesky_ex(wide + step * torch.eye(len(wide)))
    while failed and bool(torch.isfinite(step)):
        step = step * 10
        factor, failed = torch.linalg.cholesky_ex(wide + step * torch.eye(len(wide)))
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True)
    return upper.float()


class _Columns:
    """Quantizes one column at a time to the nearest levels, as `formats.contract.nearest_codes` does for all."""

    def __init__(self, weight: QuantizedWeight) -> None:
        rows, columns = weight.codes.shape
        self.scale = contract.column_scale(weight.scale, weight.segments, columns).expand(rows, columns)
        self.offset = torch.zeros(rows) if weight.offset is None else weight.offset.float()
        self.levels: Tensor | None = None
        if weight.lut is not None:
            classes = contract.row_classes(weight.row_class, rows)
            self.levels, self.order = (part[classes] for part in rising(weight.lut))
            self.middles = ((self.levels[:, 1:] + self.levels[:, :-1]) / 2).contiguous()

    def __call__(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The codes [O] nearest to values [O] of a column, and their levels [O]."""
        scale = self.scale[:, column]
        t = (values - self.offset) / scale
        if self.levels is None:
            entry = torch.round(t).clamp(-contract.LUT_MAX, contract.LUT_MAX)
            return entry.to(torch.int8), entry * scale + self.offset
        index = torch.searchsorted(self.middles, t[:, None])
        entry = self.levels.gather(1, index)[:, 0]
        return self.order.gather(1, index)[:, 0].to(torch.uint8), entry * scale + self.offset
