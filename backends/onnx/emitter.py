"""Walks a program's graph and writes its ONNX graph; a function for each operator does so with it.

The emitter walks the graph once, regions included. A value has the name of its node.

Programs are channels-last. Convolutions and group norms of ONNX are channels-first, integer matrix products are not. A
value has the order that the node that makes it prefers. Pointwise operators take their operands in either order, and a
reader that needs the other order transposes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx
import torch
from torch import Tensor, fx

from mpq_compiler.backends.onnx.graph import ELEMENT, Graph
from mpq_compiler.backends.onnx.weights import Weights
from mpq_compiler.ir import ops
from mpq_compiler.ir.graph import arguments, operand
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.stored_tensors import Stored
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

Shape = tuple[int, ...]
"""The sizes of a tensor; a negative one, -m, is m times the batch."""


@dataclass(frozen=True)
class Value:
    """A tensor of the ONNX graph."""

    name: str
    first: bool = False
    """Whether it is channels-first, [B, C, ...] for the program's [B, ..., C]."""


Made = str | Value | list[Value]
"""The result of emitting a call; a plain name is a value in the program's order."""
Emit = Callable[["Emitter", fx.Node, dict[str, Any]], Made]
"""A function that emits calls of an operator, given their arguments by name."""


class Emitters(dict[Any, Emit]):
    """Functions by the operators whose calls they emit."""

    def emits(self, *targets: Any) -> Callable[[Emit], Emit]:
        """Registers the decorated function as the emitter of these operators."""

        def register(function: Emit) -> Emit:
            self.update(dict.fromkeys(targets, function))
            return function

        return register


def output_name(program: Program) -> str:
    """The output's name: "sample", or "out_sample" where an input has that name, since both share one namespace."""
    return "out_sample" if "sample" in {s.name for s in program.inputs} else "sample"


