"""A pass of your own: it finds the layers whose weights have outliers.

    mpqc compile fashion-unet -o out.mpq --dumps dumps --pipeline "trace,layout,crest-factors{top=2},calibrate,\
time-groups,bit-allocation{uniform=int4},insert-fake-quant,round-weights,fold-fake-quant,fuse-epilogues"
    mpqc inspect dumps --why conv_in
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mpq_compiler.ir import provenance
from mpq_compiler.ir.graph import weight_of
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.passes import Contract, Pass
from mpq_compiler.pipeline.session import Session


@dataclass(frozen=True)
class CrestFactors(Pass):
    """Names the layers whose largest weight is farthest from the usual one.

    The crest factor is max |w| over the root mean square of w. Where it is large, evenly spaced levels are wasted on
    values that hardly occur, and formats with learned or floating levels do better.
    """

    # What must be equal before and after: `IDENTICAL` means every bit of the output (docs/ir.md has the others).
    contract: ClassVar[Contract] = Contract.IDENTICAL
    # What an earlier pass must have provided; the pipeline is refused otherwise, with the pass to put before.
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})

    # Fields are options: `crest-factors{top=2}`. Type and default are checked, the text below is shown by mpqc passes.
    top: int = 3
    """How many layers to name."""

    @classmethod
    def name(cls) -> str:
        """The name of the entry point. Without this it is the module's, with "-" for "_"."""
        return "crest-factors"

    def run(self, program: Program, session: Session) -> Program:
        program = program.fork()  # a pass never changes the program that it was given
        factors = {}
        for call in program.quantizable:
            name = str(weight_of(call))
            weight = program.tensors.read(name)
            factors[name] = float(weight.abs().max() / weight.square().mean().sqrt())
            provenance.note(program, name.partition(":")[0], self.name(), crest_factor=factors[name])
        for name in sorted(factors, key=factors.__getitem__, reverse=True)[: self.top]:
            program.note(f"the largest weight of {name} is {factors[name]:.1f} times the usual one")
        return program
