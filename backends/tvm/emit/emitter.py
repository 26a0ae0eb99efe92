"""The emitter, which the emission of every operator shares: values, shapes, kernel calls, refusals.

Values are contiguous, with the batch outermost: a tensor of m*B rows is [B, m, ...] here. Shapes are free: a call may
see an operand in any shape of equally many elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Kernel, Record, Shape, Value, record
from mpq_compiler.backends.tvm.plan.views import View, whole
from mpq_compiler.ir import ops
from mpq_compiler.ir.graph import arguments
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.stored_tensors import Stored
from mpq_compiler.support.errors import UserError


@dataclass
class Task:
    """The node or region that is being emitted."""

    node: fx.Node
    members: list[fx.Node]
    """Its calls, in order."""
    outer: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """The node of the program behind each placeholder of the region."""

    @property
    def anchor(self) -> fx.Node:
        """The first call, whose kernel computes the region."""
        return self.members[0]


@dataclass
class Epilogue:
    """The steps of a region that fit behind its anchor."""

    steps: list[Record] = field(default_factory=list)
    operands: list[tuple[str, Value]] = field(default_factory=list)
    """The values that the steps read, each with how it broadcasts."""
    quantizer: fx.Node | None = None
    """The quantizer at the end, where there is one."""
    covered: int = 1
    """The number of the region's members that anchor and steps cover."""

    @property
    def record(self) -> Record:
        """The epilogue as a part of a kernel's problem."""
        kinds = [record("epilogue.Operand", kind=kind) for kind, _ in self.operands]
        return record("epilogue.Epilogue", steps=self.steps, operands=kinds)

    def reference(self, kind: str, value: Value) -> int:
        """The index of an operand, which is added where it is new."""
        if (kind, value) not in self.operands:
            self.operands.append((kind, value))
        return self.operands.index((kind, value))


@dataclass
class Formula:
    """The computation of a pointwise kernel: its inputs, which broadcast to ``shape``, and its steps."""

    shape: Shape
    inputs: list[Value] = field(default_factory=list)
    steps: list[Record] = field(default_factory=list)

    def read(self, value: Value) -> Record:
        """A reference to an input, which is added where it is new."""
        if value not in self.inputs:
            self.inputs.append(value)
        return record("pointwise.Input", index=self.inputs.index(value))

    def step(self, op: str, *args: Record | float, value: int | None = None) -> Record:
        """Adds a step and returns a reference to its result."""
        self.steps.append(record("pointwise.PointwiseStep", op=op, args=args, value=value))
        return record("pointwise.Result", index=len(self.steps) - 1)

    def include(self, other: Formula) -> Record:
        """Adds the steps of another formula of this shape and returns a reference to its result."""
        renamed = {("pointwise.Input", i): self.read(value) for i, value in enumerate(other.inputs)}
        for i, step in enumerate(other.steps):
            args = [renamed[a.type, a.get("index")] if isinstance(a, Record) else a for a in step.get("args")]
            renamed["pointwise.Result", i] = self.step(step.get("op"), *args)
        return renamed["pointwise.Result", len(other.steps) - 1]


class Preparation:
    """The calls of `prepare`, which all functions share: they compute from stored tensors alone."""

    def __init__(self, stored: Mapping[str, Stored]) -> None:
        self.stored = stored
        self.static = set(stored)
        """The names of the values that are known at load."""
        self.calls: list[Call] = []
        self.made: dict[tuple[Any, ...], list[Value]] = {}


