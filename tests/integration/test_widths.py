"""What budgets of weights and of activations mean for the passes of a recipe."""

from __future__ import annotations

import pytest

from mpq_compiler.driver.options import Options
from mpq_compiler.driver.resolve import resolve


def widths(**options) -> dict[str, object]:
    named = {p.name(): p.options() for p in resolve(Options(weights=4, **options))}
    names = ("equalize", "rotate", "time-gains", "sensitivity")
    found = {name: named[name]["activations"] for name in names if name in named}
    return {**found, "time-groups": named["time-groups"]["bits"]}


ALL = (2, 3, 4, 5, 6, 7, 8)


@pytest.mark.parametrize(("budget", "nearest"), [(4, 4), (4.4, 4), (6, 6), (7.6, 8)])
def test_a_budget_below_eight_bits_mixes_all_widths(budget, nearest):
    wanted = dict.fromkeys(("equalize", "rotate", "time-gains", "time-groups"), nearest) | {"sensitivity": ALL}
    assert widths(activations=budget) == wanted


@pytest.mark.parametrize("recipe", ["dilatequant", "mpq-dm", "mpq-dmv2"])
def test_methods_of_one_width_measure_that_alone(recipe):
    assert widths(activations=4, recipe=recipe)["sensitivity"] == (4,)


def test_small_floats_have_four_bits_at_least():
    text = (
        "trace,layout,calibrate,time-groups,sensitivity{formats=fp8},bit-allocation{activation_format=float},numerics"
    )
    assert widths(activations=5, pipeline=text)["sensitivity"] == (4, 5, 6, 7, 8)


def test_widths_given_by_hand_stay():
    text = "trace,layout,calibrate,time-groups,sensitivity{activations=4/8},bit-allocation,numerics"
    assert widths(activations=5, pipeline=text)["sensitivity"] == (4, 8)
    assert widths(pipeline=text.replace("{activations=4/8}", ""))["sensitivity"] == (8,)


def judged_by(parameters: int | None = None, **options) -> set[object]:
    """The formats by which passes decide before there is a plan."""
    passes = resolve(Options(**options), parameters)
    return {getattr(p, p.format) for p in passes if p.format is not None}


@pytest.mark.parametrize(
    ("weights", "nearest"), [(1.7, "ec1.5"), (2.24, "ec2"), (4, "ec4"), (6, "ec5"), (8, "int8"), (16, "int8")]
)
def test_decisions_before_the_plan_are_by_the_format_nearest_to_the_budget(weights, nearest):
    assert judged_by(weights=weights) == {nearest}
    assert judged_by(weights=f"{round(weights * 125000)}B", parameters=10**6) == {nearest}


def test_a_budget_of_bytes_decides_on_no_format_where_the_model_is_not_known():
    assert judged_by(weights="1MB") == {"int4"}


def test_of_packed_formats_the_nearest_counts_its_scales():
    assert judged_by(weights=2.24, recipe="packed") == judged_by(weights=2.24, target="cuda-sm89") == {"int2"}
    assert judged_by(weights=3.3, recipe="packed") == {"int3"}


def test_formats_stated_by_hand_and_uniform_ones_stay():
    text = "trace,layout,equalize{weights=int3},rotate,calibrate,time-groups,sensitivity,bit-allocation,numerics"
    assert judged_by(pipeline=text, weights=8) == {"int3", "int8"}
    assert judged_by(pipeline=text.replace("bit-allocation", "bit-allocation{uniform=int2}")) == {"int3", "int2"}
