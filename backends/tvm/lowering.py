"""The lowering of a packed program to kernel calls: which stages there are, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from mpq_compiler.backends.tvm.emit.walk import SelectKernels
from mpq_compiler.backends.tvm.plan import stages as plan_stages
from mpq_compiler.backends.tvm.plan.calls import Lowered
from mpq_compiler.backends.tvm.plan.verifier import verify
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.pipeline.stages import LoweringStage, run_stages
from mpq_compiler.targets.table import Target

Stage = LoweringStage[Lowered]


def behind_selection(hoisted: bool = True, decoded: bool = True) -> list[Stage]:
    """The stages behind `SelectKernels`, in order.

    hoisted: what does not depend on the latents becomes functions of its own; on a GPU all of a step is one graph.
    decoded: `prepare` decodes weights; products of GPUs do it themselves, and what a gate does behind them.
    """
    chosen: list[Stage] = [each() for each in plan_stages.JOINING]
    if hoisted:
        chosen.append(plan_stages.HoistInvariants())
    chosen.append(plan_stages.ConcatenateInPlace())
    if not decoded:
        chosen += [plan_stages.FuseGates(), plan_stages.DecodeByShifts(), plan_stages.FuseDequantization()]
        chosen += [plan_stages.RoundWhereMade(), plan_stages.FuseSiblings(), plan_stages.StoreHalves()]
    return chosen


def of_target(target: Target) -> list[Stage]:
    """The stages behind `SelectKernels` for a target."""
    return behind_selection(hoisted=not target.is_cuda, decoded=decodes(target))


def decodes(target: Target) -> bool:
    """Whether artifacts for a target decode weights when they are loaded, entropy-coded ones among them."""
    return not target.is_cuda


def names(target: Target) -> tuple[str, ...]:
    """The names of all stages for a target, in order."""
    return (SelectKernels.name(), *(stage.name() for stage in of_target(target)))


def lower(
    program: Program, batches: Sequence[int], others: Sequence[Specialization] = (), hoisted: bool = True
) -> Lowered:
    """The packed program as kernel calls, after all stages but that of GPUs.

    others: the program at other image sizes, each with its batch sizes.
    """
    return run([SelectKernels(program, batches, others), *behind_selection(hoisted)])


def run(stages: Sequence[Stage], observe: Callable[[int, Stage, Lowered], None] | None = None) -> Lowered:
    """The plan that the stages make, each verified; ``observe(index, stage, plan)`` looks at it then."""
    return run_stages(stages, Lowered(), verify, observe)
