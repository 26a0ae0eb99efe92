"""Allocation by a price: every layer takes what is best for itself, and the price of the budget makes it fit."""

from __future__ import annotations

import math

from mpq_compiler.allocation.problem import GAP, Choice, Problem, Solution

STEPS = 60
"""Of the bisection: the price is as exact as a float."""


def priced(problem: Problem, price: float) -> dict[str, Choice]:
    """Of each layer the choice of least loss plus ``price`` times its cost; of equal ones that of least cost.

    Higher prices never give a higher total cost. The problem has one budget.
    """
    (cost,) = {budget.cost for budget in problem.budgets}

    def worth(choice: Choice) -> tuple[float, float, str]:
        return choice.loss + price * choice.costs[cost], choice.costs[cost], choice.name

    return {layer.name: min(layer.choices, key=worth) for layer in problem.layers}


def solve(problem: Problem) -> Solution:
    """The choices at the least price at which the one budget is met (Qua2SeDiMo, arXiv 2412.14628, sweeps it).

    No integer program: what the budget leaves between two prices is not spent. Layers are independent: there are no
    ties, links or fixed choices. The budget must be one that the smallest choices meet.
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
