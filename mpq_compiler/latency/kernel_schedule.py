"""The kernel schedule of an artifact: its kernel calls in the order of execution, with the layer that each computes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program

Row = Mapping[str, Any]
"""What is said of a kernel call."""


def describe(program: Program, made: Iterable[Row]) -> list[Row]:
    """Describes the kernel calls of a program, a row each.

    Args:
        program: packed.
        made: the backend's description of each call: its node, its kernel, and more; the nodes ``beside`` it that it
            computes too, where it does.

    Returns:
        The descriptions, with ``layer`` (a parameter, or None), or layers ``beside``, and ``macs``, the
        multiply-accumulates per sample. Where several calls stand for one node, the last has its multiplications:
        others make ready what it reads.
    """
    layers, work = _layers(program), _macs(program)
    calls = [(call, [call["node"], *call.get("beside", ())]) for call in made]
    last = {node: number for number, (_, nodes) in enumerate(calls) for node in nodes}
    rows: list[Row] = []
    for number, (call, nodes) in enumerate(calls):
        beside = {"beside": [layers.get(node) for node in nodes[1:]]} if nodes[1:] else {}
        macs = sum(work.get(node, 0) for node in nodes if last[node] == number)
        rows.append({**call, **beside, "layer": layers.get(nodes[0]), "macs": macs})
    return rows


def by_layer(rows: Iterable[Row]) -> dict[str, Row]:
    """The kernel calls of each layer: their templates, kernels and multiply-accumulates, the layer's share of them."""
    found: dict[str, Row] = {}
    for row in rows:
        layers = [row["layer"], *row.get("beside", ())]
        kernel = {"template": row["template"], "kernel": row["kernel"], "macs": row["macs"] // len(layers)}
        for layer in layers:
            if layer is not None:
                found.setdefault(layer, {"kernels": []})["kernels"].append(kernel)
    return found


def _inside(program: Program, node: fx.Node) -> list[views.Call]:
    if node.op == "call_module":
        return list(views.inside(program, node))
    return [views.Call(node.name, node.target, node.args, dict(node.kwargs))] if node.op == "call_function" else []


def _layers(program: Program) -> dict[str, str]:
    """The parameter of the layer in each node or region that has one."""
    levels = {made.call.name: made for made in views.levels_of(views.flatten(program))}
    found = {}
    for node in program.graph.nodes:
        paths = (views.weight_path(call, levels) for call in _inside(program, node))
        path = next((p for p in paths if p is not None), None)
        if path is not None:
            found[node.name] = path
    return found


def _macs(program: Program) -> dict[str, int]:
    """The multiply-accumulates per sample of each node or region that contracts anything."""
    sizes = shapes(program, 1)

    def shape(operand: Any) -> tuple[int, ...]:
        if name := views.stored(operand):
            return tuple(program.tensors[name].shape)
        return tuple(sizes[operand.name].shape)

    found = {}
    for node in program.graph.nodes:
        total = 0
        for call in _inside(program, node):
            # What is fused behind a contraction keeps its size, so that the node's is the contraction's.
            if call.target in views.PACKED_LAYERS:
                total += sizes[node.name].numel() * shape(call.args[2])[1]
            elif call.target in views.FLOAT_LAYERS:
                total += sizes[node.name].numel() * math.prod(shape(call.args[1])[1:])
            elif call.target in (ops.attention, *views.ATTENTIONS):
                total += 2 * math.prod(shape(call.args[0])) * shape(call.args[1])[1]
            elif call.target in (aten.matmul.default, aten.bmm.default):
                total += sizes[node.name].numel() * shape(call.args[0])[-1]
        if total:
            found[node.name] = int(total)
    return found
