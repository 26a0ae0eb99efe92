"""Graphs that are read of text have the calls and edges of the program."""

from __future__ import annotations

import pytest
from torch import fx

from mpq_compiler.inspection import stage_graph
from mpq_compiler.ir import printer, views
from mpq_compiler.support.errors import UserError
from tests.harness import programs

LAYERS = {"down.0.conv.weight": "down.0.conv.weight", "down_0_conv": "down.0.conv.weight"}


@pytest.mark.parametrize("model", ["pixart", "unet2d"])
@pytest.mark.parametrize("stage", ["trace", "insert-fake-quant", "fold-fake-quant"])
def test_the_graph_is_that_of_the_program(model, stage):
    program = programs.after(model, stage)
    nodes = stage_graph.read(printer.text(program, stage), {}, {})
    calls = views.flatten(program)
    assert [n.name for n in nodes if n.operator != "input"] == [c.name for c in calls]
    inputs = {n.name for n in nodes if n.operator == "input"}
    assert inputs == {str(n.target) for n in program.graph.nodes if n.op == "placeholder"}
    known = inputs | {c.name for c in calls}
    for node, call in zip([n for n in nodes if n.operator != "input"], calls, strict=True):
        wanted: set[str] = set()
        fx.map_arg((call.args, call.kwargs), lambda operand, wanted=wanted: wanted.add(operand.name))
        assert {nodes[i].name for i in node.reads} == wanted & known


def test_layers_and_blocks_are_found():
    text = (
        "// packed stage\ngraph tiny(%sample f32[B,4], %timestep f32[B]) -> f32[B,4] {\n"
        "  %reshape = aten.reshape(%sample, [-1,4])  f32[B,4]\n"
        "  %down_0_norm_q = norm[quantize] {  u8[B,4]\n"
        "    %down_0_norm = aten.norm(%reshape)\n"
        "    %down_0_norm_q = mpq::quantize(%down_0_norm, :{scale})\n  }\n"
        "  %down_0_conv = mpq::quant_conv2d(%down_0_norm_q, .weight:{codes.1,scale.1})  f32[B,4]  w int8\n"
        "  return %down_0_conv\n}\n"
    )
    nodes = {n.name: n for n in stage_graph.read(text, LAYERS, stage_graph.blocks_of(LAYERS.values()))}
    region = "down_0_norm_q norm[quantize]"
    assert [n.block for n in nodes.values()] == [(), (), ("down.0",), *2 * [("down.0", region)], ("down.0",)]
    assert nodes["down_0_conv"].layer == "down.0.conv.weight" and nodes["down_0_norm"].layer is None
    assert nodes["down_0_conv"].reads == [4] and nodes["down_0_conv"].type == "f32[B,4]"


def test_a_lowered_stage_leaves_out_what_is_prepared_once():
    text = (
        "prepare() {\n  |tiles = prepare(codes=a.weight:codes)  Quant()\n}\n"
        "time(%timestep f32[B]) -> %g i64[B] {\n  %g = quantize(timestep=%timestep)  i64[B]  TimeGroup()\n}\n"
        "denoise(%sample f32[B], %g i64[B]) -> f32[B] {\n"
        "  %a_q, %down_0_conv = gemm(x=%sample, group=%g, tiles=down_0_conv|tiles)  u8[B]\n"
        "  %end = movement(x0=%down_0_conv)  f32[B]\n}\n"
    )
    nodes = stage_graph.read(text, LAYERS, {})
    assert [n.name for n in nodes] == ["timestep", "g", "sample", "a_q", "end"]
    assert [n.reads for n in nodes] == [[], [0], [], [2, 1], [3]]
    assert nodes[3].layer == "down.0.conv.weight"


def test_text_without_calls_is_refused():
    with pytest.raises(UserError, match="holds no calls, so it was cut off or altered; write the dumps again"):
        stage_graph.read("// trace: float stage", {}, {})
