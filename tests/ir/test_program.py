from __future__ import annotations

import pytest
import torch
from torch import fx

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.graph import prune, weight_of
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.ops.shapes import SHAPES
from mpq_compiler.ir.program import InputSpec, Program, TensorStore
from mpq_compiler.support.errors import UserError
from tests.harness import programs


def test_the_store_never_changes_what_it_holds():
    first, second = torch.ones(3), torch.zeros(3)
    store = TensorStore({"w": first})
    assert store.add("w", torch.ones(3)) == "w"  # the same values are the same tensor
    assert store.add("w", second) == "w.1" and store.add("w", second) == "w.1"
    assert store.add("w", torch.ones(3, dtype=torch.float16)) == "w.2"
    assert store["w"] is first and len(store) == 3 and [*store] == ["w", "w.1", "w.2"]


def test_halves_are_read_as_f32():
    store = TensorStore({"h": torch.tensor([0.1], dtype=torch.float16), "i": torch.tensor([1], dtype=torch.int8)})
    assert store.read("h").dtype == torch.float32 and float(store.read("h")[0]) == float(store["h"][0])
    assert store.read("i") is store["i"]


def test_a_fork_has_its_own_graph_and_tables_and_shares_tensors():
    program = programs.after("pixart", "fuse-epilogues")
    fork = program.fork()
    assert fork.tensors is program.tensors
    assert [n.name for n in fork.graph.nodes] == [n.name for n in program.graph.nodes]
    assert not {*fork.graph.nodes} & {*program.graph.nodes}
    fork.weights.clear(), fork.fallbacks.update(x="y"), fork.regions.clear(), fork.facts.clear()
    assert program.weights and "x" not in program.fallbacks and program.regions and program.facts
    x = programs.inputs("pixart", 2)
    assert torch.equal(run(program, x), run(program.fork(), x))


def test_a_missing_input_is_named():
    program = programs.after("pixart", "layout")
    with pytest.raises(UserError, match="input 'timestep' is missing"):
        run(program, {n: v for n, v in programs.inputs("pixart", 1).items() if n != "timestep"})


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.parametrize("pass_name", ["trace", "layout", "insert-fake-quant", "fold-fake-quant"])
def test_shapes_are_those_of_a_run(model, pass_name):
    program, found = programs.after(model, pass_name), {}
    run(program, programs.inputs(model, 2), lambda node, value: found.__setitem__(node.name, value))
    predicted = shapes(program, 2)
    for name, value in found.items():
        if isinstance(value, torch.Tensor):
            stored = predicted[name]
            assert (stored.shape, stored.dtype) == (value.shape, value.dtype), name


def test_watching_sees_every_node_once_and_tensors_where_they_are_first_read():
    program = programs.after("unet2d", "layout")
    seen = []
    run(program, programs.inputs("unet2d", 1), lambda node, value: seen.append(node))
    nodes = [n for n in program.graph.nodes if n.op != "output"]
    assert len(seen) == len(nodes) and {*seen} == {*nodes}
    assert [n for n in seen if n.op != "get_attr"] == [n for n in nodes if n.op != "get_attr"]
    read = set()
    for node in seen:
        assert node.op == "get_attr" or read <= {*node.all_input_nodes}, "a tensor was read before it was needed"
        read = read | {node} if node.op == "get_attr" else set()


def test_grouped_and_computed_weights_are_not_quantizable():
    graph = fx.Graph()
    x, w = graph.placeholder("x"), graph.get_attr("w")
    plain = graph.call_function(ops.conv2d, (x, w))
    grouped = graph.call_function(ops.conv2d, (x, w, None, (1, 1), (0, 0, 0, 0), 2))
    computed = graph.call_function(ops.conv2d, (x, x))
    assert weight_of(plain) == "w" and weight_of(grouped) is None and weight_of(computed) is None


def test_pruning_keeps_inputs():
    graph = fx.Graph()
    x, unused = graph.placeholder("x"), graph.placeholder("y")
    graph.call_function(torch.ops.aten.rand_like.default, (x,))
    graph.output(x)
    prune(graph)
    assert [n.op for n in graph.nodes] == ["placeholder", "placeholder", "output"] and unused in graph.nodes


def test_sizes_of_an_input():
    assert InputSpec("x", ("B", 3, 8), torch.float32).sized(5) == (5, 3, 8)


def test_flat_reading_sees_through_regions():
    before, after = (programs.after("pixart", n) for n in ("fold-fake-quant", "fuse-epilogues"))

    def layers(program: Program):
        return {
            layer.call.name: (layer.levels.path, layer.act_scale, layer.act_zero, layer.segments)
            for layer in views.layers_of(views.flatten(program))
        }

    assert layers(before) == layers(after) and len(layers(after)) == len(after.weights)
    edges = [{q.edge: (q.scale, q.bits) for q in views.quantizers_of(views.flatten(p))} for p in (before, after)]
    assert edges[0] == edges[1]


def test_shapes_name_what_does_not_fit():
    quantize = SHAPES[ops.quantize]
    with pytest.raises(ValueError, match="5 rows do not divide into a batch of 2"):
        quantize(torch.empty(5, 3), torch.empty(1), torch.empty(1), torch.empty(2), 8)
