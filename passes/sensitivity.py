"""Measures the loss of output quality of each layer in each format, by itself."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal, cast

from torch import Tensor, fx

from mpq_compiler.allocation import mixdq_groups
from mpq_compiler.allocation.sensitivity_table import CONTENT, require_of
from mpq_compiler.analysis.content_loss import ContentLoss
from mpq_compiler.analysis.estimated_losses import LossEstimator, fit_edges
from mpq_compiler.analysis.noise_power import (
    input_weights,
    inputs_held,
    mean_power,
    measurement_key,
    noise_power,
    rounded,
)
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.analysis.single_changes import (
    PROBABILITIES,
    WEIGHT,
    QuantizedAttention,
    QuantizedEdge,
    Task,
    quantized_weight,
)
from mpq_compiler.analysis.time_weights import TIME_GAINS
from mpq_compiler.formats import get as get_format
from mpq_compiler.ir import parcels
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.findings import SENSITIVITY, Losses
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program
from mpq_compiler.pipeline.demand import Asked, Demand, fitting
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.requests import NONE, Requests
from mpq_compiler.quantization.statistics import (
    CALIBRATION,
    GRAM,
    RANGE,
    VALUES,
    Statistic,
)
from mpq_compiler.support import cache
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import BATCH, batches

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Measures the output's relative noise power with one weight, or one activation, quantized at a time.

    ``sum (y_q - y)^2 / sum y^2`` over calibration inputs spread over time (MixDQ, arXiv 2405.17873, section 4.2,
    measures the same as an SQNR). Noise powers of independent errors add, which is what the allocation relies on.
    Backward passes of random probes estimate all of them together (`analysis.probes`), at the cost of a few runs of the
    model an input; ``method=ablation`` runs it once for each instead. With `time-gains` each input counts by what an
    error at its time does to images. Results go to the cache as they are measured: a run that was killed goes on where
    it was. Where `bit-allocation` may quantize attentions, each is measured with q, k, v and its probabilities
    quantized together; where it makes activations dynamic, or small floats, those are measured so.

        (no change; facts["sensitivity"] holds weights[path][format], activations[edge][bits], attention[node][bits])
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.MEASURES
    width: ClassVar[str | None] = "activations"
    settings: ClassVar[Mapping[str, str]] = {"sensitivity": "sensitivity", "packed": "packed"}
    efforts: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {"inputs": 16}}
    requires: ClassVar[frozenset[str]] = frozenset({"calibration", "time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, GRAM})

    inputs: int | None = None
    """Calibration inputs on which the output is compared; by default 32, of models above 500 M parameters 16, above 2 B
    8; of models up to 10 M 128 where several widths of activations are measured."""
    formats: tuple[str, ...] = ("int2", "int3", "int2+b", "int4", "int3+b", "int8")
    """Weight formats to measure."""
    packed: tuple[str, ...] = ()
    """Weight formats to measure in their place for targets that do not decode entropy-coded weights, if there are any.
    """
    activations: tuple[int, ...] = (8,)
    """Activation widths to measure."""
    method: Literal["probes", "ablation"] = "probes"
    """``probes``: estimated by backward passes, in the first order of the errors. ``ablation``: each change made, and
    what depends on it run again, which takes as many runs as there are layers and formats."""
    probes: int = 8
    """Backward passes for an input on average, with ``method=probes``; inputs that count for more have more."""
    content: Literal["noise", "ssim"] = "noise"
    """What is measured of content layers (`mixdq_groups`). ``ssim``: 1 - SSIM of the clean image that the output
    predicts (MixDQ, section 4.2), with ``method=ablation``; such losses are of another unit than those of quality
    layers, so that the two need budgets of their own (`bit-allocation{ratios,activation_ratios}`)."""
    sampled: int = 1 << 23
    """Weights that are quantized in every format, with ``method=probes``; of a larger model some rows stand for all."""

    def __post_init__(self) -> None:
        for option in ("inputs", "probes", "sampled"):
            self.require(option, 1)
        self.require("activations", 2, 8)
        if not self.formats:
            raise UserError("option 'formats' of pass 'sensitivity' must name a format to measure, and is empty")
        for name in (*self.formats, *self.packed):
            get_format(name)
        if self.content != "noise" and self.method != "ablation":
            raise UserError(f"sensitivity{{content={self.content}}} runs each change of its own: add method=ablation")

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if self.formats == self.packed:
            program.note(
                "the target does not decode entropy-coded weights: in their place are packed formats, of which images "
                "take more bytes"
            )
        if session.sensitivity is not None:
            edges: dict[str, list[str]] = {}
            for node in program.quantizable:
                edges.setdefault(str(weight_path(node)), []).append(input_edge(node).name)
            require_of(session.sensitivity, program.model, program.facts[PARAMETERS], edges)
            program.facts[SENSITIVITY] = session.sensitivity
            return program
        estimator = self.estimator
        count = estimator.count(program.facts[PARAMETERS])
        inputs = program.facts[CALIBRATION].select(count)
        tasks = self._with_content(program, self.tasks(program, session.requests), session)
        key = self.key(program, inputs, session.device)
        if self.content != "noise" and session.denoiser is not None:
            key = cache.digest(key, repr(session.denoiser.scheduler))
        results = cache.Results("sensitivity", key, session.cache)
        if self.method == "ablation":
            losses = self._by_ablation(program, inputs, tasks, results, session)
        else:
            losses = estimator.losses(program, inputs, tasks, results, session)
        program.facts[SENSITIVITY] = estimator.table(tasks, losses, count, session.requests)
        if self.content != "noise":
            program.facts[SENSITIVITY]["content"] = self.content
        return program

    def _with_content(self, program: Program, tasks: list[Task], session: Session) -> list[Task]:
        """Gives the measurements of content layers their metric. UserError: nothing says what outputs predict."""
        if self.content == "noise":
            return tasks
        if session.denoiser is None or not session.denoiser.whole:
            raise UserError(
                f"sensitivity{{content={self.content}}} needs the clean image that an output predicts, and nothing "
                f"says how '{program.model}' draws: leave the option out"
            )
        metric, groups = ContentLoss(session.denoiser.scheduler, session.denoiser.latent), mixdq_groups.groups(program)

        def content(task: Task) -> bool:
            if task.kind == PROBABILITIES:
                return False  # attentions are quality, whoever reads them
            layers = [task.node] if task.kind == WEIGHT else _readers(program, task.node)
            return all(groups[str(weight_path(node))] == CONTENT for node in layers)

        return [replace(t, content=metric, name=f"{t.name} {self.content}") if content(t) else t for t in tasks]

    @property
    def estimator(self) -> LossEstimator:
        """What estimates the losses, and names the tasks."""
        return LossEstimator(self.formats, self.activations, self.inputs, self.probes, self.sampled)

    def tasks(self, program: Program, requests: Requests = NONE) -> list[Task]:
        """The measurements, in graph order."""
        return self.estimator.tasks(program, requests)

    def _by_ablation(
        self,
        program: Program,
        inputs: dict[str, Tensor],
        tasks: list[Task],
        results: cache.Results,
        session: Session,
    ) -> Losses:
        """The losses of tasks by name, each measured by a run of its own; ``results`` has those that are known."""
        parts = list(batches(inputs, inputs_held(program)))
        count = len(tasks) * len(parts)
        missing = sum(_key(task.name, part) not in results for task in tasks for part in range(len(parts)))
        if missing < count:
            session.reuse(f"{count - missing} of {count} losses")
            _logger.info("sensitivity: the cache has %d of %d losses", count - missing, count)
        if missing:
            with session.track("measuring losses", missing) as advance:
                for part, batch in enumerate(parts):
                    left = [task for task in tasks if _key(task.name, part) not in results]
                    self._measure_part(program, batch, part, left, results, session, advance)
        sizes = [float(input_weights(program, part).sum()) for part in parts]
        return {
            task.name: mean_power([results[_key(task.name, part)] for part in range(len(parts))], sizes)
            for task in tasks
        }

    def demand(self, asked: Asked) -> Demand:
        sizes = asked.sizes
        estimator = self.estimator
        share = estimator.share(sizes.numbers)
        fitted = fitting(sizes.layers, [get_format(f) for f in self.formats], asked.requests.rounding.quick, share)
        if self.method == "ablation":
            count = min(estimator.count(sizes.parameters), asked.rows)
            changes = len(sizes.layers) * (len(self.formats) + len(self.activations))
            return fitted + asked.running(count, BATCH) * changes
        return fitted + estimator.demand(asked)

    def _measure_part(
        self,
        program: Program,
        inputs: dict[str, Tensor],
        part: int,
        tasks: list[Task],
        results: cache.Results,
        session: Session,
        advance: Callable[[int], None],
    ) -> None:
        """Measures tasks on some of the inputs and adds their losses to ``results``.

        part: the number of these inputs' part, for the names of the results.
        """
        if not tasks:
            return
        fit_edges(program, tasks, session)
        measurement = _Measurement(self, program, inputs, tasks, session.fits)

        def keep(item: int, power: float) -> None:
            results[_key(tasks[item].name, part)] = rounded(power)
            advance(1)

        session.tasks(_measure, measurement, range(len(tasks)), keep)

    def key(self, program: Program, inputs: dict[str, Tensor], device: str = "cpu") -> str:
        """The cache key: a digest of all that a result depends on but its own task."""
        return measurement_key(program, inputs, self.estimator.count(program.facts[PARAMETERS]), device)

    def measure(
        self,
        program: Program,
        ablation: Ablation,
        inputs: dict[str, Tensor],
        task: Task,
        fits: FitCache | None = None,
    ) -> float:
        """The relative noise power of one task over ``inputs``; ``fits`` are those that are known."""
        node, choice, fits = task.node, task.choice, fits or FitCache()
        time = inputs["timestep"]
        if isinstance(choice, str):
            output = ablation.output(values=quantized_weight(program, fits, task))
        elif task.kind == PROBABILITIES:
            args = cast("tuple[Tensor, ...]", fx.map_arg(node.args, ablation.value))
            change = QuantizedAttention.of(program, fits, node, choice)
            output = ablation.output(values={node: change(args, time)})
        else:
            changed = QuantizedEdge.of(program, fits, task.kind, node.name, choice)(ablation.value(node), time)
            output = ablation.output(operands=dict.fromkeys(_readers(program, node), changed))
        given = output, ablation.reference
        weights = input_weights(program, inputs)
        return noise_power(*given, weights) if task.content is None else task.content(*given, inputs, weights)


class _Measurement:
    """What the tasks of an ablation share: the unchanged run is made where it is needed, once a process."""

    def __init__(
        self, step: Sensitivity, program: Program, inputs: dict[str, Tensor], tasks: list[Task], fits: FitCache
    ) -> None:
        self.step, self.program, self.inputs, self.tasks, self.fits = step, program, inputs, tasks, fits
        self._ablation: Ablation | None = None
        self._lock = threading.Lock()

    @property
    def ablation(self) -> Ablation:
        """The values of the unchanged run."""
        with self._lock:
            if self._ablation is None:
                self._ablation = Ablation(self.program, self.inputs)
            return self._ablation

    def __reduce__(self) -> tuple[type[_Measurement], tuple[object, ...]]:
        program = parcels.lean(self.program, CALIBRATION.name, TIME_GROUPS.name, TIME_GAINS.name)
        return _Measurement, (self.step, program, self.inputs, self.tasks, self.fits)


def _measure(shared: _Measurement, item: int) -> float:
    return shared.step.measure(shared.program, shared.ablation, shared.inputs, shared.tasks[item], shared.fits)


def _readers(program: Program, edge: fx.Node) -> list[fx.Node]:
    """The layers that read an edge."""
    return [n for n in program.quantizable if input_edge(n) is edge]


def _key(name: str, part: int) -> str:
    """The name of a result in the cache; it has no part where one part holds all inputs, as it mostly does."""
    return f"{name} part {part}" if part else name
