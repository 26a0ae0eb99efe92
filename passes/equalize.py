"""Equalization: scales the channels of activations alike, and undoes that in the weights that read them."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from mpq_compiler.analysis.rewrite_search import RewriteSearch
from mpq_compiler.formats.contract import row_parts
from mpq_compiler.ir import provenance
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization import rewrite_gain
from mpq_compiler.quantization.channel_scaling import Scaling
from mpq_compiler.quantization.rewrite_gain import Layers, Rows

POWERS = tuple(i / 10 for i in range(1, 10))
"""The values of SmoothQuant's alpha: how much of the spread of a channel's values moves into the weights."""
WIDEST = 64.0
"""The largest factor, and the inverse of the smallest, relative to their geometric mean."""


class Found(NamedTuple):
    """The result of a search."""

    factor: Tensor
    """The factors [C] of the tensor's channels."""
    rule: str
    """The rule that gave them."""
    gain: float
    """Their gain in dB."""


@dataclass(frozen=True)
class Equalize(RewriteSearch):
    """Divides the channels of a tensor by factors, and multiplies the columns of the layers that read it with them.

    The quantized product is what should come out best: of many ways to share out the spread of channels between
    activation and weights (SmoothQuant, arXiv 2211.10438, with each alpha; weight dilation, DilateQuant, arXiv
    2409.14307; powers of the activation's magnitudes alone) each group of layers that read one tensor takes the one
    with the least error of its outputs, both sides quantized, and none where it does not gain on rows that the search
    has not seen. Factors go into what makes the tensor where that is exact: a norm's weight and bias, the rows of a
    layer, of the values through an attention; else they are a multiplication, which the producing kernel takes along.

        %time_embedding_linear_1 = aten.linear(%time_proj_cat_1, .weight, .bias)
      =>
        %time_proj_cat_1_scaled  = aten.mul(%time_proj_cat_1, time_proj_cat_1:equalized)
        %time_embedding_linear_1 = aten.linear(%time_proj_cat_1_scaled, .weight:equalized, .bias)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    role: ClassVar[Role | None] = Role.REWRITES
    capped: ClassVar[frozenset[str]] = frozenset({"steps"})
    width: ClassVar[str | None] = "activations"
    tried: ClassVar[int] = len(POWERS) + 4

    rule: Literal["search", "dilation", "smoothquant"] = "search"
    """Which factors are tried. ``dilation`` and ``smoothquant`` have those of DilateQuant, and of SmoothQuant with
    alpha 0.5 (which MPQ-DM takes), everywhere, whether they gain or not."""
    exact: bool = True
    """Factors are powers of two, so that scaling changes no bit of a float; else, and those of ``rule=dilation``, most
    of which are below two, f16."""

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        groups = self.layers(program, session)
        scaling = Scaling(program)
        chosen = [g for g in groups if scaling.possible(g.readers)]
        with session.track("equalizing", len(chosen)) as advance:

            share = self.share(program)

            def search(group: Layers) -> Found | None:
                found = self.search(program, group, share)
                advance(1)
                return found

            results = session.map(search, chosen)
        for group, found in zip(chosen, results, strict=True):
            if found is not None:
                folded = scaling.scale(group.edge, found.factor, group.readers)
                said = {"rule": found.rule, "gain_db": found.gain, "into": "producer" if folded else "multiplication"}
                for reader in group.readers:
                    provenance.note(program, str(weight_path(reader)), self.name(), **said)
        scaling.apply()
        for group, found in zip(chosen, results, strict=True):
            if found is not None:
                self.hand_on(session, group, found.factor)
        return program

    def search(self, program: Program, group: Layers, share: float = 1.0) -> Found | None:
        """The best factor for the tensor that the layers read; None where none gains on held-out rows.

        share: of the rows of weights by which errors are measured.
        """
        weights = [program.tensors[str(weight_of(n))] for n in group.readers]
        joined = group.rows()
        shown = {geometry: rows[::2] for geometry, rows in joined.items()}
        kept = {geometry: rows[min(1, len(rows) - 1) :: 2] for geometry, rows in joined.items()}
        whole = torch.ones(len(group.largest))
        some = self.some_rows(program, group, share)
        if self.rule != "search":
            rule = {"dilation": "dilation", "smoothquant": "alpha 0.5"}[self.rule]
            best = (
                self._dilating(weights)
                if self.rule == "dilation"
                else dict(self.candidates(group.largest, weights))[rule]
            )
            if torch.equal(best, whole):
                return None
        else:
            rule, best, least = "", whole, self._error(group, shown, some, whole)
            for name, factor in self.candidates(group.largest, weights):
                error = self._error(group, shown, some, factor)
                if error < least:
                    rule, best, least = name, factor, error
        before, after = (self._error(group, kept, some, f) for f in (whole, best))
        gain = rewrite_gain.gain_db(before, after)
        return Found(best, rule, gain) if rule and (gain >= self.gain or self.rule != "search") else None

    def candidates(self, largest: Tensor, weights: list[Tensor]) -> Iterator[tuple[str, Tensor]]:
        """The rules, each with its factors [C].

        largest: the largest magnitude of each channel [C]. weights: of the layers, [O, ..., C].
        """
        columns = torch.stack([part.abs().flatten(0, -2).amax(0) for part in _parts(weights)]).amax(0)
        for power in POWERS:
            yield f"alpha {power}", self._on_grid(columns ** (1 - power) / largest**power)
        for power in (0.25, 0.5, 0.75):
            yield f"activation^{power}", self._on_grid(largest**-power)
        yield "dilation", self._on_grid(1 / dilation(weights))

    def _dilating(self, weights: list[Tensor]) -> Tensor:
        """The inverse factors [C] of `dilation`, at least 1/`WIDEST`, in f16 so that no row leaves its range."""
        factor = 1 / dilation(weights).clamp_max(WIDEST)
        return (factor * (1 + 2.0**-10)).to(torch.float16).to(torch.float32).clamp_max(1.0)

    def _on_grid(self, factor: Tensor) -> Tensor:
        """Normalizes factors to a geometric mean of 1, within `WIDEST`, and rounds them as they are stored.

        Channels that are always zero get 1.
        """
        log = factor.log2()
        known = torch.isfinite(log)
        if not bool(known.any()):
            return torch.ones_like(factor)
        log = torch.where(known, log - log[known].mean(), torch.zeros_like(log))
        bound = torch.tensor(WIDEST).log2()
        log = log.clamp(-bound, bound)
        return torch.exp2(log.round()) if self.exact else torch.exp2(log).to(torch.float16).to(torch.float32)

    def _error(self, group: Layers, rows: Rows, weights: list[Tensor], factor: Tensor) -> float:
        """The relative squared error of the layers' outputs where their input is multiplied by ``factor`` [C]."""
        return self.error(group, rows, weights, lambda x: x * factor, lambda w: w / factor)


def dilation(weights: list[Tensor]) -> Tensor:
    """The largest factors [C] by which columns can grow without a row leaving its range (DilateQuant, eq. 10-12)."""
    found = torch.full((weights[0].shape[-1],), torch.inf)
    for w in _parts(weights):
        taps = w.reshape(len(w), -1, w.shape[-1])
        for sign in (1, -1):
            part = (sign * taps).clamp_min(0)
            bound = part.amax((1, 2))[:, None, None]
            found = torch.minimum(found, torch.where(part > 0, bound / part, torch.inf).amin((0, 1)))
    return torch.where(torch.isfinite(found), found, torch.ones_like(found))


def _parts(weights: list[Tensor]) -> Iterator[Tensor]:
    """The rows of weights [O, ..., C], f32, some at a time."""
    return (w[part].to(torch.float32) for w in weights for part in row_parts(w))
