"""What a program holds while it runs, reckoned from shapes, against graphs whose values are few enough to count."""

from __future__ import annotations

import itertools
import operator

import torch
from torch import fx

from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.program import PARAMETERS, InputSpec, Program, Stage, TensorStore
from mpq_compiler.ir.sizes import Moment, Sizes
from tests.harness import programs


def _program(graph: fx.Graph, **tensors: torch.Tensor) -> Program:
    stored = TensorStore()
    for name, value in tensors.items():
        stored.add(name, value)
    inputs = (InputSpec("x", ("B", 8), torch.float32),)
    return Program(graph, stored, inputs, Stage.FLOAT, facts=Facts({PARAMETERS: 1}))


def test_a_view_takes_nothing_and_keeps_what_it_is_of() -> None:
    graph = fx.Graph()
    x, weight = graph.placeholder("x"), graph.get_attr("weight")
    wide = graph.call_function(aten.linear.default, (x, weight))  # 32 numbers
    parts = graph.call_function(aten.split.Tensor, (wide, 16, 1))
    left, right = (graph.call_function(operator.getitem, (parts, i)) for i in range(2))
    seen = graph.call_function(aten.view.default, (right, [-1, 4, 4]))
    first = graph.call_function(aten.silu.default, (left,))  # 16, and x is dead
    second = graph.call_function(aten.silu.default, (seen,))
    graph.output((first, second))
    sizes = Sizes.of(_program(graph, weight=torch.zeros(32, 8)))
    assert sizes.live_bytes == 4 * (32 + 16 + 16)  # while the last is made: the layer's result is still there


def test_moments_are_those_that_no_other_exceeds() -> None:
    graph = fx.Graph()
    x, small, large = graph.placeholder("x"), graph.get_attr("small"), graph.get_attr("large")
    narrow = graph.call_function(aten.linear.default, (x, large))  # 2 of 8: much is read, little is alive
    wide = graph.call_function(aten.linear.default, (narrow, small))
    graph.output(wide)
    sizes = Sizes.of(_program(graph, small=torch.zeros(6, 2), large=torch.zeros(2, 8)))
    assert sizes.moments == (Moment(4 * (8 + 2), 16),)  # 10 numbers and 16 read, more than 8 and 12 of the other
    assert sizes.held_bytes(3, 8) == 3 * 40 + 8 * 16


def test_more_inputs_take_more_in_a_straight_line() -> None:
    sizes = Sizes.of(programs.after("unet2d", "layout"))
    found = [sizes.held_bytes(count, 8) for count in (0, 1, 8, 64)]
    assert found[0] == 8 * max(moment.numbers for moment in sizes.moments)
    assert found == sorted(found) and found[-1] >= 64 * sizes.live_bytes
    for more, less in itertools.pairwise(sizes.moments):
        assert more.bytes > less.bytes and more.numbers < less.numbers
