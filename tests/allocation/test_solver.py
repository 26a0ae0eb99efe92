"""The allocator against brute force, and the properties that its answers must have."""

from __future__ import annotations

import itertools
import json
import math
import random
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import scipy.optimize

from mpq_compiler import schemas
from mpq_compiler.allocation.problem import Budget, Choice, InfeasibleError, Layer, Link, Problem
from mpq_compiler.allocation.solver import solve
from mpq_compiler.support.errors import UserError


def random_problem(seed: int) -> Problem:
    """Up to 6 layers in two groups, 2 to 4 choices, two budgets, at times ties, links and fixed choices."""
    rng = random.Random(seed)
    layers = []
    for i in range(rng.randint(1, 6)):
        names = rng.sample(["int2", "int3", "int4", "int8"], rng.randint(2, 4))
        choices = tuple(
            Choice(
                name,
                rng.choice([rng.uniform(-1, 1), rng.lognormvariate(-8, 4), rng.randint(-1, 1)]),
                {"bits": float(rng.randint(0, 40)), "time": rng.uniform(0, 1)},
                {"activation": rng.choice(["u8", "u4"])},
            )
            for name in names
        )
        layers.append(Layer(f"layer{i}", choices, rng.choice(["content", "quality"])))
    names = [layer.name for layer in layers]
    groups = sorted({layer.group for layer in layers})
    ties = (tuple(rng.sample(names, 2)),) if len(names) > 2 and rng.random() < 0.5 else ()
    links = (Link(tuple(rng.sample(names, 3)), "activation"),) if len(names) > 3 and rng.random() < 0.4 else ()
    fixed = {}
    if rng.random() < 0.3:
        layer = rng.choice(layers)
        fixed[layer.name] = rng.choice(layer.choices).name

    def budget(cost: str, group: str | None = None) -> Budget:
        members = [layer for layer in layers if group in (None, layer.group)]
        least = sum(min(choice.costs[cost] for choice in layer.choices) for layer in members)
        most = sum(max(choice.costs[cost] for choice in layer.choices) for layer in members)
        limit = least + rng.uniform(-0.02, 1.0) * (most - least)
        return Budget(cost, math.floor(limit) if cost == "bits" else limit, group)

    return Problem(tuple(layers), (budget("bits"), budget("time", rng.choice(groups))), ties, fixed, links)


def brute_force(problem: Problem, budgets: tuple[Budget, ...] | None = None) -> list[dict[str, Choice]]:
    """Every allocation that keeps all constraints."""
    budgets = problem.budgets if budgets is None else budgets
    kept = []
    for picked in itertools.product(*(layer.choices for layer in problem.layers)):
        chosen = {layer.name: choice for layer, choice in zip(problem.layers, picked, strict=True)}
        if (
            all(chosen[name].name == choice for name, choice in problem.fixed.items())
            and all(len({chosen[name].name for name in tie}) == 1 for tie in problem.ties)
            and all(
                len({chosen[name].attributes[link.attribute] for name in link.layers}) == 1 for link in problem.links
            )
            and all(used(problem, chosen, budget) <= budget.max * (1 + 1e-12) for budget in budgets)
        ):
            kept.append(chosen)
    return kept


def used(problem: Problem, chosen: dict[str, Choice], budget: Budget) -> float:
    return math.fsum(
        chosen[layer.name].costs[budget.cost] for layer in problem.layers if budget.group in (None, layer.group)
    )


def loss(chosen: dict[str, Choice]) -> float:
    return math.fsum(choice.loss for choice in chosen.values())


def shared_choices(problem: Problem) -> bool:
    by_name = {layer.name: {choice.name for choice in layer.choices} for layer in problem.layers}
    for tie in problem.ties:
        common = set.intersection(*(by_name[name] for name in tie))
        if not common or any(problem.fixed.get(name, min(common)) not in common for name in tie):
            return False
    return True


