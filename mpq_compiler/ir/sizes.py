"""Sizes of a program: what is multiplied, computed and held when it runs, by shapes alone."""

from __future__ import annotations

import math
import operator
from dataclasses import dataclass

from torch import Tensor, fx
from torch._ops import OpOverload

from mpq_compiler.ir import ops, segments
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.graph import CONTRACTIONS, operand, weight_of
from mpq_compiler.ir.interpreter import shapes, value_nbytes
from mpq_compiler.ir.program import PARAMETERS, Program

LARGE = 500_000_000
"""Parameters above which a model is measured and judged on fewer inputs: each has many values, and takes long."""
HUGE = 2_000_000_000
"""Parameters above which losses are measured on half as many again."""


@dataclass(frozen=True)
class LayerSize:
    """A stored weight that layers multiply with."""

    rows: int
    """Output channels."""
    columns: int
    """Inputs of a row: channels times taps."""
    products: int
    """Multiply-accumulates of all its calls for one input."""
    edge: str
    """The tensor that the first of its calls reads."""

    @property
    def numbers(self) -> int:
        """Numbers of the weight."""
        return self.rows * self.columns

    @property
    def positions(self) -> int:
        """Rows of one input that the weight is multiplied with: pixels or tokens, over all calls."""
        return self.products // max(1, self.numbers)


@dataclass(frozen=True)
class Moment:
    """An operator's call, when it has computed its value."""

    bytes: int
    """Bytes of the values that are alive, for one input."""
    numbers: int
    """How many numbers the stored tensors have that it reads."""


@dataclass(frozen=True)
class Sizes:
    """The sizes of a program for one input."""

    layers: tuple[LayerSize, ...]
    """Weights that can be quantized, each once."""
    parameters: int
    """Parameters of the model, those that are not quantized too."""
    products: int
    """Multiply-accumulates, those of attentions and of float layers too."""
    value_bytes: int
    """Bytes of all values that are computed."""
    moments: tuple[Moment, ...]
    """When most memory is held: each with more values alive, or larger weights read, than every other."""
    calls: int
    """Operators that are called."""
    backward_bytes: int
    """Bytes of values and widened weights that going back through the program by segments holds.

    What layers read comes with an error each.
    """
    latents: int
    """Numbers of the first input: of a denoiser its latents."""

    @property
    def live_bytes(self) -> int:
        """The most bytes of values that are alive at one time."""
        return max((moment.bytes for moment in self.moments), default=0)

    def held_bytes(self, inputs: int, widened: int) -> int:
        """The most bytes that running so many inputs together holds, with so many for each number of a weight."""
        return max((inputs * moment.bytes + widened * moment.numbers for moment in self.moments), default=0)

    @property
    def numbers(self) -> int:
        """Numbers of all weights that can be quantized."""
        return sum(layer.numbers for layer in self.layers)

    @property
    def largest(self) -> int:
        """Numbers of the largest of these weights."""
        return max((layer.numbers for layer in self.layers), default=0)

    @staticmethod
    def of(program: Program) -> Sizes:
        """The sizes of a program in the laid-out stage."""
        known = shapes(program, 1)
        bytes_of = {name: value_nbytes(value) for name, value in known.items()}
        calls = [n for n in program.graph.nodes if n.op == "call_function"]
        products = {node: _products(node, known) for node in calls}
        layers: dict[str, list[fx.Node]] = {}
        for node in program.quantizable:
            layers.setdefault(str(weight_of(node)), []).append(node)
        sized = []
        for name, readers in layers.items():
            shape = program.tensors[name].shape
            total = sum(products[node] for node in readers)
            sized.append(LayerSize(shape[0], math.prod(shape[1:]), total, operand(readers[0], 0).name))
        return Sizes(
            tuple(sized),
            program.facts[PARAMETERS],
            sum(products.values()),
            sum(bytes_of[n.name] for n in calls),
            _moments(program, bytes_of),
            len(calls),
            _backward(program),
            known[program.inputs[0].name].numel(),
        )


def _backward(program: Program) -> int:
    held = segments.held_bytes(program, 1)
    for edge in {input_edge(node).name for node in program.quantizable}:
        held[edge] = 2 * held.get(edge, 0)
    return segments.leanest(program, held, segments.HELD).bytes


def _moments(program: Program, sizes: dict[str, int]) -> tuple[Moment, ...]:
    """`Sizes.moments`: values are alive from their computation to their last use.

    A view takes no bytes of its own, and keeps what it is of.
    """
    graph = program.graph
    owner, last = _owners(graph), dict[fx.Node, fx.Node]()
    for node in graph.nodes:
        last |= dict.fromkeys((owner[source] for source in node.all_input_nodes), node)
    ends: dict[fx.Node, list[fx.Node]] = {}
    for held, node in last.items():
        ends.setdefault(node, []).append(held)
    own = {n: 0 if n.op in ("get_attr", "output") or owner[n] is not n else sizes[n.name] for n in graph.nodes}
    alive, found = 0, []
    for node in graph.nodes:
        alive += own[node]
        read = (program.tensors.meta(str(n.target)).numel() for n in node.all_input_nodes if n.op == "get_attr")
        found.append(Moment(alive, sum(read)))
        alive -= sum(own[held] for held in ends.get(node, ()))
    largest: list[Moment] = []
    for moment in sorted(set(found), key=lambda moment: (moment.bytes, moment.numbers), reverse=True):
        if not largest or moment.numbers > largest[-1].numbers:
            largest.append(moment)
    return tuple(largest)


def _owners(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """The node that has made the memory in which a node's value lies: of a view, what it is of."""
    found: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        source = next(iter(node.all_input_nodes), None)
        found[node] = node if source is None or not _is_view(node) else found[source]
    return found


def _is_view(node: fx.Node) -> bool:
    """Whether an operator's result lies in its operand's memory, by its schema; an item of several is as they are."""
    if node.target is operator.getitem:
        return _is_view(node.all_input_nodes[0])
    returns = node.target._schema.returns if isinstance(node.target, OpOverload) else ()
    return any(value.alias_info is not None for value in returns)


def _products(node: fx.Node, known: dict[str, object]) -> int:
    """The multiply-accumulates of a call for one input."""
    value = known[node.name]
    if not isinstance(value, Tensor):
        return 0
    if node.target in CONTRACTIONS:
        weight = known[operand(node, 1).name]
        assert isinstance(weight, Tensor)
        return value.numel() * math.prod(weight.shape[1:])
    if node.target is ops.attention:
        queries, keys = (known[operand(node, i).name] for i in range(2))
        assert isinstance(queries, Tensor) and isinstance(keys, Tensor)
        return 2 * queries.numel() * keys.shape[-2]
    if node.target in (aten.bmm.default, aten.matmul.default):
        left = known[operand(node, 0).name]
        assert isinstance(left, Tensor)
        return value.numel() * left.shape[-1]
    return 0
