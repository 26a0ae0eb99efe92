from __future__ import annotations

import pytest
import torch

from mpq_compiler.formats import contract
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.interpreter import run
from mpq_compiler.passes.fold_fake_quant import FoldFakeQuant
from mpq_compiler.pipeline.session import Session
from tests.harness import programs


@pytest.mark.invariant("compiler-11")
def test_base_and_branch_become_one_table():
    step = programs.step("pixart", "fold-fake-quant", programs.RESIDUAL)
    before = {x.path: x for x in views.levels_of(views.flatten(step.before))}
    signs = {
        str(n.args[0].target).split(":")[0]: (str(n.args[0].target), str(n.args[2].target))
        for n in step.before.graph.nodes
        if n.target is ops.binary_branch
    }
    folded = views.levels_of(views.flatten(step.after))
    assert {x.path for x in folded} == {*signs}
    tensors = step.after.tensors
    for x in folded:
        base = before[x.path]
        sign, alpha = (tensors[name] for name in signs[x.path])
        entry = contract.entries(tensors[base.codes], tensors[base.tables.lut], None) + (2.0 * sign - 1) * alpha
        assert torch.equal(contract.entries(tensors[x.codes], tensors[x.tables.lut], None), entry)
        assert (x.tables.scale, x.tables.offset) == (base.tables.scale, base.tables.offset)


@pytest.mark.parametrize("model", programs.MODELS)
def test_no_float_layer_is_left(model):
    flat = views.flatten(programs.after(model, "fold-fake-quant"))
    assert not [c for c in flat if c.target in views.FLOAT_LAYERS or c.target is ops.fake_quantize]


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_bit_for_bit_at_other_batches(model, batch):
    step = programs.step(model, "fold-fake-quant")
    x = programs.inputs(model, batch)
    assert torch.equal(run_exact(step.before, x), run(step.after, x))


def test_another_reader_keeps_the_simulated_tensor():
    """A float call that reads a quantizer's output goes on reading that value, the layers read codes."""
    program = programs.after("pixart", "round-weights").fork()
    output = program.graph.output_node()
    quantizer = next(n for n in program.graph.nodes if n.target is ops.fake_quantize and n.args[0].op != "placeholder")
    with program.graph.inserting_before(output):
        total = program.graph.call_function(torch.ops.aten.sum.default, (quantizer,))
        y = program.graph.call_function(torch.ops.aten.add.Tensor, (output.args[0], total))
    output.args = (y,)
    x = programs.inputs("pixart", 2)
    folded = FoldFakeQuant().run(program, Session())
    assert torch.equal(run_exact(program, x), run_exact(folded, x))
