"""GPTQ: chooses codes one column after another, and compensates each column's error in the columns behind it.

Frantar 2022, "GPTQ: accurate post-training quantization for generative pre-trained transformers" (arXiv 2210.17323),
on any table of the weight contract, in the form of LDLQ (Chee 2023, "QuIP", arXiv 2307.13304, theorem 6), which chooses
the same codes and needs no inverse. The order in which columns are taken (`_last_first`) is theirs alone: codes stay
where they are. Along several paths (`quantization.paths`) a row keeps more than one sequence of codes as it goes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, errors_of_rows
from mpq_compiler.ir import scratch
from mpq_compiler.quantization.paths import Walk, best_entries
from mpq_compiler.support.memo import last_result

BLOCK = 128
"""The number of columns whose updates to the columns behind the block are applied together."""

DAMPING = 0.01
"""What is added to the diagonal of second moments, relative to its mean."""


def gptq(
    rows: Tensor,
    nearest: QuantizedWeight,
    gram: Tensor,
    order: bool = True,
    damping: float = DAMPING,
    paths: int = 1,
) -> QuantizedWeight:
    """Chooses codes by GPTQ; rows keep the nearest codes where GPTQ's have no smaller output error.

    Args:
        rows: the weight, f32 [O, K].
        nearest: its fit with the nearest codes.
        gram: the second moments of the layer's input, whole [K, K] or in blocks along the diagonal [J, B, B]: no error
            is compensated outside its block.
        order: whether columns are taken in the order of the least error, else as they stand.
        damping: what is added to the gram's diagonal, relative to its mean.
        paths: the sequences of codes that each row keeps while columns are taken.

    Returns:
        The fit with other codes; scales, offsets and tables stay.
    """
    (found,) = gptq_of_formats(rows, [nearest], gram, order, damping, paths)
    return found


def gptq_of_formats(
    rows: Tensor,
    fits: Sequence[QuantizedWeight],
    gram: Tensor,
    order: bool = True,
    damping: float = DAMPING,
    paths: int = 1,
) -> list[QuantizedWeight]:
    """Chooses the codes of several fits of the same rows as `gptq` does, in one walk over the columns.

    Of few rows a step takes the time of its calls, whatever the number of formats.
    """
    ranked = sorted(range(len(fits)), key=lambda i: fits[i].lut is not None)
    quantizer = _Columns([fits[i] for i in ranked])
    every = rows if len(fits) == 1 else rows.repeat(len(fits), 1)
    codes = torch.empty(every.shape, dtype=fits[0].codes.dtype if len(fits) == 1 else torch.int16)
    updates = _updates(gram, order, damping)
    for update, part in zip(updates, torch.arange(rows.shape[1]).chunk(len(updates)), strict=True):
        _block(every, part[update.order], update, quantizer, codes, paths)
    made = dict(zip(ranked, codes.chunk(len(fits)), strict=True))
    found = [dataclasses.replace(fit, codes=made[i].to(fit.codes.dtype)) for i, fit in enumerate(fits)]
    errors = zip(errors_of_rows(fits, rows, gram), errors_of_rows(found, rows, gram), strict=True)
    better = [(after < before)[:, None] for before, after in errors]
    return [
        dataclasses.replace(fit, codes=torch.where(rows_better, chosen.codes, fit.codes))
        for fit, chosen, rows_better in zip(fits, found, better, strict=True)
    ]


@dataclass(frozen=True)
class _Update:
    """What a block of second moments says of its columns."""

    order: Tensor
    """The columns in the order in which they are taken, i64 [B]."""
    carried: Tensor
    """The matrix U [B, B] that carries a column's error to those behind it, f32."""
    cost: Tensor
    """What the square of the error that a column is left with costs, f32 [B]."""


