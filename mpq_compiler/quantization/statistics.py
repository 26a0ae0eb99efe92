"""What calibration knows: recorded inputs, and statistics of the tensors that may be quantized.

Passes ask for statistics by name; `calibrate` collects what the whole pipeline asks for in one run over the inputs.
"""

from __future__ import annotations

import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import attention_arguments, attention_edges, input_edge, row_geometry
from mpq_compiler.ir.graph import arguments, operand, softmax, weight_of
from mpq_compiler.ir.interpreter import Interpreter
from mpq_compiler.ir.program import Program
from mpq_compiler.support import cache
from mpq_compiler.support.execution import batches

if TYPE_CHECKING:
    from mpq_compiler.support.execution import RunContext

RANGE, VALUES, MOMENTS, GRAM = "range", "values", "moments", "gram"
"""The statistics there are: extremes per input; a sample of values per input; the mean squares of layer inputs; their
whole second moments, which take as long as running the model does."""
ATTENTION, DYNAMIC, FLOATING = "attention", "dynamic", "floating"
"""Asked for like statistics: the edges of attentions and their probabilities; what dynamic quantizers cost; what
activations in small floats do."""
GPTQ, IN_ORDER, LEARNED = "gptq", "in-order", "learned"
"""Asked for like statistics: that codes are chosen by GPTQ, and column after column as they stand; or are learned."""

VALUES_PER_INPUT = 256
VALUES_PER_EDGE = 1 << 18
"""Sampled at least from every input, and from all inputs together: of few inputs, more values each."""
PROBABILITIES = 1024
"""Sampled from an attention per input, about: whole rows, because few of a row's values are large."""
GRAM_ROWS = 8192
GRAM_COLUMNS = 4096
"""Layers with more inputs than this keep the diagonal of their second moments only: memory and time grow as K^2."""

PART = 8
"""Inputs that a thread takes at a time."""


@dataclass
class EdgeStatistics:
    """Of one tensor edge over the N recorded inputs."""

    low: Tensor
    """f32 [N]"""
    high: Tensor
    """f32 [N]"""
    values: Tensor
    """f32 [N, S], a fixed sample of positions."""
    elements: int
    """Elements of the edge per input."""

    @staticmethod
    def joined(parts: Sequence[EdgeStatistics]) -> EdgeStatistics:
        """The statistics of all inputs; the parts may have drawn other positions, but as many."""
        low, high, values = (torch.cat([getattr(p, name) for p in parts]) for name in ("low", "high", "values"))
        return EdgeStatistics(low, high, values, parts[0].elements)


@dataclass
class Calibration:
    """Recorded inputs [N, ...] by name, ordered by time, and what was measured on them."""

    inputs: dict[str, Tensor]
    edges: dict[str, EdgeStatistics] = field(default_factory=dict)
    grams: dict[str, Tensor] = field(default_factory=dict)
    """Call node -> mean of x x^T [K, K], or its diagonal [K], over rows of its input (patches for a convolution).

    Calls that multiply the same rows, such as those of q, k and v, share one tensor.
    """
    means: dict[str, Tensor] = field(default_factory=dict)
    """Call node -> mean of x [K]."""

    @property
    def timesteps(self) -> Tensor:
        return self.inputs["timestep"].to(torch.float32)

    def select(self, count: int) -> dict[str, Tensor]:
        """``count`` inputs spread evenly over the recording, so over time."""
        n = len(next(iter(self.inputs.values())))
        index = torch.linspace(0, n - 1, min(count, n)).round().long()
        return {name: value[index] for name, value in self.inputs.items()}


def fingerprint(program: Program, inputs: Mapping[str, Tensor], options: str) -> str:
    """Of the cache: everything that a measurement of the calibrated program on ``inputs`` depends on."""
    names = sorted({str(n.target) for n in program.graph.nodes if n.op == "get_attr"})
    tensors = {name: program.tensors[name].contiguous() for name in names}
    text = "\n".join(f"{n.name} {ops.name_of(n.target)} {n.args} {n.kwargs}" for n in program.graph.nodes)
    calibration: Calibration = program.facts["calibration"]
    edges = {name: statistics.values for name, statistics in calibration.edges.items()}
    versions = f"{options} {torch.__version__} {platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    return cache.digest(versions, text, str(program.facts["time-groups"]), tensors, inputs, edges, calibration.grams)


