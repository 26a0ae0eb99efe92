"""The graph of layers, and its units."""

from __future__ import annotations

import pytest

from mpq_compiler.allocation.qua2sedimo import graph as qua2sedimo_graph
from mpq_compiler.allocation.qua2sedimo.graph import Graph, Node
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.program import Program
from tests.harness import programs

FAMILIES = pytest.mark.parametrize("model", ["fashion-unet", "pixart", "sd15"])


def laid_out(model: str) -> Program:
    return programs.after(model, "layout", "trace,layout")


def graph_of(model: str) -> Graph:
    return qua2sedimo_graph.of(laid_out(model), programs.denoiser(model).module.model)


def chain(*sources: tuple[int, ...], combinations: tuple[int, ...] = (), block: str = "b") -> Graph:
    """Nodes with those sources, in one block; layers but for the ``combinations``."""
    return Graph(
        tuple(
            Node(f"n{i}", None if i in combinations else f"n{i}.weight", f"n{i}", block, "B", 0, s)
            for i, s in enumerate(sources)
        )
    )


@FAMILIES
def test_every_layer_is_a_node_and_reads_what_came_before(model):
    graph, program = graph_of(model), laid_out(model)
    assert [graph.nodes[place].path for place in graph.layers] == [weight_path(n) for n in program.quantizable]
    for place, node in enumerate(graph.nodes):
        assert all(source < place for source in node.sources)
        assert node.path is not None or len(node.sources) > 1  # a combination is of several things


@pytest.mark.invariant("qua2sedimo-6")
@FAMILIES
def test_units_partition_the_layers(model):
    """Invariant: units partition the weights, so that each quantizer occurs exactly once in a configuration."""
    graph = graph_of(model)
    paths = {str(graph.nodes[place].path) for place in graph.layers}
    for units in (qua2sedimo_graph.units(graph), qua2sedimo_graph.alone(graph)):
        found = [str(graph.nodes[place].path) for unit in units for place in unit.layers]
        assert len(found) == len(paths) and {*found} == paths
        for unit in units:
            assert len({graph.nodes[place].block for place in unit.layers}) == 1
            assert {*unit.layers} <= {*unit.nodes} <= graph.within(unit.root, unit.hops)


def test_units_are_attentions_feed_forward_networks_and_residual_blocks():
    graph = graph_of("pixart")
    units = qua2sedimo_graph.units(graph)
    kinds = {graph.kind(unit): ([graph.nodes[p].operation for p in unit.layers], unit.hops) for unit in units}
    attention = ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"]
    assert kinds["BasicTransformerBlock attn1"] == (attention, 2)
    assert kinds["BasicTransformerBlock ff.net"] == (["ff.net.0.proj", "ff.net.2"], 1)
    graph = graph_of("fashion-unet")
    found = [[graph.nodes[p].operation for p in unit.layers] for unit in qua2sedimo_graph.units(graph)]
    assert ["conv1", "time_emb_proj", "conv2"] in found and ["conv_shortcut"] in found and ["conv_in"] in found


def test_a_unit_ends_at_a_residual_addition():
    # 0 -> 1 -> add(0, 1) -> 3: the addition takes along what layer 1 was made from
    residual = chain((), (0,), (0, 1), (2,), combinations=(2,))
    assert [unit.layers for unit in qua2sedimo_graph.units(residual)] == [(0, 1), (3,)]
    # 0 -> 2 <- 1: nothing in it was made from the other
    joined = chain((), (), (0, 1), (2,), combinations=(2,))
    (unit,) = qua2sedimo_graph.units(joined)
    assert (unit.layers, unit.nodes, unit.hops) == ((0, 1, 3), (0, 1, 2, 3), 2)


def test_a_unit_has_no_more_layers_and_hops_than_asked():
    line = chain(*((i - 1,) if i else () for i in range(7)))
    assert [unit.layers for unit in qua2sedimo_graph.units(line, hops=3)] == [(0, 1, 2), (3, 4, 5, 6)]
    assert [unit.layers for unit in qua2sedimo_graph.units(line, hops=1)] == [(0,), (1, 2), (3, 4), (5, 6)]
    assert {len(unit.layers) for unit in qua2sedimo_graph.units(line, most=2)} == {1, 2}


@pytest.mark.invariant("qua2sedimo-3")
def test_a_weight_that_is_read_twice_is_in_one_unit():
    """Layers that share a weight share its format."""
    nodes = [Node(f"call{i}", "shared.weight", "shared", "b", "B", 0, (i - 1,) if i else ()) for i in range(3)]
    graph = Graph(tuple(nodes))
    (unit,) = qua2sedimo_graph.units(graph)
    assert unit.layers == (2,)
    assert qua2sedimo_graph.by_path(graph, {"shared.weight": 4}, range(3)) == [4, 4, 4]
