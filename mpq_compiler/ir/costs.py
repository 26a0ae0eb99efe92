"""The costs of a plan: stored bytes, true average bits, operations; allocator, packer and report share them."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.formats.base import F16_MAX
from mpq_compiler.ir.edges import attention_edges, input_edge
from mpq_compiler.ir.graph import operand, softmax, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.targets.numerics import FLOAT_BITS, layer_bops

ACTIVATION_GROUP_BYTES = 3
"""The stored bytes of a time group of an integer quantizer: an f16 scale and a u8 zero point."""
FLOAT_GROUP_BYTES = 2
"""The stored bytes of a time group of a small-float quantizer: the f16 scale alone."""


def weight_path(node: fx.Node) -> str | None:
    """The name in the model of a quantizable call's weight, in whichever layout the graph reads it; None elsewhere."""
    name = weight_of(node)
    return None if name is None else name.split(":")[0]


def stored_dtype(name: str, tensor: Tensor) -> torch.dtype:
    """The type in which a float leftover is stored: f16, or f32 for computed constants and values that overflow f16."""
    if not tensor.is_floating_point() or tensor.dtype == torch.float16:
        return tensor.dtype
    if name.startswith(("constant.", "time_groups.")) or float(tensor.abs().max() if tensor.numel() else 0) > F16_MAX:
        return torch.float32
    return torch.float16


def leftovers(program: Program) -> dict[str, Tensor]:
    """The tensors, by store name, that no weight plan covers or that calls other than layers read."""
    layers = {n for n in program.quantizable if weight_path(n) in program.weights}
    weights = {operand(n, 1) for n in layers}
    read = (n for n in program.graph.nodes if n.op == "get_attr" and not (n in weights and layers.issuperset(n.users)))
    return {name: program.tensors[name] for name in sorted({str(n.target) for n in read})}


def fixed_bytes(program: Program, group_bytes: int, groups: int) -> int:
    """The bytes that do not depend on the allocation: float leftovers, activation scales, time-group boundaries.

    Args:
        program: in the planned stage, with weight plans for all weights that will be quantized.
        group_bytes: stored bytes of one time group of all activations together.
        groups: the number of time groups.
    """
    floats = sum(t.numel() * stored_dtype(n, t).itemsize for n, t in leftovers(program).items())
    return floats + group_bytes * groups + (4 * (groups - 1) if group_bytes else 0)


def weight_bytes(program: Program, name: str, format_name: str) -> int:
    """The stored bytes of a weight (by store name) in a format."""
    return formats.get(format_name).stored_bytes(*program.tensors[name].shape)


def stored_bytes(program: Program) -> int:
    """The payload bytes of a planned program's artifact: exactly the tensors in weights.safetensors."""
    names = {str(weight_of(n)): program.weights[str(weight_path(n))].format for n in program.quantizable}
    weights = sum(weight_bytes(program, name, fmt) for name, fmt in names.items())
    groups = len(program.facts[TIME_GROUPS]) + 1
    return weights + fixed_bytes(program, sum(p.group_bytes for p in program.activations.values()), groups)


def average_bits(stored: int, parameters: int) -> float:
    """The true average bits: all stored bits over the number of the model's parameters."""
    return 8 * stored / parameters


def macs(program: Program, batch: int = 1) -> dict[str, int]:
    """The multiply-accumulates per sample of each quantizable call."""
    sizes = shapes(program, batch)
    found = {}
    for node in program.quantizable:
        weight = sizes[operand(node, 1).name].shape
        found[node.name] = sizes[node.name].numel() // batch * math.prod(weight[1:])
    return found


def bops(program: Program) -> tuple[int, int]:
    """The bit operations per sample of a planned program's layers and attentions, and those of all of it in float.

    An allocation's cost ``bops`` is the same sum over what it chooses for.
    """
    planned, unquantized, sizes = 0, 0, macs(program)
    for node in program.quantizable:
        operations, chosen = sizes[node.name], formats.get(program.weights[str(weight_path(node))].format)
        shape = program.tensors[str(weight_of(node))].shape
        rows, columns = shape[0], math.prod(shape[1:])
        read = program.activations.get(input_edge(node).name)
        bits = read.bits if read is not None and (chosen.integer or read.exponent is not None) else FLOAT_BITS
        branch = operations // (rows * columns) * chosen.branch_elements(rows, columns)
        planned += layer_bops(operations, chosen.operand_bits, bits, branch)
        unquantized += layer_bops(operations, FLOAT_BITS, FLOAT_BITS)
    for name, cost in attention_costs(program).items():
        read = program.activations.get(softmax(name))
        bits = FLOAT_BITS if read is None else read.bits
        planned += int(cost["macs"]) * bits * bits
        unquantized += int(cost["macs"]) * FLOAT_BITS * FLOAT_BITS
    return planned, unquantized


def activation_elements(program: Program) -> dict[str, int]:
    """The number of elements per sample of each tensor edge that a quantizable call reads."""
    sizes = shapes(program, 1)
    return {e.name: sizes[e.name].numel() for e in (input_edge(n) for n in program.quantizable)}


def attention_costs(program: Program) -> dict[str, dict[str, float]]:
    """The costs that each attention call adds if it is quantized: ``macs``, ``elements``, and ``bytes`` of its scales.

    Its elements are the probabilities, and those of q, k and v that no layer reads, divided among the attentions that
    read them.
    """
    sizes, layers = shapes(program, 1), {input_edge(n) for n in program.quantizable}
    groups = len(program.facts[TIME_GROUPS]) + 1
    readers: dict[fx.Node, int] = {}
    for node in program.attentions:
        for edge in attention_edges(node):
            readers[edge] = readers.get(edge, 0) + 1
    found = {}
    for node in program.attentions:
        own = [e for e in attention_edges(node) if e not in layers]
        (_, queries, width), keys = sizes[operand(node, 0).name].shape, sizes[operand(node, 1).name].shape[1]
        found[node.name] = {
            "macs": 2 * queries * keys * width,
            "elements": node.args[3] * queries * keys + sum(sizes[e.name].numel() / readers[e] for e in own),
            "bytes": (len(own) + 1) * groups * ACTIVATION_GROUP_BYTES,
        }
    return found


def activation_bits(program: Program) -> float:
    """The average bits of a planned program's activations; an attention listed as a float leftover counts 32."""
    elements: dict[str, float] = dict(activation_elements(program))
    bits = {edge: plan.bits for edge, plan in program.activations.items()}
    for name, cost in attention_costs(program).items():
        if softmax(name) in bits or name in program.fallbacks:
            elements[softmax(name)] = cost["elements"]
            bits.setdefault(softmax(name), FLOAT_BITS)
    planned = {edge: count for edge, count in elements.items() if edge in bits}
    if not planned:
        return FLOAT_BITS
    return sum(bits[edge] * count for edge, count in planned.items()) / sum(planned.values())
