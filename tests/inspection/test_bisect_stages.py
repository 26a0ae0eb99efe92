"""Faults are planted into stages of the lowering; bisecting their dumps names the stage and the layer, nothing else."""

from __future__ import annotations

import copy
import functools
import shutil
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from mpq_compiler.backends.tvm import lowering as tvm_lowering
from mpq_compiler.backends.tvm.inspect import InspectablePlan
from mpq_compiler.backends.tvm.plan.calls import Call, Lowered
from mpq_compiler.driver.dump_writer import Writer
from mpq_compiler.inspection import bisect
from mpq_compiler.inspection import dumps as inspection_dumps
from mpq_compiler.passes.fuse_epilogues import FuseEpilogues
from tests.harness import lowering

MODEL = lowering.BY_HAND
STAGES = tvm_lowering.names(lowering.target())
NORM = "norm_2"
_FOLDER = tempfile.TemporaryDirectory()


def inputs() -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return {"sample": torch.randn(2, 4, 4, 8, generator=generator), "timestep": torch.tensor([250, 750])}


def eps_of(plan: Lowered, node: str) -> Lowered:
    """The plan with another epsilon in the norm that the node's name begins with."""

    def change(call: Call) -> Call:
        if not call.node.startswith(node) or call.kernel.template != "norms":
            return call
        return replace(call, kernel=replace(call.kernel, problem=call.kernel.problem.replace(eps=0.5)))

    changed = replace(plan, functions=tuple(function.mapped(change) for function in plan.functions))
    assert changed != plan
    return changed


@functools.cache
def clean() -> tuple[Path, tuple[Writer, ...]]:
    """The dumps of a lowering without faults, behind those of the last pass, and the writer before each stage."""
    folder = Path(_FOLDER.name)
    writer = Writer(folder, inputs())
    writer.write(0, FuseEpilogues(), lowering.program(MODEL), lowering.program(MODEL))
    before = []
    with lowering.running(MODEL) as runner:
        for index, (stage, plan) in enumerate(lowering.after_stages(MODEL).values()):
            before.append(copy.copy(writer))
            writer.write_stage(1 + index, stage, InspectablePlan(plan, runner))
    return folder, tuple(before)


def verdict(folder: Path, broken: str, fault: Callable[[Lowered], Lowered]) -> dict[str, Any]:
    """The verdict on a lowering whose stage ``broken`` has a fault, which the next stage hands on."""
    recorded, writers = clean()
    start = STAGES.index(broken)
    for path in recorded.iterdir():
        if path.name[:3].isdigit() and int(path.name[:3]) <= start:
            shutil.copy(path, folder)
    writer = copy.copy(writers[start])
    writer.folder = folder
    stages = lowering.after_stages(MODEL)
    plan = fault(stages[broken][1])
    with lowering.running(MODEL) as runner:
        writer.write_stage(1 + start, stages[broken][0], InspectablePlan(plan, runner))
        for name in STAGES[start + 1 : start + 2]:
            stage = stages[name][0]
            writer.write_stage(2 + start, stage, InspectablePlan(stage.run(plan), runner))
    return bisect.bisect(inspection_dumps.read_dumps(folder))


def test_a_clean_lowering_has_nothing_wrong():
    dumps = inspection_dumps.read_dumps(clean()[0])
    assert [dump.name for dump in dumps] == ["fuse-epilogues", *STAGES]
    found = bisect.bisect(dumps)
    assert found["clean"], found["sentence"]
    assert all(row["nodes"] >= 8 for row in found["passes"][1:])
    assert [row["contract"] for row in found["passes"][1:]] == ["lowered", *["identical"] * (len(STAGES) - 1)]


@pytest.mark.parametrize("broken", ["select-kernels", "fuse-quantizers", "hoist-invariants"])
def test_a_fault_is_named_by_stage_and_node(tmp_path, broken):
    found = verdict(tmp_path, broken, lambda plan: eps_of(plan, NORM))
    findings = [f for row in found["passes"] for f in row["findings"]]
    assert found["pass"] == broken, found["sentence"]
    assert [f["after"] for f in findings] == [broken], found["sentence"]
    assert findings[0]["node"].startswith(NORM) and found["sentence"].startswith(broken)


def test_what_cannot_be_run_leaves_its_text(tmp_path):
    stages = lowering.after_stages(MODEL)
    writer = Writer(tmp_path, inputs())
    with lowering.running(MODEL) as runner:
        runner.target = lowering.target("aarch64-dotprod")
        for index, name in enumerate(STAGES[:2]):
            stage, plan = stages[name]
            writer.write_stage(index, stage, InspectablePlan(plan, runner))
    dumps = inspection_dumps.read_dumps(tmp_path)
    assert all("// no values: this machine lacks" in dump.text and not dump.values for dump in dumps)
    assert bisect.bisect(dumps)["clean"]
