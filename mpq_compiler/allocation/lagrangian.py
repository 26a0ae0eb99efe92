"""Lagrangian allocation: every layer minimizes loss plus price times cost, and bisection finds the budget's price."""

from __future__ import annotations

import math

from mpq_compiler.allocation.problem import GAP, Choice, Problem, Solution

STEPS = 60
"""The number of bisections, after which the price is as exact as a float."""


def priced(problem: Problem, price: float) -> dict[str, Choice]:
    """The choice of each layer at a price: the least loss plus ``price`` times cost; of equal ones the cheapest.

    A higher price never gives a higher total cost. The problem must have one budget.
    """
    (cost,) = {budget.cost for budget in problem.budgets}

    def worth(choice: Choice) -> tuple[float, float, str]:
        return choice.loss + price * choice.costs[cost], choice.costs[cost], choice.name

    return {layer.name: min(layer.choices, key=worth) for layer in problem.layers}


def solve(problem: Problem) -> Solution:
    """Solves a problem at the least price that meets its one budget (Qua2SeDiMo, arXiv 2412.14628, sweeps the price).

    This is no integer program: what the budget leaves between two prices is not spent, and `Solution.gap` bounds the
    loss of that. Layers must be independent, without ties, links or fixed choices, and the smallest choices must meet
    the budget.
    """
    assert not (problem.ties or problem.links or problem.fixed) and len(problem.budgets) == 1
    (budget,) = problem.budgets

    def total(price: float) -> float:
        return math.fsum(choice.costs[budget.cost] for choice in priced(problem, price).values())

    low, high = 0.0, 0.0
    if total(0.0) > budget.max:
        high = 1e-12
        while total(high) > budget.max:
            low, high = high, 2 * high
        for _ in range(STEPS):
            middle = (low + high) / 2
            low, high = (middle, high) if total(middle) > budget.max else (low, middle)
    chosen = priced(problem, high)
    objective = math.fsum(choice.loss for choice in chosen.values())
    least = math.fsum(min(choice.loss for choice in layer.choices) for layer in problem.layers)
    unspent = high * (budget.max - total(high))  # by weak duality no choices are better by more than this
    gap = unspent / (objective - least) if objective > least else 0.0
    return Solution(
        choices={name: choice.name for name, choice in chosen.items()},
        objective=objective,
        costs={budget.cost: total(high)},
        gap=gap,
        optimal=gap <= GAP,
    )
