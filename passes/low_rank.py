"""Inserts low-rank branches beside layers."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from torch import fx

from mpq_compiler.formats import low_rank
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import function_of, operand, prune
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.views import FAKE_QUANTIZERS
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import REST
from mpq_compiler.quantization.settle import Open, attributes, fit_unsettled
from mpq_compiler.quantization.statistics import CALIBRATION, GRAM, Statistic


@dataclass(frozen=True)
class LowRank(Pass):
    """Gives the layers whose plan says so a float branch of low rank: y = layer(x) + (x V) U (arXiv 2411.05007).

    The branch reads the activation before its quantizer, where it has one, and what it leaves of the weight is
    quantized as the base of the format. Its two layers stay float, are listed, and their factors count as stored bytes
    of the weight. In a convolution V is a convolution of the same window, and U a linear layer over channels.

        %conv_in_w    = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
        %conv_in      = mpq::conv2d(%permute_default_q, %conv_in_w, .bias:f16, ...)
      =>
        %conv_in_w    = mpq::fake_quantize_weight(.weight:{rest,scale,offset,lut})
        %conv_in_base = mpq::conv2d(%permute_default_q, %conv_in_w, conv_in.bias:f16, ...)
        %conv_in_down = mpq::conv2d(%permute_default, conv_in.weight:down, ...)
        %conv_in_up   = aten.linear(%conv_in_down, conv_in.weight:up)
        %conv_in      = aten.add(%conv_in_base, %conv_in_up)
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    role: ClassVar[Role | None] = Role.SIMULATES
    decides_kernels: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"fake-quant"})
    provides: ClassVar[frozenset[str]] = frozenset({"low-rank"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({GRAM})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        rounding = session.requests.rounding
        title, kind = "fitting low-rank branches", low_rank.LowRankFormat
        branches = fit_unsettled(program, session, session.fits, rounding, title, kind)
        for weight, fit in branches:
            self._leave_rest(program, weight, fit)
            for call in list(weight.quantizer.users):
                self._insert(program, weight, call, fit)
        prune(program.graph)
        return program

    def _leave_rest(self, program: Program, weight: Open, fit: low_rank.LowRankWeight) -> None:
        """Leaves the quantizer the weight minus the branch, at the levels that were fitted with the branch."""
        tensor, base = program.tensors.read(weight.weight), fit.base
        rest = tensor - fit.branch.reshape(tensor.shape)
        with program.graph.inserting_before(weight.quantizer):
            parts = attributes(
                program, f"{weight.path}:", **{REST: rest}, scale=base.scale, offset=base.offset, lut=base.lut,
                row_class=base.row_class,
            )  # fmt: skip
        weight.quantizer.args = (*parts, *([list(base.segments)] if base.segments else []))

    def _insert(self, program: Program, weight: Open, call: fx.Node, fit: low_rank.LowRankWeight) -> None:
        graph, x = program.graph, operand(call, 0)
        if x.target in FAKE_QUANTIZERS:
            x = operand(x, 0)
        shape = program.tensors[weight.weight].shape
        with graph.inserting_after(call):
            total = graph.call_function(aten.add.Tensor)
        with graph.inserting_before(total):
            down, up = attributes(program, f"{weight.path}:", down=fit.down.reshape(-1, *shape[1:]), up=fit.up)
            window = call.args[3:] if call.target is ops.conv2d else ()
            narrow = graph.call_function(function_of(call), (x, down, *((None, *window) if window else ())))
            wide = graph.call_function(aten.linear.default, (narrow, up))
        name = call.name
        call.replace_all_uses_with(total)
        total.args = (call, wide)
        call.name, narrow.name, wide.name, total.name = f"{name}_base", f"{name}_down", f"{name}_up", name
        _rename_site(program, weight.path, name, call.name)
        for node in (narrow, wide):
            program.fallbacks[node.name] = f"low-rank branch of {weight.format}: computed in float"


def _rename_site(program: Program, path: str, old: str, new: str) -> None:
    """Renames the layer in plan and statistics, since the sum of layer and branch has taken its name."""
    plan, calibration = program.weights[path], program.facts[CALIBRATION]
    program.weights[path] = replace(plan, sites=tuple(new if site == old else site for site in plan.sites))
    if old in program.fallbacks:
        program.fallbacks[new] = program.fallbacks.pop(old)
    grams, means = ({**d, new: d[old]} if old in d else d for d in (calibration.grams, calibration.means))
    program.facts[CALIBRATION] = replace(calibration, grams=grams, means=means)
