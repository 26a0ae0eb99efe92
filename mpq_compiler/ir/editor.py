"""A graph under rewriting, with the shapes of its values, and the few spellings that passes and backends know."""

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
        two, three = self._values[node]
        return tuple(zip(two.shape, three.shape, strict=True))

    def rank(self, node: fx.Node) -> int:
        return len(self._values[node][0].shape)

    @contextmanager
    def before(self, node: fx.Node) -> Iterator[None]:
        with self.graph.inserting_before(node):
            yield

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        """A new call at the place of insertion."""
        node = self.graph.call_function(target, args, kwargs)
        values = []
        for batch in (0, 1):
            given = fx.map_arg((args, kwargs), lambda n: self._values[n][batch])  # noqa: B023
            values.append(function_of(node)(*given[0], **given[1]))
        self._values[node] = (values[0], values[1])
        return node

    def permuted(self, x: fx.Node, order: Sequence[int]) -> fx.Node:
        return x if list(order) == sorted(order) else self.call(aten.permute.default, x, list(order))

    def stored(self, name: str, tensor: Tensor) -> fx.Node:
        """A new read of ``tensor``, which the store gets under ``name``."""
        node = self.graph.get_attr(self.program.tensors.add(name, tensor))
        meta = self.program.tensors.read(str(node.target)).to("meta")
        self._values[node] = (meta, meta)
        return node

    def replace(self, node: fx.Node, new: fx.Node, back: fx.Node | None = None) -> None:
        """``new`` computes what ``node`` did and takes its name; readers read ``back``, by default ``new`` itself."""
        node.replace_all_uses_with(back or new)
        new.meta["origin"] = node.meta.get("origin", node.name)
        self.erase(node)

    def erase(self, node: fx.Node) -> None:
        self.graph.erase_node(node)
        del self._values[node]


def bound(node: fx.Node, *defaults: Any) -> list[Any]:
    """The first ``len(defaults)`` arguments by their position in the schema, keyword or not; ``defaults`` fill up."""
    assert isinstance(node.target, torch._ops.OpOverload)
    values = [*node.args[: len(defaults)], *defaults[len(node.args) :]]
    names = [a.name for a in node.target._schema.arguments]
    for key, value in node.kwargs.items():
        if names.index(key) < len(values):
            values[names.index(key)] = value
    return values