def _block(rows: Tensor, columns: Tensor, update: _Update, quantizer: _Columns, codes: Tensor, paths: int) -> None:
    """Writes the codes of the columns of one block, which are given in the order in which they are chosen.

    The error of a row is ``|e V|^2``, e its departure from the codes. A column adds ``(e_i + sum_j<i e_j U_ji)^2``,
    times a constant, U being V with a diagonal of ones: so each takes up what those before it have left.
    """
    left, upper = rows.index_select(1, columns), update.carried
    for start in range(0, len(columns), BLOCK):
        end = min(start + BLOCK, len(columns))
        here, carried = columns[start:end], upper[start:end, start:end]
        # columns as rows, which lie in memory one after the other
        part, given = (x.T.contiguous() for x in (left[:, start:end], rows.index_select(1, here)))
        scales = quantizer.scales(here)
        if paths > 1:
            walk = Walk(part, given, scales, quantizer.offset, carried, update.cost[start:end])
            steps = best_entries(walk, quantizer.nearest_two, paths)
            given -= walk.levels(steps, scales)
        else:
            steps = torch.empty_like(part)
            # NumPy's view of them: of few rows a step takes the time of its calls, and NumPy's take a third of torch's
            walked = zip(part.numpy(), scales.numpy(), steps.numpy(), given.numpy(), strict=True)
            for i, (values, scale, in_steps, departure) in enumerate(walked):
                departure -= quantizer.level(values, scale, in_steps)
                part[i + 1 :].addr_(carried[i, i + 1 :], given[i])
        codes[:, here] = quantizer.codes(steps).T.to(codes.dtype)
        left[:, end:] += given.T @ upper[start:end, end:]


@last_result  # one layer is rounded to many formats, one after the other
def _updates(gram: Tensor, order: bool, damping: float) -> list[_Update]:
    """What the blocks of second moments say of their columns."""
    return [
        _Update(own, scratch.kept(_carried(root)), root.diagonal().float().square())
        for own, root in roots(gram, order, damping)
    ]


def _carried(root: Tensor) -> Tensor:
    """The root V [B, B] with columns that are divided by their diagonal, f32."""
    return (root / root.diagonal()).float()


@last_result  # a search for scales sees moments through their roots, too
def roots(gram: Tensor, order: bool, damping: float) -> list[tuple[Tensor, Tensor]]:
    """Damped second moments as products ``V V^T``, V upper: of each block the order of its columns, and V, f64 [B, B].

    Args:
        gram: [K, K], or in blocks along the diagonal [J, B, B].
        order: whether columns are taken in the order of the least error, else as they stand.
        damping: what is added to the diagonal, relative to its mean.
    """
    found = []
    for block in gram if gram.dim() == 3 else gram[None]:
        # the root of the last column first, turned itself, is upper
        turned = _last_first(block, damping) if order else torch.arange(len(block)).flip(0)
        lower = cholesky(block[turned][:, turned].double(), damping)
        found.append((turned.flip(0), scratch.kept(lower.flip(0, 1))))
    return found


def _last_first(gram: Tensor, damping: float) -> Tensor:
    """The columns of a gram [K, K], the one that is taken last first, i64 [K].

    What a column costs is the variance of its input that those behind it leave unexplained. The product of these does
    not depend on the order, so that their sum is least where they are alike: the last column is that of the least
    variance, the one before it that of the least variance behind it, and so on (Wubben 2001, "Efficient algorithm for
    decoding layered space-time codes", the sorted QR decomposition). Activation order, largest second moment first
    (``act_order`` in the authors' code of GPTQ), is this without what columns explain of each other.
    """
    left = gram.numpy().astype(np.float64)  # of the columns that are left, as those taken explain them
    least = max(damping * np.diag(left).mean(), float(np.finfo(np.float32).tiny))
    variance = np.diag(left) + least
    np.fill_diagonal(left, variance)
    order = []
    for start in range(0, len(left), BLOCK):
        explained = np.zeros((min(BLOCK, len(left) - start), len(left)))
        for i, row in enumerate(explained):
            last = int(np.argmin(variance.astype(np.float32)))  # rounding errors decide nothing
            order.append(last)
            np.subtract(left[last], explained[:i, last] @ explained[:i], out=row)
            # less than the damping is left where rounding errors made the gram indefinite: it explains nothing
            row *= row[last] ** -0.5 if row[last] > least / 2 else 0.0
            variance -= row * row
            variance[last] = np.inf
        left -= explained.T @ explained
    return torch.tensor(order)


def cholesky(gram: Tensor, damping: float) -> Tensor:
    """The lower Cholesky factor of a gram [K, K] to whose diagonal ``damping`` times its mean is added.

    Where inputs hardly vary, rounding errors may make the gram indefinite; the damping then grows until it is definite.
    """
    step = (damping * gram.diagonal().mean()).clamp_min(1e-30)
    damped = gram.clone()
    while True:
        damped.diagonal().copy_(gram.diagonal() + step)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not failed or not bool(torch.isfinite(step)):
            return factor
        step = step * 10


