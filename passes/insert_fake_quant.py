"""Explicit quantizers in the float graph."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import fx

from mpq_compiler import formats, ops
from mpq_compiler.calibration import input_edge
from mpq_compiler.costs import stored_dtype, weight_path
from mpq_compiler.fitting import rows_of
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.formats.uniform import UniformFormat
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.passes.time_groups import BOUNDARIES
from mpq_compiler.program import Program, Stage, weight_of


@dataclass(frozen=True)
class InsertFakeQuant(Pass):
    """Writes the plan into the graph as differentiable quantizers, and rounds float leftovers to their stored type.

    One quantizer a tensor edge, whoever reads it; one a weight, with the scales of the min-max range until a later pass
    sets better ones. Biases, norms and embeddings are read from f16 from here on.

        %conv_in           = mpq::conv2d(%permute_default, .weight:ohwi, .bias, ...)
      =>
        %g                 = mpq::time_group(%timestep, time_groups.boundaries)
        %permute_default_q = mpq::fake_quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in_w         = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
        %conv_in           = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:f16, ...)
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    requires: ClassVar[frozenset[str]] = frozenset({"plan"})
    provides: ClassVar[frozenset[str]] = frozenset({"fake-quant"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.FAKE_QUANTIZED)
        graph = program.graph
        calls = [n for n in program.quantizable if weight_path(n) in program.weights]
        weights = {str(weight_of(n)): self._add_parameters(program, n) for n in calls}
        group = _insert_time_group(program)
        quantized: dict[fx.Node, fx.Node] = {}
        rounded: dict[str, fx.Node] = {}
        for call in calls:
            edge, weight, name = input_edge(call), call.args[1], str(weight_of(call))
            if edge not in quantized:
                quantized[edge] = _insert_quantizer(program, edge, group)
            if name not in rounded:
                with graph.inserting_before(call):
                    parameters = [p if p is None else graph.get_attr(p) for p in weights[name]]
                    rounded[name] = graph.call_function(ops.fake_quantize_weight, (weight, *parameters, None))
                    rounded[name].name = f"{call.name}_w"
            call.update_arg(0, quantized[edge])
            call.update_arg(1, rounded[name])
        self._store_leftovers(program, set(weights))
        return program

    def _add_parameters(self, program: Program, call: fx.Node) -> tuple[str, str | None, str | None]:
        """Store names of scale, offset and table of the planned format's (for a residual: its base's) min-max range."""
        path = str(weight_path(call))
        planned = formats.get(program.weights[path].format)
        if isinstance(planned, ResidualFormat):
            planned = UniformFormat("base", planned.base_bits)
        assert isinstance(planned, UniformFormat)
        scale, offset = planned.range_parameters(rows_of(program, str(weight_of(call))))
        add = program.tensors.add
        return (
            add(f"{path}:range.scale", scale),
            None if offset is None else add(f"{path}:range.offset", offset),
            None if planned.table is None else add(f"{path}:range.lut", planned.table),
        )

    def _store_leftovers(self, program: Program, weights: set[str]) -> None:
        for node in program.graph.nodes:
            name = str(node.target)
            if node.op != "get_attr" or name in weights:
                continue
            tensor = program.tensors[name]
            kind = stored_dtype(name, tensor)
            if kind != tensor.dtype:
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


def _insert_quantizer(program: Program, edge: fx.Node, group: fx.Node) -> fx.Node:
    plan = program.activations[edge.name]
    place = group if edge.op == "placeholder" else edge
    with program.graph.inserting_after(place):
        zero = program.graph.get_attr(plan.zero_point)
    with program.graph.inserting_after(place):
        scale = program.graph.get_attr(plan.scale)
    with program.graph.inserting_after(zero):
        new = program.graph.call_function(ops.fake_quantize, (edge, scale, zero, group, plan.bits))
    new.name = f"{edge.name}_q"
    return new
