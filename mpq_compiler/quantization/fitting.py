"""Fits weights and activation quantizers on calibration statistics; a fit is cached once computed."""

from __future__ import annotations

import dataclasses
import itertools
import logging
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats import activation, contract, low_rank
from mpq_compiler.formats.base import (
    Fit,
    Format,
    QuantizedWeight,
    departures,
    diagonal,
    errors_of_rows,
    stored_scale,
    stored_type,
    weighted,
)
from mpq_compiler.formats.entropy import TOGETHER, rounded_together
from mpq_compiler.ir import ops, scratch
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.quantization import fit_files
from mpq_compiler.quantization.adaround import adaround
from mpq_compiler.quantization.fit_files import FitFiles
from mpq_compiler.quantization.gptq import DAMPING, gptq, gptq_of_formats, roots
from mpq_compiler.quantization.statistics import CALIBRATION, EdgeStatistics, evenly
from mpq_compiler.support.execution import RunContext
from mpq_compiler.support.memo import last_result

_logger = logging.getLogger(__name__)
KEPT_ELEMENTS = 1 << 20
"""The most elements of a weight whose fits are cached in memory; codes of larger ones are, where they lie in a file."""

CONSTANT = 1e-5
"""Share of the second moments below which the moments about the mean count as rounding errors."""

SKETCH = 256
"""The columns of the factor that stands for a layer's whole second moments where candidates of a fit are compared."""

FEWEST_ROWS = 16
"""The fewest rows that stand for all rows of a weight."""

REST = "rest"
"""The part of a weight that the base of a low-rank format quantizes: the weight minus its branch."""


def rows_of(program: Program, weight: str) -> Tensor:
    """Reads a stored weight as f32 [O, K]."""
    tensor = program.tensors.read(weight)
    return tensor.reshape(len(tensor), -1).contiguous()


def some_rows(count: int, share: float) -> Tensor:
    """The numbers of the rows that stand for all ``count`` rows of a weight, at least `FEWEST_ROWS`, i64."""
    return evenly(count, max(FEWEST_ROWS, round(count * share)))


def bias_of(call: fx.Node) -> fx.Node | None:
    """The node of a call's bias where it is a stored tensor, else None."""
    bias = call.args[2] if len(call.args) > 2 else call.kwargs.get("bias")
    return bias if isinstance(bias, fx.Node) and bias.op == "get_attr" else None


def moments(program: Program, call: fx.Node) -> Tensor | None:
    """The gram under which a call's weight is fitted; None where calibration has none.

    Where the layer has a bias, the gram is taken about the mean, because `corrected_bias` removes the mean error.
    """
    gram, mean = _moments(program, call)
    return gram if gram is None or mean is None else _about(gram, mean)


def _moments(program: Program, call: fx.Node) -> tuple[Tensor | None, Tensor | None]:
    """The gram of a call's input, and the mean where the gram is to be taken about it."""
    calibration = program.facts[CALIBRATION]
    gram = calibration.grams.get(call.name)
    return gram, None if gram is None or bias_of(call) is None else calibration.means[call.name]


@last_result  # the same tensor for all formats of a layer: `gptq` keeps what it makes of it
def _about(gram: Tensor, mean: Tensor) -> Tensor:
    """The second moments about the mean; the gram itself where only rounding errors would be left.

    This happens for a layer whose input never changes, such as the time embedding of a one-step model.
    """
    squares = diagonal(gram)
    if float((squares - mean.square()).sum()) <= CONSTANT * float(squares.sum()):
        return gram
    if gram.dim() == 1:
        return gram - mean.square()
    parts = mean.reshape(-1, gram.shape[-1])
    return gram - (parts[:, :, None] * parts[:, None, :]).reshape(gram.shape)


