from __future__ import annotations

import pytest
import torch
from torch import fx

from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import aten, interior_permutes, is_movement
from mpq_compiler.ir.editor import Editor
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import InputSpec, Program, Stage, TensorStore
from mpq_compiler.passes.layout import Layout, simplify_movement
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs


def program_of(build, shape=(3, 4, 6), tensors=None) -> Program:
    """A float program of one input x [B, *shape]."""
    graph = fx.Graph()
    graph.output(build(graph, graph.placeholder("x")))
    return Program(graph, TensorStore(tensors or {}), (InputSpec("x", ("B", *shape), torch.float32),), Stage.FLOAT)


@pytest.mark.parametrize("model", programs.MODELS)
def test_permutes_remain_at_the_ends_only(model):
    program = programs.after(model, "layout")
    assert interior_permutes(program.graph) == [] and program.fallbacks == {}
    permutes = [n for n in program.graph.nodes if n.target is aten.permute.default]
    assert len(permutes) <= 2
    left = {n.target for n in program.graph.nodes if is_movement(n)}
    assert left <= {aten.permute.default, aten.reshape.default}


def test_permutes_cancel_through_pointwise_calls_and_concatenations():
    def build(graph, x):
        call = graph.call_function
        there = call(aten.permute.default, (x, [0, 2, 3, 1]))
        left = call(aten.silu.default, (there,))
        right = call(aten.permute.default, (call(aten.neg.default, (x,)), [0, 2, 3, 1]))
        joined = call(aten.cat.default, ([left, right], 3))
        return call(aten.permute.default, (joined, [0, 3, 1, 2]))

    before = program_of(build)
    after = Layout().run(before, Session())
    x = {"x": torch.randn(2, 3, 4, 6)}
    assert torch.equal(run(before, x), run(after, x))
    assert not [n for n in after.graph.nodes if n.target is aten.permute.default]


def test_a_permute_between_two_kernels_is_listed():
    def build(graph, x):
        call = graph.call_function
        weight = graph.get_attr("w")
        first = call(aten.linear.default, (x, weight))
        turned = call(aten.permute.default, (first, [0, 1, 3, 2]))
        return call(aten.linear.default, (turned, weight))

    before = program_of(build, (3, 6, 6), {"w": torch.randn(6, 6)})
    after = Layout().run(before, Session())
    assert list(after.fallbacks.values()) == ["data is permuted between two kernels"]
    assert {*after.fallbacks} == {n.name for n in interior_permutes(after.graph)}


def test_layers_on_rows_of_several_samples_are_refused():
    """[B, T, C] as [T * B, C]: row r is not of sample r // T."""

    def build(graph, x):
        call = graph.call_function
        turned = call(aten.permute.default, (call(aten.neg.default, (x,)), [1, 0, 2]))
        rows = call(aten.reshape.default, (turned, [-1, 6]))
        return call(aten.linear.default, (rows, graph.get_attr("w")))

    with pytest.raises(UserError, match=r"layer 'w' of .* multiplies rows of several samples in turn"):
        Layout().run(program_of(build, (4, 6), {"w": torch.randn(6, 6)}), Session())


@pytest.mark.parametrize(
    "chain, left",
    [
        ([(aten.view.default, [-1, 12, 6]), (aten.view.default, [-1, 3, 4, 6])], 0),
        ([(aten.permute.default, [0, 2, 3, 1]), (aten.permute.default, [0, 3, 1, 2])], 0),
        ([(aten.permute.default, [0, 2, 3, 1]), (aten.view.default, [-1, 24, 3])], 2),
        ([(aten.unsqueeze.default, 1), (aten.view.default, [-1, 72])], 1),
    ],
)
def test_a_chain_of_movement_becomes_what_it_amounts_to(chain, left):
    def build(graph, x):
        node = graph.call_function(aten.neg.default, (x,))
        for target, argument in chain:
            if target is aten.view.default:
                target = aten.reshape.default
            node = graph.call_function(target, (node, argument))
        return graph.call_function(aten.neg.default, (node,))

    program = program_of(build)
    x = {"x": torch.randn(2, 3, 4, 6)}
    expected = run(program, x)
    simplify_movement(Editor(program))
    assert torch.equal(run(program, x), expected)
    assert sum(is_movement(n) for n in program.graph.nodes) == left


def test_a_boolean_mask_becomes_additive():
    """Attention of two heads among 5 tokens of 8 channels, with a mask of the keys."""
    graph = fx.Graph()
    x, mask = graph.placeholder("x"), graph.placeholder("mask")
    call = graph.call_function
    rows = call(aten.transpose.int, (call(aten.view.default, (x, [-1, 5, 2, 4])), 1, 2))
    keys = call(aten.view.default, (call(aten.to.dtype, (mask, torch.bool)), [-1, 1, 1, 5]))
    keys = call(aten.expand.default, (keys, [-1, 2, 5, -1]))
    y = call(aten.scaled_dot_product_attention.default, (rows, rows, rows, keys))
    graph.output(call(aten.reshape.default, (call(aten.transpose.int, (y, 1, 2)), [-1, 5, 8])))
    inputs = (InputSpec("x", ("B", 5, 8), torch.float32), InputSpec("mask", ("B", 5), torch.float32))
    before = Program(graph, TensorStore({}), inputs, Stage.FLOAT)
    after = Layout().run(before, Session())
    given = {"x": torch.randn(3, 5, 8), "mask": torch.tensor([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1.0]])}
    torch.testing.assert_close(run(after, given), run(before, given))
    (attention,) = [n for n in after.graph.nodes if n.target is ops.attention]
    assert attention.args[5].target is aten.where.self
    assert shapes(after, 2)[attention.args[5].name].shape == (2, 1, 1, 5)
