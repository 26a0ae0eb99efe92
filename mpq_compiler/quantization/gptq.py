"""GPTQ: chooses codes one column after another, and compensates each column's error in the columns behind it.

Frantar 2022, "GPTQ: accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323),
on any table of the weight contract, in the form of LDLQ (Chee 2023, "QuIP", arXiv 2307.13304, theorem 6), which chooses
the same codes and needs no inverse. Activation order, largest second moment first (``act_order`` in the authors' code),
orders the columns alone: codes stay where they are.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, row_errors
from mpq_compiler.ir import scratch
from mpq_compiler.support.memo import last_result

BLOCK = 128
"""The number of columns whose updates to the columns behind the block are applied together."""

DAMPING = 0.01
"""What is added to the diagonal of second moments, relative to its mean."""


def gptq(
    rows: Tensor, nearest: QuantizedWeight, gram: Tensor, order: bool = True, damping: float = DAMPING
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
    (found,) = gptq_of_formats(rows, [nearest], gram, order, damping)
    return found


def gptq_of_formats(
    rows: Tensor, fits: Sequence[QuantizedWeight], gram: Tensor, order: bool = True, damping: float = DAMPING
) -> list[QuantizedWeight]:
    """Chooses the codes of several fits of the same rows as `gptq` does, in one walk over the columns.

    Of few rows a step takes the time of its calls, whatever the number of formats.
    """
    ranked = sorted(range(len(fits)), key=lambda i: fits[i].lut is not None)
    quantizer = _Columns([fits[i] for i in ranked])
    every = rows if len(fits) == 1 else rows.repeat(len(fits), 1)
    codes = torch.empty(every.shape, dtype=fits[0].codes.dtype if len(fits) == 1 else torch.int16)
    updates = _updates(gram, order, damping)
    for (permutation, upper), part in zip(updates, torch.arange(rows.shape[1]).chunk(len(updates)), strict=True):
        _block(every, part[permutation], upper, quantizer, codes)
    made = dict(zip(ranked, codes.chunk(len(fits)), strict=True))
    return [_better(rows, fit, made[i].to(fit.codes.dtype), gram) for i, fit in enumerate(fits)]


def _better(rows: Tensor, nearest: QuantizedWeight, codes: Tensor, gram: Tensor) -> QuantizedWeight:
    """The fit with other codes in the rows where their output error is smaller."""
    found = dataclasses.replace(nearest, codes=codes)
    before, after = (row_errors(fit, rows, gram) for fit in (nearest, found))
    return dataclasses.replace(nearest, codes=torch.where((after < before)[:, None], codes, nearest.codes))


def _block(rows: Tensor, columns: Tensor, upper: Tensor, quantizer: _Columns, codes: Tensor) -> None:
    """Writes the codes of the columns of one block, which are given in the order in which they are chosen.

    The error of a row is ``|e V|^2``, e its departure from the codes. A column adds ``(e_i + sum_j<i e_j U_ji)^2``,
    times a constant, U being V with a diagonal of ones: so each takes up what those before it have left.
    """
    places, left = columns.tolist(), rows.index_select(1, columns)
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        # columns as rows, which lie in memory one after the other
        part, given = (x.T.contiguous() for x in (left[:, start:end], rows.index_select(1, columns[start:end])))
        chosen, carried = torch.empty(part.shape, dtype=codes.dtype), upper[start:end, start:end]
        for i, place in enumerate(places[start:end]):
            code, level = quantizer(part[i], place)
            chosen[i] = code
            given[i] -= level
            part[i + 1 :].addr_(carried[i, i + 1 :], given[i])
        codes[:, columns[start:end]] = chosen.T
        left[:, end:] += given.T @ upper[start:end, end:]


@last_result  # one layer is rounded to many formats, one after the other
def _updates(gram: Tensor, order: bool, damping: float) -> list[tuple[Tensor, Tensor]]:
    """The order of a block's columns, and the matrix U [B, B] that carries a column's error to those behind it."""
    return [(own, scratch.kept(_carried(root))) for own, root in roots(gram, order, damping)]


def _carried(root: Tensor) -> Tensor:
    """The root V [B, B] with columns that are divided by their diagonal, f32."""
    return (root / root.diagonal()).float()


@last_result  # a search for scales sees moments through their roots, too
def roots(gram: Tensor, order: bool, damping: float) -> list[tuple[Tensor, Tensor]]:
    """Damped second moments as products ``V V^T``, V upper: of each block the order of its columns, and V, f64 [B, B].

    Args:
        gram: [K, K], or in blocks along the diagonal [J, B, B].
        order: whether columns go by descending second moment, else as they stand.
        damping: what is added to the diagonal, relative to its mean.
    """
    found = []
    for block in gram if gram.dim() == 3 else gram[None]:
        own = torch.argsort(block.diagonal(), descending=True, stable=True) if order else torch.arange(len(block))
        lower = cholesky(block[own][:, own].double().flip(0, 1), damping)  # of the last column first: upper, turned
        found.append((own, scratch.kept(lower.flip(0, 1))))
    return found


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

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        """Takes fits of the same rows, those without tables first; their rows stand one below the other."""
        rows, columns = weights[0].codes.shape
        scales = [contract.column_scale(w.scale, w.segments, columns).expand(rows, columns) for w in weights]
        self.scale = scales[0] if len(scales) == 1 else torch.cat(scales)
        self.offset = torch.cat([torch.zeros(rows) if w.offset is None else w.offset.float() for w in weights])
        self.plain = sum(rows for w in weights if w.lut is None)
        tables = [(w.lut, contract.row_classes(w.row_class, rows)) for w in weights if w.lut is not None]
        if tables:
            starts = itertools.accumulate((len(lut) for lut, _ in tables), initial=0)
            first = torch.cat([classes + start for (_, classes), start in zip(tables, starts, strict=False)])
            self.first = (first * contract.PLACES).to(torch.int32)
            """Where the places of each row's table begin, i32."""
            known = [(lut, contract.codes_at_places(lut)) for lut, _ in tables]
            self.codes = torch.cat([codes for _, codes in known]).flatten()
            self.levels = torch.cat([lut.float().gather(1, codes.long()) for lut, codes in known]).flatten()

    def __call__(self, values: Tensor, column: int) -> tuple[Tensor, Tensor]:
        """The codes [O] nearest to values [O] of a column, and their levels [O]."""
        scale = self.scale[:, column]
        t = (values - self.offset) / scale
        codes, entries = [], []
        if self.plain:
            entry = torch.round(t[: self.plain]).clamp(-contract.LUT_MAX, contract.LUT_MAX)
            codes.append(entry.to(torch.int16))
            entries.append(entry)
        if self.plain < len(t):
            place = contract.places(t[self.plain :]) + self.first
            codes.append(self.codes.index_select(0, place).to(torch.int16))
            entries.append(self.levels.index_select(0, place))
        code, entry = (one[0] if len(one) == 1 else torch.cat(one) for one in (codes, entries))
        return code, entry * scale + self.offset
