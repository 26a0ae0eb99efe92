"""Inserts binary residual branches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpq_compiler.formats.base import QuantizedWeight
from mpq_compiler.formats.residual import ResidualFormat
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.graph import prune
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.settle import Open, attributes, fit_unsettled, settle


@dataclass(frozen=True)
class ResidualBranch(Pass):
    """Gives the layers whose plan says so their branch: base + alpha * B, fitted together (MPQ-DMv2, arXiv 2507.04290).

    Base codes, branch signs, scale, offset and the layer's ratio alpha come out of one fit on output error.

        %conv_in_w        = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
      =>
        %conv_in_w_base   = mpq::dequantize_weight(.weight:{base.codes,scale,offset,base.lut}, shape=[32,3,3,3])
        %conv_in_w_branch = mpq::binary_branch(.weight:{signs,scale,alpha}, shape=[32,3,3,3])
        %conv_in_w        = aten.add(%conv_in_w_base, %conv_in_w_branch)
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    role: ClassVar[Role | None] = Role.SIMULATES
    requires: ClassVar[frozenset[str]] = frozenset({"fake-quant"})
    provides: ClassVar[frozenset[str]] = frozenset({"residuals"})

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        rounding = session.requests.rounding
        title = "fitting residual branches"
        for weight, fit in fit_unsettled(program, session, session.fits, rounding, title, ResidualFormat):
            self._insert(program, weight, fit)
        prune(program.graph)
        return program

    def _insert(self, program: Program, weight: Open, fit: QuantizedWeight) -> None:
        graph, shape = program.graph, list(program.tensors[weight.weight].shape)
        with graph.inserting_before(weight.quantizer):
            scale, offset = attributes(program, f"{weight.path}:", scale=fit.scale, offset=fit.offset)
            codes, lut = attributes(program, f"{weight.path}:base.", codes=fit.codes, lut=fit.lut)
            signs, alpha = attributes(program, f"{weight.path}:", signs=fit.signs, alpha=fit.alpha)
            base = graph.call_function(ops.dequantize_weight, (codes, scale, offset, lut, None, shape))
            branch = graph.call_function(ops.binary_branch, (signs, scale, alpha, shape))
            total = graph.call_function(aten.add.Tensor, (base, branch))
        name = weight.quantizer.name
        base.name, branch.name = f"{name}_base", f"{name}_branch"
        settle(program, weight, total, fit)

