"""The blocks of a denoiser in the order of execution, which block-wise training takes one by one.

A block is one of several modules of a kind that follow each other: an element of a ``ModuleList`` of one class, the
innermost (residual blocks, transformer blocks, samplers). Every other layer is a block of its own. Blocks follow from
structure alone, so every model has them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

import torch
from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import copy_graph, prune
from mpq_compiler.ir.program import Program

_NO_VALUE = (
    ops.fake_quantize,
    ops.fake_quantize_float,
    ops.dynamic_fake_quantize,
    ops.time_group,
    ops.dequantize_weight,
    ops.dequantize_float8,
    ops.binary_branch,
)
"""The operators of the simulated program that the float program does not have."""
_PART = re.compile(r"_part\d+(?=\.[^.]+$)")
"""The mark in the path of a parameter's part, from `split-shortcut`."""


@dataclass(frozen=True)
class Block:
    """Parameters that are trained together, and the node that is the output of their layers."""

    name: str
    """The path of the module."""
    parameters: tuple[str, ...]
    """The paths of its parameters that the program reads, sorted."""
    output: str
    """The node whose value is the block's output."""
    repeated: bool
    """Whether it is one of several of a kind; else it is a single layer."""


def blocks(model: torch.nn.Module, program: Program) -> list[Block]:
    """Finds the blocks of a fake-quantized program, in the order of their last layers.

    The output of a block is the last value that follows from its last layer before another block's layer runs. Residual
    additions and changes of size thus still belong to it.
    """
    lists = repeated(model)
    known = {name for name, _ in model.named_parameters()}
    order = [n for n in program.graph.nodes if n.op == "call_function" and not _is_weight(n)]
    place = {node: index for index, node in enumerate(order)}
    owners: dict[fx.Node, str] = {}
    read: dict[str, set[str]] = {}
    for node in order:
        for path in _read(node):
            source = path if path in known else _PART.sub("", path)
            if source in known:
                owners[node] = block_of(source, lists)
                read.setdefault(owners[node], set()).add(path)
    last = {owner: node for node, owner in owners.items()}
    found = []
    for name, node in sorted(last.items(), key=lambda item: place[item[1]]):
        reached, output = {node}, node
        for later in order[place[node] + 1 :]:
            if later in owners:
                break
            if reached.intersection(later.all_input_nodes):
                reached.add(later)
                output = later if later.target not in _NO_VALUE else output
        found.append(Block(name, tuple(sorted(read[name])), output.name, name in lists))
    return found


def cut(program: Program, node: str) -> Program:
    """Cuts a program so that its output is the value of a node."""
    graph = copy_graph(program.graph)
    short = program.fork(graph=graph)
    graph.output_node().args = (short.node(node),)
    prune(graph)
    return short


def repeated(model: torch.nn.Module) -> set[str]:
    """The paths of modules in a ``ModuleList`` of one class."""
    found = set()
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.ModuleList) and len({type(child) for child in module}) == 1:
            found |= {f"{path}.{index}" for index in range(len(module))}
    return found


def block_of(parameter: str, repeated: set[str]) -> str:
    """The path of the block that a parameter belongs to: the innermost of ``repeated``, or its own module."""
    module, _, _ = parameter.rpartition(".")
    parts = module.split(".")
    prefixes = (".".join(parts[:count]) for count in range(len(parts), 0, -1))
    return next((prefix for prefix in prefixes if prefix in repeated), module)


def _is_weight(node: fx.Node) -> bool:
    """Whether the call computes a weight from stored tensors."""
    if node.target is aten.add.Tensor:
        return any(isinstance(a, fx.Node) and a.target is ops.binary_branch for a in node.args)
    return node.target in (ops.dequantize_weight, ops.dequantize_float8, ops.binary_branch)


def weight_path_of(node: fx.Node) -> str | None:
    """The parameter by which a layer on a settled weight multiplies; None for any other call."""
    made = next((n for n in node.all_input_nodes if _is_weight(n)), None)
    if made is None or _is_weight(node):
        return None
    codes = (
        made.all_input_nodes[0] if made.target is not aten.add.Tensor else made.all_input_nodes[0].all_input_nodes[0]
    )
    return str(codes.target).split(":")[0]


def _read(node: fx.Node) -> list[str]:
    """The paths of the parameters that a call reads from the store, its weight's among them."""
    paths = [str(n.target).split(":")[0] for n in node.all_input_nodes if n.op == "get_attr"]
    weight = weight_path_of(node)
    return paths if weight is None else [*paths, weight]
