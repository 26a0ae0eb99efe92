"""Learned tables: K-means over the values of a weight, a table for the tensor or for every 16 rows.

Qua2SeDiMo's K-means formats (arXiv 2412.14628, section 3) in the form that the integer kernels run: entries are int8,
every row has a scale, and clusters are those of the rows divided by it. Weights count in the clustering by what they
add to the layer's output, ``scale[i]^2 * E[x_k^2]`` (SqueezeLLM, arXiv 2306.07629, weights by sensitivity alike).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from mpq_compiler.formats import contract
from mpq_compiler.formats.base import (
    Format,
    QuantizedWeight,
    diagonal,
    output_error,
    row_tiles,
    stored_scale,
    weighted,
)
from mpq_compiler.formats.contract import nearest_codes, row_parts

BINS = 512
"""The number of bins of the histogram that K-means starts from."""
SAMPLED = 1_048_573
"""The most values of a table that K-means sees, spread over all; a prime, so that no column of a weight is left out."""
LLOYD = 25
"""The number of steps of Lloyd's algorithm; in one dimension with many values it has converged by then."""
FACTORS = tuple(1 + 0.04 * i for i in range(-4, 5))
"""Fractions of the least-squares scale of a row that the scale search tries."""
ROUNDS = 3
"""Rounds from each start: a round fits the tables to the scales, then the scales to the tables; the best is kept."""
MOST_CLASSES = 256
"""The most tables of a weight, since a row class is stored as u8."""


