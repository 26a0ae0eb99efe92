"""Where networks can be cut, and the programs of steps that keep a value and of steps that reuse it."""

from __future__ import annotations

import itertools

import pytest
import torch

from mpq_compiler.ir import ops, reuse
from mpq_compiler.ir.costs import macs
from mpq_compiler.ir.interpreter import Interpreter, run
from mpq_compiler.ir.verifier import verify
from mpq_compiler.sampling.reuse import KEPT, OUTPUT, SLOTS, WEIGHTS
from tests.harness import packed, programs, tiny

STAGES = ("layout", "bit-allocation", "insert-fake-quant", "round-weights", "fuse-epilogues")


def marked(model: str, stage: str = "layout", number: int = 0):
    """A program with a value that is kept, and that value's cut."""
    program = programs.after(model, "layout")
    cut = reuse.cuts(program, 3, reuse.MOST)[number]
    program = programs.after(model, stage).fork()
    reuse.mark(program, cut.node)
    return program, cut


@pytest.mark.parametrize("model", programs.MODELS)
def test_what_is_inside_of_a_cut_is_needed_for_its_value_alone(model):
    """With the value given, the output is computed without the nodes inside, and no other node could be left out."""
    program = programs.after(model, "layout")
    inputs = programs.denoiser(model).random_inputs(2, 0)
    values = {}
    expected = Interpreter(program).run(inputs, watch=lambda node, value: values.__setitem__(node.name, value))
    work = macs(program)
    for cut in reuse.cuts(program, 3, reuse.MOST):
        interpreter, env = Interpreter(program), {}
        for node in program.graph.nodes:
            if node.op == "placeholder":
                env[node] = inputs[str(node.target)]
            elif node.name == cut.node:
                env[node] = values[cut.node]
            elif node.op == "output":
                assert torch.equal(env[node.args[0]], expected)
            elif node.op != "get_attr" and node.name not in cut.inside:
                env.update({n: interpreter.evaluate(n, env) for n in node.all_input_nodes if n.op == "get_attr"})
                env[node] = interpreter.evaluate(node, env)
        assert cut.share == pytest.approx(sum(work.get(name, 0) for name in cut.inside) / sum(work.values()))
        assert reuse.LEAST <= cut.share <= reuse.MOST


@pytest.mark.parametrize("model", programs.MODELS)
def test_cuts_are_few_and_apart(model):
    first, *others = reuse.cuts(programs.after(model, "layout"), 3)
    assert (first.node, first.share) == (OUTPUT, 1.0)
    shares = [cut.share for cut in others]
    assert 1 <= len(shares) <= 2
    assert all(a - b > reuse.APART - reuse.ALIKE for a, b in itertools.pairwise(shares))
    assert all(cut.share <= 0.6 for cut in reuse.cuts(programs.after(model, "layout"), 3, 0.6))


@pytest.mark.parametrize("stage", STAGES)
def test_a_mark_changes_nothing(stage):
    program, cut = marked("unet2d", stage)
    verify(program)
    inputs = programs.denoiser("unet2d").random_inputs(2, 0)
    assert torch.equal(run(program, inputs), run(programs.after("unet2d", stage), inputs))
    kept = reuse.marked(program)
    assert kept is not None and kept.name == cut.node and kept.target is ops.keep
    assert reuse.marked(programs.after("unet2d", stage)) is None


@pytest.mark.parametrize("model", programs.MODELS)
def test_a_step_that_reuses_what_it_would_compute_gives_the_same_bits(model):
    inputs = programs.denoiser(model).random_inputs(2, 0)
    for number in range(len(reuse.cuts(programs.after(model, "layout"), 3))):
        program, cut = marked(model, "fuse-epilogues", number)
        expected, keeping, reusing = run(program, inputs), reuse.keeping(program), reuse.reusing(program)
        verify(keeping)
        verify(reusing)
        found, shape = run(keeping, inputs), reuse.kept_shape(program)
        size = expected[0].numel()
        assert torch.equal(found[:, :size].reshape(expected.shape), expected)
        value = found[:, size:].reshape(2, *shape)
        others = [torch.full_like(value, 7.0)] * (SLOTS - 1)
        given = {KEPT: torch.stack([value, *others], 1), WEIGHTS: torch.eye(SLOTS)[:1].repeat(2, 1)}
        assert torch.equal(run(reusing, inputs | given), expected)
        left = {n.name for n in reusing.graph.nodes if n.op == "call_function"}
        assert not left & (cut.inside - {cut.node}), "something inside is computed all the same"


def test_values_are_summed_by_their_weights():
    program, cut = marked("unet2d")
    inputs, reusing = programs.denoiser("unet2d").random_inputs(2, 0), reuse.reusing(program)
    values = torch.randn(2, SLOTS, *reuse.kept_shape(program))
    weights = torch.tensor([[1.5, -0.5, 0.125], [0.25, 2.0, -1.0]])
    seen = {}
    given = inputs | {KEPT: values, WEIGHTS: weights}
    Interpreter(reusing).run(given, watch=lambda node, value: seen.__setitem__(node.name, value))
    each = [values[:, i] * weights[:, i].reshape(2, 1, 1, 1) for i in range(SLOTS)]
    assert torch.equal(seen[cut.node], each[0] + each[1] + each[2])


def test_programs_of_steps_are_made_where_a_value_is_kept():
    program, _ = marked("unet2d", "fuse-epilogues")
    assert [each.name for each in reuse.specializations(program, (1, 2))] == [reuse.KEEPING, reuse.REUSING]
    assert reuse.specializations(packed.program("unet2d").program, (1, 2)) == []


@pytest.mark.parametrize("name", tiny.ALL_FAMILIES)
def test_every_family_can_be_cut(name):
    laid_out = packed.program(name).laid_out
    found = reuse.cuts(laid_out, 1, reuse.MOST)
    assert found and found[0].share > 0.5
