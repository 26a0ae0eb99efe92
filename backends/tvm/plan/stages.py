"""The stages behind the selection of kernels: each turns the plan into one of fewer or cheaper calls, bit for bit.

All but `StoreHalves`, of which the pass `numerics` has measured that it may. A value that others read keeps its name,
so that plans can be compared value by value. The rules are in `fuse`, `hoist`, `gates`, `halves`, `integers`,
`rounding`, `siblings` and `weight_only`; a stage applies one of them to a whole plan.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import replace
from typing import ClassVar

from mpq_compiler.backends.tvm.plan import fuse, gates, halves, hoist, integers, rounding, siblings, weight_only
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Lowered, needed
from mpq_compiler.pipeline.passes import Contract
from mpq_compiler.pipeline.stages import LoweringStage


class _FunctionStage(LoweringStage[Lowered]):
    """A stage that changes each function by itself."""

    def run(self, plan: Lowered) -> Lowered:
        return replace(plan, functions=tuple(map(self.changed, plan.functions))).linked()

    @abstractmethod
    def changed(self, function: Function) -> Function:
        """The function after the stage."""


def _joined(function: Function, rule: Callable[[fuse.Known], list[Call]]) -> Function:
    """The function with a rule of `fuse` applied to its calls."""
    known = fuse.Known(function.own, function.values, function.output.name)
    own = tuple(rule(known))
    return replace(function, own=own, made=tuple(known.values.values()))


class FuseConcatenations(_FunctionStage):
    """Group norms and quantizers read the parts of a concatenation of channels where they lie."""

    def changed(self, function: Function) -> Function:
        return _joined(function, fuse.read_parts)


class CommuteQuantizers(_FunctionStage):
    """A quantizer of what is upsampled goes before the upsampling, which then moves codes: a quarter of the bytes."""

    def changed(self, function: Function) -> Function:
        return _joined(function, fuse.quantize_first)


class FuseSiblingQuantizers(_FunctionStage):
    """A group norm writes the codes of what it reads beside its own result, where a quantizer reads that too."""

    def changed(self, function: Function) -> Function:
        return _joined(function, fuse.codes_beside_norms)


class FuseQuantizers(_FunctionStage):
    """The product that makes a value writes its codes, and the value itself only where others read it."""

    def changed(self, function: Function) -> Function:
        return _joined(function, fuse.codes_behind_products)


class FuseRotations(_FunctionStage):
    """The norm that makes a value rotates it, where nothing reads it unrotated."""

    def changed(self, function: Function) -> Function:
        return _joined(function, fuse.rotated_by_norms)


class EliminateDeadCalls(_FunctionStage):
    """Calls whose results nothing reads are dropped: concatenations of which all readers read the parts."""

    def changed(self, function: Function) -> Function:
        return replace(function, own=needed(function.own, [function.output.name]))


class HoistInvariants(LoweringStage[Lowered]):
    """What does not depend on the latents leaves the step for functions of its own, whose results are kept."""

    def run(self, plan: Lowered) -> Lowered:
        functions: list[Function] = []
        for function in plan.functions:
            values = function.values
            parts, own = hoist.split(function.inputs, function.own, function.output.name, values, function.suffix)
            mixed = tuple(hoist.mixed(function.inputs, function.own, values))
            parts = hoist.shared(parts, [part for other in functions for part in other.parts])
            functions.append(replace(function, own=own, parts=parts, mixed=mixed))
        return replace(plan, functions=tuple(functions)).linked()


class ConcatenateInPlace(_FunctionStage):
    """Parts of a concatenation that nothing else reads are written where they belong by the kernels that make them."""

    def changed(self, function: Function) -> Function:
        own = fuse.in_place(function.own, function.values, function.output.name)
        return replace(function, own=own, copied=tuple(fuse.copies(own).items()))


class FuseGates(LoweringStage[Lowered]):
    """The product whose halves a gate joins (GEGLU, SwiGLU) computes it, and writes half as much: codes, perhaps."""

    def run(self, plan: Lowered) -> Lowered:
        return gates.join(plan)


class DecodeByShifts(LoweringStage[Lowered]):
    """Products decode codes of 4 bits that number integers without a gap by shifts, and read no table of them."""

    def run(self, plan: Lowered) -> Lowered:
        return integers.decode_by_shifts(plan)


class FuseDequantization(LoweringStage[Lowered]):
    """Weights that `prepare` would decode for products in bfloat16 alone stay in codes, which the products decode."""

    def run(self, plan: Lowered) -> Lowered:
        return weight_only.keep_codes(plan)


class RoundWhereMade(_FunctionStage):
    """What is read in bfloat16 is stored in bfloat16, by what makes it where nothing else reads it."""

    def changed(self, function: Function) -> Function:
        return rounding.round_where_made(function)


class StoreHalves(LoweringStage[Lowered]):
    """What kernels hand on is stored in half precision, where all that make and read it can."""

    contract: ClassVar[Contract] = Contract.SIMULATION

    def run(self, plan: Lowered) -> Lowered:
        return replace(plan, functions=tuple(map(halves.store_halves, plan.functions))) if plan.halves else plan


class FuseSiblings(LoweringStage[Lowered]):
    """Products of one input, alike but for their weights, are one launch: queries, keys and values."""

    def run(self, plan: Lowered) -> Lowered:
        return siblings.multiply_together(plan)


JOINING: tuple[type[LoweringStage[Lowered]], ...] = (
    FuseConcatenations,
    CommuteQuantizers,
    FuseSiblingQuantizers,
    FuseQuantizers,
    FuseRotations,
    EliminateDeadCalls,
)
"""Stages of every target, in order."""
