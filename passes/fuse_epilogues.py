"""Fuses pointwise calls into the kernel that produces their operand."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor, fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten, is_pointwise
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session

ANCHORS: dict[Callable[..., Any], str] = {
    ops.quant_linear: "quant_linear",
    ops.quant_conv2d: "quant_conv2d",
    aten.linear.default: "linear",
    ops.linear: "linear",
    ops.conv2d: "conv2d",
    ops.group_norm: "group_norm",
    aten.layer_norm.default: "layer_norm",
    ops.rms_norm: "rms_norm",
    ops.hadamard: "hadamard",
    ops.attention: "attention",
}
"""The operators whose kernels take an epilogue, and the first part of their regions' names."""


@dataclass(frozen=True)
class FuseEpilogues(Pass):
    """Groups an operator with the pointwise calls behind it into a region: one kernel, one pass over memory.

    A call joins while it is the only reader of the value and keeps its shape; the region stands where its last call
    stood. A quantizer ends the region, which then yields codes. Pointwise calls without such an operator are grouped
    among themselves. `reference` runs the region's graph, backends match it by its first call.

        %mid_block_resnets_0_norm1               = mpq::group_norm(%down_blocks_1_attentions_0_add, ...)
        %mid_block_resnets_0_nonlinearity_silu   = aten.silu(%mid_block_resnets_0_norm1)
        %mid_block_resnets_0_nonlinearity_silu_q = mpq::quantize(%mid_block_resnets_0_nonlinearity_silu, ...)
      =>
        %mid_block_resnets_0_nonlinearity_silu_q   = group_norm[silu, quantize] {  ...
          %mid_block_resnets_0_norm1               = mpq::group_norm(%down_blocks_1_attentions_0_add, ...)
          %mid_block_resnets_0_nonlinearity_silu   = aten.silu(%mid_block_resnets_0_norm1)
          %mid_block_resnets_0_nonlinearity_silu_q = mpq::quantize(%mid_block_resnets_0_nonlinearity_silu, ...)
        }
    """

    contract: ClassVar[Contract] = Contract.EXACT
    role: ClassVar[Role | None] = Role.PACKS
    decides_kernels: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"packed"})
    provides: ClassVar[frozenset[str]] = frozenset({"regions"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        sizes = shapes(program, 2)
        taken: set[fx.Node] = set()
        for node in list(program.graph.nodes):
            if node.op != "call_function" or node in taken:
                continue
            kind = ANCHORS.get(node.target) or ("pointwise" if is_pointwise(node) else None)
            if kind is None:
                continue
            members = _chain(node, sizes)
            if len(members) > 1:
                taken.update(members)
                _make_region(program, kind, members)
        return program


def _chain(anchor: fx.Node, sizes: dict[str, Any]) -> list[fx.Node]:
    """The anchor and the calls that join it, in order."""
    members = [anchor]
    while len(members[-1].users) == 1:
        last = members[-1]
        (user,) = last.users
        if not (is_pointwise(user) or user.target is ops.quantize or _keeps_rows(user, sizes)):
            break
        if user.args[0] is not last and user.target in (ops.quantize, aten.reshape.default):
            break
        before, after = sizes[last.name], sizes[user.name]
        if before.numel() != after.numel() or before.shape[-1] != after.shape[-1]:
            break
        members.append(user)
        if user.target is ops.quantize:
            break
    while len(members) > 1 and members[-1].target is aten.reshape.default:
        members.pop()
    return members


def _keeps_rows(node: fx.Node, sizes: dict[str, Any]) -> bool:
    """Whether the node is a reshape that leaves the last dimension alone, and thus the rows."""
    if node.target is not aten.reshape.default:
        return False
    source: Tensor = sizes[operand(node, 0).name]
    return source.shape[-1] == sizes[node.name].shape[-1] and source.dim() > 1


def _make_region(program: Program, kind: str, members: list[fx.Node]) -> None:
    inside = set(members)
    outer: list[fx.Node] = []
    for member in members:
        outer += [n for n in member.all_input_nodes if n not in inside and n not in outer]
    region = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for n in outer:
        env[n] = region.placeholder(n.name)
        env[n].name = n.name
    for member in members:
        env[member] = region.node_copy(member, env.__getitem__)
        env[member].name = member.name
    region.output(env[members[-1]])
    last = members[-1]
    name = f"{kind}_{last.name}"
    program.regions[name] = region
    with program.graph.inserting_before(last):
        call = program.graph.call_module(name, tuple(outer))
    last.replace_all_uses_with(call)
    final = last.name
    for member in reversed(members):
        program.graph.erase_node(member)
    call.name = final
