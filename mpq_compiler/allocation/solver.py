"""Solves allocation problems, multiple-choice knapsacks, to optimality with HiGHS."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from mpq_compiler.allocation.problem import GAP, Budget, Choice, InfeasibleError, Layer, Problem, Solution
from mpq_compiler.support.errors import UserError

TIME_LIMIT = 60.0
"""Seconds after which a search ends by default."""

_REPAIRS = 10  # times that a solution which exceeds a budget by the solver's tolerance is repaired
_ROUNDING = 1e-12
"""The relative excess of a sum over its budget that counts as rounding, for sums such as 0.1 + 0.2 <= 0.3."""


def solve(problem: Problem, gap: float = GAP, time_limit: float = TIME_LIMIT) -> Solution:
    """Finds the allocation of least summed loss under all budgets, ties, links and fixed choices.

    The result is deterministic: one thread searches, and the order of layers and choices does not matter. Of choices
    that are equal in loss, costs and linked attributes the first by name is taken. Losses and costs may be negative.

    Args:
        problem: the allocation problem.
        gap: the search stops when the loss is proven to be within this relative distance of the optimum.
        time_limit: seconds, after which the best allocation found so far is returned.

    Raises:
        InfeasibleError: no allocation meets the constraints.
        UserError: the time ran out before any allocation was found.
    """
    if not (math.isfinite(gap) and gap >= 0) or not time_limit > 0:
        raise UserError("the gap must be 0 or more and the time limit more than 0 seconds")
    deadline = time.monotonic() + time_limit
    units = _units(problem)
    rows = [_Row(budget.max, _cost_of(i)) for i, budget in enumerate(problem.budgets)]
    found = _minimize(units, lambda option: option.loss, rows, gap, deadline)
    if found is None:
        raise _infeasible(problem, units, rows, time_limit)
    chosen = {name: choice for unit, o in zip(units, found.options, strict=True) for name, choice in o.members.items()}
    choices = {layer.name: chosen[layer.name].name for layer in problem.layers}
    return Solution(
        choices=choices,
        objective=math.fsum(choice.loss for choice in chosen.values()),
        costs={
            cost: math.fsum(choice.costs.get(cost, 0.0) for choice in chosen.values())
            for cost in sorted({cost for layer in problem.layers for choice in layer.choices for cost in choice.costs})
        },
        gap=found.gap,
        optimal=found.gap <= gap,
    )


# Solving


@dataclass(frozen=True)
class _Option:
    """A choice of a unit, which is one layer or several that are tied."""

    members: dict[str, Choice]
    """The choice of each layer by its name."""
    loss: float
    costs: tuple[float, ...]
    """The unit's part of each budget's cost, in the order of the budgets."""
    links: dict[int, str]
    """The value of the linked attribute, by the index of the link."""


@dataclass(frozen=True)
class _Row:
    """A constraint: the sum of `cost` over the chosen options is at most `most`."""

    most: float
    cost: Callable[[_Option], float]


@dataclass(frozen=True)
class _Found:
    options: list[_Option]
    gap: float


def _cost_of(budget: int) -> Callable[[_Option], float]:
    return lambda option: option.costs[budget]


def _units(problem: Problem) -> list[list[_Option]]:
    """The options of every unit that ties and fixed choices leave, without dominated ones.

    They are sorted by name, so that the order in which a problem is written has no influence.
    """
    parent = {layer.name: layer.name for layer in problem.layers}

    def root(name: str) -> str:
        while parent[name] != name:
            name = parent[name]
        return name

    for tie in problem.ties:
        for name in tie[1:]:
            a, b = sorted((root(tie[0]), root(name)))
            parent[b] = a
    members: dict[str, list[Layer]] = {}
    for layer in sorted(problem.layers, key=lambda layer: layer.name):
        members.setdefault(root(layer.name), []).append(layer)

    units = []
    for layers in members.values():
        names = set.intersection(*({choice.name for choice in layer.choices} for layer in layers))
        if not names:
            raise UserError(f"the tied layers {', '.join(layer.name for layer in layers)} have no choice in common")
        wanted = {problem.fixed[layer.name] for layer in layers if layer.name in problem.fixed}
        if len(wanted) > 1 or not wanted <= names:
            raise UserError(
                f"the tied layers {', '.join(layer.name for layer in layers)} are fixed to choices that they "
                f"cannot share: {', '.join(sorted(wanted))}"
            )
        options = []
        for name in sorted(wanted or names):
            chosen = {layer.name: next(c for c in layer.choices if c.name == name) for layer in layers}
            values: dict[int, str] = {}
            agree = True
            for i, link in enumerate(problem.links):
                own = {chosen[layer].attributes[link.attribute] for layer in link.layers if layer in chosen}
                agree &= len(own) <= 1
                if own:
                    values[i] = min(own)
            if agree:
                options.append(_option(problem, layers, chosen, values))
        units.append(_undominated(options))
    return units


def _option(problem: Problem, layers: Sequence[Layer], chosen: dict[str, Choice], links: dict[int, str]) -> _Option:
    costs = tuple(
        math.fsum(chosen[layer.name].costs[b.cost] for layer in layers if b.group in (None, layer.group))
        for b in problem.budgets
    )
    return _Option(chosen, math.fsum(choice.loss for choice in chosen.values()), costs, links)


def _undominated(options: list[_Option]) -> list[_Option]:
    """Drops the options that are no better than another in any respect; the first of equal ones stays."""

    def dominates(a: int, b: int) -> bool:
        p, q = options[a], options[b]
        if p.links != q.links or p.loss > q.loss or any(x > y for x, y in zip(p.costs, q.costs, strict=True)):
            return False
        return (p.loss, p.costs) != (q.loss, q.costs) or a < b

    count = range(len(options))
    return [options[i] for i in count if not any(dominates(k, i) for k in count if k != i)]


def _minimize(
    units: list[list[_Option]],
    objective: Callable[[_Option], float],
    rows: Sequence[_Row],
    gap: float,
    deadline: float,
) -> _Found | None:
    """Finds one option per unit with the least summed objective under `rows` and all links; None if infeasible.

    The solver's tolerances are absolute, and losses span many magnitudes. So every unit's least objective and least
    cost are subtracted, every row is scaled by the slack that is left, and the objective is rescaled until its best
    value has the magnitude of 1000. Options dearer than the best value or than a slack are dropped on the way.

    Args:
        units: the options of each unit.
        objective: the summand of an option.
        rows: the budgets.
        gap: the relative gap to stop at.
        deadline: the `time.monotonic()` at which the search ends.
    """
    if not units:
        return _Found([], 0.0)
    if any(not options for options in units):
        return None
    values = [np.array([objective(option) for option in options]) for options in units]
    values = [value - value.min() for value in values]
    keep = [np.ones(len(options), bool) for options in units]
    loads = []
    for row in rows:
        costs = [np.array([row.cost(option) for option in options]) for options in units]
        least = math.fsum(cost.min() for cost in costs)
        slack = row.most - least
        room = slack + _ROUNDING * max(abs(row.most), math.fsum(abs(cost.min()) for cost in costs))
        if room < 0:
            return None
        for kept, cost in zip(keep, costs, strict=True):
            kept &= cost - cost.min() <= room
        loads.append([(cost - cost.min()) / (slack if slack > 0 else 1.0) for cost in costs])
    if any(not kept.any() for kept in keep):
        return None

    best: list[int] | None = None
    upper, lower = max(float(v[kept].max()) for v, kept in zip(values, keep, strict=True)), 0.0
    rough = True
    while True:
        scale = upper / 1000 if upper > 0 else 1.0
        model = _Model(units, [v / scale for v in values], keep, loads)
        answer = model.run(1e-2 if rough else gap, deadline, best)
        if answer is None:
            break
        picked, bound = answer
        total = math.fsum(float(v[i]) for v, i in zip(values, picked, strict=True))
        if best is None or total < upper:
            best, upper = picked, total
        # A bound that is small beside the scale is within the solver's tolerance of anything.
        lower = bound * scale if upper >= 100 * scale else 0.0
        if upper == 0 or not rough:
            break
        rough = upper < 100 * scale
        for kept, value in zip(keep, values, strict=True):
            kept &= value <= upper
    if best is None:
        return None
    left = max(0.0, 1 - lower / upper) if upper > 0 else 0.0
    return _Found([options[i] for options, i in zip(units, best, strict=True)], left)


class _Model:
    """The scaled binary program: x[u, o] = 1 where unit u takes option o, over the kept options."""

    def __init__(
        self,
        units: list[list[_Option]],
        values: list[np.ndarray],
        keep: list[np.ndarray],
        loads: list[list[np.ndarray]],
    ) -> None:
        self.picks = [(u, int(i)) for u, kept in enumerate(keep) for i in np.flatnonzero(kept)]
        self.costs = np.array([values[u][i] for u, i in self.picks])
        self.loads = [np.array([load[u][i] for u, i in self.picks]) for load in loads]
        columns: list[list[int]] = [[] for _ in units]
        for column, (u, _) in enumerate(self.picks):
            columns[u].append(column)
        self.equal: list[tuple[list[int], list[float], float]] = [(c, [1.0] * len(c), 1.0) for c in columns]
        self.equal += self._links(units, columns)

    def _links(
        self, units: list[list[_Option]], columns: list[list[int]]
    ) -> Iterable[tuple[list[int], list[float], float]]:
        """Equations of the links: every linked unit chooses each value as often as the first linked unit does."""
        numbers = sorted({link for options in units for option in options for link in option.links})
        for link in numbers:
            with_value: list[dict[str, list[int]]] = []
            for columns_of_unit in columns:
                by_value: dict[str, list[int]] = {}
                for column in columns_of_unit:
                    u, i = self.picks[column]
                    if link in units[u][i].links:
                        by_value.setdefault(units[u][i].links[link], []).append(column)
                if by_value:
                    with_value.append(by_value)
            for other in with_value[1:]:
                for value in sorted(with_value[0].keys() | other.keys()):
                    plus, minus = with_value[0].get(value, []), other.get(value, [])
                    yield [*plus, *minus], [1.0] * len(plus) + [-1.0] * len(minus), 0.0

    def run(self, gap: float, deadline: float, start: list[int] | None) -> tuple[list[int], float] | None:
        """Solves the program: the option of every unit, and a lower bound of the objective; None if infeasible.

        Args:
            gap: the relative gap to stop at.
            deadline: the `time.monotonic()` at which the search ends.
            start: an answer to begin with, which is returned if the time runs out before a better one is found.

        Raises:
            UserError: the time ran out before any answer was found.
        """
        limits = np.ones(len(self.loads))
        lower = None
        for _ in range(_REPAIRS):
            answer = self._solve(limits, gap, deadline, start)
            if answer is None:
                return None
            x, bound = answer
            lower = bound if lower is None else lower
            # The solver's feasibility is approximate and a budget is not: tighten what it exceeded.
            excess = [math.fsum(load[x]) - 1 for load in self.loads]
            if all(over <= _ROUNDING for over in excess):
                return [self.picks[column][1] for column in np.flatnonzero(x)], lower
            limits = np.array([limit - 2 * max(over, 0) for limit, over in zip(limits, excess, strict=True)])
        return None

    def _solve(
        self, limits: np.ndarray, gap: float, deadline: float, start: list[int] | None
    ) -> tuple[np.ndarray, float] | None:
        import highspy

        count = len(self.picks)
        rows = [(np.arange(count), load, -np.inf, limit) for load, limit in zip(self.loads, limits, strict=True)]
        rows += [(np.array(index), np.array(value), right, right) for index, value, right in self.equal]
        model = highspy.HighsLp()
        model.num_col_, model.num_row_ = count, len(rows)
        model.col_cost_, model.col_lower_, model.col_upper_ = self.costs, np.zeros(count), np.ones(count)
        model.integrality_ = [highspy.HighsVarType.kInteger] * count
        model.row_lower_ = np.array([row[2] for row in rows])
        model.row_upper_ = np.array([row[3] for row in rows])
        model.a_matrix_.format_ = highspy.MatrixFormat.kRowwise
        model.a_matrix_.start_ = np.cumsum([0, *(len(row[0]) for row in rows)]).astype(np.int32)
        model.a_matrix_.index_ = np.concatenate([row[0] for row in rows]).astype(np.int32)
        model.a_matrix_.value_ = np.concatenate([row[1] for row in rows])
        solver = highspy.Highs()
        for option, value in {
            "output_flag": False,
            "threads": 1,
            "random_seed": 0,
            "mip_rel_gap": gap,
            "mip_abs_gap": 0.0,
            "mip_feasibility_tolerance": 1e-9,
            "primal_feasibility_tolerance": 1e-9,
            "dual_feasibility_tolerance": 1e-9,
            "time_limit": max(deadline - time.monotonic(), 0.01),
        }.items():
            solver.setOptionValue(option, value)
        solver.passModel(model)
        if start is not None:
            known = highspy.HighsSolution()
            known.col_value = [float(start[u] == i) for u, i in self.picks]
            solver.setSolution(known)
        # In a thread of its own, for Ctrl-C to end it: Python does not see the signal while it waits for C++. It is
        # asked whether it has ended: up to Python 3.12 a join that Ctrl-C ends takes the thread for one that has.
        solver.HandleUserInterrupt = True
        solver.startSolve()
        try:
            while not solver.wait(0.1)[0]:
                pass
        except KeyboardInterrupt:
            solver.cancelSolve()
            solver.wait()
            raise
        status, info = solver.getModelStatus(), solver.getInfo()
        if status == highspy.HighsModelStatus.kInfeasible:
            return None
        if info.primal_solution_status != highspy.SolutionStatus.kSolutionStatusFeasible:
            raise UserError(
                "the time limit ended the search before an allocation within the budgets was found; raise it"
            )
        return np.array(solver.getSolution().col_value) > 0.5, max(info.mip_dual_bound, 0.0)


def _infeasible(problem: Problem, units: list[list[_Option]], rows: list[_Row], time_limit: float) -> InfeasibleError:
    """The error that says what value every budget would need."""
    least: dict[Budget, float | None] = {}
    clauses = []

    def least_of(row: _Row, others: Sequence[_Row]) -> float | None:
        found = _minimize(units, row.cost, others, 1e-9, time.monotonic() + time_limit)
        return None if found is None else math.fsum(row.cost(option) for option in found.options)

    for budget, row in zip(problem.budgets, rows, strict=True):
        others = [other for other in rows if other is not row]
        least[budget] = value = least_of(row, others)
        if value is not None:
            clauses.append(f"{budget} (at most {_up(budget.max)}) is {_up(value)} at the least with the others kept")
        elif (alone := least_of(row, [])) is not None:
            clauses.append(f"{budget} (at most {_up(budget.max)}) is {_up(alone)} at the least whatever the others")
    if not clauses:
        return InfeasibleError("the ties, links and fixed choices exclude each other: no allocation keeps them", least)
    return InfeasibleError("no allocation meets the budgets: " + "; ".join(clauses), least)


def _up(value: float) -> str:
    """Formats a value in ten digits, or in all where ten name a smaller number, which would not suffice as a budget."""
    text = f"{value:.10g}"
    return text if float(text) >= value else repr(value)
