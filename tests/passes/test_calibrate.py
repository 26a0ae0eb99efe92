from __future__ import annotations

from collections import defaultdict

import pytest
import torch

from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.ir import ops
from mpq_compiler.ir.edges import row_geometry
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, TensorStore
from mpq_compiler.passes.calibrate import Calibrate
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.between_times import between
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import CALIBRATION, GRAM, MOMENTS, PART, RANGE, VALUES, collect, input_rows
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import batches
from tests.harness import programs, tiny


def test_statistics_are_those_of_the_values():
    program = programs.after("unet2d", "calibrate")
    calibration = program.facts[CALIBRATION]
    values, outputs = defaultdict(list), []
    for part in batches(calibration.inputs, PART):  # on some CPUs the bits depend on the size of the batch
        outputs.append(run(program, part, lambda node, value: values[node.name].append(value)))
    assert torch.equal(calibration.outputs, torch.cat(outputs))
    assert torch.equal(calibration.select_outputs(3), calibration.outputs[[0, 6, 11]])
    for name, edge in calibration.edges.items():
        rows = torch.cat(values[name]).reshape(12, -1)
        assert torch.equal(edge.low, rows.amin(1)) and torch.equal(edge.high, rows.amax(1))
        assert edge.elements == rows.shape[1]
        assert all(set(e.tolist()) <= set(r.tolist()) for e, r in zip(edge.values, rows, strict=True))


@pytest.mark.parametrize("name", ["conv_in", "down_blocks_0_downsamplers_0_conv", "time_embedding_linear_1"])
def test_rows_are_what_the_weight_multiplies(name):
    """All rows of a layer's input, times its weight as stored, are the layer's output."""
    program = programs.after("unet2d", "calibrate")
    layer, values = program.node(name), {}
    run(program, programs.inputs("unet2d", 2), lambda node, value: values.__setitem__(node.name, value))
    stored = program.tensors[str(layer.args[1].target)]
    rows = input_rows(row_geometry(layer, stored.shape), values[layer.args[0].name], 10**9, torch.Generator())
    weight = stored.reshape(values[name].shape[-1], -1)
    y = rows @ weight.T + program.tensors[str(layer.args[2].target)]
    assert torch.allclose(y.reshape(values[name].shape), values[name], atol=1e-4)


def test_moments():
    program = programs.after("unet2d", "calibrate")
    calibration = program.facts[CALIBRATION]
    name = "mid_block_attentions_0_to_q"
    values = {}
    run(program, calibration.inputs, lambda node, value: values.__setitem__(node.name, value))
    x = values[program.node(name).args[0].name].flatten(0, 1)
    assert torch.allclose(calibration.grams[name], x.T @ x / len(x), atol=1e-5)
    assert torch.allclose(calibration.means[name], x.mean(0), atol=1e-6)


@pytest.mark.parametrize(
    ("model", "timed"),
    [
        ("unet2d", "time_embedding_linear_1"),
        ("unet2d", "down_blocks_0_resnets_0_time_emb_proj"),
        ("dit", "transformer_blocks_0_norm1_linear"),
    ],
)
def test_moments_of_what_sees_the_time_alone_are_those_between_the_recorded_times(model, timed):
    """Embeddings of the time, and of classes with it, are taken at many times, not at the few that were recorded."""
    program = programs.after(model, "calibrate")
    calibration, values = program.facts[CALIBRATION], {}
    inputs = between(calibration.inputs)
    assert len(inputs["timestep"].unique()) > 10 * len(calibration.timesteps.unique())
    run(program, inputs, lambda node, value: values.__setitem__(node.name, value))
    x = values[program.node(timed).args[0].name]
    torch.testing.assert_close(calibration.grams[timed], x.T @ x / len(x), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(calibration.means[timed], x.mean(0), atol=1e-5, rtol=1e-4)


def test_only_what_is_asked_for_is_collected():
    program = programs.after("pixart", "layout")
    x = programs.inputs("pixart", 2)
    assert not collect(program, x, frozenset({RANGE}), Session()).grams
    both = collect(program, x, frozenset({VALUES, GRAM}), Session())
    assert {*both.grams} == {n.name for n in program.quantizable}
    squares = collect(program, x, frozenset({MOMENTS}), Session())
    for name, gram in both.grams.items():
        torch.testing.assert_close(squares.grams[name], gram.diagonal(), rtol=1e-4, atol=1e-5)


def test_the_pipeline_asks_once():
    passes = parser.parse(programs.MIXED)
    assert Requests.all(p.requests() for p in passes).statistics == {RANGE, VALUES, MOMENTS, GRAM}


def test_a_model_without_layers_is_a_sentence():
    program = programs.after("pixart", "layout").fork()
    for node in list(program.graph.nodes):
        if node.target in (torch.ops.aten.linear.default, ops.conv2d):
            node.target = torch.nn.functional.silu
    session = Session(programs.denoiser("pixart"), programs.calibration("pixart"))
    with pytest.raises(UserError, match="pixart has no linear or conv2d layer that could be quantized"):
        Calibrate().run(program, session)


def test_values_that_are_not_finite_are_a_sentence():
    program = programs.after("pixart", "layout")
    name = str(program.quantizable[0].args[2].target)
    infinite = torch.full_like(program.tensors[name], torch.inf)
    bad = program.fork(tensors=TensorStore({**program.tensors, name: infinite}))
    session = Session(programs.denoiser("pixart"), programs.calibration("pixart"))
    with pytest.raises(UserError, match=r"pixart gives values that are not finite at '.*' during calibration"):
        Calibrate().run(bad, session)


def test_a_layer_that_never_runs_is_not_in_the_graph():
    """A parameter that the forward never touches takes no part: it is traced away, and everything else compiles."""
    model = tiny.model("pixart")
    model.never = torch.nn.Linear(8, 8)
    denoiser = denoisers.wrap(model, name="unused")
    session = Session(denoiser, programs.calibration("pixart"))
    program, _ = manager.run_pipeline(parser.parse(programs.RESIDUAL), programs.empty(), session)
    assert not [name for name in program.weights if name.startswith("never")]
    assert program.facts[PARAMETERS] == programs.denoiser("pixart").parameters + 72


def test_moments_are_taken_once_for_all_readers_of_an_edge():
    """q, k and v share the moments of the edge they read; windows of other geometry have their own."""
    program = programs.after("unet2d", "calibrate")
    calibration, shared = program.facts[CALIBRATION], {}
    for node in program.quantizable:
        geometry = row_geometry(node, program.tensors[str(node.args[1].target)].shape)
        shared.setdefault((node.args[0].name, geometry), []).append(node.name)
    for names in shared.values():
        assert len({id(calibration.grams[n]) for n in names}) == len({id(calibration.means[n]) for n in names}) == 1
    assert len({id(g) for g in calibration.grams.values()}) == len(shared) < len(program.quantizable)
    to_q, to_k = (program.node(f"mid_block_attentions_0_to_{part}") for part in "qk")
    assert calibration.grams[to_q.name] is calibration.grams[to_k.name]
