"""Final codes of the weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import fx

from mpq_compiler import formats, ops
from mpq_compiler.calibration import GRAM
from mpq_compiler.fitting import fit_unsettled, settle
from mpq_compiler.pass_manager import Contract, Pass, Session
from mpq_compiler.program import Program, operand, prune


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Settles scales and codes of every weight that is still open, and corrects biases.

    ``nearest``: of a grid of shrunken ranges, each row takes the scale with the least error of the layer's *output* on
    calibration data (least weight error is the wrong target: it shrinks near-uniform rows and loses 4-6 dB of the image
    at 2-3 bits), and codes are those of the nearest levels. The mean of the remaining error moves into the bias.

        %conv_in_w = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
      =>
        %conv_in_w = mpq::dequantize_weight(.weight:{codes,scale,offset,lut}, shape=[32,3,3,3])
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    requires: ClassVar[frozenset[str]] = frozenset({"fake-quant"})
    provides: ClassVar[frozenset[str]] = frozenset({"codes"})
    statistics: ClassVar[frozenset[str]] = frozenset({GRAM})

    method: Literal["nearest"] = "nearest"
    """How codes are chosen."""

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        for quantizer, fit in fit_unsettled(program, session, "rounding weights"):
            self._settle(program, quantizer, fit)
        prune(program.graph)
        return program

    def _settle(self, program: Program, quantizer: fx.Node, fit: formats.QuantizedWeight) -> None:
        weight = str(operand(quantizer, 0).target)
        path, shape = weight.split(":")[0], list(program.tensors[weight].shape)
        fit = fit.merged()  # a residual format whose branch no pass has inserted is one table from here on
        tensors = {"codes": fit.codes, "scale": fit.scale, "offset": fit.offset, "lut": fit.lut}
        with program.graph.inserting_before(quantizer):
            parts = [
                None if tensor is None else program.graph.get_attr(program.tensors.add(f"{path}:{name}", tensor))
                for name, tensor in tensors.items()
            ]
            value = program.graph.call_function(ops.dequantize_weight, (*parts, None, shape))
        settle(program, quantizer, value, fit)
