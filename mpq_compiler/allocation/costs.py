"""Costs of layers in each format: the part of a sensitivity table that needs no measuring."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from mpq_compiler import formats
from mpq_compiler.allocation import mixdq_groups
from mpq_compiler.ir.costs import (
    ACTIVATION_GROUP_BYTES,
    FLOAT_GROUP_BYTES,
    activation_elements,
    attention_costs,
    fixed_bytes,
    macs,
    weight_path,
)
from mpq_compiler.ir.edges import dynamic_edges, input_edge
from mpq_compiler.ir.findings import NO_LOSSES, SENSITIVITY, CostTable, FormatCosts, LayerCosts
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import PARAMETERS, TIME_GROUPS, Program, WeightPlan


def format_costs(shape: Sequence[int], name: str, operations: int, floating: bool = False) -> FormatCosts:
    """The costs of a weight in a format: bits as it is multiplied, bytes, those of a float branch or a float layer.

    Args:
        shape: of the weight.
        name: of the format.
        operations: multiply-accumulates of its layer.
        floating: whether activations are small floats, which float layers read like any other.
    """
    chosen = formats.get(name)
    found: FormatCosts = {"bits": chosen.operand_bits, "bytes": chosen.stored_bytes(*shape)}
    rows, columns = shape[0], math.prod(shape[1:])
    if branch := chosen.branch_elements(rows, columns):
        found["float_macs"] = operations // (rows * columns) * branch
    if not chosen.integer and not floating:
        found["float"] = True
    return found


def describe(program: Program, dynamic: bool = False, names: Iterable[str] = (), floating: bool = False) -> CostTable:
    """Fills in a sensitivity table, all but the losses.

    Args:
        program: calibrated and in float.
        dynamic: whether edges that only linear layers read have dynamic quantizers, which store no scales.
        names: formats besides the built-in and the measured ones.
        floating: whether activations are small floats: they have no zero points, and float layers read them, too.
    """
    known = program.facts.get(SENSITIVITY, NO_LOSSES)["weights"]
    measured = (name for losses in known.values() for name in losses)
    candidates = list(dict.fromkeys([*formats.FORMATS, *names, *measured]))
    everything, group_of = program.fork(), mixdq_groups.groups(program)
    layers: dict[str, LayerCosts] = {}
    operations = macs(program)
    for node in program.quantizable:
        path, weight = str(weight_path(node)), str(weight_of(node))
        everything.weights[path] = WeightPlan("int8")
        sizes = {f: format_costs(program.tensors[weight].shape, f, operations[node.name], floating) for f in candidates}
        costs: LayerCosts = {
            "name": path,
            "group": group_of[path],
            "weights": program.tensors[weight].numel(),
            "edges": [],
            "macs": 0,
            "formats": sizes,
        }
        layer = layers.setdefault(path, costs)
        layer["macs"] += operations[node.name]
        if (edge := input_edge(node).name) not in layer["edges"]:
            layer["edges"].append(edge)
    elements = activation_elements(program)
    static = len(elements) - (len(dynamic_edges(program, bool(program.attentions))) if dynamic else 0)
    groups, each = len(program.facts[TIME_GROUPS]) + 1, FLOAT_GROUP_BYTES if floating else ACTIVATION_GROUP_BYTES
    return {
        "version": 1,
        "model": program.model,
        "parameters": program.facts[PARAMETERS],
        "fixed_bytes": fixed_bytes(everything, each * static, groups),
        "layers": list(layers.values()),
        "elements": elements,
        "attention_costs": attention_costs(program),
    }


def least_bytes(program: Program, names: Sequence[str]) -> int:
    """The bytes of weights in the smallest of these formats, and of what stays float; scales of activations not.

    The program need not be calibrated: shapes decide.
    """
    everything, least = program.fork(), dict[str, int]()
    for node in program.quantizable:
        path, shape = str(weight_path(node)), program.tensors[str(weight_of(node))].shape
        everything.weights[path] = WeightPlan(names[0])
        least[path] = min(formats.get(name).stored_bytes(*shape) for name in names)
    return sum(least.values()) + fixed_bytes(everything, 0, 1)


def scale_bytes(program: Program, groups: int) -> int:
    """The bytes of integer quantizers of all edges that layers read, in so many time groups."""
    edges = {input_edge(node) for node in program.quantizable}
    return ACTIVATION_GROUP_BYTES * groups * len(edges) + 4 * (groups - 1)
