"""Folds fake quantizers into layers: from simulated to integer arithmetic."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from mpq_compiler.formats.contract import WeightTables, merge_branch
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import CONTRACTIONS, arguments, operand, prune
from mpq_compiler.ir.program import Program, Stage
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session

_SIMULATED = (ops.fake_quantize, ops.dynamic_fake_quantize)


@dataclass(frozen=True)
class FoldFakeQuant(Pass):
    """Layers between fake quantizers become packed operators on codes; base and branch become one table.

    Layers on small floats and on float activations stay what they are: float layers on the dequantized weight.

    Equal, bit for bit, to the program before executed in exact mode (docs/ir.md, "Exact arithmetic").

        %permute_default_q = mpq::fake_quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in_w         = mpq::dequantize_weight(.weight:{codes,scale,offset,lut}, shape=[32,3,3,3])
        %conv_in           = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:corrected, ...)
      =>
        %permute_default_q = mpq::quantize(%permute_default, :{scale,zero_point}, %g, bits=8)
        %conv_in           = mpq::quant_conv2d(%permute_default_q, %g, .weight:{codes,scale,offset,lut}, ...)
    """

    contract: ClassVar[Contract] = Contract.EXACT
    role: ClassVar[Role | None] = Role.PACKS
    decides_kernels: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"codes"})
    provides: ClassVar[frozenset[str]] = frozenset({"packed"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork(stage=Stage.PACKED)
        packed: dict[fx.Node, Codes] = {}
        for node in list(program.graph.nodes):
            if node.target in _SIMULATED and any(_reads_codes(user) for user in node.users):
                codes = _quantize(program.graph, node)
                packed[codes.codes] = codes
            elif _is_layer(node):
                self._fold(program, node, packed[operand(node, 0)])
            elif _is_branched(node):
                _merge(program, node)
            elif node.target is ops.fake_quantize_attention:
                _fold_attention(program.graph, node, [packed[operand(node, i)] for i in range(3)])
        prune(program.graph)
        return program

    def _fold(self, program: Program, call: fx.Node, x: Codes) -> None:
        graph, weight = program.graph, operand(call, 1)
        bias, *geometry = arguments(call)[2:] or (None,)
        with graph.inserting_before(call):
            codes, tables, shape = _tables(program, weight)
            channels = list(tables.segments or shape[-1:])
            scales, zeros = [x.scale] * len(channels), [x.zero_point] * len(channels)
            common = (x.codes, x.group, codes, *tables.operands, scales, zeros, bias)
            if call.target is ops.conv2d:
                stride, padding, *_ = geometry
                window = (list(shape[1:3]), list(stride), list(padding))
                new = graph.call_function(ops.quant_conv2d, (*common, channels, *window))
            else:
                new = graph.call_function(ops.quant_linear, (*common, channels))
        _replace(graph, call, new)


@dataclass(frozen=True)
class Codes:
    """A quantized tensor of the packed graph; without a group, scale and zero point are per row."""

    codes: fx.Node
    scale: fx.Node
    zero_point: fx.Node
    group: fx.Node | None


def _quantize(graph: fx.Graph, x: fx.Node) -> Codes:
    """Quantizes a fake-quantized tensor to codes for the layers that read it; other readers keep the tensor."""
    with graph.inserting_before(x):
        if x.target is ops.fake_quantize:
            made = graph.call_function(ops.quantize, x.args)
            _, scale, zero, group, _ = arguments(x)
            found = Codes(made, scale, zero, group)
        else:
            made = graph.call_function(ops.dynamic_quantize, x.args)
            parts = [graph.call_function(operator.getitem, (made, i)) for i in range(3)]
            for part, name in zip(parts, ("codes", "scale", "zero"), strict=True):
                part.name = f"{x.name}_{name}"
            found = Codes(parts[0], parts[1], parts[2], None)
    x.replace_all_uses_with(found.codes, delete_user_cb=_reads_codes)
    if not x.users:
        _replace(graph, x, made)
    return found


def _replace(graph: fx.Graph, old: fx.Node, new: fx.Node) -> None:
    """Replaces ``old`` by ``new``, which takes its name."""
    old.replace_all_uses_with(new)
    name = old.name
    graph.erase_node(old)
    new.name = name


def _is_layer(node: fx.Node) -> bool:
    if node.op != "call_function" or node.target not in (ops.conv2d, aten.linear.default):
        return False
    x, weight = views.made_by(node.args[0]), node.args[1]
    quantized = isinstance(x, fx.Node) and x.target in (*_SIMULATED, ops.quantize, ops.dynamic_quantize)
    rounded = (ops.dequantize_weight, aten.add.Tensor)
    return quantized and isinstance(weight, fx.Node) and weight.op == "call_function" and weight.target in rounded


def _is_branched(node: fx.Node) -> bool:
    """Whether the node is a weight with base and branch that float layers read."""
    return (
        node.target is aten.add.Tensor
        and isinstance(node.args[1], fx.Node)
        and node.args[1].target is ops.binary_branch
        and any(user.target in CONTRACTIONS and not _is_layer(user) for user in node.users)
    )


def _merge(program: Program, weight: fx.Node) -> None:
    """Merges base and branch of a weight into one table."""
    with program.graph.inserting_before(weight):
        codes, tables, shape = _tables(program, weight)
        segments = () if tables.segments is None else (tables.segments,)
        new = program.graph.call_function(ops.dequantize_weight, (codes, *tables.operands, shape, *segments))
    _replace(program.graph, weight, new)


def _reads_codes(node: fx.Node) -> bool:
    return node.target is ops.fake_quantize_attention or _is_layer(node)


def _fold_attention(graph: fx.Graph, call: fx.Node, operands: list[Codes]) -> None:
    _, _, _, group, p_scale, p_zero, *rest = arguments(call)
    tables = [t for x in operands for t in (x.scale, x.zero_point)]
    with graph.inserting_before(call):
        codes = (x.codes for x in operands)
        new = graph.call_function(ops.quant_attention, (*codes, group, *tables, p_scale, p_zero, *rest))
    _replace(graph, call, new)


def _tables(program: Program, weight: fx.Node) -> tuple[fx.Node, WeightTables[fx.Node], tuple[int, ...]]:
    """The codes, tables and shape of a settled weight, with its branch merged."""
    is_plain = weight.target is ops.dequantize_weight
    codes, scale, offset, lut, row_class, shape, *segments = arguments(weight if is_plain else operand(weight, 0))
    tables = WeightTables(scale, offset, lut, row_class, *segments)
    if is_plain:
        return codes, tables, shape
    signs, _, alpha, _ = arguments(operand(weight, 1))
    stored = [program.tensors[str(n.target)] for n in (codes, lut, signs, alpha)]
    path = str(codes.target).split(":")[0]
    merged = merge_branch(*stored)
    names = [program.tensors.add(f"{path}:{n}", t) for n, t in zip(("codes", "lut"), merged, strict=True)]
    new_codes, new_lut = (program.graph.get_attr(n) for n in names)
    return new_codes, tables._replace(lut=new_lut), shape
