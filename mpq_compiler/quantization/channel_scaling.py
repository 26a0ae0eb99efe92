"""Exact scaling of a program's tensors channel by channel, folded into the stored tensors that produce them.

Scaling a tensor by r, and the columns of the layers that read it by 1/r, does not change the function. SmoothQuant
(arXiv 2211.10438), weight dilation (DilateQuant, arXiv 2409.14307) and SVDQuant's smoothing have this in common.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import CONTRACTIONS, arguments, operand, prune, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.weight_basis import Scaled, record

AFFINE = {ops.group_norm: (2, 3), aten.layer_norm.default: (2, 3), ops.rms_norm: (1,)}
"""The norms, and the positions of weight and bias among their arguments."""
CARRIERS = (aten.relu.default, ops.upsample_nearest2d)
"""Unary operators that commute with a positive factor per channel.

Reshapes commute too, but what changes with the image size must keep its name (`driver.specialize`).
"""


class Edit(NamedTuple):
    """A stored tensor that a call reads, and the factors along its first dimension."""

    call: fx.Node
    argument: int
    factor: Tensor


Made = tuple[list[Edit], list[fx.Node]]
"""The edits that scale a node's value, and the nodes whose values change with them."""


class Scaling:
    """Collects factors and applies them together, so that a stored tensor with several factors is rewritten once."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._sizes = shapes(program, 2)
        self._edits: list[Edit] = []
        self._columns: list[tuple[fx.Node, Tensor]] = []
        self._scaled: dict[fx.Node, None] = {}
        self._multiplied: list[tuple[fx.Node, Tensor, list[fx.Node]]] = []
        self._shared = sharing(program)

    def scale(self, edge: fx.Node, factor: Tensor, readers: Iterable[fx.Node]) -> bool:
        """Scales an edge and undoes that in the weights of the layers that read it.

        Args:
            edge: the node of the tensor [..., C].
            factor: positive factors [C].
            readers: the layers that read the edge scaled.

        Returns:
            True where the factor is folded into what produces the edge, False where a multiplication is inserted.
        """
        readers = list(readers)
        made = self._absorb(edge, factor, {*readers})
        if made is None:
            self._multiplied.append((edge, factor, readers))
        else:
            edits, nodes = made
            self._edits += edits
            self._scaled |= dict.fromkeys(nodes)
        self._columns += [(reader, 1 / factor) for reader in readers]
        return made is not None

    def possible(self, readers: Iterable[fx.Node]) -> bool:
        """Whether no other layer reads the weights of these layers."""
        return not self._shared & {*readers}

    def _absorb(self, node: fx.Node, factor: Tensor, readers: set[fx.Node]) -> Made | None:
        """Folds ``factor`` into what produces ``node``.

        None where something besides ``readers`` reads the node, or an operator on the way does not commute with the
        factor.
        """
        if {*node.users} - readers or node.op != "call_function":
            return None
        args, only = arguments(node), {node}
        found: Made | None = None
        if node.target in CONTRACTIONS:
            if weight_of(node) is not None and node not in self._shared:
                found = self._stored(node, (1, 2), factor)
        elif node.target in AFFINE:
            if node.target is not aten.layer_norm.default or len(args[1]) == 1:
                found = self._stored(node, AFFINE[node.target], factor)
        elif node.target in CARRIERS:
            found = self._absorb(operand(node, 0), factor, only)
        elif node.target is ops.attention and args[2] not in args[:2]:
            found = self._absorb(operand(node, 2), factor, only)
        elif node.target is ops.prepend:
            found = _both(self._absorb(operand(node, 0), factor, only), self._stored(node, (1,), factor))
        elif node.target is aten.add.Tensor and self._alike(node):
            found = self._absorb(operand(node, 0), factor, only)
            if args[0] is not args[1]:
                found = _both(found, self._absorb(operand(node, 1), factor, only))
        elif node.target is aten.mul.Tensor and self._alike(node) and args[0] is not args[1]:
            found = self._absorb(operand(node, 0), factor, only) or self._absorb(operand(node, 1), factor, only)
        elif node.target is aten.slice.Tensor:
            found = self._absorb_in_source(node, factor)
        if found is not None:
            found[1].append(node)
        return found

    def _absorb_in_source(self, node: fx.Node, factor: Tensor) -> Made | None:
        """Folds factors through a slice of channels, such as half of a GEGLU layer's output, into these channels."""
        source, dim, start, end, *step = arguments(node)
        rank = self._sizes[source.name].dim()
        parts = [u for u in source.users if u.target is aten.slice.Tensor and len(u.args) == 4]
        if dim % rank != rank - 1 or step or len(parts) < len(source.users):
            return None
        others = [arguments(u)[2:4] for u in parts if u is not node]
        if any(arguments(u)[1] != dim for u in parts) or any(a < end and start < b for a, b in others):
            return None
        whole = torch.ones(self._channels(source))
        whole[start:end] = factor
        return self._absorb(source, whole, {*parts})

    def _stored(self, node: fx.Node, places: tuple[int, ...], factor: Tensor) -> Made | None:
        """The edits of a call's stored arguments; None where the first is missing or one of them is computed."""
        given = [(i, arguments(node)[i]) for i in places if i < len(node.args) and node.args[i] is not None]
        if node.kwargs or not given or given[0][0] != places[0] or any(n.op != "get_attr" for _, n in given):
            return None
        return [Edit(node, i, factor) for i, _ in given], []

    def _alike(self, node: fx.Node) -> bool:
        """Whether both operands are tensors of the result's shape."""
        shape = self._sizes[node.name].shape
        both = [a for a in arguments(node)[:2] if isinstance(a, fx.Node)]
        return len(both) == 2 and all(self._sizes[n.name].shape == shape for n in both) and len(node.args) == 2

    def _channels(self, node: fx.Node) -> int:
        return int(self._sizes[node.name].shape[-1])

    def apply(self) -> None:
        """Rewrites the program; nodes whose values change get names that end in ``_scaled``."""
        program, graph = self.program, self.program.graph
        for edge, factor, readers in self._multiplied:
            place = edge.next
            while place.op == "placeholder":  # inputs stay together
                place = place.next
            with graph.inserting_before(place):
                stored = graph.get_attr(program.tensors.add(f"{edge.name}:equalized", factor))
                scaled = graph.call_function(aten.mul.Tensor, (edge, stored))
            scaled.name = f"{edge.name}_scaled"
            for reader in readers:
                reader.update_arg(0, scaled)
        factors: dict[tuple[fx.Node, int], list[Tensor]] = {}
        for call, argument, factor in self._edits:
            rank = self.program.tensors[str(operand(call, argument).target)].dim()
            factors.setdefault((call, argument), []).append(factor.reshape(-1, *[1] * (rank - 1)))
        for call, factor in self._columns:
            factors.setdefault((call, 1), []).append(factor)
        for (call, argument), found in factors.items():
            name = str(operand(call, argument).target)
            tensor = program.tensors.read(name)
            path, _, part = name.partition(":")
            for factor in found:
                tensor = tensor * factor
                columns = argument == 1 and call.target in CONTRACTIONS and factor.dim() == 1
                record(program, path, Scaled(factor.flatten(), outputs=not columns))
            with graph.inserting_before(call):
                new = graph.get_attr(program.tensors.add(f"{path}:{part + '.' if part else ''}equalized", tensor))
            call.update_arg(argument, new)
        for node in self._scaled:
            node.name = f"{node.name}_scaled"
        prune(graph)


def sharing(program: Program) -> set[fx.Node]:
    """The layers that share their weight with another layer, for which it must not change."""
    reads: dict[str, list[fx.Node]] = {}
    for node in program.quantizable:
        reads.setdefault(str(weight_of(node)), []).append(node)
    return {node for nodes in reads.values() if len(nodes) > 1 for node in nodes}


def _both(left: Any, right: Any) -> Made | None:
    return None if left is None or right is None else (left[0] + right[0], left[1] + right[1])