@pytest.mark.parametrize("block", range(20))
@pytest.mark.invariant("allocator-1", "allocator-2", "allocator-8")
def test_equals_brute_force(block):
    for seed in range(10 * block, 10 * block + 10):
        problem = random_problem(seed)
        allowed = brute_force(problem)
        if allowed:
            solution = solve(problem)
            least = min(map(loss, allowed))
            assert solution.optimal
            assert solution.objective == pytest.approx(least, rel=1e-6, abs=1e-9), seed
            by_name = {layer.name: {choice.name: choice for choice in layer.choices} for layer in problem.layers}
            chosen = {name: by_name[name][choice] for name, choice in solution.choices.items()}
            assert chosen in allowed
            assert solution.objective == loss(chosen)
            assert solution.costs["bits"] == sum(choice.costs["bits"] for choice in chosen.values())
        elif shared_choices(problem):
            with pytest.raises(InfeasibleError) as caught:
                solve(problem)
            for budget in problem.budgets:
                others = tuple(other for other in problem.budgets if other is not budget)
                costs = [used(problem, chosen, budget) for chosen in brute_force(problem, others)]
                expected = pytest.approx(min(costs), rel=1e-9) if costs else None
                assert caught.value.least[budget] == expected, seed
        else:
            with pytest.raises(UserError):
                solve(problem)


def test_brute_force_has_both_kinds_of_problems():
    feasible = sum(bool(brute_force(random_problem(seed))) for seed in range(200))
    assert 100 <= feasible <= 180


def network(layers: int, seed: int = 0) -> Problem:
    """A network's worth of layers: sizes and sensitivities over many magnitudes, 4 widths, 2 budgets."""
    rng = random.Random(seed)
    made = []
    for i in range(layers):
        size, loss_of_one = round(rng.lognormvariate(11, 1.5)), rng.lognormvariate(-14, 3)
        macs = size * rng.lognormvariate(3, 1)
        choices = tuple(
            Choice(
                f"int{bits}",
                loss_of_one * 4.0**-bits * rng.lognormvariate(0, 0.2),
                {"bits": float(size * bits + 512), "bops": macs * bits * 8},
            )
            for bits in (2, 3, 4, 8)
        )
        made.append(Layer(f"layer{i}", choices, rng.choice(["content", "quality"])))
    most = {cost: sum(layer.choices[2].costs[cost] for layer in made) for cost in ("bits", "bops")}
    return Problem(tuple(made), (Budget("bits", 0.9 * most["bits"]), Budget("bops", 0.95 * most["bops"])))


@pytest.mark.parametrize("seed", range(4))
def test_800_layers_are_solved_to_optimality_in_seconds(seed):
    problem = network(800, seed)
    begun = time.process_time()  # others on the machine take none of it
    solution = solve(problem)
    assert time.process_time() - begun < 5
    assert solution.optimal and 0 <= solution.gap <= 1e-6
    assert solution.costs["bits"] <= problem.budgets[0].max
    assert solution.costs["bops"] <= problem.budgets[1].max


@pytest.mark.invariant("allocator-3")
def test_larger_budgets_are_never_worse():
    problem = network(30)
    before = math.inf
    for factor in (0.6, 0.7, 0.8, 0.9, 1.0, 1.3, 3.0):
        budgets = tuple(replace(budget, max=budget.max * factor) for budget in problem.budgets)
        found = solve(replace(problem, budgets=budgets)).objective
        assert found <= before * (1 + 1e-6)
        before = found
    unlimited = solve(replace(problem, budgets=()))
    assert set(unlimited.choices.values()) == {"int8"} and unlimited.gap == 0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.invariant("allocator-4")
def test_the_relaxation_bounds_the_optimum_and_leaves_a_layer_a_budget_open(seed):
    problem = network(60, seed)
    solution = solve(problem)
    choices = [(i, choice) for i, layer in enumerate(problem.layers) for choice in layer.choices]
    unit = max(choice.loss for _, choice in choices)
    relaxed = scipy.optimize.linprog(
        [choice.loss / unit for _, choice in choices],
        A_ub=[[choice.costs[budget.cost] / budget.max for _, choice in choices] for budget in problem.budgets],
        b_ub=[1.0] * len(problem.budgets),
        A_eq=[[float(i == row) for i, _ in choices] for row in range(len(problem.layers))],
        b_eq=[1.0] * len(problem.layers),
        method="highs-ds",  # whose optimum is a vertex
    )
    assert relaxed.fun * unit <= solution.objective * (1 + 1e-9) and solution.gap <= 1e-6
    undecided = {i for (i, _), share in zip(choices, relaxed.x, strict=True) if 1e-6 < share < 1 - 1e-6}
    assert 0 < len(undecided) <= len(problem.budgets)
    mixed = sum(c.loss * x for (i, c), x in zip(choices, relaxed.x, strict=True) if i in undecided)
    smallest = [min(problem.layers[i].choices, key=lambda choice: choice.costs["bits"]) for i in undecided]
    assert all(c.costs["bops"] == min(o.costs["bops"] for o in problem.layers[i].choices)
               for i, c in zip(undecided, smallest, strict=True))  # so that they keep the budgets
    assert solution.objective <= relaxed.fun * unit - mixed + sum(choice.loss for choice in smallest)


