"""Inserts explicit quantizers into the float graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mpq_compiler import formats
from mpq_compiler.formats import base, floating
from mpq_compiler.ir import ops
from mpq_compiler.ir.costs import stored_dtype, weight_path
from mpq_compiler.ir.edges import attention_arguments, attention_edges, input_edge
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.graph import function_of, operand, softmax, weight_of
from mpq_compiler.ir.program import BOUNDARIES, PLANNED, ActivationPlan, Program, Stage
from mpq_compiler.pipeline.demand import Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.settle import attributes


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Writes the plan into the graph as differentiable quantizers, and rounds float leftovers to their stored type.

    One quantizer a tensor edge, whoever reads it; one a weight, with the scales of the min-max range until a later pass
    sets better ones. Layers whose format is no table of integers keep reading the float activation, unless that is
    planned as small floats, and so do layers whose activation has no plan. Biases, norms and embeddings are read from
    f16 from here on; attentions and such layers have the numerics that were chosen for them.

        %conv_in           = mpq::conv2d(%permute_default, .weight:ohwi, .bias, ...)
      =>
        %g                 = mpq::time_group(%timestep, time_groups.boundaries)
        %permute_default_q = mpq::fake_quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in_w         = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
        %conv_in           = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:f16, ...)
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    role: ClassVar[Role | None] = Role.SIMULATES
    decides_kernels: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"fake-quant"})

    def demand(self, asked: Asked) -> Demand:
        sizes = asked.sizes
        return Demand(traffic=50 * sizes.numbers, shared=8 * sizes.largest, serial=True)

    def run(self, program: Program, session: Session) -> Program:
        before = program
        program = program.fork(stage=Stage.FAKE_QUANTIZED)
        program.facts[PLANNED] = before
        calls = [n for n in program.quantizable if weight_path(n) in program.weights]
        static = any(not plan.dynamic for plan in program.activations.values())
        group = _insert_time_group(program) if static else None
        quantized: dict[fx.Node, fx.Node] = {}
        rounded: dict[str, fx.Node] = {}
        for call in calls:
            edge, name = input_edge(call), str(weight_of(call))
            planned = formats.get(program.weights[str(weight_path(call))].format)
            if name not in rounded:
                rounded[name] = _insert_levels(program, call, planned)
            call.update_arg(1, rounded[name])
            if edge.name in program.activations and (planned.integer or program.reads_floats(call)):
                if edge not in quantized:
                    quantized[edge] = _insert_quantizer(program, edge, group)
                call.update_arg(0, quantized[edge])
        for call in [n for n in program.attentions if softmax(n.name) in program.activations]:
            for edge in attention_edges(call):
                if edge not in quantized:
                    quantized[edge] = _insert_quantizer(program, edge, group)
            _quantize_attention(program, call, quantized, group)
        for call in [*program.attentions, *calls]:
            if (kind := program.facts.get(ATTENTION_NUMERICS, {}).get(call.name)) is not None:
                call.target = ops.NUMERICAL.get(function_of(call), call.target)
                call.kwargs = {**call.kwargs, "numerics": kind}
        self._store_leftovers(program, rounded)
        return program

    def _store_leftovers(self, program: Program, quantized: dict[str, fx.Node]) -> None:
        floats = {str(n.target) for n in program.facts[PLANNED].graph.nodes if n.op == "get_attr"}
        for node in [n for n in program.graph.nodes if n.op == "get_attr"]:
            name = str(node.target)
            if name in quantized:
                others = [user for user in node.users if user is not quantized[name]]
                if not others:
                    continue
                with program.graph.inserting_after(node):
                    own = program.graph.get_attr(name)
                for user in others:
                    user.replace_input_with(node, own)
                node = own
            tensor = program.tensors[name]
            kind = stored_dtype(name, tensor)
            # what the model has in half precision was a float to it like all others, and is named like them
            if kind != (program.tensors.meta(name).dtype if name in floats else tensor.dtype):
                node.target = program.tensors.add(f"{name}:f16", tensor.to(kind))
            elif kind == torch.float32 and not name.startswith(("constant.", "time_groups.")):
                program.fallbacks[name] = "values beyond the range of f16, stored as f32"


def _insert_time_group(program: Program) -> fx.Node:
    timestep = next(n for n in program.graph.nodes if n.op == "placeholder" and n.target == "timestep")
    last = [n for n in program.graph.nodes if n.op == "placeholder"][-1]
    with program.graph.inserting_after(last):
        boundaries = program.graph.get_attr(BOUNDARIES)
    with program.graph.inserting_after(boundaries):
        group = program.graph.call_function(ops.time_group, (timestep, boundaries))
    group.name = "g"
    return group


def _insert_levels(program: Program, call: fx.Node, planned: base.Format) -> fx.Node:
    """Inserts the quantizer of a call's weight, at the levels from which its format starts."""
    graph, weight, prefix = program.graph, operand(call, 1), f"{weight_path(call)}:range."
    start = planned.start(program.tensors.read(str(weight.target)))
    with graph.inserting_before(call):
        if isinstance(start, floating.Float8Weight):
            scale = attributes(program, prefix, scale=start.scale)
            new = graph.call_function(ops.fake_quantize_float8, (weight, *scale, start.exponent))
        else:
            assert isinstance(start, base.QuantizedWeight)
            parts = attributes(
                program, prefix, scale=start.scale, offset=start.offset, lut=start.lut, row_class=start.row_class
            )
            segments = [list(start.segments)] if start.segments else []
            new = graph.call_function(ops.fake_quantize_weight, (weight, *parts, *segments))
    new.name = f"{call.name}_w"
    return new


