"""From simulated to integer arithmetic."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from mpq_compiler import ops
from mpq_compiler.aten import aten
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program, Stage, arguments, operand, prune


@dataclass(frozen=True)
class FoldFakeQuant(Pass):
    """Layers between fake quantizers become packed operators on codes; base and branch become one table.

    Equal, bit for bit, to the program before executed in exact mode (docs/ir.md, "Exact arithmetic").

        %permute_default_q = mpq::fake_quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in_w         = mpq::dequantize_weight(.weight:{codes,scale,offset,lut}, shape=[32,3,3,3])
        %conv_in           = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:corrected, ...)
      =>
        %permute_default_q = mpq::quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in           = mpq::quant_conv2d(%permute_default_q, %g, .weight:{codes,scale,offset,lut}, ...)
    """

    contract: ClassVar[Contract] = Contract.EXACT
    requires: ClassVar[frozenset[str]] = frozenset({"codes"})
    provides: ClassVar[frozenset[str]] = frozenset({"packed"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.PACKED)
        for node in list(program.graph.nodes):
            if _is_layer(node):
                self._fold(program, node)
        prune(program.graph)
        return program

    def _fold(self, program: Program, call: fx.Node) -> None:
        graph = program.graph
        x, weight = operand(call, 0), operand(call, 1)
        bias, *geometry = arguments(call)[2:] or (None,)
        _, act_scale, act_zero, group, _ = arguments(x)
        if x.target is ops.fake_quantize:
            _quantize_for_layers(graph, x)
        with graph.inserting_before(call):
            codes, scale, offset, lut, row_class, shape = _table(program, weight)
            common = (call.args[0], group, codes, scale, offset, lut, row_class, [act_scale], [act_zero], bias)
            if call.target is ops.conv2d:
                stride, padding, *_ = geometry
                window = (list(shape[1:3]), list(stride), list(padding))
                new = graph.call_function(ops.quant_conv2d, (*common, [shape[3]], *window))
            else:
                new = graph.call_function(ops.quant_linear, (*common, [shape[1]]))
        call.replace_all_uses_with(new)
        name = call.name
        graph.erase_node(call)
        new.name = name


def _quantize_for_layers(graph: fx.Graph, x: fx.Node) -> None:
    """Every layer that reads the fake-quantized tensor reads its codes instead; other readers keep the tensor."""
    with graph.inserting_before(x):
        codes = graph.call_function(ops.quantize, x.args)
    x.replace_all_uses_with(codes, delete_user_cb=_is_layer)
    name = x.name
    if not x.users:
        graph.erase_node(x)
        codes.name = name


def _is_layer(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (ops.conv2d, aten.linear.default):
        return False
    x, weight = node.args[0], node.args[1]
    quantized = isinstance(x, fx.Node) and x.target in (ops.fake_quantize, ops.quantize)
    rounded = (ops.dequantize_weight, aten.add.Tensor)
    return quantized and isinstance(weight, fx.Node) and weight.op == "call_function" and weight.target in rounded


def _table(program: Program, weight: fx.Node) -> tuple[Any, ...]:
    """codes, scale, offset, lut, row_class and shape of a settled weight, its branch merged."""
    if weight.target is ops.dequantize_weight:
        return arguments(weight)
    codes, scale, offset, lut, row_class, shape = arguments(operand(weight, 0))
    signs, _, alpha, _ = arguments(operand(weight, 1))
    stored = [program.tensors[str(n.target)] for n in (codes, lut, signs, alpha)]
    path = str(codes.target).split(":")[0]
    merged = ops.merge_branch(*stored)
    names = [program.tensors.add(f"{path}:{n}", t) for n, t in zip(("codes", "lut"), merged, strict=True)]
    new_codes, new_lut = (program.graph.get_attr(n) for n in names)
    return new_codes, scale, offset, new_lut, row_class, shape
