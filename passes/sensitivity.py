"""Measures the loss of output quality of each layer in each format, by itself."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal, NamedTuple, cast

import torch
from torch import Tensor, fx

from mpq_compiler.allocation.sensitivity_table import require_of
from mpq_compiler.analysis.noise_power import (
    input_weights,
    inputs_held,
    mean_power,
    measurement_key,
    noise_power,
    rounded,
    usual_inputs,
)
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.analysis.probes import Name, Probes, WeightErrors
from mpq_compiler.analysis.single_changes import (
    PER_TOKEN,
    PROBABILITIES,
    SMALL_FLOAT,
    STATIC,
    WEIGHT,
    QuantizedAttention,
    QuantizedEdge,
    Task,
    quantized_weight,
)
from mpq_compiler.analysis.time_weights import TIME_GAINS
from mpq_compiler.formats import get as get_format
from mpq_compiler.formats import version as formats_version
from mpq_compiler.formats.base import Fit
from mpq_compiler.ir import parcels
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import dynamic_edges, input_edge
from mpq_compiler.ir.findings import SENSITIVITY, Losses, LossTable
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program
from mpq_compiler.pipeline.demand import VALUE_PASSES, Asked, Demand, fitting
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import FitCache, Layer, Rounding, bias_of, kept, some_rows
from mpq_compiler.quantization.requests import NONE, Activations, Requests
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
    settings: ClassVar[Mapping[str, str]] = {"sensitivity": "sensitivity"}
    efforts: ClassVar[Mapping[str, Mapping[str, Any]]] = {"fast": {"inputs": 16}}
    requires: ClassVar[frozenset[str]] = frozenset({"calibration", "time-groups"})
    provides: ClassVar[frozenset[str]] = frozenset({"sensitivity"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({RANGE, VALUES, GRAM})

    inputs: int | None = None
    """Calibration inputs on which the output is compared; by default 32, of models above 500 M parameters 16, above 2 B
    8."""
    formats: tuple[str, ...] = ("int2", "int3", "int2+b", "int4", "int3+b", "int8")
    """Weight formats to measure."""
    activations: tuple[int, ...] = (8,)
    """Activation widths to measure."""
    method: Literal["probes", "ablation"] = "probes"
    """``probes``: estimated by backward passes, in the first order of the errors. ``ablation``: each change made, and
    what depends on it run again, which takes as many runs as there are layers and formats."""
    probes: int = 8
    """Backward passes for an input on average, with ``method=probes``; inputs that count for more have more."""
    sampled: int = 1 << 23
    """Weights that are quantized in every format, with ``method=probes``; of a larger model some rows stand for all."""

    def __post_init__(self) -> None:
        for option in ("inputs", "probes", "sampled"):
            self.require(option, 1)
        self.require("activations", 2, 8)
        if not self.formats:
            raise UserError("option 'formats' of pass 'sensitivity' must name a format to measure, and is empty")
        for name in self.formats:
            get_format(name)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        if session.sensitivity is not None:
            edges: dict[str, list[str]] = {}
            for node in program.quantizable:
                edges.setdefault(str(weight_path(node)), []).append(input_edge(node).name)
            require_of(session.sensitivity, program.model, program.facts[PARAMETERS], edges)
            program.facts[SENSITIVITY] = session.sensitivity
            return program
        calibration = program.facts[CALIBRATION]
        count = self._count(program.facts[PARAMETERS])
        inputs = calibration.select(count)
        results = cache.Results("sensitivity", self.key(program, inputs, session.device), session.cache)
        requests = session.requests
        tasks = self.tasks(program, requests)
        losses = (self._by_ablation if self.method == "ablation" else self._by_probes)(
            program, inputs, tasks, results, session
        )
        weights: dict[str, Losses] = {}
        activations: dict[str, Losses] = {}
        attention: dict[str, Losses] = {}
        for task in tasks:
            if task.kind == WEIGHT:
                weights.setdefault(str(weight_path(task.node)), {})[str(task.choice)] = losses[task.name]
            else:
                kind = attention if task.kind == PROBABILITIES else activations
                kind.setdefault(task.node.name, {})[str(task.choice)] = losses[task.name]
        table: LossTable = {
            "weights": weights,
            "activations": activations,
            "inputs": count,
            "attention": attention,
            "dynamic": requests.activations == Activations.DYNAMIC,
            "floating": requests.activations == Activations.FLOATING,
        }
        program.facts[SENSITIVITY] = table
        return program

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
        missing = sum(_key(task.name, part) not in results for task in tasks for part in range(len(parts)))
        if missing:
            with session.track("sensitivity", missing) as advance:
                for part, batch in enumerate(parts):
                    left = [task for task in tasks if _key(task.name, part) not in results]
                    self._measure_part(program, batch, part, left, results, session, advance)
        sizes = [float(input_weights(program, part).sum()) for part in parts]
        return {
            task.name: mean_power([results[_key(task.name, part)] for part in range(len(parts))], sizes)
            for task in tasks
        }

    def _by_probes(
        self,
        program: Program,
        inputs: dict[str, Tensor],
        tasks: list[Task],
        results: cache.Results,
        session: Session,
    ) -> Losses:
        """The losses of tasks by name, estimated by backward passes; ``results`` has what is known of each input."""
        samples = list(batches(inputs, 1))
        weights = input_weights(program, inputs)
        # the squares of many rows, which are summed where some rows stand for all, scatter less than that of one sum
        each = self._each(self._share(tasks, program))
        counts = (weights * (each * len(samples) / weights.sum())).round().clamp_min(1).long().tolist()
        keys = [f"{count} probes, {self.sampled} weights, input {i}" for i, count in enumerate(counts)]
        names = {task.name for task in tasks}
        left = [i for i, key in enumerate(keys) if key not in results or not names <= results[key]["errors"].keys()]
        session.saved.extend(results[key].get("seconds", 0.0) for i, key in enumerate(keys) if i not in left)
        if left:
            with session.track("sensitivity", len(names) + len(left)) as advance:
                probes = self._probes(program, tasks, session, advance)

                def keep(item: tuple[dict[str, Tensor], int, int], estimated: _Estimated) -> None:
                    key = keys[item[1]]
                    rounded_errors = {task.name: rounded(estimated.errors.get(task.name, 0.0)) for task in tasks}
                    known = results[key]["errors"] if key in results else {}
                    results[key] = {
                        "power": rounded(estimated.power),
                        "errors": known | rounded_errors,
                        "seconds": round(estimated.seconds, 2),
                    }
                    advance(1)

                session.tasks(_estimate, probes, ((samples[i], i, counts[i]) for i in left), keep)
        found = list(zip(weights.tolist(), (results[key] for key in keys), strict=True))
        power = max(sum(weight * one["power"] for weight, one in found), 1e-300)
        return {name: rounded(sum(weight * one["errors"][name] for weight, one in found) / power) for name in names}

    def _probes(
        self, program: Program, tasks: list[Task], session: Session, advance: Callable[[int], None]
    ) -> Probes:
        """What estimates the tasks: the errors of weights, and the functions that change activations."""
        fits = session.fits
        layers: dict[fx.Node, list[Task]] = {}
        edges: dict[fx.Node, dict[Name, Callable[[Tensor, Tensor], Tensor]]] = {}
        calls: dict[fx.Node, dict[Name, Callable[[Sequence[Tensor], Tensor], Tensor]]] = {}
        _fit_edges(program, tasks, session)
        for task in tasks:
            node, bits = task.node, task.choice
            if isinstance(bits, str):
                layers.setdefault(operand(node, 1), []).append(task)
                continue
            advance(1)
            if task.kind == PROBABILITIES:
                calls.setdefault(node, {})[task.name] = QuantizedAttention.of(program, fits, node, bits)
            else:
                edges.setdefault(node, {})[task.name] = QuantizedEdge.of(program, fits, task.kind, node.name, bits)
        share = self._share(tasks, program)
        weights: dict[fx.Node, WeightErrors] = {}
        read = {weight.name: weight for weight in layers}

        def keep(item: _Rows, found: tuple[WeightErrors, Mapping[str, Fit]]) -> None:
            weight = read[item.weight]
            weights[weight], made = found
            for task in layers[weight]:
                if (choice := str(task.choice)) in made:
                    fits.keep(program, task.node, str(weight.target), choice, task.rounding, made[choice])
            advance(len(layers[weight]))

        session.tasks(_row_errors, None, (_rows(program, fits, of, share) for of in layers.values()), keep)
        ordered = {weight: weights[weight] for weight in layers}
        return Probes(program, ordered, edges, calls, session.seed, session.device)

    def demand(self, asked: Asked) -> Demand:
        sizes = asked.sizes
        share = self._share_of(sizes.numbers)
        count = min(self._count(sizes.parameters), asked.rows)
        fitted = fitting(sizes.layers, [get_format(f) for f in self.formats], asked.requests.rounding.quick, share)
        if self.method == "ablation":
            changes = len(sizes.layers) * (len(self.formats) + len(self.activations))
            return fitted + asked.running(count, BATCH) * changes
        ways = self._each(share)
        back = Demand(
            products=ways * (1.25 + share) * sizes.products,
            traffic=ways * 3 * VALUE_PASSES * sizes.value_bytes,
            held=1.3 * sizes.backward_bytes + 8 * sizes.largest,
        )
        return fitted + asked.running(2 * count, 1) + back * count

    def _count(self, parameters: int) -> int:
        """The number of inputs of a model with so many parameters."""
        return usual_inputs(parameters) if self.inputs is None else self.inputs

    def _share(self, tasks: list[Task], program: Program) -> float:
        """The share of the rows of weights that are quantized in every format."""
        weights = {str(operand(task.node, 1).target) for task in tasks if task.kind == WEIGHT}
        return self._share_of(sum(program.tensors[name].numel() for name in weights))

    def _share_of(self, numbers: int) -> float:
        return min(1.0, self.sampled / max(1, numbers))

    def _each(self, share: float) -> int:
        """The probes of an input on average, where that share of the rows of weights is quantized."""
        return self.probes if share == 1 else max(1, self.probes // 4)

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
        _fit_edges(program, tasks, session)
        measurement = _Measurement(self, program, inputs, tasks, session.fits)

        def keep(item: int, power: float) -> None:
            results[_key(tasks[item].name, part)] = rounded(power)
            advance(1)

        session.tasks(_measure, measurement, range(len(tasks)), keep)

    def tasks(self, program: Program, requests: Requests = NONE) -> list[Task]:
        """The measurements, in graph order; a shared weight or edge counts once.

        Dynamic activations are those of edges that linear layers alone read; attentions are measured where they are
        asked for; weights are rounded as the pipeline asks.
        """
        found: dict[str, Task] = {}

        rounding = requests.rounding.quick
        versions = {name: formats_version(name) for name in self.formats}

        def add(kind: str, node: fx.Node, what: str, choice: str | int) -> None:
            name = f"{kind} {what} {choice}" + (f" {rounding}{versions[str(choice)]}" if kind == WEIGHT else "")
            found.setdefault(name, Task(kind, node, choice, name, rounding))

        floating = requests.activations == Activations.FLOATING
        by_row = requests.activations == Activations.DYNAMIC
        dynamic = dynamic_edges(program, requests.attention) if by_row else frozenset()
        for node in program.quantizable:
            for f in self.formats:
                add(WEIGHT, node, str(weight_path(node)), f)
            edge = input_edge(node)
            for bits in self.activations:
                kind = SMALL_FLOAT if floating else PER_TOKEN if edge.name in dynamic else STATIC
                add(kind, edge, edge.name, bits)
        for node in program.attentions if requests.attention else ():
            for bits in self.activations:
                add(PROBABILITIES, node, node.name, bits)
        return list(found.values())

    def key(self, program: Program, inputs: dict[str, Tensor], device: str = "cpu") -> str:
        """The cache key: a digest of all that a result depends on but its own task."""
        return measurement_key(program, inputs, self._count(program.facts[PARAMETERS]), device)

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
            readers = [n for n in program.quantizable if input_edge(n) is node]
            output = ablation.output(operands=dict.fromkeys(readers, changed))
        return noise_power(output, ablation.reference, input_weights(program, inputs))


def _fit_edges(program: Program, tasks: Sequence[Task], session: Session) -> None:
    """Fits the quantizers of activations that the tasks have, to be known to the session."""
    integers: list[tuple[str, int]] = []
    floats: list[tuple[str, int]] = []
    for task in tasks:
        if isinstance(task.choice, int) and task.kind != PER_TOKEN:
            names = QuantizedAttention.edges(task.node) if task.kind == PROBABILITIES else [task.node.name]
            (floats if task.kind == SMALL_FLOAT else integers).extend((name, task.choice) for name in names)
    session.fits.fit_integers(program, integers, session)
    session.fits.fit_floats(program, floats, session)


@dataclass(frozen=True)
class _Rows:
    """A task: a weight whose errors in several formats are wanted, in all rows or in some."""

    weight: str
    """The name of the node that reads it."""
    layer: Layer
    picked: Tensor
    count: int
    formats: tuple[tuple[Name, str, Rounding], ...]
    """The name of each error, the format, and how codes are chosen."""
    known: dict[str, Fit]
    """The fits that are known, by format."""
    mean: Tensor | None


def _rows(program: Program, fits: FitCache, tasks: Sequence[Task], share: float) -> _Rows:
    """The errors of a weight in the formats of its tasks, in a share of its rows, as a task."""
    node, weight = tasks[0].node, operand(tasks[0].node, 1)
    name = str(weight.target)
    count = len(program.tensors[name])
    mean = None if bias_of(node) is None else program.facts[CALIBRATION].means.get(node.name)
    formats = tuple((task.name, str(task.choice), task.rounding) for task in tasks)
    known = {f: fit for _, f, rounding in formats if (fit := fits.known(program, name, f, rounding)) is not None}
    layer = Layer.of(program, node, name)
    return _Rows(weight.name, layer, some_rows(count, share), count, formats, known, mean)


def _row_errors(_: None, item: _Rows) -> tuple[WeightErrors, dict[str, Fit]]:
    """The errors of a weight, and the whole fits that were made for them, unless they are too large to keep."""
    errors: dict[Name, Tensor] = {}
    made: dict[str, Fit] = {}
    some = [choice for _, choice, _ in item.formats if len(item.picked) < item.count and get_format(choice).by_row]
    rows = item.layer.fit_formats(some, item.formats[0][2], item.picked) if some else {}
    for name, choice, rounding in item.formats:
        if choice in rows:
            error = rows[choice].dequantize() - item.layer.read(item.picked).flatten(1)
        else:
            if (known := item.known.get(choice)) is None:
                known = made[choice] = item.layer.fit(choice, rounding)
            error = (known.dequantize() - item.layer.read().flatten(1))[item.picked]
        errors[name] = error.to(torch.bfloat16)
    return WeightErrors(item.picked, item.count, errors, item.mean), {f: fit for f, fit in made.items() if kept(fit)}


class _Estimated(NamedTuple):
    """What the probes of an input show, and the CPU seconds that they took."""

    power: float
    errors: dict[Name, float]
    seconds: float


def _estimate(probes: Probes, item: tuple[dict[str, Tensor], int, int]) -> _Estimated:
    begin = time.thread_time()
    power, errors = probes.powers(*item)
    return _Estimated(power, errors, time.thread_time() - begin)


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


def _key(name: str, part: int) -> str:
    """The name of a result in the cache; it has no part where one part holds all inputs, as it mostly does."""
    return f"{name} part {part}" if part else name
