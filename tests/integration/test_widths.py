"""What a budget of activations means for the passes of a recipe."""

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
def test_methods_of_one_width_measure_that_and_the_ends(recipe):
    assert widths(activations=4, recipe=recipe)["sensitivity"] == (4, 8)
    assert widths(activations=8, recipe=recipe)["sensitivity"] == (8,)


def test_one_width_without_ends_is_measured_alone():
    text = "trace,layout,calibrate,time-groups,sensitivity,bit-allocation{mixed=false},numerics"
    assert widths(activations=4, pipeline=text)["sensitivity"] == (4,)


def test_small_floats_have_four_bits_at_least():
    text = (
        "trace,layout,calibrate,time-groups,sensitivity{formats=fp8},bit-allocation{activation_format=float},numerics"
    )
    assert widths(activations=5, pipeline=text)["sensitivity"] == (4, 5, 6, 7, 8)


def test_widths_given_by_hand_stay():
    text = "trace,layout,calibrate,time-groups,sensitivity{activations=4/8},bit-allocation,numerics"
    assert widths(activations=5, pipeline=text)["sensitivity"] == (4, 8)
    assert widths(pipeline=text.replace("{activations=4/8}", ""))["sensitivity"] == (8,)
