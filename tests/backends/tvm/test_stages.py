"""The declared contract of every stage of the lowering, on small models; texts of plans; what is said of stages."""

from __future__ import annotations

import functools
import itertools
from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_compiler.backends.tvm import lowering as tvm_lowering
from mpq_compiler.backends.tvm.inspect import InspectablePlan
from mpq_compiler.backends.tvm.plan import printer, stages
from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Function, Kernel, Lowered, Value, record
from mpq_compiler.ir import diff
from mpq_compiler.ir.interpreter import run
from mpq_compiler.pipeline.passes import Contract
from mpq_compiler.pipeline.stages import LoweringStage
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets
from tests.harness import lowering, packed

GOLDEN = Path(__file__).parents[2] / "golden" / "stages"
STAGES = tvm_lowering.names(targets.resolve(lowering.TARGET))
Values = dict[str, np.ndarray]


def inputs(model: lowering.Model) -> Values:
    return {name: value.numpy() for name, value in packed.take(packed.program(*model).inputs, slice(2)).items()}


@functools.cache
def reference(model: lowering.Model) -> Values:
    """What the packed program computes, by node."""
    found: Values = {}

    def watch(node, value):
        if isinstance(value, torch.Tensor):
            found[node.name] = (value.float() if value.dtype == torch.bool else value).numpy()

    run(packed.program(*model).program, packed.take(packed.program(*model).inputs, slice(2)), watch=watch)
    return found


@functools.cache
def values(model: lowering.Model, name: str, forced: bool = False) -> Values:
    """What a plan computes, by node; with forced inputs what its calls compute of the packed program's values."""
    with lowering.running(model) as runner:
        plan = InspectablePlan(lowering.after_stages(model)[name][1], runner)
        plan.verify(name)
        return plan.run(inputs(model), reference(model) if forced else None)


def check_identical(before: Values, after: Values) -> int:
    """How many values are in both plans: all with the same bits."""
    both = before.keys() & after.keys()
    for name in both:
        assert np.array_equal(before[name], after[name], equal_nan=True), name
    return len(both)


@pytest.mark.parametrize("model", lowering.MODELS, ids=[name for name, *_ in lowering.MODELS])
@pytest.mark.parametrize("name", STAGES)
def test_contract(model, name):
    stage, plan = lowering.after_stages(model)[name]
    if stage.contract == Contract.LOWERED:
        assert name == STAGES[0]
        found, expected = values(model, name, forced=True), reference(model)
        with lowering.running(model) as runner:
            allowed = InspectablePlan(plan, runner).tolerance
        checked = codes = differing = 0
        for node, value in found.items():
            if node not in expected or expected[node].dtype != value.dtype or expected[node].size != value.size:
                continue
            known, checked = expected[node].reshape(value.shape), checked + 1
            if value.dtype.kind == "f":
                assert np.abs(value - known).max() <= allowed(node) * np.abs(known).max(), node
            else:
                difference = np.abs(value.astype(int) - known)
                assert difference.max(initial=0) <= allowed(node), node
                codes, differing = codes + difference.size, differing + int(difference.sum())
        assert checked > 50 and differing <= max(1, 1e-5 * codes)
        return
    assert stage.contract == Contract.IDENTICAL
    before = STAGES[STAGES.index(name) - 1]
    output = plan.functions[0].output.name
    shared = check_identical(values(model, before), values(model, name))
    assert output in values(model, name) and shared > 0.7 * len(values(model, name))


def test_every_stage_of_every_target_says_what_it_does():
    every = {name for target in targets.TARGETS for name in _names(target)}
    on_gpus = [stages.FuseGates, stages.DecodeByShifts, stages.FuseDequantization]
    on_gpus += [stages.RoundWhereMade, stages.FuseSiblings, stages.StoreHalves]
    assert {*STAGES, *(stage.name() for stage in on_gpus)} == every
    classes = [*stages.JOINING, stages.HoistInvariants, stages.ConcatenateInPlace, *on_gpus]
    for cls in (tvm_lowering.SelectKernels, *classes):
        assert issubclass(cls, LoweringStage) and (cls.__doc__ or "").splitlines()[0].endswith((".", ";"))
        promised = {tvm_lowering.SelectKernels: Contract.LOWERED, stages.StoreHalves: Contract.SIMULATION}
        assert cls.contract == promised.get(cls, Contract.IDENTICAL)


def _names(target: str) -> tuple[str, ...]:
    row = targets.resolve(target)
    return tvm_lowering.names(row) if row.backend == "tvm" else ()


def test_every_stage_changes_the_plan_of_some_model():
    changed = set()
    for model in lowering.MODELS:
        texts = {name: printer.text(plan) for name, (_, plan) in lowering.after_stages(model).items()}
        changed |= {name for before, name in itertools.pairwise(STAGES) if diff.diff(texts[before], texts[name])}
    assert changed == {*STAGES[1:]}


def test_a_machine_that_lacks_the_target_says_so():
    model = lowering.MODELS[0]
    with lowering.running(model) as runner:
        runner.target = targets.resolve("aarch64-dotprod")
        with pytest.raises(UserError, match=r"this machine lacks .* which 'aarch64-dotprod' needs"):
            InspectablePlan(lowering.after_stages(model)[STAGES[0]][1], runner).run(inputs(model))


# ----------------------------------------------------------------------------------------------- texts


def small() -> Lowered:
    """A product whose codes the next one reads, upsampled: every line of a text has something to say."""
    shape, wide = (BATCH, 4, 4, 8), (BATCH, 8, 8, 8)
    inputs = (Value("sample", shape, "float32"), Value("timestep", (BATCH,), "int64"))
    norm = record(
        "norms.GroupNorm", height=4, width=4, channels=8, groups=2, eps=1e-5,
        epilogue=record("epilogue.Epilogue", steps=(), operands=()),
    )  # fmt: skip
    upsample = record("movement.upsample", shape=shape, factors=(2, 2), dtype="float32")
    quantize = record("quantize.Quantize", shape=(512,), bits=8, groups=3)
    tables = (("qscale", "edge:scale"), ("qzero", "edge:zero"), ("group", "timestep"))
    calls = (
        Call(Kernel("norms", norm), (("x", "sample"), ("weight", "norm.weight")), (("y", "norm"),), "norm"),
        Call(Kernel("movement", upsample), (("x0", "norm"),), (("y", "up"),), "up"),
        Call(Kernel("quantize", quantize), (("x", "up"), *tables), (("out", "up_q"),), "up_q"),
    )
    made = (Value("norm", shape, "float32"), Value("up", wide, "float32"), Value("up_q", wide, "uint8"))
    stored = (Value("norm.weight", (8,), "float32"), Value("edge:scale", (3,), "float32"))
    stored += (Value("edge:zero", (3,), "int32"), Value("unread", (1,), "float32"))
    function = Function(inputs, calls, Value("up_q", wide, "float32"), (1, 2), made=made)
    return Lowered(stored, (), (), (function,)).linked()


def test_golden_text(request):
    """The text of a plan, and what a stage changes of it."""
    before = small()
    after = stages.CommuteQuantizers().run(before)
    for name, text in (
        ("plan", printer.text(before, "select-kernels")),
        ("commute-quantizers", diff.diff(printer.text(before), printer.text(after))),
    ):
        path = GOLDEN / f"{name}.txt"
        if request.config.getoption("--accept"):
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
        expected = path.read_text(encoding="utf-8") if path.exists() else ""
        assert text == expected, f"{diff.diff(expected, text)}\n(pytest --accept writes {path.name} anew)"
