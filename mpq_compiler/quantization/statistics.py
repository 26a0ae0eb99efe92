"""Calibration's statistics: recorded inputs, and measurements of the tensors that may be quantized.

Passes ask for statistics by name; `calibrate` collects what the whole pipeline asks for in one run over the inputs.
"""

from __future__ import annotations

import itertools
import platform
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence, Set
from concurrent.futures import CancelledError
from contextlib import contextmanager
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops, scratch
from mpq_compiler.ir.edges import RowGeometry, attention_arguments, attention_edges, input_edge, row_geometry
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import softmax, weight_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.quantization.between_times import TimedRows
from mpq_compiler.support import cache
from mpq_compiler.support.execution import batches

if TYPE_CHECKING:
    from mpq_compiler.support.execution import RunContext


class Statistic(StrEnum):
    """What calibration can collect of the tensors that may be quantized."""

    RANGE = "range"
    """The extremes of an edge, per input."""
    VALUES = "values"
    """A sample of the values of an edge, per input."""
    MOMENTS = "moments"
    """The mean squares of a layer's inputs."""
    GRAM = "gram"
    """The whole second moments of a layer's inputs, which take as long as running the model does."""


RANGE, VALUES, MOMENTS, GRAM = Statistic

VALUES_PER_INPUT = 256
"""The fewest values of an edge that are sampled from every input."""
VALUES_PER_EDGE = 1 << 18
"""The fewest values of an edge that are sampled from all inputs together; fewer inputs give more values each."""
PROBABILITIES = 1024
"""The approximate number of probabilities sampled per attention and input: whole rows, as few values of one are large.
"""
GRAM_ROWS = 8192
"""The approximate number of rows over which second moments are averaged."""
GRAM_COLUMNS = 2048
"""The most inputs of a layer whose second moments are kept whole; of more, blocks of as many, for memory and the time
of what works with them grow as K^2 and K^3."""

PART = 8
"""The number of inputs that a thread takes at a time."""


@dataclass
class EdgeStatistics:
    """Statistics of one tensor edge over the N recorded inputs."""

    low: Tensor
    """The minimum of each input, f32 [N]."""
    high: Tensor
    """The maximum of each input, f32 [N]."""
    values: Tensor
    """The values at S sampled positions of each input, f32 [N, S]."""
    elements: int
    """The number of elements of the edge per input."""

    def first(self, count: int) -> EdgeStatistics:
        """The statistics of the first inputs, views of these."""
        return EdgeStatistics(self.low[:count], self.high[:count], self.values[:count], self.elements)

    @staticmethod
    def joined(parts: Sequence[EdgeStatistics]) -> EdgeStatistics:
        """Joins the statistics of parts of the inputs; their positions may differ, their number S may not."""
        low, high, values = (torch.cat([getattr(p, name) for p in parts]) for name in ("low", "high", "values"))
        return EdgeStatistics(low, high, values, parts[0].elements)


@dataclass
class Calibration:
    """Recorded inputs and the statistics measured on them."""

    inputs: dict[str, Tensor]
    """The recorded inputs [N, ...] by name, ordered by time."""
    edges: dict[str, EdgeStatistics] = field(default_factory=dict)
    """Statistics of each tensor edge, by its node's name."""
    grams: dict[str, Tensor] = field(default_factory=dict)
    """The mean of x x^T over rows of a call's input, by the call's name: [K, K], its blocks [J, B, B], or its diagonal
    [K].

    Rows of a convolution are patches; what sees the time and no image has those at times between the recorded ones, too
    (`between_times`). Calls that multiply the same rows, such as q, k and v, share one tensor.
    """
    means: dict[str, Tensor] = field(default_factory=dict)
    """The mean of x [K] over the same rows, by the call's name."""
    outputs: Tensor | None = None
    """The program's output on each input, f32 [N, ...]; None where it was not run."""

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the recorded inputs, f32 [N]."""
        return self.inputs["timestep"].to(torch.float32)

    def ranges(self) -> dict[str, tuple[float, float]]:
        """The least and the greatest value of each float input."""
        floats = {name: values for name, values in self.inputs.items() if values.is_floating_point()}
        return {name: (float(values.min()), float(values.max())) for name, values in floats.items()}

    def select(self, count: int) -> dict[str, Tensor]:
        """Selects ``count`` inputs, spread evenly over the recording and thus over time."""
        return spread(self.inputs, count)

    def select_outputs(self, count: int) -> Tensor:
        """The program's outputs on the inputs of `select`, f32 [count, ...]."""
        assert self.outputs is not None
        return self.outputs[evenly(len(self.outputs), count)]


