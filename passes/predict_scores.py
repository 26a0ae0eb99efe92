"""Scores the formats of layers, and of groups of layers, by predictors that learn from random configurations."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mpq_compiler.allocation.pose import SCORES, ScoredUnit, Scores
from mpq_compiler.allocation.qua2sedimo import graph as qua2sedimo_graph
from mpq_compiler.allocation.qua2sedimo import random_plans
from mpq_compiler.allocation.qua2sedimo.graph import Graph
from mpq_compiler.allocation.qua2sedimo.predictor import (
    Features,
    Learner,
    Predictor,
    Scored,
    Training,
    variants_of,
)
from mpq_compiler.allocation.qua2sedimo.random_plans import Configuration, Fits
from mpq_compiler.analysis.noise_power import rounded
from mpq_compiler.formats import get as get_format
from mpq_compiler.formats import version as formats_version
from mpq_compiler.inspection import score_report
from mpq_compiler.ir import provenance
from mpq_compiler.ir.costs import weight_bytes
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, GRAM, RANGE, VALUES, Statistic, fingerprint
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError

TRUSTED = 0.8
"""The Spearman correlation of prediction and label below which there is a note."""
LEAST = 20
"""The fewest configurations that leave each fold some to be judged by."""


@dataclass(frozen=True)
class PredictScores(Pass):
    """Scores the formats of layers by a graph neural network, which random configurations have taught.

    Each configuration gives all weights formats at random; its label is the output's SQNR in dB with these weights on
    calibration inputs. Predictors of several folds learn to rank them; the norm of what one node is embedded as, after
    as many hops as its unit is deep, standardized and weighted by how well such norms rank configurations that were
    held out, is the score of the unit's formats (Qua2SeDiMo, arXiv 2412.14628, section 3). A unit is an attention, a
    feed-forward network, the layers of a residual block: `allocation/qua2sedimo/graph.py` finds them. Labels and
    scores go to the cache as they are made.

        (no change; facts["scores"] holds units: their layers, and a score for each variant of their formats)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.MEASURES
    requires: ClassVar[frozenset[str]] = frozenset({"calibration", "time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"scores"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, GRAM})

    formats: tuple[str, ...] = ("int4", "km4", "km4t", "int3", "km3", "km3t")
    """Weight formats to draw from: the width first, then one of its formats."""
    configurations: int = 500
    """Random configurations to measure."""
    inputs: int = 32
    """Calibration inputs on which the output is compared."""
    level: Literal["block", "operation"] = "block"
    """Units to score: those of blocks, or single layers."""
    folds: int = 5
    """Predictors; each is judged by the part of the configurations that it was not trained on."""
    epochs: int = 60
    """Epochs of training of each predictor."""
    ranking: Literal["spearman", "ndcg", "hybrid"] = "spearman"
    """What norms of embeddings are trained for: Spearman's correlation of all ranks, the gain of a ranking by the best
    ones (NDCG), or both."""

    def __post_init__(self) -> None:
        self.require("inputs", 1)
        self.require("configurations", LEAST)
        self.require("folds", 2, 10)
        self.require("epochs", 1)
        if len({*self.formats}) < 2:
            raise UserError("option 'formats' of pass 'predict-scores' must name two formats or more to choose from")
        for name in self.formats:
            get_format(name)

    def run(self, program: Program, session: Session) -> Program:
        assert session.denoiser is not None
        program = program.fork()
        graph = qua2sedimo_graph.of(program, session.denoiser.module.model)
        calibration = program.facts[CALIBRATION]
        inputs = calibration.select(self.inputs)
        results = cache.Results("sensitivity", self.key(program, graph, inputs, session), session.cache)
        fits = Fits(program, self.formats, session)
        drawn = random_plans.drawn(list(fits.calls), self.formats, self.configurations, session.seed)
        labels = self._labels(program, fits, drawn, inputs, results, session)
        units, alone = qua2sedimo_graph.units(graph), qua2sedimo_graph.alone(graph)
        training = Training(self.folds, self.epochs, ranking=self.ranking)
        learner = Learner(graph, self._features(program, fits), [*units, *alone], training, session.seed)
        folds = self._folds(learner, drawn, labels, results, session)
        mean = [torch.tensor([fold.variants[i] for fold in folds]).mean(0) for i in range(len(learner.units))]
        found: list[ScoredUnit] = []
        for unit, score in zip(learner.units, mean, strict=True):
            names = [
                " ".join(self.formats[i] for i in chosen) for chosen in variants_of(len(self.formats), len(unit.layers))
            ]
            found.append(
                {
                    "kind": graph.kind(unit),
                    "layers": learner.paths(unit),
                    "variants": dict(zip(names, score.tolist(), strict=True)),
                }
            )
        scores: Scores = {"units": found[: len(units)] if self.level == "block" else found[len(units) :]}
        program.facts[SCORES] = scores
        worst = min(fold.prediction for fold in folds)
        if worst < TRUSTED:
            program.note(
                f"the predictors rank configurations poorly that they have not seen (Spearman correlation {worst:.2f}, "
                f"where {TRUSTED} is usual): predict-scores{{configurations}} above {self.configurations} may help"
            )
        self._note(program, graph, learner, found, len(units), folds, labels)
        return program

    def _labels(
        self,
        program: Program,
        fits: Fits,
        drawn: Sequence[Configuration],
        inputs: dict[str, Tensor],
        results: cache.Results,
        session: Session,
    ) -> Tensor:
        """The SQNR in dB of each configuration, f32 [configurations], measured where it is not cached."""
        missing = [i for i in range(len(drawn)) if f"configuration {i}" not in results]
        if missing:
            measured = random_plans.Measured(fits, inputs, run(program, inputs))
            with session.track("random configurations", len(missing)) as advance:

                def keep(item: tuple[int, Configuration], power: float) -> None:
                    results[f"configuration {item[0]}"] = rounded(power)
                    advance(1)

                session.tasks(random_plans.measure, measured, ((i, drawn[i]) for i in missing), keep)
        powers = torch.tensor([results[f"configuration {i}"] for i in range(len(drawn))], dtype=torch.float64)
        return (-10 * powers.clamp_min(1e-30).log10()).float()

    def _features(self, program: Program, fits: Fits) -> Features:
        kinds = list(dict.fromkeys(map(random_plans.method, self.formats)))
        widths = sorted({get_format(name).bits for name in self.formats})
        values = {}
        for path, (call, *_) in fits.calls.items():
            weight = str(weight_of(call))
            size = program.tensors[weight].numel() * 4
            rows = [
                [
                    size / weight_bytes(program, weight, name),
                    float(torch.tensor(max(fits.error(path, name), 1e-12)).log10()),
                ]
                for name in self.formats
            ]
            values[path] = torch.tensor(rows)
        return Features(
            self.formats,
            tuple(1 + kinds.index(random_plans.method(name)) for name in self.formats),
            tuple(1 + widths.index(get_format(name).bits) for name in self.formats),
            values,
        )

    def _folds(
        self, learner: Learner, drawn: Sequence[Configuration], labels: Tensor, results: cache.Results, session: Session
    ) -> list[Scored]:
        def name(fold: int) -> str:
            ranking = "" if self.ranking == "spearman" else f" {self.ranking}"
            return f"fold {fold} of {self.folds} {self.epochs} epochs {len(drawn)}{ranking}"

        missing = [fold for fold in range(self.folds) if name(fold) not in results]
        if missing:
            place = {name: 1 + i for i, name in enumerate(self.formats)}
            choices = learner.encoded([{path: place[f] for path, f in c.items()} for c in drawn])
            predictors = learner.predictors()
            with session.track("training predictors", len(missing)) as advance:

                def keep(item: tuple[int, Predictor], scored: Scored) -> None:
                    results[name(item[0])] = scored.to_json()
                    advance(1)

                items = ((fold, predictors[fold]) for fold in missing)
                session.tasks(_learn, _Lessons(learner, choices, labels), items, keep)
        return [Scored.from_json(results[name(fold)]) for fold in range(self.folds)]

    def _note(
        self,
        program: Program,
        graph: Graph,
        learner: Learner,
        found: Sequence[Mapping[str, Any]],
        units: int,
        folds: Sequence[Scored],
        labels: Tensor,
    ) -> None:
        """Notes what explains the scores, for each layer and for each group of layers."""
        alone = {entry["layers"][0]: entry["variants"] for entry in found[units:]}
        groups: dict[str, dict[str, list[float]]] = {kind: {} for kind in score_report.KINDS}
        for entry in found[:units]:
            groups[score_report.UNIT].setdefault(entry["kind"], []).extend(entry["variants"].values())
            for path in entry["layers"]:
                provenance.note(program, path, self.name(), unit=entry["kind"])
                if self.level == "block":
                    provenance.note(program, path, self.name(), unit_layers=entry["layers"])
        for place in graph.layers:
            node = graph.nodes[place]
            if (path := str(node.path)) in alone:
                said = {score_report.OPERATION: node.operation, score_report.BLOCK: f"{node.index} {node.block}"}
                provenance.note(program, path, self.name(), scores=alone[path], **said)
                for kind, name in said.items():
                    groups[kind].setdefault(name, []).extend(alone[path].values())
        provenance.note(
            program,
            provenance.PROGRAM,
            self.name(),
            correlations=[fold.prediction for fold in folds],
            hops=[list(fold.hops) for fold in folds],
            sqnr_db=[float(labels.min()), float(labels.max())],
            boxes={kind: {name: score_report.box(v) for name, v in group.items()} for kind, group in groups.items()},
        )

    def key(self, program: Program, graph: Graph, inputs: dict[str, Tensor], session: Session) -> str:
        """Everything a label or a score depends on but its own number and the predictors' options."""
        rounding = session.requests.rounding.quick
        versions = "".join(map(formats_version, self.formats))
        options = f"scores 1 {self.formats}{versions} {session.seed} {rounding} {graph}"
        return fingerprint(program, inputs, options)


@dataclass(frozen=True)
class _Lessons:
    """What all predictors learn from."""

    learner: Learner
    choices: Tensor
    labels: Tensor


def _learn(shared: _Lessons, item: tuple[int, Predictor]) -> Scored:
    fold, predictor = item
    shared.learner.fit(predictor, fold, shared.choices, shared.labels)
    return shared.learner.scored(predictor, fold, shared.choices, shared.labels)