@pytest.mark.invariant("allocator-9")
def test_a_group_that_outweighs_the_others_is_served_as_if_alone():
    problem = network(30)

    def content(weight: float, others: float) -> float:
        """Its loss, in the optimum of losses that are weighted so."""
        layers = []
        for layer in problem.layers:
            factor = weight if layer.group == "content" else others
            choices = (replace(choice, loss=factor * choice.loss) for choice in layer.choices)
            layers.append(replace(layer, choices=tuple(choices)))
        chosen = solve(replace(problem, layers=tuple(layers))).choices
        members = [layer for layer in problem.layers if layer.group == "content"]
        return math.fsum(c.loss for layer in members for c in layer.choices if c.name == chosen[layer.name])

    alone = content(1, 0)
    assert content(1e6, 1) == pytest.approx(alone, rel=1e-5) and content(1, 1) > 1.01 * alone


@pytest.mark.invariant("allocator-10")
def test_the_order_in_which_a_problem_is_written_has_no_influence():
    problem = network(60)
    expected = solve(problem)
    rng = random.Random(1)
    layers = [replace(layer, choices=tuple(rng.sample(layer.choices, 4))) for layer in problem.layers]
    rng.shuffle(layers)
    shuffled = solve(replace(problem, layers=tuple(layers), budgets=problem.budgets[::-1]))
    assert shuffled == expected
    assert list(solve(problem).choices) == [layer.name for layer in problem.layers]


@pytest.mark.parametrize(("loss_scale", "cost_scale"), [(2.0**-40, 1.0), (1e-6, 1e3), (1e9, 1e-6)])
@pytest.mark.invariant("allocator-7")
def test_units_of_measure_have_no_influence(loss_scale, cost_scale):
    problem = network(60)
    scaled = Problem(
        tuple(
            replace(
                layer,
                choices=tuple(
                    replace(
                        choice,
                        loss=choice.loss * loss_scale,
                        costs={name: cost * cost_scale for name, cost in choice.costs.items()},
                    )
                    for choice in layer.choices
                ),
            )
            for layer in problem.layers
        ),
        tuple(replace(budget, max=budget.max * cost_scale) for budget in problem.budgets),
    )
    assert solve(scaled).choices == solve(problem).choices


def test_a_constant_added_to_all_losses_has_no_influence():
    problem = network(40)
    shifted = tuple(
        replace(layer, choices=tuple(replace(choice, loss=choice.loss - 1e-3) for choice in layer.choices))
        for layer in problem.layers
    )
    assert solve(replace(problem, layers=shifted)).choices == solve(problem).choices


def test_equal_choices_are_told_apart_by_name():
    choices = tuple(Choice(name, 1.0, {"bits": 4.0}) for name in ("nf4", "fp4", "int4"))
    problem = Problem((Layer("a", choices), Layer("b", choices[::-1])), (Budget("bits", 8.0),))
    assert solve(problem).choices == {"a": "fp4", "b": "fp4"}


def test_a_budget_is_met_to_the_last_byte():
    choices = (Choice("small", 1.0, {"bytes": 10.0**9 - 1}), Choice("large", 0.0, {"bytes": 10.0**9}))
    layers = tuple(Layer(f"l{i}", choices) for i in range(8))
    for most, large in ((8 * 10**9, 8), (8 * 10**9 - 1, 7), (8 * 10**9 - 8, 0)):
        solution = solve(Problem(layers, (Budget("bytes", most),)))
        assert solution.objective == 8 - large and solution.costs["bytes"] <= most


def test_losses_of_very_different_magnitude_are_all_respected():
    """The optimum hangs on losses 1e-12 times the largest one."""
    tiny = tuple(
        Layer(f"t{i}", (Choice("a", 1e-12 * (i + 1), {"bits": 1.0}), Choice("b", 0.0, {"bits": 2.0}))) for i in range(5)
    )
    huge = Layer("huge", (Choice("a", 1.0, {"bits": 1.0}), Choice("b", 0.0, {"bits": 2.0})))
    solution = solve(Problem((*tiny, huge), (Budget("bits", 9.0),)))
    assert solution.choices == {"t0": "a", "t1": "a", "t2": "a", "t3": "b", "t4": "b", "huge": "b"}


