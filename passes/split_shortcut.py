"""Splits layers that read a concatenation along channels into sums of layers that read its parts."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import fx

from mpq_compiler.ir import ops, provenance
from mpq_compiler.ir.aten import aten, is_movement, is_pointwise
from mpq_compiler.ir.graph import arguments, function_of, merge_equal, operand, prune, weight_of
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.weight_basis import Part, record
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session

CONCATENATIONS = (aten.cat.default, aten.concat.default)
NORMS = (ops.group_norm, aten.layer_norm.default, ops.rms_norm)
"""The norms, which leave channels in their places; a norm itself is over the whole concatenation."""


@dataclass(frozen=True)
class SplitShortcut(Pass):
    """Gives each part of a concatenation its own quantizers: conv(cat(a, b)) becomes conv_a(a) + conv_b(b).

    A UNet's shortcuts have other ranges than what they are joined with, and one scale for both wastes levels on one of
    them (Q-Diffusion, arXiv 2302.04304, section 3.3; MixDQ splits the same layers). Each part has a weight of its own,
    hence its own format, scales and activation edge; the bias stays with the first. Where norms or pointwise calls
    stand between concatenation and layer, the parts are slices of what the layer read.

        %up_blocks_0_resnets_0_conv_shortcut = mpq::conv2d(%up_blocks_0_cat, .weight:ohwi, .bias, ...)
      =>
        %up_blocks_0_resnets_0_conv_shortcut_part0 = mpq::conv2d(%mid_block_resnets_1_add_1, .weight:ohwi, ...)
        %up_blocks_0_resnets_0_conv_shortcut_part1 = mpq::conv2d(%down_blocks_1_attentions_0_add, .weight:ohwi, ...)
        %up_blocks_0_resnets_0_conv_shortcut       = aten.add(%up_blocks_0_resnets_0_conv_shortcut_part0, ...)
    """

    contract: ClassVar[Contract] = Contract.REWRITE
    role: ClassVar[Role | None] = Role.REWRITES
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    channels: int = 16
    """Least channels of a part: layers stay whole where one would have fewer."""

    def __post_init__(self) -> None:
        self.require("channels", 1)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        sizes = shapes(program, 2)
        sites: dict[str, list[tuple[fx.Node, tuple[int, ...]]]] = {}
        for node in program.quantizable:
            sites.setdefault(str(weight_of(node)), []).append((node, self._widths(node, sizes)))
        parts: dict[fx.Node, list[fx.Node]] = {}
        for weight, found in sites.items():
            widths = found[0][1]
            if widths and all(other == widths for _, other in found):  # a shared weight is stored in one form
                names = _split_weight(program, weight, widths)
                for name, width, end in zip(names, widths, itertools.accumulate(widths), strict=True):
                    whole, part = (n.split(":")[0] for n in (weight, name))
                    record(program, part, Part(end - width, end), origin=whole)
                    provenance.note(program, part, self.name(), part_of=whole, channels_until=end)
                for node, _ in found:
                    x = operand(node, 0)
                    if x not in parts:
                        parts[x] = _parts(program.graph, x, widths, sizes[x.name].dim() - 1)
                    _split(program, node, names, parts[x])
        merge_equal(program.graph)  # a shared weight is one node, by which `sensitivity` replaces it
        prune(program.graph)
        return program

    def _widths(self, node: fx.Node, sizes: dict[str, Any]) -> tuple[int, ...]:
        """The channel counts of the parts that a call reads side by side; empty where it stays whole."""
        joined = concatenation(operand(node, 0), sizes)
        if joined is None:
            return ()
        parts = list(arguments(joined)[0])
        widths = tuple(int(sizes[p.name].shape[-1]) for p in parts)
        # The halves of a sinusoidal embedding, say, are one tensor in two forms, and have one range.
        several = len({_source(p, sizes) for p in parts}) > 1
        return widths if several and min(widths) >= self.channels else ()


def concatenation(x: fx.Node, sizes: dict[str, Any]) -> fx.Node | None:
    """The concatenation whose operands lie side by side in the channels of ``x``; None where there is none."""
    node: fx.Node | None = x
    while node is not None:
        if node.target in CONCATENATIONS:
            dim = int(arguments(node)[1]) if len(node.args) > 1 else 0
            return node if dim % sizes[node.name].dim() == sizes[node.name].dim() - 1 else None
        node = _carrier(node, sizes)
    return None


def _carrier(node: fx.Node, sizes: dict[str, Any]) -> fx.Node | None:
    """The one operand whose channels are the channels of the call, or None."""
    if node.op != "call_function":
        return None
    if node.target in NORMS or is_movement(node):
        source = operand(node, 0)
        same = sizes[source.name].shape[-1:] == sizes[node.name].shape[-1:]
        return source if same and node.target is not aten.permute.default else None
    if is_pointwise(node):
        whole = [n for n in node.all_input_nodes if sizes[n.name].numel() == sizes[node.name].numel()]
        return whole[0] if len(whole) == 1 else None
    return None


def _source(node: fx.Node, sizes: dict[str, Any]) -> fx.Node:
    """The tensor whose values, or a slice of them, the node holds in some form."""
    while True:
        before = operand(node, 0) if node.target is aten.slice.Tensor else _carrier(node, sizes)
        if before is None:
            return node
        node = before


def _split_weight(program: Program, weight: str, widths: tuple[int, ...]) -> list[str]:
    """Stores the parts of a weight as parameters of modules named ``..._part0``, ``..._part1``; returns their names."""
    path, colon, layout = weight.partition(":")
    module, _, leaf = path.rpartition(".")
    names = []
    for i, part in enumerate(program.tensors[weight].split(widths, dim=-1)):
        part = part.contiguous()
        own = program.tensors.add(f"{module}_part{i}.{leaf}", part.permute(0, 3, 1, 2) if colon else part)
        names.append(program.tensors.add(f"{own}:{layout}", part) if colon else own)
    return names


def _split(program: Program, node: fx.Node, weights: list[str], parts: list[fx.Node]) -> None:
    """Replaces a call by the sum of calls on the parts; the sum has its value and takes its name."""
    graph = program.graph
    total: fx.Node | None = None
    with graph.inserting_before(node):
        for i, (weight, part) in enumerate(zip(weights, parts, strict=True)):
            rest, named = list(arguments(node)[2:]), dict(node.kwargs)
            if i and rest:
                rest[:1] = [None] if len(rest) > 1 else []
            elif i:
                named.pop("bias", None)
            call = graph.call_function(function_of(node), (part, graph.get_attr(weight), *rest), named)
            call.name = f"{node.name}_part{i}"
            total = call if total is None else graph.call_function(aten.add.Tensor, (total, call))
    assert total is not None
    node.replace_all_uses_with(total)
    name = node.name
    graph.erase_node(node)
    total.name = name


def _parts(graph: fx.Graph, x: fx.Node, widths: tuple[int, ...], dim: int) -> list[fx.Node]:
    """The tensors side by side along ``dim`` of ``x``: the operands of a concatenation, else slices."""
    if x.target in CONCATENATIONS:
        return list(arguments(x)[0])
    found = []
    with graph.inserting_before(x.next):
        for i, end in enumerate(itertools.accumulate(widths)):
            part = graph.call_function(aten.slice.Tensor, (x, dim, end - widths[i], end))
            part.name = f"{x.name}_part{i}"
            found.append(part)
    return found