class _Columns:
    """Quantizes one column at a time to the nearest levels, as `formats.contract.nearest_codes` does for all."""

    def __init__(self, weights: Sequence[QuantizedWeight]) -> None:
        """Takes fits of the same rows, those without tables first; their rows stand one below the other."""
        rows, columns = weights[0].codes.shape
        scales = [contract.column_scale(w.scale, w.segments, columns) for w in weights]
        width = max(scale.shape[1] for scale in scales)
        self.scale = torch.cat([scale.expand(rows, width) for scale in scales])
        self.offset = None
        if any(w.offset is not None for w in weights):
            self.offset = torch.cat([torch.zeros(rows) if w.offset is None else w.offset.float() for w in weights])
        self.plain = sum(rows for w in weights if w.lut is None)
        self.entry = np.empty(rows * len(weights), np.float32)
        tables = [(w.lut, contract.row_classes(w.row_class, rows)) for w in weights if w.lut is not None]
        if tables:
            starts = itertools.accumulate((len(lut) for lut, _ in tables), initial=0)
            first = torch.cat([classes + start for (_, classes), start in zip(tables, starts, strict=False)])
            self.first = (first * contract.PLACES).to(torch.int32)
            """Where the places of each row's table begin, i32."""
            self.zero = (self.first + contract.ZERO_PLACE).float().numpy()
            self.luts = [lut for lut, _ in tables]
            known = [(lut, contract.codes_at_places(lut)) for lut in self.luts]
            self.known = torch.cat([codes for _, codes in known]).flatten()
            self.levels = torch.cat([lut.float().gather(1, codes.long()) for lut, codes in known]).flatten().numpy()

    @functools.cached_property
    def seconds(self) -> Tensor:
        """The second nearest levels to the values of each place; one path needs none."""
        return torch.cat([contract.second_levels_at_places(lut) for lut in self.luts]).flatten()

    def scales(self, columns: Tensor) -> Tensor:
        """The scales of some columns, f32 [columns, O]."""
        if self.scale.shape[1] == 1:
            return self.scale.T.expand(len(columns), -1)
        return self.scale.index_select(1, columns).T.contiguous()

    def level(self, values: np.ndarray, scale: np.ndarray, in_steps: np.ndarray) -> np.ndarray:
        """The levels nearest to values [O] of a column, until the next call; writes where the values lie, in steps."""
        offset, plain, entry = self.offset, self.plain, self.entry
        np.divide(values if offset is None else values - offset.numpy(), scale, out=in_steps)
        if plain:
            _whole(in_steps[:plain], np.rint, -contract.LUT_MAX, contract.LUT_MAX, entry[:plain])
        if plain < len(entry):
            place = entry[plain:]
            np.multiply(in_steps[plain:], 2, out=place)
            _whole(place, np.ceil, -contract.ZERO_PLACE, contract.ZERO_PLACE + 1, place)
            place += self.zero
            self.levels.take(place.astype(np.intp), out=place, mode="clip")
        entry *= scale
        if offset is not None:
            entry += offset.numpy()
        return entry

    def nearest_two(self, some: slice, in_steps: Tensor) -> tuple[Tensor, Tensor]:
        """The nearest and the second nearest entries to values [P, O'] of some rows, in steps."""
        plain = max(0, min(self.plain, some.stop) - some.start)
        values, tabled = in_steps[:, :plain], in_steps[:, plain:]
        first = values.round().clamp_(-contract.LUT_MAX, contract.LUT_MAX)
        second = first + torch.where(values >= first, 1.0, -1.0)
        second.masked_fill_(second.abs() > contract.LUT_MAX, torch.inf)
        if not tabled.shape[1]:
            return first, second
        place = contract.places(tabled) + self.first[max(0, some.start - self.plain) :][: tabled.shape[1]]
        near = (torch.from_numpy(self.levels), self.seconds)
        levels, seconds = (x.index_select(0, place.flatten()).view(place.shape) for x in near)
        return torch.cat([first, levels], 1), torch.cat([second, seconds], 1)

    def codes(self, in_steps: Tensor) -> Tensor:
        """The codes [columns, O] of what `level` has written, or of entries."""
        plain, tabled = in_steps[:, : self.plain], in_steps[:, self.plain :]
        found = [torch.round(plain).clamp_(-contract.LUT_MAX, contract.LUT_MAX).to(torch.int16)]
        if tabled.shape[1]:
            place = contract.places(tabled) + self.first
            found.append(self.known.index_select(0, place.flatten()).view(place.shape).to(torch.int16))
        return torch.cat(found, 1)


def _whole(values: np.ndarray, rounded: np.ufunc, least: int, most: int, out: np.ndarray) -> None:
    """Writes rounded values, none below the least or above the most."""
    rounded(values, out=out)
    np.maximum(out, least, out=out)
    np.minimum(out, most, out=out)
