"""Complex numbers as pairs of reals: rotary embeddings that are written as products of complex numbers.

A complex tensor [...] becomes a real one [..., 2]. A product is two products and a sum, as rotary embeddings are
written in reals: (a + ib)(c + id) = [a, b] * [c, c] + [-b, a] * [d, d].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx
from torch.fx.node import Argument

from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import operand, prune
from mpq_compiler.ir.program import TensorStore

Call = Callable[..., fx.Node]
"""Inserts a call of an operator."""
CASTS = {aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.clone.default, aten.contiguous.default}


def to_reals(graph: fx.Graph, tensors: TensorStore) -> None:
    """Rewrites what reads and makes complex numbers; calls that have no rule stay as they are."""
    pairs: dict[fx.Node, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "get_attr" and tensors[str(node.target)].is_complex():
            value = torch.view_as_real(tensors[str(node.target)]).contiguous()
            with graph.inserting_before(node):
                pairs[node] = graph.get_attr(tensors.add(f"{node.target}:pairs", value))
            pairs[node].meta = {**node.meta, "val": value.to(node.meta["val"].device)}
        elif node.op == "call_function" and (found := _rewritten(graph, node, pairs)) is not None:
            if node.target is aten.view_as_real.default:
                node.replace_all_uses_with(found)
            else:
                pairs[node] = found
    prune(graph)


def _rewritten(graph: fx.Graph, node: fx.Node, pairs: dict[fx.Node, fx.Node]) -> fx.Node | None:
    """The pairs of a complex result, or the real result of complex operands; None where there is no rule."""
    if node.target is aten.view_as_complex.default:
        return operand(node, 0)
    if not any(source in pairs for source in node.all_input_nodes):
        return None
    if node.target is aten.view_as_real.default or node.target in CASTS:
        return pairs[operand(node, 0)]

    def call(target: Callable[..., object], *args: Argument) -> fx.Node:
        made = graph.call_function(target, args)
        values = fx.map_arg(args, lambda n: n.meta["val"])
        made.meta = {**node.meta, "val": target(*values)}
        return made

    source, given = operand(node, 0), list(node.args[1:])
    rank = len(node.meta["val"].shape)
    with graph.inserting_before(node):
        if node.target is aten.unsqueeze.default and isinstance(dim := given[0], int):
            return call(aten.unsqueeze.default, pairs[source], dim % rank)
        if node.target in (aten.view.default, aten.reshape.default) and isinstance(sizes := given[0], list | tuple):
            return call(aten.reshape.default, pairs[source], [*sizes, 2])
        if node.target is aten.mul.Tensor and len(node.all_input_nodes) == 2:
            return _times(call, pairs, node)
    return None


def _times(call: Call, pairs: dict[fx.Node, fx.Node], node: fx.Node) -> fx.Node:
    """The product of complex numbers, or of one with a real."""
    first, second = operands = [a for a in node.args if isinstance(a, fx.Node)]
    if first in pairs and second in pairs:
        z, c = operands if second.op == "get_attr" else operands[::-1]
        return _product(call, pairs[z], pairs[c])
    z, factor = operands if first in pairs else operands[::-1]
    return call(aten.mul.Tensor, pairs[z], call(aten.unsqueeze.default, factor, -1))


def _product(call: Call, z: fx.Node, c: fx.Node) -> fx.Node:
    real, imaginary = (call(aten.select.int, z, -1, part) for part in (0, 1))
    turned = call(aten.stack.default, [call(aten.neg.default, imaginary), real], -1)
    cos, sin = (call(aten.slice.Tensor, c, -1, part, part + 1) for part in (0, 1))
    made: fx.Node = call(aten.add.Tensor, call(aten.mul.Tensor, z, cos), call(aten.mul.Tensor, turned, sin))
    return made


