"""GPTQ: codes chosen one column after the other, what a column errs carried over to those behind it.

Frantar 2022, "GPTQ: accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323),
on any table of the weight contract. Activation order, largest second moment first (the option ``act_order`` of the
authors' code), is the order of the updates alone: codes stay where they are.
"""

from __future__ import annotations

import dataclasses
import functools

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.formats.contract import rising

BLOCK = 128
"""Columns whose updates to all later ones are applied together."""


def gptq(
    rows: Tensor, nearest: QuantizedWeight, gram: Tensor, order: bool = True, damping: float = 0.01
) -> QuantizedWeight:
    """``nearest`` with the codes that GPTQ chooses, in the rows where their output error is the lesser.

    rows:    f32 [O, K]
    gram:    the second moments [K, K] of the layer's input, whole
    order:   columns by descending second moment, else as they stand
    damping: of the gram's diagonal, in parts of its mean
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


@functools.lru_cache(maxsize=1)  # one layer is rounded to many formats, one after the other
def _updates(gram: Tensor, order: bool, damping: float) -> tuple[Tensor, Tensor]:
    """The order of the columns, and what the error of each does to those behind it."""
    permutation = torch.argsort(gram.diagonal(), descending=True, stable=True) if order else torch.arange(len(gram))
    return permutation, _inverse_factor(gram[permutation][:, permutation], damping)


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped gram, f32.

    Where inputs hardly vary, what rounding left of the gram may need more than that damping to be positive definite.
    """
    wide = gram.double()
    step = (damping * wide.diagonal().mean()).clamp_min(1e-30)
    factor, failed = torch.linalg.cholesky_ex(wide + step * torch.eye(len(wide)))
    while failed and bool(torch.isfinite(step)):
        step = step * 10
        factor, failed = torch.linalg.cholesky_ex(wide + step * torch.eye(len(wide)))
    return torch.linalg.cholesky(torch.cholesky_inverse(factor), upper=True).float()


class _Columns:
    """The nearest levels of one column at a time, as `formats.base.nearest_codes` finds those of all."""

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
        """Codes and levels [O] of the values [O] of a column."""
        scale = self.scale[:, column]
        t = (values - self.offset) / scale
        if self.levels is None:
            entry = torch.round(t).clamp(-contract.LUT_MAX, contract.LUT_MAX)
            return entry.to(torch.int8), entry * scale + self.offset
        index = torch.searchsorted(self.middles, t[:, None])
        entry = self.levels.gather(1, index)[:, 0]
        return self.order.gather(1, index)[:, 0].to(torch.uint8), entry * scale + self.offset