@pytest.mark.invariant("allocator-2")
def test_infeasible_budgets_are_told_what_they_can_be():
    def layer(name: str, group: str, costs: list[tuple[float, float]]) -> Layer:
        return Layer(name, tuple(Choice(f"c{i}", -i, {"bits": b, "time": t}) for i, (b, t) in enumerate(costs)), group)

    layers = (layer("x", "content", [(1, 9), (5, 2)]), layer("y", "quality", [(2, 7), (6, 1)]))
    with pytest.raises(InfeasibleError) as caught:
        solve(Problem(layers, (Budget("bits", 6), Budget("time", 8, "content"), Budget("time", 4))))
    assert str(caught.value) == (
        "no allocation meets the budgets: bits (at most 6) is 11 at the least with the others kept; "
        "time of group 'content' (at most 8) is 2 at the least whatever the others; "
        "time (at most 4) is 3 at the least whatever the others"
    )
    assert list(caught.value.least.values()) == [11, None, None]
    with pytest.raises(InfeasibleError) as caught:
        solve(Problem(layers, (Budget("bits", 2), Budget("time", 1))))
    assert "bits (at most 2) is 3 at the least whatever the others" in str(caught.value)
    assert "time (at most 1) is 3 at the least whatever the others" in str(caught.value)
    assert set(caught.value.least.values()) == {None}


def test_constraints_that_exclude_each_other():
    layers = (
        Layer("x", (Choice("c", 0.0, {}, {"a": "u8"}),)),
        Layer("y", (Choice("c", 0.0, {}, {"a": "u4"}),)),
        Layer("z", (Choice("d", 0.0, {}), Choice("e", 0.0, {}))),
    )
    with pytest.raises(InfeasibleError, match="exclude each other"):
        solve(Problem(layers, links=(Link(("x", "y"), "a"),)))
    with pytest.raises(UserError, match="no choice in common"):
        solve(Problem(layers, ties=(("x", "z"),)))


def test_nothing_to_allocate():
    solution = solve(Problem(()))
    assert (solution.choices, solution.objective, solution.optimal) == ({}, 0.0, True)


def test_the_time_limit_is_kept():
    for problem in (network(800), hard_problem()):  # the second takes minutes
        begun = time.process_time()
        try:
            solution = solve(problem, gap=0.0, time_limit=0.05)
            assert solution.gap > 0 and not solution.optimal
        except UserError as error:
            assert "time limit" in str(error)
        assert time.process_time() - begun < 2


def hard_problem() -> Problem:
    """Losses that are the negated sum of five costs, as in subset sum: nothing to prune by."""
    rng = random.Random(0)
    layers = []
    for i in range(60):
        choices = []
        for k in range(3):
            costs = {f"cost{j}": float(rng.randint(100, 1000) * k) for j in range(5)}
            choices.append(Choice(f"c{k}", -sum(costs.values()), costs))
        layers.append(Layer(f"layer{i}", tuple(choices)))
    return Problem(tuple(layers), tuple(Budget(f"cost{j}", 30000.0 + 1000 * j) for j in range(5)))


def test_when_the_time_ends_the_best_so_far_is_returned_with_its_gap():
    solution = solve(hard_problem(), gap=0.0, time_limit=1.0)
    assert not solution.optimal and 0 < solution.gap < 0.1
    assert all(solution.costs[budget.cost] <= budget.max for budget in hard_problem().budgets)


def test_ctrl_c_ends_the_search():
    script = (
        "import signal, threading, time; from tests.allocation.test_solver import hard_problem; "
        "from mpq_compiler.allocation.solver import solve; begun = time.monotonic(); "
        "threading.Timer(1, signal.raise_signal, [signal.SIGINT]).start()\n"
        "try: solve(hard_problem(), gap=0.0)\n"
        "except KeyboardInterrupt: print('interrupted', time.monotonic() - begun < 20)"
    )
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, capture_output=True, text=True, timeout=50)
    assert (done.stdout, done.stderr, done.returncode) == ("interrupted True\n", "", 0)


