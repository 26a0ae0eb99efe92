"""The editor of a graph, which knows the shape of every value while passes rewrite it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import function_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.layout_algebra import Size
from mpq_compiler.ir.program import Program


class Editor:
    """Inserts calls into a program's graph and knows the shape of every value at the batch sizes 2 and 3."""

    def __init__(self, program: Program) -> None:
        self.program, self.graph = program, program.graph
        two, three = shapes(program, 2), shapes(program, 3)
        self._values = {n: (two[n.name], three[n.name]) for n in self.graph.nodes if n.op != "output"}

    def __contains__(self, node: fx.Node) -> bool:
        return node in self._values

    def value(self, node: fx.Node) -> Any:
        """The value at batch 2, on the meta device."""
        return self._values[node][0]

    def size(self, node: fx.Node) -> tuple[Size, ...]:
        """The sizes of a value, each at batch 2 and 3."""
        two, three = self._values[node]
        return tuple(zip(two.shape, three.shape, strict=True))

    def rank(self, node: fx.Node) -> int:
        """The number of dimensions of a value."""
        return len(self._values[node][0].shape)

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        """Inserts the calls within the block before a node."""
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """Inserts a call."""
        node = self.graph.call_function(target, args, kwargs)
        values = []
        for batch in (0, 1):
            given = fx.map_arg((args, kwargs), lambda n: self._values[n][batch])  # noqa: B023
            values.append(function_of(node)(*given[0], **given[1]))
        self._values[node] = (values[0], values[1])
        return node

    def permuted(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        """Inserts a permute, or returns ``x`` where the order is its own."""
        return x if list(order) == sorted(order) else self.call(aten.permute.default, x, list(order))

    def stored(self, name: str, tensor: Tensor) -> fx.Node:
        """Stores a tensor and inserts its read."""
        node = self.graph.get_attr(self.program.tensors.add(name, tensor))
        meta = self.program.tensors.meta(str(node.target))
        self._values[node] = (meta, meta)
        return node

    def replace(self, node: fx.Node, new: fx.Node, back: fx.Node | None = None) -> None:
        """Replaces ``node`` by ``new``, which takes its name.

        back: what readers read, a permute of ``new``; None has them read ``new`` itself.
        """
        node.replace_all_uses_with(back or new)
        new.meta["origin"] = node.meta.get("origin", node.name)
        self.erase(node)

    def erase(self, node: fx.Node) -> None:
        """Erases a node without readers."""
        self.graph.erase_node(node)
        del self._values[node]


def bound(node: fx.Node, *defaults: Any) -> list[Any]:
    """Binds the first ``len(defaults)`` arguments in the order of the schema, positional or keyword, with defaults."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = [*node.args[: len(defaults)], *defaults[len(node.args) :]]
    names = [a.name for a in node.target._schema.arguments]
    for key, value in node.kwargs.items():
        if names.index(key) < len(values):
            values[names.index(key)] = value
    return values
