"""Activations in small floats: their search, their plans, what they cost, and that reports call them simulated."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mpq_compiler.analysis.expected_noise import table_noise
from mpq_compiler.driver.manifest import layer_rows
from mpq_compiler.formats import activation, contract
from mpq_compiler.ir import costs, ops, printer, stored_tensors
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.findings import ALLOCATION, SENSITIVITY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.pipeline import recipes
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.fitting import Rounding
from mpq_compiler.support.errors import UserError
from tests.harness import programs
from tests.harness.tree import ROOT

MODEL = "unet2d"
MEASURED = programs.MIXED.replace("bit-allocation{", "bit-allocation{activation_format=float,").replace(
    "int2/int2+b/int8", "fp4/fp8/int8"
)
FLOAT8 = programs.SMALL_FLOATS.replace("uniform=fp4", "uniform=fp8").replace("activations=4", "activations=8")
BRANCHED = programs.SMALL_FLOATS.replace("uniform=fp4", "uniform=int2+b")


# --- the operator ---------------------------------------------------------------------------------------------


@settings(max_examples=200)
@given(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=9), st.sampled_from([(2, 4), (2, 8), (4, 8)]))
@pytest.mark.invariant("fpq-4", "fpq-5")
def test_values_scales_and_powers_of_two(values, kind):
    """Rounded once and twice alike; ``Q(2^k x; 2^k s) = 2^k Q(x; s)``; at most half a step away within the range."""
    x, group = torch.tensor([values]), torch.zeros(1, dtype=torch.int64)
    s = torch.tensor([0.37]).half()
    y = ops.fake_quantize_float(x, s, group, *kind)
    assert torch.equal(ops.fake_quantize_float(8 * x, 8 * s, group, *kind), 8 * y)
    largest = contract.float_largest(*kind) * s.float()
    inside = x.abs() <= largest
    mantissa = kind[1] - 1 - kind[0]
    step = torch.maximum(x.abs(), s.float() * 2.0 ** (1 - contract.float_bias(kind[0]))) * 2.0**-mantissa
    assert bool(((y - x).abs() <= step / 2 * (1 + 1e-5))[inside].all()) and bool((y.abs() <= largest).all())


def test_samples_have_the_scales_of_their_groups_and_gradients_pass_within_the_range():
    x = torch.tensor([[1.3, -20.0], [1.3, -20.0]], requires_grad=True)
    scale = torch.tensor([1.0, 4.0], requires_grad=True)
    y = ops.fake_quantize_float(x, scale, torch.tensor([0, 1]), 2, 4)
    assert y.tolist() == [[1.5, -6.0], [2.0, -16.0]]  # -20 is a tie: to the even code
    y.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0], [1.0, 1.0]]
    assert scale.grad[0] == pytest.approx(1.5 - 1.3 - 6.0, abs=1e-5)  # rounding error, and the end of the range


# --- the search -----------------------------------------------------------------------------------------------


def test_encodings_leave_a_mantissa():
    assert activation.exponents(4) == (2,) and activation.exponents(8) == (2, 3, 4, 5) and activation.exponents(3) == ()


@pytest.mark.parametrize("bits", [4, 6, 8])
@pytest.mark.invariant("fpq-7")
def test_the_search_is_never_worse_than_the_whole_range_of_any_encoding(bits):
    draw = torch.Generator().manual_seed(bits)
    values = [torch.randn(5000, generator=draw) ** power for power in (1, 3)]
    peaks = torch.stack([v.abs().max() for v in values])
    exponent, scale = activation.fit_floats(values, peaks, bits)
    assert exponent in activation.exponents(bits) and scale.dtype == torch.float16 and scale.shape == (2,)

    def total(s: torch.Tensor, e: int) -> float:
        return sum(float(activation.float_error(v, s[g], e, bits)) for g, v in enumerate(values))

    for other in activation.exponents(bits):
        assert total(scale, exponent) <= total((peaks / contract.float_largest(other, bits)).half(), other)


def test_heavy_tails_take_more_bits_of_exponent():
    draw = torch.Generator().manual_seed(0)
    flat, tailed = torch.rand(9000, generator=draw) * 2 - 1, torch.randn(9000, generator=draw) ** 9
    found = [activation.fit_floats([v], v.abs().max()[None], 8)[0] for v in (flat, tailed)]
    assert found[0] == 2 < found[1]


# --- plans ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("pipeline", [programs.SMALL_FLOATS, FLOAT8, BRANCHED], ids=["fp4", "fp8", "branches"])
def test_every_layer_reads_small_floats_and_is_listed_as_simulated(pipeline):
    planned = programs.after(MODEL, "bit-allocation", pipeline)
    packed = programs.after(MODEL, "fuse-epilogues", pipeline)
    width = 8 if pipeline is FLOAT8 else 4
    for plan in planned.activations.values():
        assert plan.bits == width and plan.zero_point is None and plan.exponent in activation.exponents(width)
        assert re.fullmatch(r"e2m1/t3" if width == 4 else r"e[2-5]m[2-5]/t3", plan.label(3))
    for node in planned.quantizable:
        assert "simulated" in packed.fallbacks[node.name] and "computes in float" in packed.fallbacks[node.name]
    targets = [n.target for n in packed.graph.nodes]
    for g in packed.regions.values():
        targets += [n.target for n in g.nodes]
    assert targets.count(ops.fake_quantize_float) == len(planned.activations)
    assert not {ops.quant_linear, ops.quant_conv2d, ops.quantize, ops.binary_branch} & {*targets}
    text = printer.text(packed)
    assert f"exponent=2, bits={width}" in text and "activations are simulated" in text
    assert all(row["activation"].startswith("e") and "simulated" in row["fallback"] for row in layer_rows(planned)[:20])


@pytest.mark.parametrize("pipeline", [programs.SMALL_FLOATS, FLOAT8, BRANCHED], ids=["fp4", "fp8", "branches"])
def test_the_packed_program_is_what_was_simulated_and_its_bytes_are_counted(pipeline):
    x = dict(programs.inputs(MODEL, 3))
    simulated, packed = (programs.after(MODEL, name, pipeline) for name in ("round-weights", "fuse-epilogues"))
    assert torch.equal(run_exact(simulated, x), run(packed, x))
    stored = sum(s.array.nbytes for s in stored_tensors.stored(packed).values())
    assert stored == costs.stored_bytes(programs.after(MODEL, "bit-allocation", pipeline))


def test_the_noise_of_a_search_is_at_most_that_of_the_range():
    planned = programs.after(MODEL, "bit-allocation", FLOAT8)
    for edge, plan in planned.activations.items():
        found = table_noise(planned, edge, plan)
        assert (found.measured <= found.expected * 1.05 + 1e-12).all()  # the search saw a part of the values


# --- measured and allocated -----------------------------------------------------------------------------------


def test_sensitivities_are_those_of_small_floats_and_formats_mix():
    table = programs.after(MODEL, "sensitivity", MEASURED).facts[SENSITIVITY]
    integers = programs.after(MODEL, "sensitivity").facts[SENSITIVITY]
    assert table["floating"] and not integers["floating"]
    assert table["activations"].keys() == integers["activations"].keys()
    assert table["activations"] != integers["activations"]
    planned = programs.after(MODEL, "bit-allocation", MEASURED)
    assert {plan.format for plan in planned.weights.values()} <= {"fp4", "fp8", "int8"}
    assert len({plan.format for plan in planned.weights.values()}) > 1
    assert all(plan.exponent is not None for plan in planned.activations.values())
    allocation = planned.facts[ALLOCATION]
    assert all(choice.endswith("f8") for choice in allocation["choices"].values())


def test_sensitivities_of_the_other_kind_are_refused():
    program = programs.after(MODEL, "sensitivity").fork()
    with pytest.raises(UserError, match="those of activations in integers, and bit-allocation plans small floats"):
        BitAllocation(weights=6.0, activation_format="float").run(program, Session())


@pytest.mark.parametrize(
    "options, message",
    [
        ("activation_format=float,activations=3", "'activations'.* 4"),
        ("activation_format=float,attention=8", "attention.*exclude each other"),
        ("activation_format=float,dynamic=true", "dynamic.*exclude each other"),
        ("activation_format=float,latency=3", "latency.*exclude each other"),
        ("activation_format=fp8", "activation_format"),
    ],
)
def test_what_small_floats_are_not_for_is_refused_by_name(options, message):
    with pytest.raises(UserError, match=message):
        parse(f"bit-allocation{{uniform=int8,{options}}}")


def test_sensitivities_stand_in_gptq_for_learned_rounding():
    learned = parse("sensitivity,round-weights{method=learned}")
    tasks = learned[0].tasks(programs.after(MODEL, "time-groups"), learned[1].requests())
    assert {task.rounding for task in tasks} == {Rounding.GPTQ}
    assert learned[1].requests().rounding == Rounding.LEARNED


def test_the_recipe_lists_what_the_method_is():
    made = {each.name(): each for each in recipes.load("fpq").passes()}
    assert made["sensitivity"].formats == ("fp4", "fp8")
    assert made["bit-allocation"].floating and made["round-weights"].method == "learned"
    page = (ROOT / "docs" / "recipes" / "fpq.md").read_text()
    assert "# `fpq`" in page and "arXiv 2408.06995" in page and "simulated" in page
