"""Which kernel computes what: the calls of a compiled program in the order in which they run, for `mpqc bench`."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch import fx

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program


def describe(program: Program, made: Iterable[Mapping[str, str]]) -> list[dict[str, Any]]:
    """A row for each kernel call: what ``made`` says of it, layer (a parameter, or None), macs per sample.

    ``made`` holds the node of each, its kernel and what else the backend says. Where several calls stand for one node,
    the multiplications are those of the first.
    """
    layers, work = _layers(program), _macs(program)
    rows = []
    for call in made:
        node = call["node"]
        rows.append({**call, "layer": layers.get(node), "macs": work.pop(node, 0)})
    return rows


def by_layer(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """What the backend says of each layer: the kernel calls that stand for it."""
    found: dict[str, dict[str, Any]] = {}
    for row in rows:
        if row["layer"] is not None:
            found.setdefault(row["layer"], {"kernels": []})["kernels"].append(
                {"template": row["template"], "kernel": row["kernel"], "macs": row["macs"]}
            )
    return found


def encode(rows: list[dict[str, Any]]) -> bytes:
    return (json.dumps(rows, indent=1) + "\n").encode()


def _inside(program: Program, node: fx.Node) -> list[views.Call]:
    if node.op == "call_module":
        return list(views.inside(program, node))
    return [views.Call(node.name, node.target, node.args, dict(node.kwargs))] if node.op == "call_function" else []


def _layers(program: Program) -> dict[str, str]:
    """Node or region -> the parameter of the layer in it."""
    levels = {made.call.name: made for made in views.levels_of(views.flatten(program))}
    found = {}
    for node in program.graph.nodes:
        paths = (views.weight_path(call, levels) for call in _inside(program, node))
        path = next((p for p in paths if p is not None), None)
        if path is not None:
            found[node.name] = path
    return found


def _macs(program: Program) -> dict[str, int]:
    """Multiply-accumulates per sample of each node or region that contracts anything."""
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
