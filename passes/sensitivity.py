"""Measures the loss of output quality of each layer in each format, one at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from mpq_compiler.allocation.sensitivity_table import require_of
from mpq_compiler.analysis.noise_power import (
    input_weights,
    inputs_held,
    mean_power,
    measurement_key,
    noise_power,
    rounded,
)
from mpq_compiler.analysis.perturbation import Ablation
from mpq_compiler.formats import get as get_format
from mpq_compiler.formats import version as formats_version
from mpq_compiler.ir import ops
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.edges import attention_arguments, dynamic_edges, input_edge
from mpq_compiler.ir.findings import SENSITIVITY, Losses, LossTable
from mpq_compiler.ir.graph import operand, softmax
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import (
    FitCache,
    Rounding,
    bias_of,
    corrected_bias,
)
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
from mpq_compiler.support.execution import batches

WEIGHT, STATIC, PER_TOKEN, SMALL_FLOAT, PROBABILITIES = "w", "a", "d", "f", "p"
"""What a task quantizes: a weight; an edge by time group, by row, or to small floats; an attention with probabilities.
"""


@dataclass(frozen=True)
class Task:
    """One measurement."""

    kind: str
    node: fx.Node
    """The call, edge or attention that is quantized."""
    choice: str | int
    """The format of a weight, or the bits of an activation."""
    name: str
    """The name of its result in the cache."""
    rounding: Rounding = Rounding.NEAREST
    """How a weight's codes are chosen."""


@dataclass(frozen=True)
class Sensitivity(Pass):
    """Measures the output's relative noise power with one weight, or one activation, quantized at a time.

    ``sum (y_q - y)^2 / sum y^2`` over calibration inputs spread over time (MixDQ, arXiv 2405.17873, section 4.2,
    measures the same as an SQNR). Noise powers of independent errors add, which is what the allocation relies on. With
    `time-gains` each input counts by what an error at its time does to images. Each result goes to the cache as it is
    measured: a run that was killed goes on where it was. Where `bit-allocation` may quantize attentions, each is
    measured with q, k, v and its probabilities quantized together; where it makes activations dynamic, or small floats,
    those are measured so.

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

    inputs: int = 32
    """Calibration inputs on which the output is compared."""
    formats: tuple[str, ...] = ("int2", "int3", "int2+b", "int4", "int3+b", "int8")
    """Weight formats to measure."""
    activations: tuple[int, ...] = (8,)
    """Activation widths to measure."""

    def __post_init__(self) -> None:
        self.require("inputs", 1)
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
        inputs = calibration.select(self.inputs)
        results = cache.Results("sensitivity", self.key(program, inputs), session.cache)
        requests = session.requests
        tasks = self.tasks(program, requests)
        parts = list(batches(inputs, inputs_held(program)))
        missing = sum(_key(task.name, part) not in results for task in tasks for part in range(len(parts)))
        if missing:
            with session.track("sensitivity", missing) as advance:
                for part, batch in enumerate(parts):
                    left = [task for task in tasks if _key(task.name, part) not in results]
                    self._measure_part(program, batch, part, left, results, session, advance)
        weights: dict[str, Losses] = {}
        activations: dict[str, Losses] = {}
        attention: dict[str, Losses] = {}
        sizes = [float(input_weights(program, part).sum()) for part in parts]
        for task in tasks:
            loss = mean_power([results[_key(task.name, part)] for part in range(len(parts))], sizes)
            if task.kind == WEIGHT:
                weights.setdefault(str(weight_path(task.node)), {})[str(task.choice)] = loss
            else:
                losses = attention if task.kind == PROBABILITIES else activations
                losses.setdefault(task.node.name, {})[str(task.choice)] = loss
        table: LossTable = {
            "weights": weights,
            "activations": activations,
            "inputs": self.inputs,
            "attention": attention,
            "dynamic": requests.activations == Activations.DYNAMIC,
            "floating": requests.activations == Activations.FLOATING,
        }
        program.facts[SENSITIVITY] = table
        return program

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
        ablation = Ablation(program, inputs)
        lock = threading.Lock()

        def measure(task: Task) -> None:
            power = self.measure(program, ablation, inputs, task, session.fits)
            with lock:
                results[_key(task.name, part)] = rounded(power)
                advance(1)

        session.map(measure, tasks)

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

    def key(self, program: Program, inputs: dict[str, Tensor]) -> str:
        """The cache key: a digest of all that a result depends on but its own task."""
        return measurement_key(program, inputs, self.inputs)

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

        def noise(output: Tensor) -> float:
            return noise_power(output, ablation.reference, input_weights(program, inputs))

        if isinstance(choice, str):
            weight = operand(node, 1)
            name = str(weight.target)
            quantized = fits.fitted(program, node, name, choice, task.rounding)
            values = {weight: quantized.dequantize().reshape(program.tensors[name].shape)}
            bias, corrected = bias_of(node), corrected_bias(program, node, name, quantized)
            if bias is not None and corrected is not None:
                values[bias] = corrected
            return noise(ablation.output(values=values))
        group = ops.time_group(inputs["timestep"], program.facts[TIME_GROUPS])

        def quantized_edge(edge: fx.Node) -> Tensor:
            return ops.fake_quantize(
                ablation.value(edge), *fits.activation_parameters(program, edge.name, choice), group, choice
            )

        if task.kind == PROBABILITIES:
            heads, scale, mask = attention_arguments(node.args)
            tables = fits.activation_parameters(program, softmax(node.name), choice)
            q, k, v = (quantized_edge(operand(node, i)) for i in range(3))
            mask = None if mask is None else ablation.value(mask)
            y = ops.fake_quantize_attention(q, k, v, group, *tables, heads, scale, mask, choice)
            return noise(ablation.output(values={node: y}))
        if task.kind == SMALL_FLOAT:
            exponent, table = fits.float_parameters(program, node.name, choice)
            changed = ops.fake_quantize_float(ablation.value(node), table, group, exponent, choice)
        elif task.kind == PER_TOKEN:
            changed = ops.dynamic_fake_quantize(ablation.value(node), choice)
        else:
            changed = quantized_edge(node)
        readers = [n for n in program.quantizable if input_edge(n) is node]
        return noise(ablation.output(operands=dict.fromkeys(readers, changed)))


def _key(name: str, part: int) -> str:
    """The name of a result in the cache; it has no part where one part holds all inputs, as it mostly does."""
    return f"{name} part {part}" if part else name
