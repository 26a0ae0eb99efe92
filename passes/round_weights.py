"""Rounds the weights to their final codes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from mpq_compiler import formats
from mpq_compiler.formats import base, floating, low_rank
from mpq_compiler.ir import ops
from mpq_compiler.ir.graph import prune
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import USUAL, Asked, Demand, fitting
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Rounding
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.settle import Open, attributes, fit_unsettled, settle, unsettled
from mpq_compiler.quantization.statistics import GRAM, MOMENTS, Statistic
from mpq_compiler.support.errors import UserError


@dataclass(frozen=True)
class RoundWeights(Pass):
    """Settles scales and codes of every weight that is still open, and corrects biases.

    Scales and tables come out of the format's fit: of a grid of shrunken ranges, each row takes the scale with the
    least error of the layer's *output* on calibration data (least weight error is the wrong target: it shrinks
    near-uniform rows and loses 4-6 dB of the image at 2-3 bits). With ``nearest`` codes are those of the nearest
    levels. With ``gptq`` they are chosen column by column, each carrying its error over to the inputs that go with it
    (arXiv 2210.17323), in the rows where that is better. With ``learned`` each is the level below or above its weight,
    as gradient descent on the same error decides (arXiv 2004.10568), in the rows where that is better. FP8 and layers
    whose moments are too large to keep have the nearest. The mean of the remaining error moves into the bias.

        %conv_in_w = mpq::fake_quantize_weight(.weight:{ohwi,range.scale,range.offset,range.lut})
      =>
        %conv_in_w = mpq::dequantize_weight(.weight:{codes,scale,offset,lut}, shape=[32,3,3,3])
    """

    contract: ClassVar[Contract] = Contract.SIMULATION
    role: ClassVar[Role | None] = Role.ROUNDS
    decides_kernels: ClassVar[bool] = True
    requires: ClassVar[frozenset[str]] = frozenset({"fake-quant"})
    provides: ClassVar[frozenset[str]] = frozenset({"codes"})
    statistics: ClassVar[frozenset[Statistic]] = frozenset({MOMENTS})

    method: Literal["nearest", "gptq", "learned"] = "nearest"
    """How codes are chosen. Residual branches follow it, and so does what `sensitivity` measures, with GPTQ in place
    of learned rounding."""
    order: bool = True
    """Whether GPTQ takes inputs in the order of the least error, or as they stand."""
    scales: bool = False
    """Whether behind GPTQ the scale of a row becomes that by which its output is as loud as it was, in formats below 8
    bits whose rows have one scale each. In weights of up to a million numbers the best of several is taken to choose
    codes by."""
    paths: bool = False
    """Whether, in weights of up to a million numbers, GPTQ keeps the best eight sequences of codes of a row while it
    chooses them, in place of one; needs ``scales``."""

    def __post_init__(self) -> None:
        if self.scales and (self.method != "gptq" or not self.order):
            raise UserError("round-weights{scales=true} searches scales behind GPTQ in order: add method=gptq")
        if self.paths and not self.scales:
            raise UserError("round-weights{paths=true} comes on top of searched scales: add scales=true")

    @property
    def rounding(self) -> Rounding:
        """The method, its order, and what it searches."""
        if self.method == "gptq":
            if not self.order:
                return Rounding.GPTQ_IN_ORDER
            searched = Rounding.GPTQ_PATHS if self.paths else Rounding.GPTQ_SCALES
            return searched if self.scales else Rounding.GPTQ
        return Rounding(self.method)

    def requests(self) -> Requests:
        statistics = self.statistics if self.method == "nearest" else self.statistics | {GRAM}
        return Requests(statistics, self.rounding)

    def demand(self, asked: Asked) -> Demand:
        sizes = asked.sizes
        corrected = Demand(traffic=60 * sizes.numbers, disk=sizes.numbers)
        rounding = self.rounding
        known = rounding.quick if asked.rounded else None  # fits by which the plan was measured
        layers = [x for x in sizes.layers if known is None or rounding.of_size(x.numbers) != known.of_size(x.numbers)]
        return corrected + fitting(layers, [formats.get(asked.uniform or USUAL)], rounding)

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()
        rounding = (session.requests | self.requests()).rounding
        for weight in unsettled(program):
            if isinstance(formats.get(weight.format), low_rank.LowRankFormat):
                raise UserError(
                    f"'{weight.path}' is planned as {weight.format}: put pass 'low-rank' before 'round-weights'"
                )
        for weight, fit in fit_unsettled(program, session, session.fits, rounding, "rounding weights"):
            self._settle(program, weight, fit)
        prune(program.graph)
        return program

    def _settle(self, program: Program, weight: Open, fit: base.Fit) -> None:
        graph, prefix, shape = program.graph, f"{weight.path}:", list(program.tensors[weight.weight].shape)
        with graph.inserting_before(weight.quantizer):
            if isinstance(fit, floating.Float8Weight):
                parts = attributes(program, prefix, codes=fit.codes, scale=fit.scale)
                value = graph.call_function(ops.dequantize_float8, (*parts, shape, fit.exponent))
            else:
                assert isinstance(fit, base.QuantizedWeight)
                fit = fit.merged()  # a residual format whose branch no pass has inserted is one table from here on
                parts = attributes(
                    program, prefix, codes=fit.codes, scale=fit.scale, offset=fit.offset, lut=fit.lut,
                    row_class=fit.row_class,
                )  # fmt: skip
                segments = [list(fit.segments)] if fit.segments else []
                value = graph.call_function(ops.dequantize_weight, (*parts, shape, *segments))
        settle(program, weight, value, fit)
