"""Losses of a program's single changes, estimated together by random probes."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, fx

from mpq_compiler.analysis.noise_power import input_weights, rounded, usual_inputs
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
)
from mpq_compiler.formats import get as get_format
from mpq_compiler.formats import version as formats_version
from mpq_compiler.formats.base import Fit
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import dynamic_edges, input_edge
from mpq_compiler.ir.findings import Losses, LossTable
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import VALUE_PASSES, Asked, Demand
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import FitCache, Layer, Rounding, bias_of, kept, some_rows
from mpq_compiler.quantization.requests import NONE, Activations, Requests
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support import cache
from mpq_compiler.support.execution import batches

_logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class LossEstimator:
    """Which losses are estimated, and how well."""

    formats: tuple[str, ...]
    """Weight formats."""
    activations: tuple[int, ...]
    """Activation widths."""
    inputs: int | None
    """Calibration inputs; None: `usual_inputs`."""
    probes: int
    """Backward passes for an input on average; inputs that count for more have more."""
    sampled: int
    """Weights that are quantized in every format; of a larger model some rows stand for all."""

    def count(self, parameters: int) -> int:
        """The number of inputs of a model with so many parameters."""
        return usual_inputs(parameters, len(self.activations) > 1) if self.inputs is None else self.inputs

    def demand(self, asked: Asked) -> Demand:
        """What it takes to estimate the losses, but for fitting the weights in their formats."""
        sizes, share = asked.sizes, self.share(asked.sizes.numbers)
        count, ways = min(self.count(sizes.parameters), asked.rows), self.each(share)
        back = Demand(
            products=ways * (1.25 + share) * sizes.products,
            traffic=ways * 3 * VALUE_PASSES * sizes.value_bytes,
            held=1.3 * sizes.backward_bytes + 8 * sizes.largest,
        )
        return asked.running(2 * count, 1) + back * count

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

    def table(self, tasks: Sequence[Task], losses: Losses, count: int, requests: Requests) -> LossTable:
        """The table of the losses of tasks, by name, on so many inputs."""
        weights: dict[str, Losses] = {}
        activations: dict[str, Losses] = {}
        attention: dict[str, Losses] = {}
        for task in tasks:
            if task.kind == WEIGHT:
                weights.setdefault(str(weight_path(task.node)), {})[str(task.choice)] = losses[task.name]
            else:
                kind = attention if task.kind == PROBABILITIES else activations
                kind.setdefault(task.node.name, {})[str(task.choice)] = losses[task.name]
        return {
            "weights": weights,
            "activations": activations,
            "inputs": count,
            "attention": attention,
            "dynamic": requests.activations == Activations.DYNAMIC,
            "floating": requests.activations == Activations.FLOATING,
        }

    def losses(
        self,
        program: Program,
        inputs: dict[str, Tensor],
        tasks: list[Task],
        results: cache.Results,
        session: Session,
    ) -> Losses:
        """The losses of tasks by name.

        Args:
            program: the float program, whose weights and activations are changed.
            inputs: on which outputs are compared.
            tasks: the changes.
            results: what is known of each input.
            session: has the fits and runs the probes.
        """
        samples = list(batches(inputs, 1))
        weights = input_weights(program, inputs)
        # the squares of many rows, which are summed where some rows stand for all, scatter less than that of one sum
        each = self.each(self._share(tasks, program))
        counts = (weights * (each * len(samples) / weights.sum())).round().clamp_min(1).long().tolist()
        keys = [f"{count} probes, {self.sampled} weights, input {i}" for i, count in enumerate(counts)]
        names = {task.name for task in tasks}
        left = [i for i, key in enumerate(keys) if key not in results or not names <= results[key]["errors"].keys()]
        if len(left) < len(keys):
            known = [results[key].get("seconds", 0.0) for i, key in enumerate(keys) if i not in left]
            session.reuse(f"losses on {len(known)} of {len(keys)} inputs", sum(known))
            _logger.info("sensitivity: the cache has the losses of %d of %d inputs", len(keys) - len(left), len(keys))
        if left:
            with session.track("measuring losses", len(names) + len(left)) as advance:
                probes = self._made(program, tasks, session, advance)

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

    def _made(
        self,
        program: Program,
        tasks: list[Task],
        session: Session,
        advance: Callable[[int], None],
    ) -> Probes:
        """What estimates the tasks: the errors of weights, and the functions that change activations."""
        fits = session.fits
        layers: dict[fx.Node, list[Task]] = {}
        edges: dict[fx.Node, dict[Name, Callable[[Tensor, Tensor], Tensor]]] = {}
        calls: dict[fx.Node, dict[Name, Callable[[Sequence[Tensor], Tensor], Tensor]]] = {}
        fit_edges(program, tasks, session)
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
                    rows = item.rows_of(choice)
                    fits.keep(program, task.node, str(weight.target), choice, task.rounding, made[choice], rows)
            advance(len(layers[weight]))

        session.tasks(_row_errors, None, (_rows(program, fits, of, share) for of in layers.values()), keep)
        ordered = {weight: weights[weight] for weight in layers}
        return Probes(program, ordered, edges, calls, session.seed, session.device)

    def _share(self, tasks: list[Task], program: Program) -> float:
        """The share of the rows of weights that are quantized in every format."""
        weights = {str(operand(task.node, 1).target) for task in tasks if task.kind == WEIGHT}
        return self.share(sum(program.tensors[name].numel() for name in weights))

    def share(self, numbers: int) -> float:
        """The share of the rows of weights of so many numbers."""
        return min(1.0, self.sampled / max(1, numbers))

    def each(self, share: float) -> int:
        """The probes of an input on average, where that share of the rows of weights is quantized."""
        return self.probes if share == 1 else max(1, self.probes // 4)


def fit_edges(program: Program, tasks: Sequence[Task], session: Session) -> None:
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
    formats: tuple[tuple[Name, str], ...]
    """The name of each error, and the format."""
    rounding: Rounding
    """How codes are chosen."""
    known: dict[str, Fit]
    """The fits that are known, by format, of as many rows as `rows_of` says."""
    mean: Tensor | None

    def rows_of(self, format_name: str) -> int | None:
        """The number of rows that are fitted in a format; None where it takes all of them."""
        return _fitted_rows(format_name, self.picked, self.count)


def _fitted_rows(format_name: str, picked: Tensor, count: int) -> int | None:
    return len(picked) if len(picked) < count and get_format(format_name).by_row else None


def _rows(program: Program, fits: FitCache, tasks: Sequence[Task], share: float) -> _Rows:
    """The errors of a weight in the formats of its tasks, in a share of its rows, as a task."""
    node, weight = tasks[0].node, operand(tasks[0].node, 1)
    name = str(weight.target)
    count = len(program.tensors[name])
    mean = None if bias_of(node) is None else program.facts[CALIBRATION].means.get(node.name)
    formats, rounding = tuple((task.name, str(task.choice)) for task in tasks), tasks[0].rounding
    layer, picked, known = Layer.of(program, node, name), some_rows(count, share), {}
    for _, f in formats:
        if (fit := fits.known(program, name, f, rounding, _fitted_rows(f, picked, count))) is not None:
            known[f] = fit
    return _Rows(weight.name, layer, picked, count, formats, rounding, known, mean)


def _row_errors(_: None, item: _Rows) -> tuple[WeightErrors, dict[str, Fit]]:
    """The errors of a weight, and the fits that were made for them, unless they are too large to keep."""
    errors: dict[Name, Tensor] = {}
    missing = [choice for _, choice in item.formats if choice not in item.known]
    some = [choice for choice in missing if item.rows_of(choice) is not None]
    whole = [choice for choice in missing if choice not in some]
    made = item.layer.fit_formats(some, item.rounding, item.picked) if some else {}
    made |= item.layer.fit_formats(whole, item.rounding) if whole else {}
    fits = item.known | made
    weight = item.layer.read(item.picked).flatten(1)
    for name, choice in item.formats:
        level = fits[choice].dequantize()
        if item.rows_of(choice) is None:
            level = level[item.picked]
        errors[name] = (level - weight).to(torch.bfloat16)
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
