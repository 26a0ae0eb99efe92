"""The stages of the lowering to ONNX: their contracts on a small model, their dumps, and a fault that is found."""

from __future__ import annotations

import functools
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from mpq_compiler.artifact.bundle import WEIGHTS
from mpq_compiler.backends.onnx import FUNCTION, lowering
from mpq_compiler.backends.onnx.emit import emit
from mpq_compiler.backends.onnx.inspect import InspectableModels
from mpq_compiler.driver.dump_writer import Writer
from mpq_compiler.inspection import bisect
from mpq_compiler.inspection import dumps as inspection_dumps
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.verifier import VerificationError
from mpq_compiler.passes.fuse_epilogues import FuseEpilogues
from mpq_compiler.pipeline.passes import Contract
from tests.harness import packed

MODEL = ("pixart", "int4")
STAGES = lowering.names()
NODE = "adaln_single_linear"


@functools.cache
def after_stages() -> dict[str, tuple[lowering.Stage, InspectableModels]]:
    program = packed.program(*MODEL).program.fork()
    stored = stored_tensors.stored(program)
    tensors = {name: tensor.array for name, tensor in stored.items()}
    found, plan = {}, lowering.Models()
    for stage in (lowering.SelectOperators(program, stored), *(each() for each in lowering.BEHIND_SELECTION)):
        plan = stage.run(plan)
        lowering.verify(plan, stage.name())
        found[stage.name()] = (stage, InspectableModels(plan, program, tensors))
    return found


def with_model(found: InspectableModels, change) -> InspectableModels:
    """The models with the first one changed."""
    selected = found.plan.models[FUNCTION]
    model = onnx.ModelProto()
    model.CopyFrom(selected.model)
    change(model)
    plan = lowering.Models({**found.plan.models, FUNCTION: replace(selected, model=model)})
    return InspectableModels(plan, found.program, found.tensors)


def doubled(model: onnx.ModelProto) -> None:
    """Adds the result of a layer to itself."""
    index, node = next((i, n) for i, n in enumerate(model.graph.node) if NODE in n.output)
    node.output[0] = f"{NODE}/half"
    twice = onnx.helper.make_node("Add", [node.output[0]] * 2, [NODE], name=f"{NODE}/twice")
    model.graph.node.insert(index + 1, twice)


def dumped(folder: Path, fault: str = "") -> list[inspection_dumps.Dump]:
    case = packed.program(*MODEL)
    writer = Writer(folder, packed.take(case.inputs, slice(2)))
    writer.write(0, FuseEpilogues(), case.program, case.program)
    for index, (name, (stage, plan)) in enumerate(after_stages().items()):
        writer.write_stage(1 + index, stage, with_model(plan, doubled) if name == fault else plan)
    return inspection_dumps.read_dumps(folder)


def test_the_stages_make_the_model():
    (_, selected), (stage, last) = (after_stages()[name] for name in STAGES)
    program = packed.program(*MODEL).program.fork()
    whole = emit(program, stored_tensors.stored(program), WEIGHTS)
    assert last.plan.models[FUNCTION].model == whole
    dead = with_model(selected, lambda model: model.graph.initializer.add(name="dead", data_type=1))
    assert dead.plan.models[FUNCTION].model != selected.plan.models[FUNCTION].model
    assert stage.run(dead.plan).models[FUNCTION].model == whole
    assert [stage.contract for stage, _ in after_stages().values()] == [Contract.LOWERED, Contract.IDENTICAL]


def test_no_node_is_blamed_without_a_fault(tmp_path):
    dumps = dumped(tmp_path)
    assert [dump.name for dump in dumps] == ["fuse-epilogues", *STAGES]
    found = bisect.bisect(dumps)
    assert found["clean"], found["sentence"]
    selected, last = dumps[1:]
    assert len(selected.local) > 100 and all(np.array_equal(v, last.values[n]) for n, v in selected.values.items())
    assert "MatMul" in selected.text and "// constant" in selected.text


@pytest.mark.parametrize("broken", STAGES)
def test_a_fault_is_named_by_stage_and_node(tmp_path, broken):
    found = bisect.bisect(dumped(tmp_path, broken))
    findings = [f for row in found["passes"] for f in row["findings"]]
    assert found["pass"] == broken and findings[0]["node"] == NODE, found["sentence"]
    assert {f["node"] for f in findings if f["after"] == broken} == {NODE}


@pytest.mark.parametrize(
    ("change", "rule"),
    [
        (lambda model: model.graph.node.insert(0, model.graph.node[-1]), "order"),
        (lambda model: model.graph.node.append(model.graph.node[-1]), "single-assignment"),
        (lambda model: model.graph.node.pop(), "output"),
    ],
)
def test_the_rule_rejects_its_mutant(change, rule):
    _, plan = after_stages()[STAGES[0]]
    with pytest.raises(VerificationError, match=f"rule '{rule}' .* after stage 'select-operators'"):
        lowering.verify(with_model(plan, change).plan, STAGES[0])
