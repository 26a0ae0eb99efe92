"""Bits and reuse chosen together: against all combinations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from mpq_compiler.allocation import pose
from mpq_compiler.allocation.problem import BudgetError, Problem
from mpq_compiler.allocation.reuse_choice import Inside, candidates, ladder_of
from mpq_compiler.allocation.solver import solve
from mpq_compiler.analysis.reuse_losses import Gap, ReuseLosses, gaps_of, of_all_gaps, schedule_of, some_gaps
from mpq_compiler.ir import reuse
from mpq_compiler.ir.costs import weight_path
from tests.harness import programs

STEPS = 6
GAPS = [Gap(begin, length) for length in (1, 2) for begin in range(STEPS - length)]
FORMATS = {"int2": (0.4, 20.0), "int4": (0.1, 30.0), "int8": (0.001, 50.0)}
"""Loss and microseconds of each layer, times a number of the layer's own."""


def setting():
    """A program, times of its layers, a table of losses, and losses of reuse; all made up, for the arithmetic."""
    program = programs.after("unet2d", "layout")
    paths = sorted({str(weight_path(n)) for n in program.quantizable})
    chosen = [*paths[:2], paths[-1]]
    cuts = reuse.cuts(program, 2)
    losses = {cut: {g: 0.01 * (1 + c) * (7 - g.begin) * g.length**1.5 for g in GAPS} for c, cut in enumerate(cuts)}
    factors = {path: 1.0 + i for i, path in enumerate(chosen)}
    nodes = {n.name: 1.0 for n in program.graph.nodes if n.op == "call_function"}
    times = SimpleNamespace(
        fixed=sum(nodes.values()),
        nodes=nodes,
        layers={p: {f: t * factors[p] for f, (_, t) in FORMATS.items()} for p in chosen},
    )
    table = {
        "version": 1, "model": "unet2d", "parameters": 1000, "fixed_bytes": 0,
        "weights": {p: {f: loss * factors[p] for f, (loss, _) in FORMATS.items()} for p in chosen},
        "activations": {p: {"8": 0.0} for p in chosen}, "elements": dict.fromkeys(chosen, 1), "attention_costs": {},
        "fixed_microseconds": times.fixed,
        "layers": [
            {"name": p, "edges": [p], "macs": 1,
             "formats": {f: {"bits": 8, "bytes": 1, "microseconds": t} for f, t in times.layers[p].items()}}
            for p in chosen
        ],
    }  # fmt: skip
    quantizable = [n for n in program.quantizable if weight_path(n) in chosen]
    fewer = SimpleNamespace(quantizable=quantizable)
    return fewer, times, table, ReuseLosses(tuple(map(float, range(STEPS, 0, -1))), losses, 1.0)


def sets_of_gaps(gaps) -> list[tuple[Gap, ...]]:
    """Every set of gaps of which none begins before another's end."""
    found = [()]
    for gap in sorted(gaps):
        found += [(*taken, gap) for taken in found if not taken or taken[-1].end <= gap.begin]
    return found


def by_trying(program, times, table, losses, most: float) -> float:
    """The least loss over every plan, cut and set of gaps that keeps the time."""
    best = float("inf")
    paths = [*table["weights"]]
    for cut in losses.losses:
        inside = Inside.of(cut, times, program)
        for plan in itertools.product(FORMATS, repeat=len(paths)):
            formats = dict(zip(paths, plan, strict=True))
            bits = sum(table["weights"][p][f] for p, f in formats.items())
            whole = times.fixed + sum(times.layers[p][f] for p, f in formats.items())
            for taken in sets_of_gaps(losses.losses[cut]):
                share = sum(gap.length for gap in taken) / STEPS
                if whole - share * inside.saved(times, formats) <= most * (1 + 1e-12):
                    best = min(best, bits + sum(losses.losses[cut][gap] for gap in taken))
    return best


@pytest.mark.parametrize("part", [0.35, 0.5, 0.65, 0.8, 1.0])
def test_the_least_of_the_programs_is_the_least_of_all_combinations(part):
    program, times, table, losses = setting()
    most = part * (times.fixed + sum(t["int8"] for t in times.layers.values()))
    found = float("inf")
    for each in (None, *candidates(losses, times, program)):
        try:
            averaged = table if each is None else each.table(table)
            problem = pose.problem(averaged, latency=most / 1e3)
            solution = solve(Problem.from_json(problem if each is None else each.added(problem)))
        except BudgetError:
            continue
        if each is not None:
            assert each.loss(solution.choices) >= each.least - 1e-12
            assert sum(gap.length for gap in each.chosen(solution.choices)) >= each.count
        found = min(found, solution.objective)
    assert found == pytest.approx(by_trying(program, times, table, losses, most), rel=1e-6)


def test_the_steps_that_reuse_are_those_that_lose_least():
    losses = setting()[3].losses
    each = next(iter(losses.values()))
    for count, (loss, gaps) in ladder_of(each, STEPS).items():
        least = min(
            sum(each[gap] for gap in taken) for taken in sets_of_gaps(each) if sum(g.length for g in taken) == count
        )
        assert loss == pytest.approx(least) == sum(each[gap] for gap in gaps)
        assert sum(gap.length for gap in gaps) == count


def test_gaps_are_measured_at_a_few_places_of_each_length():
    gaps = gaps_of(20)
    assert {gap.length for gap in gaps} == {1, 2, 3, 4} and len(gaps) == 19 + 18 + 17 + 16
    assert {gap.length for gap in gaps_of(50)} == {1, 2, 3, 4, 6, 9}
    some = some_gaps(20, 4)
    assert [gap.begin for gap in some if gap.length == 2] == [0, 6, 11, 17]
    assert some_gaps(20, 100) == gaps
    assert gaps_of(2) == [Gap(0, 1)]


def test_losses_between_are_interpolated_in_decibels():
    measured = {Gap(0, 1): 1e-2, Gap(4, 1): 1e-6} | {gap: 1e-3 for gap in some_gaps(8, 2) if gap.length > 1}
    measured[Gap(6, 1)] = 1e-4
    found = of_all_gaps(measured, 8)
    assert found[Gap(1, 1)] == pytest.approx(1e-3) and found[Gap(5, 1)] == pytest.approx(1e-5)
    assert [*found] == gaps_of(8) and all(found[gap] == loss for gap, loss in measured.items())


def test_a_schedule_computes_whole_steps_as_gaps_say():
    _, _, _, losses = setting()
    cut = next(iter(losses.losses))
    found = schedule_of(cut, losses.timesteps, [Gap(1, 1), Gap(3, 2)])
    assert [bool(sources) for sources in found.sources] == [False, False, True, False, True, True]
    assert found.node == cut.node and found.reused == 3
    assert [step for step, _ in found.sources[5]] == [3, 1, 0]
