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
        gram: the second moments of the layer's input, whole [K, K] or in blocks along the diagonal [J, B, B]: no error
            is compensated outside its block.
        order: whether columns go by descending second moment, else as they stand.
        damping: what is added to the gram's diagonal, relative to its mean.

    Returns:
        The fit with other codes; scales, offsets and tables stay.
    """
    quantizer = _Columns(nearest)
    codes = torch.empty_like(nearest.codes)
    updates = _updates(gram, order, damping)
    for (permutation, upper), part in zip(updates, torch.arange(rows.shape[1]).chunk(len(updates)), strict=True):
        _block(rows, part[permutation], upper, quantizer, codes)
    found = dataclasses.replace(nearest, codes=codes)
    before, after = (output_error(q.dequantize() - rows, gram) for q in (nearest, found))
    return dataclasses.replace(nearest, codes=torch.where((after < before)[:, None], codes, nearest.codes))


def _block(rows: Tensor, columns: Tensor, upper: Tensor, quantizer: _Columns, codes: Tensor) -> None:
    """Writes the codes of the columns of one block, which are given in the order in which they are chosen."""
    places, pivots = columns.tolist(), upper.diagonal().unbind()
    left = rows[:, columns]
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        part, errors = left[:, start:end], torch.empty(len(rows), end - start)
        for i in range(end - start):
            column = places[start + i]
            code, level = quantizer(part[:, i], column)
            codes[:, column] = code
            errors[:, i] = (part[:, i] - level) / pivots[start + i]
            part[:, i + 1 :] -= errors[:, i : i + 1] * upper[start + i, start + i + 1 : end]
        left[:, end:] -= errors @ upper[start:end, end:]


@last_result  # one layer is rounded to many formats, one after the other
def _updates(gram: Tensor, order: bool, damping: float) -> list[tuple[Tensor, Tensor]]:
    """The order of a block's columns, and the matrix [B, B] that carries a column's error to those behind it."""
    found = []
    for block in gram if gram.dim() == 3 else gram[None]:
        own = torch.argsort(block.diagonal(), descending=True, stable=True) if order else torch.arange(len(block))
        found.append((own, _inverse_factor(block[own][:, own], damping)))
    return found


def _inverse_factor(gram: Tensor, damping: float) -> Tensor:
    """The upper Cholesky factor of the inverse of the damped gram, f32 [K, K]."""
    upper: Tensor = torch.linalg.cholesky(torch.cholesky_inverse(cholesky(gram.double(), damping)), upper=True)
    return upper.float()


def cholesky(gram: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a gram [K, K] to whose diagonal ``damping`` times its mean is added.

    Where inputs hardly vary, rounding errors may make the gram indefinite; the damping then grows until it is definite.
    """
    step = (damping * gram.diagonal().mean()).clamp_min(1e-30)
    factor, failed = torch.linalg.cholesky_ex(gram + step * torch.eye(len(gram)))
    while failed and bool(torch.isfinite(step)):
        step = step * 10
        factor, failed = torch.linalg.cholesky_ex(gram + step * torch.eye(len(gram)))
    found: Tensor = factor
    return found


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
