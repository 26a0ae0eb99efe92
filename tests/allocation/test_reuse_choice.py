"""Bits and reuse chosen together: against all combinations."""

from __future__ import annotations

import itertools
from types import SimpleNamespace

import pytest

from mpq_compiler.allocation import pose
from mpq_compiler.allocation.problem import BudgetError, Problem
from mpq_compiler.allocation.reuse_choice import WHOLE, Inside, candidates
from mpq_compiler.allocation.solver import solve
from mpq_compiler.analysis.reuse_losses import Option, ReuseLosses, options_of, schedule_of, stretches_of
from mpq_compiler.ir import reuse
from mpq_compiler.ir.costs import weight_path
from tests.harness import programs

STEPS = 6
FORMATS = {"int2": (0.4, 20.0), "int4": (0.1, 30.0), "int8": (0.001, 50.0)}
"""Loss and microseconds of each layer, times a number of the layer's own."""


def setting():
    """A program, times of its layers, a table of losses, and losses of reuse; all made up, for the arithmetic."""
    program = programs.after("unet2d", "layout")
    paths = sorted({str(weight_path(n)) for n in program.quantizable})
    chosen = [*paths[:2], paths[-1]]
    cuts = reuse.cuts(program, 2)
    stretches = stretches_of(STEPS, 2)
    options = options_of(stretches, (0, 1))
    losses = {
        cut: {o: 0.01 * (1 + c) * (1 + o.stretch) * o.interval * (2 - o.order) for o in options}
        for c, cut in enumerate(cuts)
    }
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
    return fewer, times, table, ReuseLosses(tuple(map(float, range(STEPS, 0, -1))), stretches, losses, 1.0)


def by_trying(program, times, table, losses, most: float) -> float:
    """The least loss over every plan, cut and option of each stretch that keeps the time."""
    best = float("inf")
    paths = [*table["weights"]]
    for cut in losses.losses:
        inside = Inside.of(cut, times, program)
        stretches = [
            [None, *(o for o in losses.losses[cut] if o.stretch == number)] for number in range(len(losses.stretches))
        ]
        for plan in itertools.product(FORMATS, repeat=len(paths)):
            formats = dict(zip(paths, plan, strict=True))
            bits = sum(table["weights"][p][f] for p, f in formats.items())
            whole = times.fixed + sum(times.layers[p][f] for p, f in formats.items())
            for options in itertools.product(*stretches):
                taken = [o for o in options if o is not None]
                share = sum(map(losses.reused, taken)) / STEPS
                if whole - share * inside.saved(times, formats) <= most * (1 + 1e-12):
                    best = min(best, bits + sum(losses.losses[cut][o] for o in taken))
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
            assert sum(map(losses.reused, each.chosen(solution.choices))) >= each.count
        found = min(found, solution.objective)
    assert found == pytest.approx(by_trying(program, times, table, losses, most), rel=1e-6)


def test_options_reuse_more_with_longer_intervals_and_nothing_twice():
    stretches = stretches_of(20, 5)
    assert stretches == ((0, 4), (4, 8), (8, 12), (12, 16), (16, 20))
    assert [(o.interval, o.order) for o in options_of(stretches, (0, 1)) if not o.stretch] == [
        (2, 0), (2, 1), (4, 0), (4, 1),
    ]  # fmt: skip
    assert stretches_of(3, 5) == ((0, 3),)


def test_a_schedule_computes_whole_steps_as_options_say():
    _, _, _, losses = setting()
    cut = next(iter(losses.losses))
    found = schedule_of(cut, losses.timesteps, losses.stretches, [Option(1, 3, 0)])
    assert [bool(sources) for sources in found.sources] == [False] * 4 + [True] * 2
    assert found.node == cut.node and found.reused == losses.reused(Option(1, 3, 0)) == 2
    assert WHOLE not in {option.name for option in losses.losses[cut]}
