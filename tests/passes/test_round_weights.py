from __future__ import annotations

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats import contract
from mpq_compiler.formats.base import F16_TINY, output_error
from mpq_compiler.formats.uniform import UniformFormat
from mpq_compiler.ir import ops
from mpq_compiler.quantization.fitting import rows_of
from mpq_compiler.quantization.settle import unsettled
from mpq_compiler.quantization.statistics import CALIBRATION
from tests.harness import programs
from tests.passes.test_residual_branch import gram, weight

UNIFORM = [f for f in formats.FORMATS.values() if isinstance(f, UniformFormat)]


@pytest.mark.parametrize("uniform", UNIFORM, ids=lambda f: f.name)
def test_the_scale_is_never_worse_than_min_max_in_any_row(uniform):
    for seed in range(4):
        w, moments = weight(seed=seed), gram(seed=seed)
        chosen = uniform.fit(w, moments)
        widest = uniform.quantize(w, *uniform.range_parameters(w))
        error, least = (output_error(q.dequantize() - w, moments) for q in (chosen, widest))
        assert (error <= least * (1 + 1e-5)).all()


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("compiler-9")
def test_layers_are_never_worse_than_min_max_on_their_own_moments(model):
    step = programs.step(model, "round-weights")
    calibration = step.after.facts[CALIBRATION]
    calls = [n for n in step.after.graph.nodes if n.target is ops.dequantize_weight]
    settled = {str(n.args[0].target).split(":")[0]: n.args[:5] for n in calls}
    checked = 0
    for weight_ in unsettled(step.before):
        w, call = rows_of(step.before, weight_.weight), weight_.call
        moments = calibration.grams[call.name]
        if len(call.args) > 2 and call.args[2] is not None:  # the mean is left to the bias
            mean = calibration.means[call.name]
            moments = moments - torch.outer(mean, mean)
        names = settled[weight_.path]
        parts = [None if n is None else step.after.tensors[str(n.target)] for n in names]
        chosen = ops.dequantize_weight(*parts, w.shape)
        widest = formats.get(weight_.format)
        widest = widest.quantize(w, *widest.range_parameters(w))
        error, least = (float(output_error(q - w, moments).sum()) for q in (chosen, widest.dequantize()))
        assert error <= least * (1 + 1e-4), weight_.path
        checked += 1
    assert checked


@pytest.mark.parametrize("name", [n for n, f in formats.FORMATS.items() if not getattr(f, "shared", False)])
@pytest.mark.parametrize("value", [0.0, 0.3, -70.0, 1e-9])
def test_constant_rows(name, value):
    """Scale 0 becomes the smallest half: no NaN; a format with offsets keeps the constant."""
    w = weight()
    w[3] = value
    fit = formats.get(name).fit(w, gram())
    y = fit.dequantize()
    assert torch.isfinite(y).all() and (fit.scale >= F16_TINY).all()
    # An offset is the constant; else it falls between two levels, 1/16 apart in the largest octave of floats. Where a
    # learned table has no zero, its least entry stays at the smallest scale.
    least = F16_TINY * contract.LUT_MAX
    tolerance = 2**-9 * abs(value) + 1e-6 if formats.get(name).has_offset else abs(value) / 16 + least
    assert (y[3] - value).abs().max() <= tolerance


def test_nothing_is_left_open():
    for model in programs.MODELS:
        assert unsettled(programs.after(model, "round-weights")) == []


def test_biases_take_up_the_mean_error():
    """On calibration data the mean of a layer's output stays that of the float layer, to the grid of f16."""
    program = programs.after("unet2d", "round-weights")
    means = program.facts[CALIBRATION].means
    checked = 0
    for call in program.graph.nodes:
        if call.target is torch.ops.aten.linear.default and str(call.args[2].target).endswith(":corrected"):
            weight_node = call.args[1]
            if weight_node.target is not ops.dequantize_weight:
                continue
            path = str(weight_node.args[0].target).split(":")[0]
            parts = [None if a is None else program.tensors[str(a.target)] for a in weight_node.args[:5]]
            quantized = ops.dequantize_weight(*parts, weight_node.args[5])
            mean, bias = means[call.name], program.tensors.read(str(call.args[2].target))
            expected = program.tensors[path] @ mean + program.tensors[str(call.args[2].target).split(":")[0]]
            got = quantized @ mean + bias
            assert torch.allclose(got, expected, atol=2e-3 * float(expected.abs().max()) + 1e-3), path
            checked += 1
    assert checked > 5
