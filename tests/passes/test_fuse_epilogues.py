from __future__ import annotations

import pytest
import torch

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten, is_pointwise
from mpq_compiler.ir.interpreter import run
from mpq_compiler.passes.fuse_epilogues import ANCHORS
from tests.harness import programs


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.parametrize("batch", [1, 4])
def test_regions_run_bit_for_bit(model, batch):
    step = programs.step(model, "fuse-epilogues")
    x = programs.inputs(model, batch)
    assert torch.equal(run(step.before, x), run(step.after, x))


@pytest.mark.parametrize("model", programs.MODELS)
def test_no_call_is_lost_or_doubled(model):
    step = programs.step(model, "fuse-epilogues")
    before, after = (sorted((c.name, str(c.target)) for c in views.flatten(p)) for p in (step.before, step.after))
    assert before == after


@pytest.mark.parametrize("model", programs.MODELS)
def test_a_region_is_an_anchor_and_pointwise_calls(model):
    program = programs.after(model, "fuse-epilogues")
    assert len(program.regions) > 10
    for name, graph in program.regions.items():
        first, *rest = [n for n in graph.nodes if n.op == "call_function"]
        assert first.target in ANCHORS or is_pointwise(first), name
        for node in rest:
            assert is_pointwise(node) or node.target in (ops.quantize, aten.reshape.default), name
        assert not [n for n in rest[:-1] if n.target is ops.quantize], name
        assert all(len(n.users) == 1 for n in (first, *rest)), name


def test_names_survive():
    step = programs.step("unet2d", "fuse-epilogues")
    regions = [n for n in step.after.graph.nodes if n.op == "call_module"]
    assert {n.name for n in regions} <= {n.name for n in step.before.graph.nodes}
    assert all(n.target in step.after.regions for n in regions)
