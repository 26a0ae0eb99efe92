"""Segments: where graphs are cut, and that what is computed piece by piece is what is computed at once."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from mpq_compiler.ir import segments
from mpq_compiler.ir.interpreter import Interpreter, run
from mpq_compiler.training import student
from mpq_compiler.training.student import Student, values, variables
from mpq_compiler.training.variables import settled
from tests.harness import programs

MODELS = ("unet2d", "pixart")


def simulated(model):
    return programs.after(model, "round-weights", programs.RESIDUAL)


def leaves(program):
    trained = variables(program, True)
    made = values(program, trained, {name: variable.zeros() for name, variable in trained.items()})
    return {name: value.detach().clone().requires_grad_() for name, value in made.items()}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("count", [2, 5, 40])
def test_gradients_are_those_of_one_pass_bit_for_bit(model, count):
    program, inputs = simulated(model), dict(programs.inputs(model, 3))
    costs = segments.value_bytes(program, 3)
    last = segments.ends(program, costs, sum(costs.values()) // count)
    assert len(last) >= count
    one, other = leaves(program), leaves(program)
    output = Student(program, one).run(inputs)
    gradients = [torch.randn(output.shape) for _ in range(2)]
    for number, gradient in enumerate(gradients):
        output.backward(gradient, retain_graph=number == 0)
    begun = []
    again = segments.backward(Student(program, other), inputs, last, lambda y: gradients, begun.append)
    assert torch.equal(again, output.detach()) and not again.requires_grad
    assert begun == [0, 1] * len(last)
    for name, leaf in one.items():
        mine, theirs = leaf.grad, other[name].grad
        # two ways back add up in another order: segment by segment rather than one after the other
        assert (mine is None) == (theirs is None) and (mine is None or torch.allclose(mine, theirs, rtol=1e-5))
    for leaf in (*one.values(), *other.values()):
        leaf.grad = None
    Student(program, one).run(inputs).backward(gradients[0])
    segments.backward(Student(program, other), inputs, last, lambda y: gradients[:1])
    for name, leaf in one.items():
        assert leaf.grad is None or torch.equal(leaf.grad, other[name].grad)


@pytest.mark.parametrize("count", [2, 40])
def test_gradients_of_frozen_codes_are_those_of_one_pass(count):
    """Scales of rows have theirs from what layers compute, in whichever segment that is; weights have none."""
    coded = programs.RESIDUAL.replace("int2+b", "ec2")
    program, inputs = programs.after("unet2d", "round-weights", coded), dict(programs.inputs("unet2d", 3))
    costs = segments.value_bytes(program, 3)
    last = segments.ends(program, costs, sum(costs.values()) // count)
    trained = variables(program, False)
    made = values(program, trained, {name: v.zeros().requires_grad_() for name, v in trained.items()})
    one, other = student.leaves(made), student.leaves(made)
    output = Student(program, one).run(inputs)
    gradient = torch.randn(output.shape)
    output.backward(gradient)
    segments.backward(Student(program, other), inputs, last, lambda y: [gradient])
    assert len(last) >= count and not all(leaf.requires_grad for leaf in one.values())
    for name, leaf in one.items():
        mine, theirs = leaf.grad, other[name].grad
        assert (mine is None) == (theirs is None) and (mine is None or torch.equal(mine, theirs)), name
    scales = [w.tables.scale for w in settled(program)]
    assert scales and all(one[name].grad is not None and one[name].grad.abs().sum() > 0 for name in scales)


def test_a_segment_holds_what_it_computes_and_no_more():
    """Calls run twice, forth and back, and those of two segments never in turns."""
    program, inputs = simulated("unet2d"), dict(programs.inputs("unet2d", 2))
    costs = segments.value_bytes(program, 2)
    last = segments.ends(program, costs, sum(costs.values()) // 6)
    seen = []

    class Watched(Interpreter):
        def call(self, node, args, kwargs):
            seen.append(node.name)
            return super().call(node, args, kwargs)

    wanting = {n: v.requires_grad_() if v.is_floating_point() else v for n, v in inputs.items()}
    segments.backward(Watched(program), wanting, last, lambda y: [torch.ones_like(y)])
    calls = [n.name for n in program.graph.nodes if n.op == "call_function"]
    cuts = [0, *(calls.index(name) + 1 for name in last)]
    pieces = [calls[a:b] for a, b in pairwise(cuts)]
    assert seen == calls + [name for piece in reversed(pieces) for name in piece]


@pytest.mark.parametrize("model", MODELS)
def test_cuts_keep_the_bound_and_lie_where_little_crosses(model):
    program = programs.after(model, "layout")
    costs = segments.value_bytes(program, 2)
    bound = sum(costs.values()) // 8
    last = segments.ends(program, costs, bound)
    calls = [n for n in program.graph.nodes if n.op == "call_function"]
    names = [n.name for n in calls]
    assert last[-1] == names[-1] and len(set(last)) == len(last)
    cuts = [0, *(names.index(name) + 1 for name in last)]
    crossing = segments._crossing_bytes(program, calls, segments.value_bytes(program, 1))
    for start, stop in pairwise(cuts):
        spent = [sum(costs[name] for name in names[start:cut]) for cut in range(start + 1, len(names) + 1)]
        allowed = [start + i for i, cost in enumerate(spent) if bound <= 2 * cost <= 2 * bound]
        assert stop == start + 1 or spent[stop - start - 1] <= bound
        assert stop == len(names) or not allowed or crossing[stop - 1] == min(crossing[i] for i in allowed)
    assert segments.ends(program, costs, sum(costs.values())) == [names[-1]]


def test_what_is_no_float_crosses_too():
    program, inputs = programs.after("unet2d", "layout"), programs.inputs("unet2d", 2)
    every = [n.name for n in program.graph.nodes if n.op == "call_function"]
    output = segments.backward(Interpreter(program), inputs, every, lambda y: [torch.ones_like(y)])
    assert torch.equal(output, run(program, inputs))


@pytest.mark.parametrize("model", MODELS)
def test_cuts_follow_what_is_held_in_all(model):
    """Where calls cost more than the bound, as those of large weights do, what crosses a cut behind each takes most."""
    program = programs.after(model, "layout")
    values = segments.value_bytes(program, 1)
    dear = segments.ends(program, values, 1)
    assert len(dear) == len(values)
    plan = segments.leanest(program, values, 1)
    assert len(plan.last) < len(dear) and max(values.values()) < plan.bytes < sum(values.values()) / 2
    roomy = segments.leanest(program, values, sum(values.values()))
    assert roomy == segments.Plan([dear[-1]], sum(values.values()) + values[dear[-1]])  # the output is kept