def evenly(total: int, count: int) -> Tensor:
    """Chooses ``count`` of 0..total-1, spread evenly from the first to the last, i64; all where there are no more."""
    return torch.linspace(0, total - 1, min(count, total)).round().long()


def spread(inputs: Mapping[str, Tensor], count: int) -> dict[str, Tensor]:
    """Selects ``count`` of the inputs, spread evenly over them."""
    index = evenly(len(next(iter(inputs.values()))), count)
    return {name: value[index] for name, value in inputs.items()}


CALIBRATION = Fact[Calibration]("calibration")


def arithmetic() -> str:
    """What decides on the last bits of results here, for the keys of caches: torch, machine, vector instructions."""
    return f"{torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"


def content(program: Program) -> tuple[str, Mapping[str, Tensor]]:
    """What a program computes, for a digest: the text of its graph, and its tensors by name."""
    tensors = program.tensors.content({str(n.target) for n in program.graph.nodes if n.op == "get_attr"})
    return "\n".join(f"{n.name} {ops.name_of(n.target)} {n.args} {n.kwargs}" for n in program.graph.nodes), tensors


def fingerprint(program: Program, inputs: Mapping[str, Tensor], options: str) -> str:
    """The cache key of a measurement: a digest of all that it depends on.

    Args:
        program: calibrated.
        inputs: the inputs of the measurement, by name.
        options: options of the measurement, in any one form.
    """
    text, tensors = content(program)
    calibration = program.facts[CALIBRATION]
    edges = {name: statistics.values for name, statistics in calibration.edges.items()}
    versions = f"{options} {arithmetic()}"
    return cache.digest(versions, text, str(program.facts[TIME_GROUPS]), tensors, inputs, edges, calibration.grams)


def every_row(geometry: RowGeometry, x: Tensor) -> Tensor:
    """All rows that a call multiplies with its weight; arguments and result as of `input_rows`."""
    return input_rows(geometry, x, sys.maxsize, torch.Generator())