DOCUMENT = {
    "version": 1,
    "layers": [
        {
            "name": "conv_in",
            "group": "quality",
            "choices": [
                {"name": "int4", "loss": 0.31, "costs": {"bits": 1152}, "attributes": {"activation": "u8"}},
                {"name": "int8", "loss": 0, "costs": {"bits": 2304}, "attributes": {"activation": "u8"}},
            ],
        },
        {
            "name": "conv_out",
            "group": "content",
            "choices": [{"name": "int8", "loss": -0.5, "costs": {"bits": 99}, "attributes": {"activation": "u8"}}],
        },
    ],
    "budgets": [{"cost": "bits", "max": 81234.5}, {"cost": "bits", "max": 4000, "group": "content"}],
    "ties": [["conv_in", "conv_out"]],
    "fixed": {"conv_out": "int8"},
    "links": [{"layers": ["conv_in", "conv_out"], "attribute": "activation"}],
}


def test_documents():
    problem = Problem.from_json(json.loads(json.dumps(DOCUMENT)))
    assert problem.to_json() == DOCUMENT and Problem.from_json(problem.to_json()) == problem
    solution = solve(problem).to_json()
    assert solution["choices"] == {"conv_in": "int8", "conv_out": "int8"} and solution["optimal"] is True
    assert schemas.check(json.loads(json.dumps(solution)), "allocation-solution") is None


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "'version' must be 1"),
        (["layers"], {}, r"'layers' must be array"),
        (["layers", 0, "choices"], [], r"'layers\[0\]\.choices' must have at least 1"),
        (["layers", 0, "choices", 1, "loss"], "low", r"'layers\[0\]\.choices\[1\]\.loss' must be number"),
        (
            ["layers", 0, "choices", 1, "loss"],
            float("nan"),
            r"'layers\[0\]\.choices\[1\]\.loss' must be a finite",
        ),
        (["layers", 0, "choices", 1, "loss"], 10**400, r"'layers\[0\]\.choices\[1\]\.loss' must be a finite"),
        (["layers", 0, "choices", 1, "costs", "bits"], True, r"costs\.bits' must be number"),
        (
            ["layers", 0, "choices", 1, "costs"],
            {},
            "budgets\\[0\\].cost is 'bits', which the choice 'int8' of 'conv_in'",
        ),
        (["layers", 0, "choices", 1, "name"], "int4", "two choices named 'int4'"),
        (["layers", 1, "name"], "conv_in", r"layers\[1\]\.name 'conv_in'"),
        (["layers", 1, "chioces"], [], "unknown key 'chioces'"),
        (["budgets", 0, "max"], None, r"'budgets\[0\]\.max' must be number"),
        (["budgets", 0, "max"], math.inf, r"'budgets\[0\]\.max' must be a finite"),
        (
            ["budgets", 1, "group"],
            "contents",
            r"budgets\[1\]\.group 'contents' has no layers; did you mean 'content'",
        ),
        (
            ["ties", 0],
            ["conv_in", "conv_ou"],
            r"ties\[0\] names the unknown layer 'conv_ou'; did you mean 'conv_out'",
        ),
        (["fixed", "conv_out"], "int4", r"fixed\.conv_out is the unknown choice 'int4'"),
        (["fixed", "conv"], "int4", r"fixed names the unknown layer 'conv'"),
        (
            ["links", 0, "attribute"],
            "activations",
            r"links\[0\]\.attribute is 'activations', which the choice",
        ),
    ],
)
def test_malformed_documents_name_the_key(path, value, message):
    document = json.loads(json.dumps(DOCUMENT))
    at = document
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = value
    with pytest.raises(UserError, match=message):
        Problem.from_json(document)


def test_files(tmp_path):
    path = tmp_path / "problem.json"
    with pytest.raises(UserError, match=r"cannot read .*problem\.json"):
        Problem.load(path)
    path.write_text("{'version': 1}")
    with pytest.raises(UserError, match=r"problem\.json' is not valid JSON"):
        Problem.load(path)
    path.write_text("[]")
    with pytest.raises(UserError, match=r"problem\.json': .* must be object"):
        Problem.load(path)
    path.write_text(json.dumps(DOCUMENT))
    assert Problem.load(path) == Problem.from_json(DOCUMENT)


def test_allocates_without_torch():
    code = (
        "import sys; from mpq_compiler.allocation.problem import *; from mpq_compiler.allocation.solver import *; "
        "solve(Problem((Layer('a', (Choice('b', 0.0, {'c': 1.0}),)),), (Budget('c', 1.0),))); "
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