class Rounding(StrEnum):
    """How codes are chosen among the levels of a fit (`passes/round_weights.py`)."""

    NEAREST = "nearest"
    GPTQ = "gptq"
    GPTQ_IN_ORDER = "gptq-in-order"
    GPTQ_GAINS = "gptq-gains"
    """GPTQ, with the scale of each row behind which its output is as loud as it was, where rows have scales."""
    GPTQ_SCALES = "gptq-scales"
    """The same, with the best of several scales of each row to choose codes by (`SCALES`)."""
    GPTQ_PATHS = "gptq-paths"
    """The same, and each row keeps the best `PATHS` sequences of codes while they are chosen."""
    LEARNED = "learned"

    @property
    def walks(self) -> bool:
        """Whether it is GPTQ, which walks over the columns."""
        return self not in (Rounding.NEAREST, Rounding.LEARNED)

    @property
    def quick(self) -> Rounding:
        """The rounding that replaces it where many are compared, which comes close to it in a fraction of the time."""
        return {Rounding.LEARNED: Rounding.GPTQ, Rounding.GPTQ_PATHS: Rounding.GPTQ_SCALES}.get(self, self)

    def of_size(self, numbers: int) -> Rounding:
        """The rounding of a weight of so many: nothing is searched in one that is too large for it."""
        return Rounding.GPTQ_GAINS if self.searches and numbers > SEARCHED else self

    @property
    def searches(self) -> bool:
        """Whether several scales of each row are tried."""
        return self in (Rounding.GPTQ_SCALES, Rounding.GPTQ_PATHS)

    @property
    def paths(self) -> int:
        """The sequences of codes that a row keeps while they are chosen."""
        return PATHS if self == Rounding.GPTQ_PATHS else 1

    def __call__(self, fit: Fit, rows: Tensor, gram: Tensor | None) -> Fit:
        """Chooses the codes of a fit of rows [O, K]; FP8, and fits on a gram's diagonal, keep the nearest codes.

        On a gram in blocks GPTQ stands in for learned rounding.
        """
        if self == Rounding.NEAREST or gram is None or gram.dim() == 1:
            return fit
        if isinstance(fit, low_rank.LowRankWeight):
            base = self(fit.base, rows - fit.branch, gram)
            assert isinstance(base, QuantizedWeight)
            return replace(fit, base=base)
        if not isinstance(fit, QuantizedWeight):
            return fit
        if self == Rounding.LEARNED and gram.dim() == 2:
            codes = adaround(rows, fit.merged(), gram).codes
        else:
            codes = gptq(rows, fit.merged(), gram, self != Rounding.GPTQ_IN_ORDER, paths=self.paths).codes
        return _with_codes(fit, codes)

    def of_formats(self, fits: Sequence[Fit], rows: Tensor, gram: Tensor | None) -> list[Fit]:
        """Chooses the codes of several fits of the same rows; GPTQ does so in one walk over the columns."""
        plain = [fit for fit in fits if isinstance(fit, QuantizedWeight)]
        if not self.walks or gram is None or gram.dim() == 1 or not plain:
            return [self(fit, rows, gram) for fit in fits]
        merged, order = [fit.merged() for fit in plain], self != Rounding.GPTQ_IN_ORDER
        made = gptq_of_formats(rows, merged, gram, order, paths=self.paths)
        codes = {id(fit): _with_codes(fit, one.codes) for fit, one in zip(plain, made, strict=True)}
        return [codes[id(fit)] if id(fit) in codes else self(fit, rows, gram) for fit in fits]

    def searched(self, fits: Sequence[Fit], rows: Tensor, gram: Tensor | None) -> list[Fit]:
        """Chooses codes as `of_formats` does and, as its name says, the scale of each row behind them.

        A scale is fitted to the nearest codes, and GPTQ leaves larger errors, which reach farther. Rows are independent
        of each other, so that a walk for each factor tries it for all of them; one along several paths follows.
        """
        if not (self.searches or self == Rounding.GPTQ_GAINS) or gram is None or gram.dim() == 1:
            return self.of_formats(fits, rows, gram)
        factors = SCALES if self.searches else ()
        tried = [[_scaled(fit, rows, f) for f in factors if _has_scales(fit)] or [fit] for fit in fits]
        every = [one for own in tried for one in own]
        step = max(1, TOGETHER // rows.numel())
        walks = [self.quick.of_formats(every[i : i + step], rows, gram) for i in range(0, len(every), step)]
        along = weighted(rows, gram)
        made = (_as_loud(fit, rows, along) for fit in itertools.chain.from_iterable(walks))
        found = [_best([next(made) for _ in own], rows, gram) for own in tried]
        if self.paths > 1:
            found = [_as_loud(fit, rows, along) for fit in self.of_formats(found, rows, gram)]
        return found


SCALES = (1.0, 0.7, 0.8, 0.9, 1.1, 1.2, 1.3)
"""Factors of the scale of a row, one of which is best behind GPTQ: 0.4 dB less error at 4 bits, 1 dB at 2, in layers of
the bundled UNet, and up to 4."""
PATHS = 8
"""The sequences of codes that a row keeps, which leave 0.6 dB less error than one in layers of the bundled DiT at 2.24
bits; four leave 0.5 dB less, sixteen 0.7 in twice the time."""
LOUDER = 1.25
"""The most by which a row is made louder: of one that codes hardly describe a scale makes nothing better."""
SEARCHED = 1 << 20
"""The most numbers of a weight whose scales and paths are searched: it takes a walk for each factor, and one for each
path. Rows that stand for those of a larger weight are rounded as it is."""


def _has_scales(fit: Fit) -> bool:
    """Whether rows have a scale each, that of few levels: of many GPTQ fills the range less than nearest codes do."""
    return isinstance(fit, QuantizedWeight) and fit.scale.shape[1] == 1 and fit.lut is not None


def _as_loud(fit: Fit, rows: Tensor, along: Tensor) -> Fit:
    """The fit with scales by which of each row's output as much is left as the float row [K] has.

    ``along`` is the rows times the gram.

    Scales and codes of the least error leave less, a hundredth or a few: what is missing of a row is no noise but has
    the same sign in every layer and step, and adds up. Banner 2019 (arXiv 1810.05723, section 4) restores a weight's
    own variance so; this is the output's, in the direction of what it was.
    """
    if not _has_scales(fit):
        return fit
    assert isinstance(fit, QuantizedWeight)
    own, whole = ((values * along).sum(1) for values in (fit.dequantize(), rows))
    louder = torch.where((own > 0) & (whole > 0), whole / own, 1).clamp(1 / LOUDER, LOUDER)
    offset = fit.offset if fit.offset is None else stored_type(fit.offset.float() * louder)
    return replace(fit, scale=stored_scale(fit.scale.float() * louder[:, None]), offset=offset)


def _scaled(fit: Fit, rows: Tensor, factor: float) -> Fit:
    """The fit of rows [O, K] with the nearest codes where the levels of each row are so many times as far apart."""
    assert isinstance(fit, QuantizedWeight)
    merged = fit.merged()
    assert merged.lut is not None
    scale, offset = stored_scale(fit.scale.float() * factor), fit.offset
    if offset is not None:  # around the middle of the levels
        levels = merged.lut.float()
        middle = (levels.masked_fill(merged.lut == contract.NO_LEVEL, torch.inf).amin(1) + levels.amax(1)) / 2
        moved = (fit.scale.float() - scale.float())[:, 0] * middle[contract.row_classes(merged.row_class, len(rows))]
        offset = stored_type(offset.float() + moved)
    scaled = replace(fit, scale=scale, offset=offset)
    return _with_codes(scaled, contract.quantize(rows, scaled.merged().tables))


def _best(fits: Sequence[Fit], rows: Tensor, gram: Tensor) -> Fit:
    """The fit that has of each row what the best of several fits, alike but for scales, has."""
    best, *others = fits
    if not others:
        return best
    least, *errors = errors_of_rows(fits, rows, gram)
    for other, error in zip(others, errors, strict=True):
        assert isinstance(best, QuantizedWeight) and isinstance(other, QuantizedWeight)
        better, least = error < least, torch.minimum(error, least)
        rows_better = better[:, None]
        best = replace(
            best,
            codes=torch.where(rows_better, other.codes, best.codes),
            scale=torch.where(rows_better, other.scale, best.scale),
            offset=_where(better, other.offset, best.offset),
            signs=_where(rows_better, other.signs, best.signs),
        )
    return best


def _where(better: Tensor, new: Tensor | None, old: Tensor | None) -> Tensor | None:
    """The new values where they are better, of a part that both have or neither."""
    return None if new is None or old is None else torch.where(better, new, old)


@dataclass(frozen=True)
class Layer:
    """What a fit of a layer's weight depends on beside the format."""

    weight: Tensor
    """The weight as stored."""
    gram: Tensor | None
    """The second moments of the layer's inputs, where there are any."""
    mean: Tensor | None
    """The mean of its inputs, where a bias takes up the mean error."""

    @staticmethod
    def of(program: Program, call: fx.Node, weight: str) -> Layer:
        """The layer of a call, whose weight has the store name ``weight``."""
        return Layer(program.tensors[weight], *_moments(program, call))

    @property
    def moments(self) -> Tensor | None:
        """The gram under which the weight is fitted."""
        return self.gram if self.gram is None or self.mean is None else _about(self.gram, self.mean)

    def read(self, picked: Tensor | None = None) -> Tensor:
        """The weight in f32, or the rows ``picked`` of it."""
        return (self.weight if picked is None else self.weight[picked]).to(torch.float32)

    def fit(self, format_name: str, rounding: Rounding = Rounding.NEAREST) -> Fit:
        """Fits the weight with the least error of the output over the calibration's rows."""
        return fit_rows(self.read(), format_name, self.moments, rounding.of_size(self.weight.numel()))

    def fit_formats(
        self, names: Sequence[str], rounding: Rounding, picked: Tensor | None = None
    ) -> dict[str, Fit]:
        """Fits the weight in several formats, as `fit` does each, or the rows ``picked`` as those of the whole."""
        within = None if picked is None else self.read().flatten(1)
        chosen = rounding.of_size(self.weight.numel())
        return fit_formats(self.read(picked), names, self.moments, chosen, within)


def fitted(
    program: Program, call: fx.Node, weight: str, format_name: str, rounding: Rounding = Rounding.NEAREST
) -> Fit:
    """Fits a call's weight in a format, with the least error of the layer's output over the calibration's rows.

    Args:
        program: has the calibration.
        call: the layer.
        weight: the store name of its weight.
        format_name: the format.
        rounding: how codes are chosen.
    """
    return Layer.of(program, call, weight).fit(format_name, rounding)


def fit_rows(weight: Tensor, format_name: str, gram: Tensor | None, rounding: Rounding = Rounding.NEAREST) -> Fit:
    """Fits rows of a weight [O, ..., C] in a format; gram as in `Format.fit`, but no factor."""
    chosen, weight = formats.get(format_name), weight.contiguous()
    choose = rounding.of_formats if isinstance(chosen, formats.EntropyFormat) else rounding.searched
    return chosen.rounded(weight.flatten(1), _nearest(weight, chosen, gram), partial(choose, gram=gram))


def _nearest(weight: Tensor, chosen: Format, gram: Tensor | None) -> Fit:
    """The fit with the nearest codes."""
    if chosen.searches and gram is not None and gram.dim() > 1 and gram.shape[-1] > 2 * SKETCH:
        gram = _sketch(gram)
    return chosen.fit(weight, gram)


def fit_formats(
    weight: Tensor, names: Sequence[str], gram: Tensor | None, rounding: Rounding, within: Tensor | None = None
) -> dict[str, Fit]:
    """Fits the same rows in several formats, as `fit_rows` does each; GPTQ chooses their codes together.

    within: the weight [O, K] for whose rows they stand.
    """
    weight = weight.contiguous()
    rows, choose = weight.flatten(1), partial(rounding.of_formats, gram=gram)
    together = rounding.walks and gram is not None and gram.dim() > 1
    coded: dict[str, formats.EntropyFormat] = {}
    if together or within is not None:
        coded = {name: chosen for name in names if isinstance(chosen := formats.get(name), formats.EntropyFormat)}
    found = dict(zip(coded, rounded_together([*coded.values()], rows, choose, within), strict=True)) if coded else {}
    others = [name for name in names if name not in coded]
    if not together:
        return found | {name: fit_rows(weight, name, gram, rounding) for name in others}
    nearest = [_nearest(weight, formats.get(name), gram) for name in others]
    return found | dict(zip(others, rounding.searched(nearest, rows, gram), strict=True))


def _with_codes(fit: QuantizedWeight, codes: Tensor) -> QuantizedWeight:
    """The fit with codes of its merged levels, which are those of base and branch where it has one."""
    return replace(fit, codes=codes) if fit.signs is None else replace(fit, codes=codes >> 1, signs=codes & 1)


@last_result  # as of `_about`
def _sketch(gram: Tensor) -> Tensor:
    """A factor S [K, `SKETCH`] of a gram: random combinations of the columns of its root, so that S S^T has its mean.

    Whether one candidate of a row is better than another shows in `SKETCH` directions as in all (Johnson and
    Lindenstrauss 1984), for a fraction of the products.
    """
    generator, parts = torch.Generator().manual_seed(0), []
    for own, root in roots(gram, True, DAMPING):  # as GPTQ asks for them, which follows
        part = torch.empty(len(own), SKETCH)
        part[own] = root.float() @ torch.randn(len(own), SKETCH, generator=generator)
        parts.append(part / SKETCH**0.5)
    return torch.cat(parts)


def corrected_bias(program: Program, call: fx.Node, weight: str, quantized: Fit) -> Tensor | None:
    """The bias that removes the mean output error, ``b + (W - W_q) E[x]`` (Nagel 2019, arXiv 1906.04721, section 4.2).

    None where the layer has no stored bias or no statistics.
    """
    bias, mean = bias_of(call), program.facts[CALIBRATION].means.get(call.name)
    if bias is None or mean is None:
        return None
    moved = torch.cat([error @ mean for error in departures(quantized, program.tensors[weight])])
    return program.tensors.read(str(bias.target)) - moved


@dataclass(frozen=True)
class Edge:
    """What the quantizer of a tensor edge is fitted to."""

    statistics: EdgeStatistics
    timestep: Tensor
    """The timesteps of the statistics' rows."""
    boundaries: Tensor
    """The boundaries of the time groups."""

    @staticmethod
    def of(program: Program, edge: str) -> Edge:
        """The edge of that name."""
        calibration = program.facts[CALIBRATION]
        return Edge(calibration.edges[edge], calibration.inputs["timestep"], program.facts[TIME_GROUPS])

    def rows(self) -> list[Tensor]:
        """The rows of each time group, as truth values."""
        group = ops.time_group(self.timestep, self.boundaries)
        return [group == g for g in range(len(self.boundaries) + 1)]

    def integers(self, bits: int) -> tuple[Tensor, Tensor]:
        """Fits an integer quantizer (`activation.fit`): scale f16 [G], zero point u8 [G] by time group."""
        found = []
        for rows in self.rows():
            low, high = self.statistics.low[rows].min(), self.statistics.high[rows].max()
            found.append(activation.fit(self.statistics.values[rows].flatten(), low, high, bits))
        return torch.stack([f[0] for f in found]), torch.stack([f[1] for f in found])

    def floats(self, bits: int) -> tuple[int, Tensor]:
        """Fits small floats by least squared error: bits of exponent, and scales f16 [G] by time group."""
        magnitude = torch.maximum(-self.statistics.low, self.statistics.high)
        chosen = self.rows()
        peaks = torch.stack([magnitude[rows].max() for rows in chosen])
        return activation.fit_floats([self.statistics.values[rows].flatten() for rows in chosen], peaks, bits)


def float_parameters(program: Program, edge: str, bits: int) -> tuple[int, Tensor]:
    """What `Edge.floats` gives for an edge of the program."""
    return Edge.of(program, edge).floats(bits)


def activation_parameters(program: Program, edge: str, bits: int) -> tuple[Tensor, Tensor]:
    """What `Edge.integers` gives for an edge of the program."""
    return Edge.of(program, edge).integers(bits)


def kept(fit: Fit) -> bool:
    """Whether a fit is cached: it is small, or its codes lie in a file."""
    return fit.codes.numel() <= KEPT_ELEMENTS or scratch.is_mapped(fit.codes)


@dataclass(frozen=True)
class KeptFit:
    """A fit with what it was made from: it holds as long as a program has the same objects."""

    fit: Fit
    weight: Tensor
    """The weight as stored."""
    call: str
    """The first of the weight's calls, under whose second moments it was fitted."""
    gram: Tensor | None
    """Those moments, where there are any."""

    def holds(self, program: Program, weight: str) -> bool:
        """Whether the program has the same weight under that name, and the same moments of its call."""
        return self.weight is program.tensors[weight] and self.gram is program.facts[CALIBRATION].grams.get(self.call)


@dataclass(frozen=True)
class Wanted:
    """A fit that is wanted."""

    call: fx.Node
    """The layer."""
    weight: str
    """The store name of its weight."""
    format: str
    rounding: Rounding


@dataclass(frozen=True)
class _Fitting:
    """A task: a layer to fit in several formats."""

    name: tuple[str, str]
    """The names of its call and of its weight."""
    layer: Layer
    formats: Sequence[tuple[str, Rounding]]


def _fit_layer(_: None, item: _Fitting) -> list[tuple[Fit, float]]:
    """Fits a layer in its formats; each fit comes with the CPU seconds that it took."""
    found = []
    for one in item.formats:
        begin = time.thread_time()
        fit = _in_files(item.layer.fit(*one))
        found.append((fit, time.thread_time() - begin))
    return found


def _in_files(fit: Fit) -> Fit:
    """The fit with its large tensors in files: those of all weights are more than memory holds."""
    assert dataclasses.is_dataclass(fit) and not isinstance(fit, type)
    parts = {part.name: getattr(fit, part.name) for part in dataclasses.fields(fit)}
    tensors = {name: scratch.kept(part) for name, part in parts.items() if isinstance(part, Tensor)}
    nested = {name: _in_files(part) for name, part in parts.items() if dataclasses.is_dataclass(part)}
    return replace(fit, **tensors, **nested)


_Tables = TypeVar("_Tables")
_Edges = dict[tuple[str, int], tuple[tuple[EdgeStatistics, Tensor], _Tables]]
"""The tables of quantizers by edge and bits, with what they were fitted to: the edge's statistics, and the boundaries
of the time groups."""


_Key = tuple[str, str, Rounding, int | None]


def _key(program: Program, weight: str, format_name: str, rounding: Rounding, rows: int | None) -> _Key:
    """The key of a fit: roundings that are one for a weight of its size share it."""
    return weight, format_name, rounding.of_size(program.tensors[weight].numel()), rows


@dataclass
class FitCache:
    """Fits of weights and activations, each made once in a run of passes; the session owns them.

    A weight that several calls read is fitted for the first of them. Other processes begin with an empty one.
    """

    def __reduce__(self) -> tuple[type[FitCache], tuple[()]]:
        return FitCache, ()

    files: FitFiles | None = None
    """Files of fits that took long, for a run that goes on where this one was killed; None: they are lost then."""
    forms: dict[tuple[str, str], Fit] = field(default_factory=dict)
    """Fits by weight and format that are given, for programs of which only the form counts."""
    weights: dict[_Key, KeptFit] = field(default_factory=dict)
    """By store name, format, rounding and number of rows (`some_rows`; None: all of them); those of more than
    `KEPT_ELEMENTS` elements are not kept."""
    integers: _Edges[tuple[Tensor, Tensor]] = field(default_factory=dict)
    """What `activation_parameters` gave."""
    floats: _Edges[tuple[int, Tensor]] = field(default_factory=dict)
    """What `float_parameters` gave."""

    def fitted(
        self,
        program: Program,
        call: fx.Node,
        weight: str,
        format_name: str,
        rounding: Rounding = Rounding.NEAREST,
    ) -> Fit:
        """What the function `fitted` gives."""
        found = self.known(program, weight, format_name, rounding)
        if found is None:
            found = fitted(program, call, weight, format_name, rounding)
            self.keep(program, call, weight, format_name, rounding, found)
        return found

    def known(
        self, program: Program, weight: str, format_name: str, rounding: Rounding, rows: int | None = None
    ) -> Fit | None:
        """The fit, or that of so many rows, where there is one."""
        if rows is None and (form := self.forms.get((weight, format_name))) is not None:
            return form
        found = self.weights.get(_key(program, weight, format_name, rounding, rows))
        return found.fit if found is not None and found.holds(program, weight) else None

    def keep(
        self,
        program: Program,
        call: fx.Node,
        weight: str,
        format_name: str,
        rounding: Rounding,
        fit: Fit,
        rows: int | None = None,
    ) -> None:
        """Keeps a fit that was made elsewhere, perhaps of so many rows, unless it is too large."""
        if kept(fit):
            gram = program.facts[CALIBRATION].grams.get(call.name)
            key = _key(program, weight, format_name, rounding, rows)
            self.weights[key] = KeptFit(fit, program.tensors[weight], call.name, gram)

    def fit_all(self, program: Program, wanted: Sequence[Wanted], context: RunContext, title: str) -> list[Fit]:
        """What `fitted` gives for each, as tasks of the context, one for each layer.

        Args:
            program: has the calibration.
            wanted: what to fit.
            context: runs the tasks and shows their progress.
            title: of the progress bar.
        """
        found = {one: self.known(program, one.weight, one.format, one.rounding) for one in wanted}
        missing: dict[tuple[str, str], list[Wanted]] = {}
        places: dict[Wanted, Path] = {}
        with context.track(title, len(found)) as advance:
            for one, fit in found.items():
                if fit is None and (place := self._place(program, one)) is not None:
                    places[one] = place
                    if self.files is not None and (left := self.files.load(place)) is not None:
                        found[one], seconds = left
                        context.reuse("fits of weights", seconds)
                        self.keep(program, one.call, one.weight, one.format, one.rounding, left[0])
                if found[one] is None:
                    missing.setdefault((one.call.name, one.weight), []).append(one)
            advance(len(found) - sum(map(len, missing.values())))
            if left_behind := sum(found[one] is not None for one in places):
                _logger.info("%s: an earlier run had left %d of %d", title, left_behind, len(found))

            def keep(item: _Fitting, fits: Sequence[tuple[Fit, float]]) -> None:
                for one, (fit, seconds) in zip(missing[item.name], fits, strict=True):
                    found[one] = fit
                    self.keep(program, one.call, one.weight, one.format, one.rounding, fit)
                    if self.files is not None and one in places:
                        self.files.save(places[one], fit, seconds)
                advance(len(fits))

            items = (
                _Fitting(name, Layer.of(program, of[0].call, of[0].weight), [(one.format, one.rounding) for one in of])
                for name, of in missing.items()
            )
            context.tasks(_fit_layer, None, items, keep)
        return [fit for one in wanted if (fit := found[one]) is not None]

    def _place(self, program: Program, one: Wanted) -> Path | None:
        """The file in which a fit that takes long is kept."""
        weight = program.tensors[one.weight]
        if self.files is None or weight.numel() < fit_files.LEAST or one.rounding == Rounding.NEAREST:
            return None
        layer = Layer.of(program, one.call, one.weight)
        rounding = one.rounding.of_size(weight.numel())
        return self.files.place(weight, (layer.gram, layer.mean), one.format, rounding)

    def fit_integers(self, program: Program, wanted: Iterable[tuple[str, int]], context: RunContext) -> None:
        """Fits integer quantizers of edges, by name and bits, as tasks of the context."""
        _fit_edges(self.integers, _integers, program, wanted, context)

    def fit_floats(self, program: Program, wanted: Iterable[tuple[str, int]], context: RunContext) -> None:
        """Fits small floats to edges, by name and bits, as tasks of the context."""
        _fit_edges(self.floats, _floats, program, wanted, context)

    def activation_parameters(self, program: Program, edge: str, bits: int) -> tuple[Tensor, Tensor]:
        """What the function `activation_parameters` gives."""
        return _kept(self.integers, activation_parameters, program, edge, bits)

    def float_parameters(self, program: Program, edge: str, bits: int) -> tuple[int, Tensor]:
        """What the function `float_parameters` gives."""
        return _kept(self.floats, float_parameters, program, edge, bits)


@dataclass(frozen=True)
class _EdgeFitting:
    """A task: an edge to fit a quantizer of some bits to."""

    name: str
    bits: int
    edge: Edge


def _integers(_: None, item: _EdgeFitting) -> tuple[Tensor, Tensor]:
    return item.edge.integers(item.bits)


def _floats(_: None, item: _EdgeFitting) -> tuple[int, Tensor]:
    return item.edge.floats(item.bits)


def _fit_edges(
    known: _Edges[_Tables],
    task: Callable[[None, _EdgeFitting], _Tables],
    program: Program,
    wanted: Iterable[tuple[str, int]],
    context: RunContext,
) -> None:
    missing = [one for one in dict.fromkeys(wanted) if _held(known, program, *one) is None]

    def keep(item: _EdgeFitting, tables: _Tables) -> None:
        known[item.name, item.bits] = (item.edge.statistics, item.edge.boundaries), tables

    items = (_EdgeFitting(name, bits, Edge.of(program, name)) for name, bits in missing)
    context.tasks(task, None, items, keep)


def _kept(
    known: _Edges[_Tables], fit: Callable[[Program, str, int], _Tables], program: Program, edge: str, bits: int
) -> _Tables:
    found = _held(known, program, edge, bits)
    if found is None:
        found = fit(program, edge, bits)
        known[edge, bits] = (program.facts[CALIBRATION].edges[edge], program.facts[TIME_GROUPS]), found
    return found


def _held(known: _Edges[_Tables], program: Program, edge: str, bits: int) -> _Tables | None:
    """The tables of an edge, where they were fitted to the statistics and time groups that the program has."""
    found = known.get((edge, bits))
    if found is None or found[0][0] is not program.facts[CALIBRATION].edges[edge]:
        return None
    return found[1] if found[0][1] is program.facts[TIME_GROUPS] else None