def input_rows(geometry: RowGeometry, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """Samples about ``rows`` rows [R, K] that a call multiplies with its weight, K in the stored weight's order.

    Args:
        geometry: of a linear layer or a convolution, whose rows are patches.
        x: its input.
        rows: how many rows are wanted, at most.
        generator: source of the randomness.
    """
    if not geometry:
        flat = x.reshape(-1, x.shape[-1])
        return flat[_choice(len(flat), rows, generator)]
    (kh, kw), (sh, sw), (top, bottom, left, right) = geometry
    padded = torch.nn.functional.pad(x, (0, 0, left, right, top, bottom))
    windows = padded.unfold(1, kh, sh).unfold(2, kw, sw)  # [B, OH, OW, C, kh, kw]
    b, oh, ow = windows.shape[:3]
    index = _choice(b * oh * ow, rows, generator)
    patches = windows[index // (oh * ow), index // ow % oh, index % ow]
    return patches.permute(0, 2, 3, 1).reshape(len(index), -1)


def _choice(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """Draws at most ``wanted`` of 0..count-1, ascending: one at random from each of ``wanted`` equal intervals."""
    if count <= wanted:
        return torch.arange(count)
    starts = torch.arange(wanted + 1) * count // wanted
    inside = torch.rand(wanted, generator=generator, dtype=torch.float64) * starts.diff()
    return starts[:-1] + inside.long()


class _Observer(Interpreter):
    """Measures the probabilities within attention calls while the program runs."""

    def __init__(
        self, program: Program, attentions: frozenset[str], generator: torch.Generator, device: str = "cpu"
    ) -> None:
        super().__init__(program, device)
        self.attentions, self.generator = attentions, generator
        self.found: dict[str, EdgeStatistics] = {}

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.name in self.attentions:
            q, k, _, *_ = args
            heads, scale, mask = attention_arguments(args)
            if mask is not None:
                mask = mask.expand(len(q), heads, q.shape[1], k.shape[1])
            self.found[node.name] = EdgeStatistics.joined(
                [
                    self._probabilities(
                        ops.attention_probabilities(
                            q[b : b + 1], k[b : b + 1], heads, scale, None if mask is None else mask[b : b + 1]
                        )
                    )
                    for b in range(len(q))  # one at a time: they are many
                ]
            )
        return super().call(node, args, kwargs)

    def _probabilities(self, p: Tensor) -> EdgeStatistics:
        rows = p.reshape(-1, p.shape[-1])
        values = rows[_choice(len(rows), max(1, PROBABILITIES // rows.shape[1]), self.generator)]
        return EdgeStatistics(p.min().reshape(1), p.max().reshape(1), values.reshape(1, -1), p.numel())


Rows = tuple[str, RowGeometry]
"""The identity of the rows that a layer multiplies: the edge that it reads, and `ir.edges.row_geometry`."""


class _Turns:
    """Lets parts that are measured on several threads add to the same sums in the order of their numbers."""

    def __init__(self) -> None:
        self._next: dict[Rows, int] = {}
        self._changed = threading.Condition()
        self._failed = False

    @contextmanager
    def take(self, key: Rows, number: int) -> Iterator[None]:
        """Waits until all parts of smaller numbers have had their turn with ``key``."""
        with self._changed:
            self._changed.wait_for(lambda: self._failed or self._next.get(key, 0) == number)
            if self._failed:
                raise CancelledError
        yield
        with self._changed:
            self._next[key] = number + 1
            self._changed.notify_all()

    @contextmanager
    def ended_by_errors(self) -> Iterator[None]:
        """Lets nobody wait for a part that has failed."""
        try:
            yield
        except BaseException:
            with self._changed:
                self._failed = True
                self._changed.notify_all()
            raise


def _blocks(columns: int) -> int:
    """The number of equal blocks, of at most `GRAM_COLUMNS`, of second moments; 0: their diagonal alone."""
    least = -(-columns // GRAM_COLUMNS)
    return next((count for count in range(least, 4 * least + 1) if columns % count == 0), 0)


class Collector:
    """Measures every edge and layer that may be quantized while the program runs on inputs, batch by batch.

    A batch is measured in parts of `PART` inputs on the threads of `RunContext.map`; their number does not change the
    statistics.
    """

    def __init__(
        self, program: Program, wanted: Set[Statistic], total: int, context: RunContext, attention: bool = False
    ) -> None:
        """Starts with nothing measured.

        Args:
            program: whose tensor edges are watched.
            wanted: the statistics to collect.
            total: how many inputs there will be, among which samples are shared out.
            context: by how many threads, on which device, and the seed of what is sampled.
            attention: whether the edges of attentions and their probabilities are watched too.
        """
        self.program, self.wanted, self.total, self.context = program, wanted, total, context
        self.layers = program.quantizable
        self.attentions = program.attentions if attention else []
        self.readers: dict[str, dict[Rows, list[fx.Node]]] = {}
        for n in self.layers:
            edge, geometry = input_edge(n).name, row_geometry(n, program.tensors[str(weight_of(n))].shape)
            self.readers.setdefault(edge, {}).setdefault((edge, geometry), []).append(n)
        read = (edge.name for n in self.attentions for edge in attention_edges(n))
        self.watched = dict.fromkeys((*self.readers, *read, *(softmax(n.name) for n in self.attentions)))
        self.edges: dict[str, EdgeStatistics] = {}
        self.timed = TimedRows.of(program, self.readers)
        self.sums: dict[Rows, tuple[Tensor, Tensor, int]] = {}
        self.turns = _Turns()
        self.outputs: list[Tensor] = []
        self.lock = threading.Lock()
        self.pieces = self.measured = 0

    def measure(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Runs the program on a batch, adds its statistics, and returns the program's output."""
        starts = itertools.count(self.measured, PART)
        outputs = self.context.map(self._piece, zip(itertools.count(self.pieces), starts, batches(inputs, PART)))
        self.pieces += len(outputs)
        self.measured += sum(map(len, outputs))
        self.outputs += outputs
        return torch.cat(outputs)

    def _keep(self, name: str, start: int, part: EdgeStatistics) -> None:
        """Writes an edge's statistics of the inputs from ``start`` on to where those of all inputs lie."""
        with self.lock:
            if name not in self.edges:
                low, high, values = (
                    scratch.zeros((self.total, *t.shape[1:])) for t in (part.low, part.high, part.values)
                )
                self.edges[name] = EdgeStatistics(low, high, values, part.elements)
        rows, whole = slice(start, start + len(part.low)), self.edges[name]
        whole.low[rows], whole.high[rows], whole.values[rows] = part.low, part.high, part.values

    def _add(self, key: Rows, rows: Tensor) -> None:
        """Adds rows [R, K] to the sums of their second moments, which grow in place."""
        blocks = _blocks(rows.shape[1]) if GRAM in self.wanted else 0
        if key not in self.sums:
            size = rows.shape[1] // max(1, blocks)
            shape = (blocks, size, size) if blocks else (size,)
            self.sums[key] = (scratch.zeros(shape), torch.zeros(rows.shape[1]), 0)
        gram, total, count = self.sums[key]
        if blocks:
            for block, part in zip(gram, rows.chunk(blocks, 1), strict=True):
                if part.is_cpu:
                    block.addmm_(part.T, part)
                else:
                    block += (part.T @ part).cpu()
        else:
            gram += rows.square().sum(0).cpu()
        self.sums[key] = (gram, total.add_(rows.sum(0).cpu()), count + len(rows))

    def _piece(self, numbered: tuple[int, int, dict[str, Tensor]]) -> Tensor:
        number, start, inputs = numbered
        size = len(next(iter(inputs.values())))
        values = max(VALUES_PER_INPUT, VALUES_PER_EDGE // self.total) if VALUES in self.wanted else 1
        generator = torch.Generator().manual_seed(self.context.seed + number)

        def watch(node: fx.Node, value: Any) -> None:
            if node.name not in self.watched:
                return
            flat = value.reshape(size, -1)
            low, high = flat.aminmax(dim=1)
            positions = _choice(flat.shape[1], values, generator)
            self._keep(node.name, start, EdgeStatistics(low, high, flat[:, positions], flat.shape[1]))
            if node.name in self.timed.edges or not self.wanted & {GRAM, MOMENTS}:
                return
            for key in self.readers.get(node.name, {}):
                rows = input_rows(key[1], value, max(1, GRAM_ROWS * size // self.total), generator)
                with self.turns.take(key, number):
                    self._add(key, rows)

        attentions = frozenset(n.name for n in self.attentions)
        observer = _Observer(self.program, attentions, generator, self.context.device)
        with torch.no_grad(), self.turns.ended_by_errors():
            output = observer.run(inputs, watch=watch).cpu()
        for name, found in observer.found.items():
            self._keep(softmax(name), start, found)
        return output

    def calibration(self, inputs: dict[str, Tensor]) -> Calibration:
        """The calibration: all statistics that were measured, with all ``inputs`` in order. It ends the measuring."""
        found = Calibration(inputs, outputs=torch.cat(self.outputs))
        found.edges |= {name: self.edges[name].first(self.measured) for name in self.watched}
        for rows in self.timed.computed(inputs, self.context.device) if self.wanted & {GRAM, MOMENTS} else ():
            for edge, several in rows.items():
                for key in self.readers[edge]:
                    self._add(key, several)
        for key, calls in itertools.chain.from_iterable(several.items() for several in self.readers.values()):
            if key not in self.sums:
                continue
            gram, total, count = self.sums.pop(key)
            gram /= count  # in place, where it lies
            moments = gram[0] if gram.dim() == 3 and len(gram) == 1 else gram, total / count
            for call in calls:
                found.grams[call.name], found.means[call.name] = moments
        return found


def collect(
    program: Program,
    inputs: dict[str, Tensor],
    wanted: Set[Statistic],
    context: RunContext,
    attention: bool = False,
) -> Calibration:
    """Runs the program over the inputs once and measures every edge and layer that may be quantized.

    Args:
        program: the program to run.
        inputs: the recorded inputs [N, ...] by name.
        wanted: the statistics and requests of the pipeline.
        context: runs the work and shows its progress.
    """
    total = len(next(iter(inputs.values())))
    collector = Collector(program, wanted, total, context, attention)
    with context.track("calibrating", total) as advance:
        for batch in batches(inputs):
            advance(len(collector.measure(batch)))
    return collector.calibration(inputs)