class Emitter:
    """The values and calls of one function while its program is walked (`emit.walk`)."""

    def __init__(self, program: Program, preparation: Preparation) -> None:
        self.program = program
        self.preparation = preparation
        self.two, self.three = (shapes(program, batch, regions=True) for batch in (2, 3))
        self.values: dict[fx.Node, Value] = {}
        self.parts: dict[fx.Node, list[Value]] = {}
        self.views: dict[str, View] = {}
        """The view behind each copy, by the copy's name: kernels that can read strides read the view's source."""
        self.formulas: dict[str, Formula] = {}
        """The formula of each pointwise kernel, by its result's name: an only reader may compute it itself."""
        self.calls: list[Call] = []
        self.results: dict[str, Value] = {}
        """The results of the calls, by name."""
        self.made: dict[tuple[Any, ...], list[Value]] = {}
        self.task = Task(next(iter(program.graph.nodes)), [])

    # ------------------------------------------------------------------------------------------ shapes

    def shape(self, node: fx.Node) -> Shape:
        """The shape of a node's value."""
        return self.shape_of(self.two[node.name], self.three[node.name])

    def shape_of(self, two: Tensor, three: Tensor) -> Shape:
        """Derives a shape with the batch outermost from the tensors at batch sizes 2 and 3.

        Raises:
            UserError: the shape does not have the batch outermost.
        """
        differing = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
        if not differing:
            return tuple(two.shape)
        rows = int(two.shape[0]) // 2
        if differing != [0] or 2 * rows != two.shape[0] or 3 * rows != three.shape[0]:
            raise self.refusal(f"its shape {text(two.shape)} does not have the batch outermost")
        return (BATCH, *([rows] if rows != 1 else []), *(int(d) for d in two.shape[1:]))

    def axis(self, node: fx.Node, dim: int) -> int:
        """The dimension of a node's value that is dimension `dim` of its tensor."""
        rank = int(self.two[node.name].dim())
        dim %= rank
        shifted = len(self.shape(node)) - rank
        if shifted and dim == 0:
            raise self.refusal("it works along a dimension that holds the batch")
        return dim + shifted

    def dtype(self, node: fx.Node) -> str:
        """The element type of a node's tensor."""
        return type_name(self.two[node.name].dtype)

    def refusal(self, reason: str) -> UserError:
        """The error for a node that no kernel computes."""
        anchor = self.task.members[0] if self.task.members else self.task.node
        return UserError(
            f"node '{self.task.node.name}' ({ops.name_of(anchor.target)}) cannot be compiled for a CPU: {reason}; "
            "use --target reference, or report the model"
        )

    # ------------------------------------------------------------------------------------------ values

    def value(self, node: Any) -> Value:
        """The value of a node of the program, or of a placeholder of the region; stored floats are converted to f32."""
        node = self.task.outer.get(node, node)
        if node.op == "get_attr":
            value = self.stored(node)
            return self.converted(value, "float32") if value.dtype == "float16" else value
        if node not in self.values:
            raise self.refusal(f"it reads '{node.name}', which is no tensor")
        return self.values[node]

    def optional(self, node: Any) -> Value | None:
        """The value of a node; None stays None."""
        return None if node is None else self.value(node)

    def stored(self, node: Any) -> Value:
        """The value of a stored tensor in its stored type. UserError: the node is computed."""
        node = self.task.outer.get(node, node)
        if node.op != "get_attr":
            raise self.refusal(f"'{node.name}' is computed where a stored tensor is expected")
        array = self.preparation.stored[str(node.target)].array
        return Value(str(node.target), array.shape, str(array.dtype))

    def is_stored(self, node: fx.Node) -> bool:
        """Whether a node, or what it stands for outside of its region, is a stored tensor."""
        return self.task.outer.get(node, node).op == "get_attr"

    def is_static(self, value: Value) -> bool:
        """Whether the value is known at load."""
        return value.name in self.preparation.static

    def converted(self, value: Value, dtype: str) -> Value:
        """Converts a value to another type."""
        problem = record(
            "pointwise.PointwiseProgram",
            inputs=[((value.size,), value.dtype)],
            steps=[record("pointwise.PointwiseStep", op="cast", args=[record("pointwise.Input", index=0)])],
            shape=(value.size,),
            dtype=dtype,
        )
        made = Value(f"{value.name}|{dtype}", value.shape, dtype)
        return self.call(Kernel("pointwise", problem), {"x0": value}, {"y": made})[0]

    def view(self, value: Value) -> View:
        """The view of a value: into the value that it was copied from, or into itself."""
        found = self.views.get(value.name)
        return (found and found.reshaped(value.shape)) or whole(value)

    def copied(self, view: View, name: str) -> Value:
        """Makes a view a value: without a call where it is its whole source, else by a copy, which may go unread."""
        if view.is_whole:
            return Value(view.source.name, view.shape, view.source.dtype)
        extents = view.extents
        strides = whole(Value("", extents, "")).strides
        copy = record(
            "movement.Copy", source=0, extents=extents, source_strides=view.strides, target_strides=strides,
            source_offset=view.offset,
        )  # fmt: skip
        problem = record(
            "movement.Movement", inputs=[view.source.shape], shape=view.shape, copies=[copy], dtype=view.source.dtype
        )
        out = Value(name, view.shape, view.source.dtype)
        made = self.call(Kernel("movement", problem), {"x0": view.source}, {"y": out})[0]
        self.views[made.name] = view
        return made

    def broadcast(self, value: Value, shape: Shape) -> Shape:
        """Pads a value's shape so that it broadcasts to `shape`.

        [B, m, ...] and [m*B, ...] may meet, and 1 may stand for B.
        """
        own = value.shape
        if value.batched and len(own) < len(shape):
            own = (BATCH, *[1] * (len(shape) - len(own)), *own[1:])
        return own

    def quantizer(self, node: fx.Node) -> dict[str, Value]:
        """The operands of a quantizer, by the names of a kernel's arguments."""
        _, scale, zero, group, _ = arguments(node)
        return {
            "qscale": self.converted(self.stored(scale), "float32"),
            "qzero": self.converted(self.stored(zero), "int32"),
            "group": self.value(group),
        }

    def folds(self, node: fx.Node) -> bool:
        """Whether the batch has several rows of each sample, so that a tensor [m*B, ...] is a value [B, m, ...]."""
        return len(self.shape(node)) != int(self.two[node.name].dim())

    # ------------------------------------------------------------------------------------------- calls

    def call(self, kernel: Kernel, operands: dict[str, Value], results: dict[str, Value]) -> list[Value]:
        """Emits a call, into `prepare` where all operands are known at load; equal calls are emitted once.

        Args:
            kernel: what computes it.
            operands: the values that it reads, by argument.
            results: the values that it makes, by argument.

        Returns:
            The results, of this call or of an equal earlier one.
        """
        names = tuple((argument, value.name) for argument, value in operands.items())
        if all(map(self.is_static, operands.values())) and not any(v.batched for v in results.values()):
            return self._prepare(kernel, names, results)
        if (kernel, names) not in self.made:
            made = tuple((argument, value.name) for argument, value in results.items())
            self.calls.append(Call(kernel, names, made, self.task.node.name))
            self.made[kernel, names] = list(results.values())
            self.results |= {value.name: value for value in results.values()}
        return _as_asked(self.made[kernel, names], results)

    def _prepare(self, kernel: Kernel, names: tuple[tuple[str, str], ...], results: dict[str, Value]) -> list[Value]:
        prepared = self.preparation
        if (kernel, names) not in prepared.made:
            renamed = {}
            for argument, value in results.items():
                name, count = value.name, 1
                while name in prepared.static:  # the same node at another image size
                    name, count = f"{value.name}#{count}", count + 1
                renamed[argument] = Value(name, value.shape, value.dtype)
            made = tuple((argument, value.name) for argument, value in renamed.items())
            prepared.calls.append(Call(kernel, names, made, self.task.node.name))
            prepared.static |= {value.name for value in renamed.values()}
            prepared.made[kernel, names] = list(renamed.values())
        return _as_asked(prepared.made[kernel, names], results)

    def constant(self, shape: tuple[int, ...], dtype: str, value: float) -> Value:
        """A tensor filled with one value, which is made at load and not stored."""
        fill = record("movement.Movement", inputs=(), shape=shape, copies=(), dtype=dtype, fill=value)
        name = f"|{value:g}x{'x'.join(map(str, shape))}|{dtype}"
        return self.call(Kernel("movement", fill), {}, {"y": Value(name, shape, dtype)})[0]


def _as_asked(made: Sequence[Value], results: dict[str, Value]) -> list[Value]:
    """Gives results of an equal call the shapes of this one, since kernels know sizes and no shapes."""
    return [replace(value, shape=asked.shape) for value, asked in zip(made, results.values(), strict=True)]


def as_ints(shape: Shape) -> list[int]:
    """The extents of a shape, with 2 for the batch."""
    return [2 if d == BATCH else int(d) for d in shape]


def elements(shape: Shape) -> int:
    """The number of elements of a shape, with 2 for the batch."""
    return math.prod(as_ints(shape))


def filled(node: fx.Node, *defaults: Any) -> list[Any]:
    """The positional arguments of a call, completed by `defaults`; the graph's own operators take no keywords."""
    return [*arguments(node)[: len(defaults)], *defaults[len(node.args) :]]


def type_name(dtype: torch.dtype) -> str:
    """The name of a type without "torch."."""
    return str(dtype).removeprefix("torch.")


def text(shape: Sequence[Any]) -> str:
    """Formats a shape for an error."""
    return "[" + ", ".join(map(str, shape)) + "]"
