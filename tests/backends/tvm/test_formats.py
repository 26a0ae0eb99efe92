"""Every family of weight formats through the TVM backend: kernels bit for bit, artifacts as good as the program."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler.backends.tvm.lowering import lower
from mpq_compiler.ir import ops
from mpq_compiler.ir.interpreter import run
from tests.backends.tvm import test_emit as emitted
from tests.harness import packed

TARGET = "x86-64-avx2"
INTEGER = (("pixart", "nf4g16+r4"), ("unet2d-class", "km3t"), ("pixart", "int2g12"))
"""K-groups with a shorter last one, low-rank branches, tables of 16 rows: all run on the integer kernels."""


@pytest.mark.parametrize(("name", "weights"), INTEGER)
@pytest.mark.invariant("compiler-1")
def test_every_node_computes_what_the_reference_does(name, weights):
    emitted.test_every_node_computes_what_the_reference_does(name, weights, TARGET)


FLOATS = (
    ("unet2d", "fp4,activation_format=float,activations=4"),
    ("unet2d-class", "int8,activation_format=float"),
    ("pixart", "km3t+r2,activation_format=float"),
    ("sd15", "int2+b,activation_format=float,activations=6"),
    ("dit", "nf4g12,activation_format=float,activations=4"),
    ("pixart", "fp8,activation_format=float"),
)
"""Weights of every kind on simulated activations: E2M1, E2M3 and the like, E2M5 to E5M2."""


@pytest.mark.parametrize(("name", "weights"), FLOATS[:2])
def test_small_floats_are_those_of_the_reference(name, weights):
    emitted.test_every_node_computes_what_the_reference_does(name, weights, TARGET)


@pytest.mark.parametrize(("name", "weights"), FLOATS[2:5])
def test_small_floats_have_the_bits_of_torch(name, weights):
    case, batch = packed.program(name, weights), 4
    program, lowered = emitted.compiled(name, weights, TARGET)
    kernels = emitted.Kernels(program, lowered, TARGET)
    values, inputs = {}, packed.take(case.inputs, slice(batch))
    run(case.program, inputs, watch=lambda node, value: values.__setitem__(node.name, value))
    nodes = {n.name: n.target for n in case.program.graph.nodes if n.op == "call_function"}
    floats = {name for name, target in nodes.items() if target is ops.fake_quantize_float}
    assert len(floats) > 10
    known = {key: value.numpy() for key, value in values.items() if isinstance(value, torch.Tensor)}
    known |= kernels.prepared | {key: value.numpy() for key, value in inputs.items()}
    checked = set()
    for call in lowered.functions[0].calls:
        if not call.node.endswith("_q") or call.node not in floats:
            continue
        results = kernels(call.kernel, {argument: known[value] for argument, value in call.operands}, batch)
        for argument, value in call.results:
            if value in floats:
                assert torch.equal(torch.from_numpy(results[argument]).reshape(values[value].shape), values[value])
                checked.add(value)
            else:
                known[value] = results[argument]
    assert checked == floats


@pytest.mark.parametrize(
    ("name", "weights"), [*INTEGER, ("pixart", "fp8"), ("unet2d-class", "fp8e5"), FLOATS[0], FLOATS[-1]]
)
def test_artifact_is_as_good_as_the_packed_program(name, weights):
    emitted.test_artifact_is_as_good_as_the_packed_program(name, weights, TARGET)


def test_fp8_weights_are_dequantized_once_and_computed_in_float():
    case = packed.program("pixart", "fp8")
    lowered = lower(case.program, (1,))
    decoded = [call for call in lowered.preparation if call.kernel.template == "float8"]
    layers = [n for n in case.program.graph.nodes if n.target is ops.dequantize_float8]
    assert len(decoded) == len(layers) > 20
    templates = {call.kernel.template for call in lowered.functions[0].calls}
    assert "float_gemm" in templates and not templates & {"gemm", "float8"}
    assert all(site in case.program.fallbacks for plan in case.planned.weights.values() for site in plan.sites)
    assert not case.planned.activations


def test_factors_of_low_rank_branches_are_listed_and_run_in_float():
    case = packed.program("pixart", "nf4g16+r4")
    plans = case.program.weights.values()
    factors = [n for n in case.program.graph.nodes if n.op == "get_attr" and str(n.target).endswith((":up", ":down"))]
    assert len(factors) == 2 * len(plans)
    listed = [name for name, reason in case.program.fallbacks.items() if "low-rank branch of nf4g16+r4" in reason]
    assert len(listed) == 2 * sum(len(plan.sites) for plan in plans)
    x = packed.take(case.inputs, slice(2))
    assert torch.isfinite(run(case.program, x)).all()