class Emitter:
    """Writes the graph of one program; the functions of `emitters` use it."""

    def __init__(
        self, program: Program, stored: Mapping[str, Stored], location: str, emitters: Mapping[Any, Emit]
    ) -> None:
        self.program, self.emitters = program, emitters
        self.graph = Graph(location)
        places = tensorfile.places({name: tensor.array for name, tensor in stored.items()})
        self.weights = Weights(self.graph, stored, places)
        self._two, self._three = (shapes(program, batch, regions=True) for batch in (2, 3))
        self.made: dict[fx.Node, Value | list[Value]] = {}
        self._outer: dict[fx.Node, fx.Node] = {}

    def model(self) -> onnx.ModelProto:
        """Emits the whole program as a model."""
        program, output = self.program, output_name(self.program)
        for name in (*(s.name for s in program.inputs), output):
            self.graph.reserve(name)
        specs = iter(program.inputs)
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.made[node] = Value(next(specs).name)
            elif node.op != "output":
                self._emit(node)
        program.fallbacks.update(self.weights.decoded())
        result = operand(program.graph.output_node(), 0)
        self.graph.scope = output
        shape, source = self.shape(result), self.last(result)
        return self.graph.model(program.model or "denoiser", program.inputs, output, shape[1:], source)

    def _emit(self, node: fx.Node) -> None:
        if node.op == "get_attr":
            return  # written where it is read
        if node.op == "call_module":
            region = self.program.regions[str(node.target)]
            placeholders = (n for n in region.nodes if n.op == "placeholder")
            self._outer.update(zip(placeholders, arguments(node), strict=True))
            for inner in region.nodes:
                if inner.op == "call_function":
                    self._emit(inner)
            self.made[node] = self.value(operand(region.output_node(), 0))
            return
        self.graph.scope = node.name
        if node.target not in self.emitters:
            raise self.refusal(node, "it is not known here")
        made = self.emitters[node.target](self, node, _bind(node))
        self.made[node] = Value(made) if isinstance(made, str) else made

    def refusal(self, node: fx.Node, reason: str) -> UserError:
        """The error for a node that cannot be exported."""
        return UserError(
            f"node '{node.name}' ({ops.name_of(node.target)}) cannot be exported to ONNX: {reason}; "
            "use --target reference, or report the model"
        )

    # ------------------------------------------------------------------------------------------- the program

    def resolve(self, node: Any) -> Any:
        """The node of the program behind an operand within a region."""
        return self._outer.get(node, node)

    def example(self, node: fx.Node) -> Tensor:
        """The meta tensor of a node at batch size 2."""
        found: Tensor = self._two[self.resolve(node).name]
        return found

    def dtype(self, node: fx.Node) -> str:
        """The element type of a node's tensor."""
        return str(self.example(node).dtype).removeprefix("torch.")

    def rank(self, node: fx.Node) -> int:
        """The number of dimensions of a node's tensor."""
        return self.example(node).dim()

    def axis(self, node: fx.Node, dim: int) -> int:
        """A dimension of a node's tensor, counted from the front."""
        return dim % max(1, self.rank(node))

    def shape(self, node: fx.Node) -> Shape:
        """The sizes of a node's tensor at any batch."""
        name = self.resolve(node).name
        return self._sizes(node, self._two[name], self._three[name])

    def shapes(self, node: fx.Node) -> list[Shape]:
        """The sizes of the tensors of a node with several, at any batch."""
        return [self._sizes(node, *pair) for pair in zip(self._two[node.name], self._three[node.name], strict=True)]

    def _sizes(self, node: fx.Node, two: Tensor, three: Tensor) -> Shape:
        steps = [int(b - a) for a, b in zip(two.shape, three.shape, strict=True)]
        if any(step and int(a) != 2 * step for a, step in zip(two.shape, steps, strict=True)):
            raise self.refusal(node, f"its shape {list(two.shape)} grows with more than the batch")
        return tuple(-step if step else int(a) for a, step in zip(two.shape, steps, strict=True))

    def stored(self, node: Any) -> str:
        """The store name of an operand. UserError: it is computed."""
        found = self.resolve(node)
        if found.op != "get_attr":
            raise self.refusal(found, "it is computed where a stored tensor is expected")
        return str(found.target)

    def array(self, node: Any) -> np.ndarray:
        """An operand's stored tensor in its stored form."""
        return self.weights.stored[self.stored(node)].array

    # ------------------------------------------------------------------------------------------------ values

    def value(self, node: fx.Node) -> Value:
        """The value of a node in whichever order it has."""
        node = self.resolve(node)
        found = Value(self.weights.read(str(node.target))) if node.op == "get_attr" else self.made[node]
        assert isinstance(found, Value), f"'{node.name}' gives several tensors"
        return found

    def item(self, node: fx.Node, index: int) -> Value:
        """One of the values of a node with several."""
        found = self.made[node]
        assert isinstance(found, list), f"'{node.name}' gives one tensor"
        return found[index]

    def last(self, node: fx.Node) -> str:
        """The value of a node in the program's order, channels last."""
        value, rank = self.value(node), self.rank(node)
        return self.graph.op("Transpose", value.name, perm=[0, *range(2, rank), 1]) if value.first else value.name

    def first(self, node: fx.Node) -> str:
        """The value of a node with channels second."""
        value, rank = self.value(node), self.rank(node)
        if value.first or rank < 3:
            return value.name
        return self.graph.op("Transpose", value.name, perm=[0, rank - 1, *range(1, rank - 1)])

    def number(self, value: float, dtype: str = "float32") -> str:
        """A scalar constant."""
        return self.graph.constant(value, dtype)

    def cast(self, name: str, dtype: str, to: str, result: str | None = None) -> str:
        """Converts a value from type ``dtype`` to type ``to``, where they differ."""
        return name if dtype == to else self.graph.op("Cast", name, to=ELEMENT[to], name=result)

    def batch(self, factor: int = 1) -> str:
        """The batch size times ``factor``, i64 [1]."""
        g = self.graph
        size = g.op("Shape", self.program.inputs[0].name, start=0, end=1, name="batch")
        return size if factor == 1 else g.op("Mul", size, g.ints(factor))

    def reshaped(self, name: str, shape: Shape, result: str | None = None) -> str:
        """Reshapes a value."""
        g = self.graph
        if sum(d < 0 for d in shape) > 1:
            return g.op("Reshape", name, self.sizes(shape), name=result)
        return g.op("Reshape", name, g.ints(*(-1 if d < 0 else d for d in shape)), name=result)

    def sizes(self, shape: Shape) -> str:
        """A shape at the batch size of the call, i64 [n]."""
        if all(d >= 0 for d in shape):
            return self.graph.ints(*shape)
        return self.graph.op("Concat", *(self.batch(-d) if d < 0 else self.graph.ints(d) for d in shape), axis=0)

    def pointwise(
        self, node: fx.Node, operands: list[Any], write: Callable[..., str], dtype: str | None = None
    ) -> Value:
        """Emits a pointwise call; its result is channels-first where all full-size operands are.

        Args:
            node: the call.
            operands: nodes and numbers, which broadcast against one another.
            write: emits the operator on their values.
            dtype: the type that operands are converted to, by default the result's.
        """
        dtype, rank = dtype or self.dtype(node), self.rank(node)
        nodes = [o for o in operands if isinstance(o, fx.Node)]
        full = [self.value(o).first for o in nodes if self.shape(o) == self.shape(node)]
        first = rank > 2 and bool(full) and all(full)
        return Value(write(*(self._broadcast(o, rank, dtype, first) for o in operands)), first)

    def _broadcast(self, source: Any, rank: int, dtype: str, first: bool) -> str:
        if not isinstance(source, fx.Node):
            return self.number(source, dtype)
        own = self.rank(source)
        if first and own == rank:
            name = self.first(source)
        else:
            name = self.last(source)
            if first and own:
                padded = self.reshaped(name, (*[1] * (rank - own), *self.shape(source)))
                name = self.graph.op("Transpose", padded, perm=[0, rank - 1, *range(1, rank - 1)])
        return self.cast(name, self.dtype(source), dtype)


def _bind(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, with defaults."""
    if isinstance(node.target, torch._ops.OpOverload):
        parameters = node.target._schema.arguments
        given = dict(zip((p.name for p in parameters), node.args, strict=False)) | dict(node.kwargs)
        return {p.name: given.get(p.name, p.default_value) for p in parameters}
    assert callable(node.target)
    try:
        bound = inspect.signature(node.target).bind(*node.args, **node.kwargs)
    except ValueError:  # a builtin
        return {str(i): argument for i, argument in enumerate(node.args)}
    bound.apply_defaults()
    return dict(bound.arguments)
