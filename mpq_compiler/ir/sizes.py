"""Sizes of a program: what is multiplied, computed and held when it runs, by shapes alone."""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor, fx

from mpq_compiler.ir import ops, segments
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import input_edge
from mpq_compiler.ir.graph import CONTRACTIONS, operand, weight_of
from mpq_compiler.ir.interpreter import last_uses, shapes, value_nbytes
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
    live_bytes: int
    """The most bytes of values that are alive at one time."""
    calls: int
    """Operators that are called."""
    backward_bytes: int
    """Bytes of values and widened weights that going back through the program by segments holds.

    What layers read comes with an error each.
    """

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
            _live(program.graph, bytes_of),
            len(calls),
            _backward(program),
        )


def _backward(program: Program) -> int:
    held = segments.held_bytes(program, 1)
    for edge in {input_edge(node).name for node in program.quantizable}:
        held[edge] = 2 * held.get(edge, 0)
    return segments.leanest(program, held, segments.HELD).bytes


def _live(graph: fx.Graph, sizes: dict[str, int]) -> int:
    """The most bytes of values between their computation and their last use, stored tensors left out."""
    dead = last_uses(graph)
    alive = most = 0
    for node in graph.nodes:
        if node.op in ("get_attr", "output"):
            continue
        alive += sizes[node.name]
        most = max(most, alive)
        alive -= sum(sizes[n.name] for n in dead.get(node, ()) if n.op != "get_attr")
    return most


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