def _insert_quantizer(program: Program, edge: fx.Node, group: fx.Node | None) -> fx.Node:
    plan, graph = program.activations[edge.name], program.graph
    place = edge
    if edge.op == "placeholder":
        place = group or [n for n in graph.nodes if n.op == "placeholder"][-1]
    if plan.dynamic:
        with graph.inserting_after(place):
            new = graph.call_function(ops.dynamic_fake_quantize, (edge, plan.bits))
    elif plan.exponent is not None:
        with graph.inserting_after(place):
            scale = graph.get_attr(str(plan.scale))
        with graph.inserting_after(scale):
            new = graph.call_function(ops.fake_quantize_float, (edge, scale, group, plan.exponent, plan.bits))
    else:
        scale, zero = _tables(program, plan, place)
        with graph.inserting_after(zero):
            new = graph.call_function(ops.fake_quantize, (edge, scale, zero, group, plan.bits))
    new.name = f"{edge.name}_q"
    return new


def _tables(program: Program, plan: ActivationPlan, place: fx.Node) -> tuple[fx.Node, fx.Node]:
    """Inserts the reads of a static plan's scale and zero point behind ``place``."""
    with program.graph.inserting_after(place):
        zero = program.graph.get_attr(str(plan.zero_point))
    with program.graph.inserting_after(place):
        scale = program.graph.get_attr(str(plan.scale))
    return scale, zero


def _quantize_attention(
    program: Program, call: fx.Node, quantized: dict[fx.Node, fx.Node], group: fx.Node | None
) -> None:
    """Replaces an attention by one on quantized operands, with quantized probabilities."""
    plan = program.activations[softmax(call.name)]
    q, k, v = (quantized[operand(call, i)] for i in range(3))
    scale, zero = _tables(program, plan, call.prev)
    with program.graph.inserting_before(call):
        arguments = (q, k, v, group, scale, zero, *attention_arguments(call.args), plan.bits)
        new = program.graph.call_function(ops.fake_quantize_attention, arguments)
    call.replace_all_uses_with(new)
    name = call.name
    program.graph.erase_node(call)
    new.name = name