def input_rows(node: fx.Node, x: Tensor, rows: int, generator: torch.Generator) -> Tensor:
    """About ``rows`` rows [R, K] that the call multiplies with its weight, K in the order of the stored weight."""
    if node.target is not ops.conv2d:
        flat = x.reshape(-1, x.shape[-1])
        return flat[_choice(len(flat), rows, generator)]
    weight = operand(node, 1).meta["shape"]
    (sh, sw), (top, bottom, left, right) = arguments(node)[3:5]
    padded = torch.nn.functional.pad(x, (0, 0, left, right, top, bottom))
    windows = padded.unfold(1, weight[1], sh).unfold(2, weight[2], sw)  # [B, OH, OW, C, kh, kw]
    b, oh, ow = windows.shape[:3]
    index = _choice(b * oh * ow, rows, generator)
    patches = windows[index // (oh * ow), index // ow % oh, index % ow]
    return patches.permute(0, 2, 3, 1).reshape(len(index), -1)


def _choice(count: int, wanted: int, generator: torch.Generator) -> Tensor:
    """At most ``wanted`` of 0..count-1, ascending: one at random out of each of as many equal stretches."""
    if count <= wanted:
        return torch.arange(count)
    starts = torch.arange(wanted + 1) * count // wanted
    inside = torch.rand(wanted, generator=generator, dtype=torch.float64) * starts.diff()
    return starts[:-1] + inside.long()


class _Observer(Interpreter):
    """Measures the probabilities within attention calls, by name, while the program runs."""

    def __init__(self, program: Program, attentions: frozenset[str], generator: torch.Generator) -> None:
        super().__init__(program)
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


Rows = tuple[str, tuple[Any, ...]]
"""What decides the rows that a layer multiplies: the edge it reads, and `row_geometry`."""


@dataclass
class _Piece:
    """What is measured on a part of a batch."""

    output: Tensor
    edges: dict[str, EdgeStatistics]
    rows: dict[Rows, Tensor]


class Collector:
    """Measures every edge and layer that may be quantized while the program runs on inputs, batch by batch.

    A batch is measured in parts of `PART` inputs, by as many threads as `RunContext.map` has; what is found does not
    depend on their number.
    """

    def __init__(self, program: Program, wanted: frozenset[str], total: int, context: RunContext) -> None:
        """wanted: the statistics. total: how many inputs there will be, among which samples are shared out."""
        self.program, self.wanted, self.total, self.context = program, wanted, total, context
        self.layers = program.quantizable
        self.attentions = program.attentions if ATTENTION in wanted else []
        self.readers: dict[str, dict[Rows, list[fx.Node]]] = {}
        for n in self.layers:
            operand(n, 1).meta["shape"] = tuple(program.tensors[str(weight_of(n))].shape)
            edge = input_edge(n).name
            self.readers.setdefault(edge, {}).setdefault((edge, row_geometry(n)), []).append(n)
        read = {e.name for n in self.attentions for e in attention_edges(n)}
        self.parts: dict[str, list[EdgeStatistics]] = {
            name: [] for name in (*(self.readers.keys() | read), *(softmax(n.name) for n in self.attentions))
        }
        self.sums: dict[Rows, tuple[Tensor, Tensor, int]] = {}
        self.measured = 0

    def measure(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """The program's output for a batch of inputs, whose statistics are added."""
        pieces = self.context.map(self._piece, enumerate(batches(inputs, PART), self.measured))
        self.measured += len(pieces)
        for piece in pieces:
            for name, found in piece.edges.items():
                self.parts[name].append(found)

        def add(key: Rows) -> None:
            rows = torch.cat([piece.rows[key] for piece in pieces])
            gram, mean, count = self.sums.get(key, (0, 0, 0))
            whole = GRAM in self.wanted and rows.shape[1] <= GRAM_COLUMNS
            moments = rows.T @ rows if whole else rows.square().sum(0)
            self.sums[key] = (gram + moments, mean + rows.sum(0), count + len(rows))

        self.context.map(add, pieces[0].rows)
        return torch.cat([piece.output for piece in pieces])

    def _piece(self, numbered: tuple[int, dict[str, Tensor]]) -> _Piece:
        number, inputs = numbered
        size = len(next(iter(inputs.values())))
        values = max(VALUES_PER_INPUT, VALUES_PER_EDGE // self.total) if VALUES in self.wanted else 1
        generator = torch.Generator().manual_seed(self.context.seed + number)
        edges: dict[str, EdgeStatistics] = {}
        sampled: dict[Rows, Tensor] = {}

        def watch(node: fx.Node, value: Any) -> None:
            if node.name not in self.parts:
                return
            flat = value.reshape(size, -1)
            low, high = flat.aminmax(dim=1)
            positions = _choice(flat.shape[1], values, generator)
            edges[node.name] = EdgeStatistics(low, high, flat[:, positions], flat.shape[1])
            for key, calls in self.readers.get(node.name, {}).items() if self.wanted & {GRAM, MOMENTS} else ():
                sampled[key] = input_rows(calls[0], value, max(1, GRAM_ROWS * size // self.total), generator)

        observer = _Observer(self.program, frozenset(n.name for n in self.attentions), generator)
        with torch.no_grad():
            output = observer.run(inputs, watch=watch)
        edges |= {softmax(name): found for name, found in observer.found.items()}
        return _Piece(output, edges, sampled)

    def calibration(self, inputs: dict[str, Tensor]) -> Calibration:
        """What was measured; ``inputs``: all of them, in order."""
        found = Calibration(inputs)
        found.edges |= {name: EdgeStatistics.joined(parts) for name, parts in self.parts.items()}
        for key, (gram, mean, count) in self.sums.items():
            moments = gram / count, mean / count
            for call in self.readers[key[0]][key]:
                found.grams[call.name], found.means[call.name] = moments
        return found


def collect(
    program: Program, inputs: dict[str, Tensor], wanted: frozenset[str], context: RunContext
) -> Calibration:
    """Runs the program over the inputs once and measures every edge and layer that may be quantized."""
    total = len(next(iter(inputs.values())))
    collector = Collector(program, wanted, total, context)
    with context.track("calibrating", total) as advance:
        for batch in batches(inputs):
            advance(len(collector.measure(batch)))
    return collector.calibration(inputs)
