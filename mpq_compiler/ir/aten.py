"""The aten operators by kind, pointwise or data movement: the vocabulary that passes and backends share."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

aten = torch.ops.aten

UNARY: frozenset[Any] = frozenset(
    {
        aten.silu.default,
        aten.gelu.default,
        aten.sigmoid.default,
        aten.tanh.default,
        aten.relu.default,
        aten.exp.default,
        aten.log.default,
        aten.sin.default,
        aten.cos.default,
        aten.sqrt.default,
        aten.rsqrt.default,
        aten.neg.default,
        aten.abs.default,
        aten.square.default,
        aten.clamp.default,
        aten.to.dtype,
        aten._to_copy.default,
    }
)

BINARY: frozenset[Any] = frozenset(
    {
        aten.add.Tensor,
        aten.add.Scalar,
        aten.sub.Tensor,
        aten.sub.Scalar,
        aten.rsub.Scalar,
        aten.rsub.Tensor,
        aten.mul.Tensor,
        aten.mul.Scalar,
        aten.div.Tensor,
        aten.div.Scalar,
        aten.pow.Tensor_Scalar,
        aten.maximum.default,
        aten.minimum.default,
    }
)

POINTWISE = UNARY | BINARY

MOVEMENT: frozenset[Any] = frozenset(
    {
        aten.permute.default,
        aten.transpose.int,
        aten.swapaxes.default,
        aten.t.default,
        aten.view.default,
        aten.reshape.default,
        aten._unsafe_view.default,
        aten.unsqueeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.contiguous.default,
        aten.clone.default,
    }
)
"""Calls of one tensor whose result holds the same elements in the same or another order."""


def is_pointwise(node: fx.Node) -> bool:
    """Whether the node is a pointwise call."""
    return node.op == "call_function" and node.target in POINTWISE


def is_movement(node: fx.Node) -> bool:
    """Whether the node only moves data."""
    return node.op == "call_function" and node.target in MOVEMENT


def is_permute(node: Any) -> bool:
    """Whether an operand is a permute."""
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target is aten.permute.default


def interior_permutes(graph: fx.Graph) -> list[fx.Node]:
    """The permutes that neither read an input nor feed the output; movement beside them does not count."""

    def reaches(node: fx.Node, forward: bool) -> bool:
        nexts = list(node.users) if forward else node.all_input_nodes
        ends = ("output",) if forward else ("placeholder", "get_attr")
        return bool(nexts) and all(n.op in ends or (is_movement(n) and reaches(n, forward)) for n in nexts)

    return [n for n in graph.nodes if is_permute(n) and not reaches(n, True) and not reaches(n, False)]
