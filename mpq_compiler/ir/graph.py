"""Helpers on fx graphs: operands, weights, names, copies, dead and equal nodes."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from mpq_compiler.ir import ops


def part_of(name: str) -> str:
    """The part of a parameter that a stored tensor is: "conv.weight:scale.2" is a "scale"."""
    return re.sub(r"\.\d+$", "", name.partition(":")[2])


def softmax(attention: str) -> str:
    """The name of the edge of an attention's probabilities, under which their plan is."""
    return f"{attention}:softmax"


def arguments(node: fx.Node) -> tuple[Any, ...]:
    """The positional arguments of a call, untyped: the operator tells the reader their types.

    torch.fx types each as the union of everything that an argument can be.
    """
    return node.args


def operand(node: fx.Node, index: int) -> fx.Node:
    """The positional argument at ``index``, which must be a node."""
    value = node.args[index]
    assert isinstance(value, fx.Node), f"argument {index} of {node.name} is {value!r}, not a node"
    return value


def function_of(node: fx.Node) -> Callable[..., Any]:
    """The operator that a call_function node calls."""
    assert callable(node.target), f"{node.name} calls no function"
    return node.target


CONTRACTIONS: tuple[Callable[..., Any], ...] = (torch.ops.aten.linear.default, ops.conv2d)
"""The operators (x, weight, bias, ...) that have a quantized form."""


def weight_of(node: fx.Node) -> str | None:
    """The store name of a quantizable call's weight; None for other calls."""
    if node.op != "call_function" or node.target not in CONTRACTIONS:
        return None
    weight = node.args[1]
    if not isinstance(weight, fx.Node) or weight.op != "get_attr":
        return None
    if node.target is ops.conv2d and len(node.args) > 5 and node.args[5] != 1:
        return None  # grouped convolutions stay float
    return str(weight.target)


def depending(graph: fx.Graph, name: str) -> set[fx.Node]:
    """The nodes that depend on the input called `name`, which is among them."""
    found: set[fx.Node] = set()
    for node in graph.nodes:
        if (node.op == "placeholder" and node.target == name) or not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Copies a graph; nodes keep their names."""
    new = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        env[node] = new.node_copy(node, lambda n: env[n])
        env[node].name = node.name
    return new


def prune(graph: fx.Graph) -> None:
    """Removes dead nodes; inputs stay, and random operators count like any other."""
    graph.eliminate_dead_code(is_impure_node=lambda n: n.op in ("placeholder", "output"))


def merge_equal(graph: fx.Graph) -> None:
    """Merges calls of one operator on the same operands; no operator is random or changes a tensor in place."""
    seen: dict[Any, fx.Node] = {}
    for node in list(graph.nodes):
        if node.op not in ("call_function", "get_attr"):
            continue
        key = (node.op, str(node.target), repr(node.args), repr(node.kwargs))
        if key in seen:
            node.replace_all_uses_with(seen[key])
            graph.erase_node(node)
        else:
            seen[key] = node
