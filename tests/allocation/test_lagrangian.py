"""Allocation by a price."""

from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_compiler.allocation import lagrangian, solver
from mpq_compiler.allocation.problem import Budget, Choice, Layer, Problem


def problem(seed: int, layers: int = 12, share: float = 0.5) -> Problem:
    """Scores that mostly rise with the bytes, with a budget of that share of what lies between least and most."""
    rng = random.Random(seed)
    made = []
    for i in range(layers):
        size = rng.randint(10, 1000)
        choices = [
            Choice(f"c{bits}{kind}", -rng.random() * bits * size, {"bytes": bits * size + 10 * kind})
            for bits in (3, 4)
            for kind in range(3)
        ]
        made.append(Layer(f"l{i}", tuple(choices)))
    least, most = (sum(f(c.costs["bytes"] for c in layer.choices) for layer in made) for f in (min, max))
    return Problem(tuple(made), (Budget("bytes", least + share * (most - least)),))


@pytest.mark.invariant("qua2sedimo-7")
@given(st.integers(0, 1000), st.floats(0, 5), st.floats(0, 5))
def test_a_higher_price_never_buys_more(seed, one, other):
    """Invariant: a larger coefficient of the bits never raises the bits of the configuration."""
    low, high = sorted((one, other))
    dear, cheap = (
        sum(c.costs["bytes"] for c in lagrangian.priced(problem(seed), price).values()) for price in (high, low)
    )
    assert dear <= cheap


@given(st.integers(0, 1000), st.floats(0, 1))
def test_budgets_are_met_and_the_gap_is_what_the_integer_program_shows(seed, share):
    posed = problem(seed, share=share)
    found, best = lagrangian.solve(posed), solver.solve(posed)
    assert found.costs["bytes"] <= posed.budgets[0].max
    assert found.choices.keys() == best.choices.keys()
    assert best.objective <= found.objective + 1e-9
    least = sum(min(c.loss for c in layer.choices) for layer in posed.layers)
    assert found.objective - best.objective <= found.gap * (found.objective - least) + 1e-6


def test_a_budget_that_does_not_bind_leaves_everybody_the_best():
    posed = problem(3, share=1.0)
    found = lagrangian.solve(posed)
    assert found.optimal and found.gap == 0
    assert found.choices == {layer.name: min(layer.choices, key=lambda c: c.loss).name for layer in posed.layers}


def test_larger_budgets_are_never_worse():
    losses = [lagrangian.solve(problem(8, share=share / 20)).objective for share in range(21)]
    assert losses == sorted(losses, reverse=True)
