"""What a plan costs: stored bytes, true average bits, operations. One function for allocator, packer and report."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.calibration import input_edge
from mpq_compiler.formats.base import F16_MAX
from mpq_compiler.program import Program, WeightPlan, operand, shapes, weight_of

ACTIVATION_GROUP_BYTES = 3
"""An f16 scale and a u8 zero point."""


def weight_path(node: fx.Node) -> str | None:
    """The parameter's name in the model, whatever layout the graph reads it in."""
    name = weight_of(node)
    return None if name is None else name.split(":")[0]


def stored_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The type in which a float leftover is stored: f16, and f32 for computed constants and beyond the range of f16."""
    if not tensor.is_floating_point():
        return tensor.dtype
    if name.startswith(("constant.", "time_groups.")) or float(tensor.abs().max() if tensor.numel() else 0) > F16_MAX:
        return torch.float32
    return torch.float16


def leftovers(program: Program) -> dict[str, Tensor]:
    """Tensors the graph reads that no weight plan covers, by store name."""
    planned = {str(weight_of(n)) for n in program.quantizable if weight_path(n) in program.weights}
    names = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    return {name: program.tensors[name] for name in sorted(names - planned)}


def fixed_bytes(program: Program, edges: int, groups: int) -> int:
    """Bytes that do not depend on the allocation: float leftovers, activation tables, time-group boundaries.

    ``program`` is in the planned stage, with weight plans for what will be quantized.
    """
    floats = sum(t.numel() * stored_dtype(n, t).itemsize for n, t in leftovers(program).items())
    return floats + edges * groups * ACTIVATION_GROUP_BYTES + 4 * (groups - 1)


def weight_bytes(program: Program, name: str, format_name: str) -> int:
    """Stored bytes of the weight (store name) in that format."""
    shape = program.tensors[name].shape
    return formats.get(format_name).stored_bytes(shape[0], math.prod(shape[1:]))


def stored_bytes(program: Program) -> int:
    """Payload bytes of the artifact of a planned program: exactly what will lie in weights.safetensors."""
    names = {str(weight_of(n)): program.weights[str(weight_path(n))].format for n in program.quantizable}
    weights = sum(weight_bytes(program, name, fmt) for name, fmt in names.items())
    groups = len(program.facts["time-groups"]) + 1
    return weights + fixed_bytes(program, len(program.activations), groups)


def average_bits(stored: int, parameters: int) -> float:
    """True average bits: all stored bits over the number of the model's parameters."""
    return 8 * stored / parameters


def macs(program: Program, batch: int = 1) -> dict[str, int]:
    """Multiply-accumulates per sample of each quantizable call."""
    sizes = shapes(program, batch)
    found = {}
    for node in program.quantizable:
        weight = sizes[operand(node, 1).name].shape
        found[node.name] = sizes[node.name].numel() // batch * math.prod(weight[1:])
    return found


def activation_elements(program: Program) -> dict[str, int]:
    """Elements per sample of each tensor edge that a quantizable call reads."""
    sizes = shapes(program, 1)
    return {e.name: sizes[e.name].numel() for e in (input_edge(n) for n in program.quantizable)}


def describe(program: Program) -> dict[str, Any]:
    """What a sensitivity table holds besides losses; ``program`` is calibrated and in float."""
    everything = program.fork()
    layers: dict[str, dict[str, Any]] = {}
    operations = macs(program)
    for node in program.quantizable:
        path, weight = str(weight_path(node)), str(weight_of(node))
        everything.weights[path] = WeightPlan("int8")
        sizes = {f: {"bits": formats.get(f).bits, "bytes": weight_bytes(program, weight, f)} for f in formats.FORMATS}
        layer = layers.setdefault(path, {"name": path, "edges": [], "macs": 0, "formats": sizes})
        layer["macs"] += operations[node.name]
        if (edge := input_edge(node).name) not in layer["edges"]:
            layer["edges"].append(edge)
    elements = activation_elements(program)
    groups = len(program.facts["time-groups"]) + 1
    return {
        "version": 1,
        "model": program.model,
        "parameters": program.facts["parameters"],
        "fixed_bytes": fixed_bytes(everything, len(elements), groups),
        "layers": list(layers.values()),
        "elements": elements,
    }


__all__ = [
    "activation_elements",
    "average_bits",
    "describe",
    "fixed_bytes",
    "macs",
    "stored_bytes",
    "stored_dtype",
    "weight_bytes",
    "weight_path",
]
