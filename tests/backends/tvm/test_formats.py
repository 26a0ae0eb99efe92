"""Every family of weight formats through the TVM backend: kernels bit for bit, artifacts as good as the program."""

from __future__ import annotations

import pytest
import torch

from mpq_compiler import ops
from mpq_compiler.backends.tvm.emit import lower
from mpq_compiler.program import run
from tests import packed
from tests.backends.tvm import test_emit as emitted

TARGET = "x86-64-avx2"
INTEGER = (("pixart", "nf4g16+r4"), ("unet2d-class", "km3t"), ("pixart", "int2g12"))
"""K-groups with a shorter last one, low-rank branches, tables of 16 rows: all run on the integer kernels."""


@pytest.mark.parametrize(("name", "weights"), INTEGER)
def test_every_node_computes_what_the_reference_does(name, weights):
    emitted.test_every_node_computes_what_the_reference_does(name, weights, TARGET)


@pytest.mark.parametrize(("name", "weights"), [*INTEGER, ("pixart", "fp8"), ("unet2d-class", "fp8e5")])
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
