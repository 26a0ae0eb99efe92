"""Interpreters run programs node by node: on tensors, or on shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, fx

from mpq_compiler.ir.graph import function_of
from mpq_compiler.ir.ops.shapes import SHAPES
from mpq_compiler.ir.program import Program
from mpq_compiler.support.errors import UserError


@contextmanager
def single_threaded() -> Iterator[None]:
    """Runs torch on one thread within the block, for equal bits with any --jobs and any number of cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class Interpreter:
    """Runs a graph node by node; subclasses override its methods for other meanings of the graph."""

    def __init__(self, program: Program, device: str = "cpu") -> None:
        self.program, self.device = program, device

    def run(
        self,
        inputs: Mapping[str, Tensor],
        *,
        watch: Callable[[fx.Node, Any], None] | None = None,
    ) -> Tensor:
        """Runs the program on inputs by name; ``watch(node, value)`` sees every value as it is computed.

        Inputs may lie elsewhere than on the device, where values and output are.
        """
        arguments = [self._input(inputs, s.name).to(self.device) for s in self.program.inputs]
        output: Tensor = self.execute(self.program.graph, arguments, watch)
        return output

    def execute(
        self, graph: fx.Graph, arguments: list[Any], watch: Callable[[fx.Node, Any], None] | None = None
    ) -> Any:
        """Runs a graph, the program's or a region's, on arguments in the order of its placeholders.

        Stored tensors are read where they are first used, since all of them widened are more than memory holds.
        """
        env: dict[fx.Node, Any] = {}
        feed = iter(arguments)
        last_use = last_uses(graph)

        def compute(node: fx.Node) -> None:
            env[node] = next(feed) if node.op == "placeholder" else self.evaluate(node, env)
            if watch is not None:
                watch(node, env[node])

        for node in graph.nodes:
            if node.op == "get_attr":
                continue
            for source in node.all_input_nodes:
                if source not in env:
                    compute(source)
            if node.op == "output":
                return self.result(fx.map_arg(node.args[0], env.__getitem__))
            compute(node)
            for dead in last_use.get(node, ()):
                del env[dead]
        raise AssertionError("a graph without an output")

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        """Computes a node's value from the values of its operands."""
        if node.op == "get_attr":
            return self.attribute(str(node.target))
        args = fx.map_arg(node.args, env.__getitem__)
        kwargs = fx.map_arg(node.kwargs, env.__getitem__)
        if node.op == "call_module":
            return self.execute(self.program.regions[str(node.target)], list(args))
        return self.call(node, args, kwargs)

    def attribute(self, name: str) -> Any:
        """Reads a stored tensor."""
        return self.program.tensors.read(name, self.device)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        """Calls a node's operator on values; what it makes of nothing lies on the device, wherever it was traced."""
        if "device" in kwargs:
            kwargs = {**kwargs, "device": self.device}
        return function_of(node)(*args, **kwargs)

    def result(self, value: Any) -> Any:
        """Converts the value of a graph's output."""
        return value

    @staticmethod
    def _input(inputs: Mapping[str, Tensor], name: str) -> Tensor:
        if name not in inputs:
            raise UserError(f"input '{name}' is missing; the denoiser takes it by that name")
        return inputs[name]


def last_uses(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """The operands that no later node reads, by the node that reads them last."""
    seen: set[fx.Node] = set()
    uses: dict[fx.Node, list[fx.Node]] = {}
    for node in reversed(graph.nodes):
        for source in node.all_input_nodes:
            if source not in seen:
                seen.add(source)
                uses.setdefault(node, []).append(source)
    return uses


@torch.no_grad()
def run(
    program: Program,
    inputs: Mapping[str, Tensor],
    watch: Callable[[fx.Node, Any], None] | None = None,
    device: str = "cpu",
) -> Tensor:
    """Runs the program without gradients on a device; ``watch`` sees every node's value there, the output is here."""
    output = Interpreter(program, device).run(inputs, watch=watch)  # of a part of a program several tensors
    return fx.node.map_aggregate(output, lambda value: value.cpu() if isinstance(value, Tensor) else value)


KNOWN_SHAPES = 50_000
"""The most results of operators on shapes that a process caches."""


class ShapeInterpreter(Interpreter):
    """Computes shapes and types only: every tensor is on the meta device.

    The process caches the result of an operator for operands of given shapes, since a pipeline asks for the shapes of
    nearly the same graph after every pass, and meta kernels are slow (a group norm takes two milliseconds).
    """

    known: ClassVar[dict[Any, Any]] = {}

    def __init__(self, program: Program, inside: Callable[[fx.Node, Any], None] | None = None) -> None:
        """``inside(node, value)`` sees the nodes of regions, which the watch of `run` does not."""
        super().__init__(program, "meta")
        self.inside = inside

    def evaluate(self, node: fx.Node, env: Mapping[fx.Node, Any]) -> Any:
        if node.op == "call_module" and self.inside is not None:
            operands = fx.map_arg(node.args, env.__getitem__)
            return self.execute(self.program.regions[str(node.target)], list(operands), self.inside)
        return super().evaluate(node, env)

    def attribute(self, name: str) -> Any:
        return self.program.tensors.meta(name)

    def call(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        key = (node.target, _shape_key(args), _shape_key(kwargs))
        if key not in self.known:
            if len(self.known) >= KNOWN_SHAPES:
                self.known.clear()
            self.known[key] = self._shape(node, args, kwargs)
        return self.known[key]

    def _shape(self, node: fx.Node, args: Any, kwargs: Any) -> Any:
        if node.target in SHAPES:
            return SHAPES[node.target](*args, **kwargs)
        return super().call(node, args, kwargs)


def _shape_key(value: Any) -> Any:
    """All that the shape of an operator's result can depend on; 1, 1.0 and True differ."""
    if isinstance(value, Tensor):
        return value.dtype, tuple(value.shape), value.stride()
    if isinstance(value, tuple | list):
        return tuple(_shape_key(v) for v in value)
    if isinstance(value, Mapping):
        return tuple((name, _shape_key(v)) for name, v in value.items())
    return type(value), value


def value_nbytes(value: object) -> int:
    """The bytes of a node's value; 0 for plain values."""
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0


@torch.no_grad()
def shapes(program: Program, batch: int, *, regions: bool = False) -> dict[str, Any]:
    """The meta tensor (or plain value) of every node at a batch size, by name; ``regions``: inside them, too."""
    found: dict[str, Any] = {}

    def watch(node: fx.Node, value: Any) -> None:
        found[node.name] = value

    inputs = {s.name: torch.empty(s.sized(batch), dtype=s.dtype, device="meta") for s in program.inputs}
    ShapeInterpreter(program, watch if regions else None).run(inputs, watch=watch)
    return found