@dataclass(frozen=True)
class CodebookFormat(Format):
    """2^bits learned int8 entries, one table for all rows or, with ``tiled``, one for every tile of 16 rows."""

    tiled: bool = False

    @property
    def by_row(self) -> bool:
        return not self.tiled

    @property
    def searches(self) -> bool:
        return True

    @property
    def operand_bits(self) -> int:
        """Those of an entry, int8: entries lie on no coarser grid (Qua2SeDiMo counts 16, for entries in f16)."""
        return 8

    @property
    def trials(self) -> int:
        return 2 * ROUNDS * (1 + len(FACTORS)) * (2 if self.tiled else 1)

    def tiles_of_class(self, rows: int) -> int:
        """The number of neighbouring tiles that share a table: 1, unless there are more tiles than classes."""
        tiles = row_tiles(rows)
        return -(-tiles // MOST_CLASSES) if self.tiled else tiles

    def classes(self, rows: int) -> int:
        return -(-row_tiles(rows) // self.tiles_of_class(rows))

    def start(self, weight: Tensor) -> QuantizedWeight:
        """Quantizes with evenly spaced entries over the range of each row."""
        rows = weight.flatten(1)
        half = 2 ** (self.bits - 1)
        lut = (torch.arange(-half, half) * 2 + 1).to(torch.int8).repeat(self.classes(len(rows)), 1)
        return self._quantize(rows, stored_scale(rows.abs().amax(1, keepdim=True) / (2 * half - 1)), lut)

    def fit(self, weight: Tensor, gram: Tensor | None = None) -> QuantizedWeight:
        rows = weight.flatten(1)
        importance = torch.ones(rows.shape[1]) if gram is None else diagonal(gram).clamp_min(0)
        best: QuantizedWeight | None = None
        least = torch.full((self.classes(len(rows)),), torch.inf)
        if self.classes(len(rows)) > 1:  # from the best table for all rows, which is kept where it is better
            best = replace(self, tiled=False).fit(weight, gram)
            starts = [best.scale.float()]
            assert best.lut is not None
            best = self._quantize(rows, best.scale, best.lut.repeat(len(least), 1))
            least = self._per_class(output_error(best.dequantize() - rows, gram))
        else:
            spread = (rows.square() * importance).sum(1, keepdim=True) / importance.sum().clamp_min(1e-30)
            starts = [spread.sqrt(), rows.abs().amax(1, keepdim=True)]
        for scale in starts:
            for _ in range(ROUNDS):
                found, error = self._search(rows, self._learn(rows, scale, importance), gram)
                total = self._per_class(error)
                best = found if best is None else self._choose(rows, total < least, found, best)
                least, scale = torch.minimum(total, least), found.scale.float()
        assert best is not None
        return best

    def _learn(self, rows: Tensor, scale: Tensor, importance: Tensor) -> QuantizedWeight:
        """Learns tables on the int8 grid for given row scales [O, 1], and takes the nearest codes."""
        scale = scale.clamp_min(1e-30)
        if self.classes(len(rows)) == 1 and rows.numel() > SAMPLED:
            picked = _picked(rows.numel())
            row, column = picked // rows.shape[1], picked % rows.shape[1]
            own = scale[row, 0]
            values, weights = rows[row, column] / own, own.square() * importance[column]
            centres = _kmeans(values[None], weights[None], 2**self.bits)
        else:
            values, weights = rows / scale, scale.square() * importance
            centres = _kmeans(self._by_class(values), self._by_class(weights), 2**self.bits)
        peak = centres.abs().amax(1, keepdim=True).clamp_min(1e-30)
        lut = torch.round(centres * (contract.LUT_MAX / peak)).to(torch.int8)
        unit = (peak / contract.LUT_MAX)[self._class_of(len(rows))]
        return self._quantize(rows, stored_scale(scale * unit), lut)

    def _search(self, rows: Tensor, found: QuantizedWeight, gram: Tensor | None) -> tuple[QuantizedWeight, Tensor]:
        """Searches the row scales of least output error under the same tables; returns that error [O], too."""
        if self.tiled:
            return self._search_part(rows, found, gram)
        parts = [self._search_part(rows[p], found.of_rows(p), gram) for p in row_parts(rows)]
        codes, scale = (torch.cat([getattr(fit, name) for fit, _ in parts]) for name in ("codes", "scale"))
        return replace(found, codes=codes, scale=scale), torch.cat([error for _, error in parts])

    def _search_part(self, rows: Tensor, found: QuantizedWeight, gram: Tensor | None) -> tuple[QuantizedWeight, Tensor]:
        assert found.lut is not None
        level = found.dequantize()
        served = weighted(level, gram)
        fitting = (served * rows).sum(1, keepdim=True) / (served * level).sum(1, keepdim=True).clamp_min(1e-30)
        middle = found.scale.float() * fitting.clamp(0.5, 2)
        best, least = found.scale, torch.full((len(rows),), torch.inf)
        for factor in FACTORS:
            tried = self._quantize(rows, stored_scale(middle * factor), found.lut)
            error = output_error(tried.dequantize() - rows, gram)
            best = torch.where((error < least)[:, None], tried.scale, best)
            least = torch.minimum(error, least)
        return self._quantize(rows, best, found.lut), least

    def _quantize(self, rows: Tensor, scale: Tensor, lut: Tensor) -> QuantizedWeight:
        row_class = self._row_class(len(rows)) if len(lut) > 1 else None
        codes = nearest_codes(rows, scale, None, lut, row_class)
        return QuantizedWeight(codes, scale, None, lut, row_class=row_class)

    def _choose(self, rows: Tensor, better: Tensor, new: QuantizedWeight, old: QuantizedWeight) -> QuantizedWeight:
        """Takes ``new`` in the classes where it is better, ``old`` elsewhere."""
        assert new.lut is not None and old.lut is not None
        row = better[self._class_of(len(rows))]
        scale = torch.where(row[:, None], new.scale, old.scale)
        return self._quantize(rows, scale, torch.where(better[:, None], new.lut, old.lut))

    # ------------------------------------------------------------------------------------------ classes

    def _row_class(self, rows: int) -> Tensor:
        return (torch.arange(row_tiles(rows)) // self.tiles_of_class(rows)).to(torch.uint8)

    def _class_of(self, rows: int) -> Tensor:
        """The class of each row, i64 [O]."""
        return contract.row_classes(self._row_class(rows), rows)

    def _by_class(self, values: Tensor) -> Tensor:
        """Reshapes rows [O, K] to [classes, all values of a class]; zeros pad the last class."""
        classes = self.classes(len(values))
        rows = self.tiles_of_class(len(values)) * contract.TILE_ROWS if classes > 1 else len(values)
        padded = torch.nn.functional.pad(values, (0, 0, 0, classes * rows - len(values)))
        return padded.reshape(classes, -1)

    def _per_class(self, error: Tensor) -> Tensor:
        """Sums errors [O] over the rows of each class."""
        return torch.zeros(self.classes(len(error))).index_add(0, self._class_of(len(error)), error)


def _picked(count: int) -> Tensor:
    """The numbers of `SAMPLED` of ``count`` values, spread over all, i64."""
    return torch.arange(SAMPLED) * count // SAMPLED


def _kmeans(values: Tensor, weights: Tensor, count: int) -> Tensor:
    """Weighted 1-D K-means of each row of values [C, N]; deterministic. Returns ascending centres [C, count].

    Lloyd's algorithm on sorted values: the sums of a cluster are differences of running sums, in f64. It starts from
    centres spaced by the cube root of the weighted density, as an optimal fine table has them (Panter and Dite 1951).
    """
    if values.shape[1] > SAMPLED:
        picked = _picked(values.shape[1])
        values, weights = values[:, picked], weights[:, picked]
    order = values.argsort(1)
    x, w = values.gather(1, order).double(), weights.gather(1, order).double()
    mass, moment = (torch.nn.functional.pad(v.cumsum(1), (1, 0)) for v in (w, w * x))
    edges = x[:, :1] + (x[:, -1:] - x[:, :1]) * torch.linspace(0, 1, BINS + 1, dtype=torch.float64)
    cut = torch.searchsorted(x, edges[:, 1:-1].contiguous())
    density = mass.gather(1, torch.nn.functional.pad(cut, (1, 0))).diff(dim=1, append=mass[:, -1:])
    spread = density.clamp_min(0).pow(1 / 3).cumsum(1)
    quantile = (torch.arange(count) + 0.5) / count
    at = torch.searchsorted(spread, spread[:, -1:] * quantile).clamp_max(BINS - 1)
    centres = (edges.gather(1, at) + edges.gather(1, at + 1)) / 2
    ends = torch.tensor([0, x.shape[1]]).repeat(len(x), 1)
    for _ in range(LLOYD):
        middles = (centres[:, 1:] + centres[:, :-1]) / 2
        cut = torch.cat([ends[:, :1], torch.searchsorted(x, middles.contiguous(), right=True), ends[:, 1:]], 1)
        total, first = (v.gather(1, cut).diff(dim=1) for v in (mass, moment))
        centres = torch.where(total > 0, first / total.clamp_min(1e-300), centres)  # an empty cluster stays
    return centres.float()


KM2 = CodebookFormat("km2", bits=2)
KM3 = CodebookFormat("km3", bits=3)
KM3T = CodebookFormat("km3t", bits=3, tiled=True)
KM4 = CodebookFormat("km4", bits=4)
KM4T = CodebookFormat("km4t", bits=4, tiled=True)
