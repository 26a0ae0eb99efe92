from __future__ import annotations

import pytest
import torch

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.costs import leftovers, stored_bytes, stored_dtype
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program, TensorStore
from mpq_compiler.ir.verifier import check
from mpq_compiler.passes.insert_fake_quant import InsertFakeQuant
from mpq_compiler.pipeline.session import Session
from tests.harness import programs


@pytest.mark.parametrize("model", programs.MODELS)
def test_one_quantizer_an_edge_and_a_weight(model):
    step = programs.step(model, "insert-fake-quant")
    flat = views.flatten(step.after)
    edges = [q.edge for q in views.quantizers_of(flat)]
    assert sorted(edges) == sorted(step.before.activations)
    assert len([c for c in flat if c.target is ops.fake_quantize_weight]) == len(step.before.weights)
    assert len([n for n in step.after.graph.nodes if n.target is ops.time_group]) == 1


@pytest.mark.parametrize("model", programs.MODELS)
def test_leftovers_are_read_as_they_are_stored(model):
    program = programs.after(model, "insert-fake-quant")
    weights = {x.weight for x in views.levels_of(views.flatten(program))}
    for node in program.graph.nodes:
        if node.op == "get_attr" and str(node.target) not in weights:
            tensor = program.tensors[str(node.target)]
            assert tensor.dtype == stored_dtype(str(node.target), tensor)


def test_values_beyond_f16_stay_f32_and_are_listed():
    program = programs.after("pixart", "bit-allocation")
    name = str(program.quantizable[0].args[2].target)
    huge = program.tensors[name].clone()
    huge.view(-1)[0] = 1e6
    spoiled = program.fork(tensors=TensorStore({**program.tensors, name: huge}))
    after = InsertFakeQuant().run(spoiled, Session())
    assert after.fallbacks == {name: "values beyond the range of f16, stored as f32"}
    assert name in {str(n.target) for n in after.graph.nodes} and torch.equal(after.tensors[name], huge)
    assert check(after) == []


def with_another_reader(program: Program) -> tuple[Program, str]:
    """The program with the sum of a layer's weight added to its output: (it, the weight)."""
    program = program.fork()
    last = program.graph.find_nodes(op="output")[0].args[0]  # to channels first
    weight = program.quantizable[-1].args[1]
    with program.graph.inserting_before(last):
        total = program.graph.call_function(aten.sum.default, (weight,))
        last.update_arg(0, program.graph.call_function(aten.add.Tensor, (last.args[0], total)))
    return program, str(weight.target)


def test_a_weight_that_another_operator_reads_is_stored_twice():
    """In codes for its layers, in f16 for the other; both count."""
    plain = programs.after("unet2d", "bit-allocation")
    before, name = with_another_reader(plain)
    assert name in leftovers(before) and name not in leftovers(plain)
    assert stored_bytes(before) - stored_bytes(plain) == 2 * before.tensors[name].numel()
    after = InsertFakeQuant().run(before, Session())
    assert check(after) == []
    readers = {str(n.target): {u.target for u in n.users} for n in after.graph.nodes if n.op == "get_attr"}
    assert readers[f"{name}:f16"] == {aten.sum.default} and readers[name] == {ops.fake_quantize_weight}
    x = programs.inputs("unet2d", 2)
    y = run(InsertFakeQuant().run(plain, Session()), x) + before.tensors[name].half().float().sum()
    assert torch.allclose(run(after, x), y, atol=1e-5 * float(y.abs().max()))
