"""`mpqc allocate`: an allocation problem solved, or the one that a sensitivity table poses."""

from __future__ import annotations

import argparse
import collections
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli import options, output
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError

if TYPE_CHECKING:
    from mpq_compiler.allocation.problem import Problem


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("allocate", run, "solve an allocation problem, or the one that a sensitivity table poses")
    parser.add_argument("problem", metavar="PROBLEM.json|TABLE.json")
    parser.add_argument("-o", "--output", metavar="FILE", help="where the solution goes, as JSON")
    options.add_budgets(parser)
    parser.add_argument("--gap", type=float, metavar="X", default=1e-6, help="relative gap at which to stop (1e-6)")
    parser.add_argument("--time-limit", type=float, metavar="SECONDS", default=60.0, help="when to give up (60)")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def run(args: argparse.Namespace) -> Any:
    """Solve the problem, print how many layers have each choice, and return the solution."""
    from mpq_compiler.allocation.solver import solve

    path = Path(args.output) if args.output else None
    if path is not None:
        output.require_new(path, args.overwrite)
    problem = problem_of(args)
    solution = solve(problem, gap=args.gap, time_limit=args.time_limit).to_json()
    terminal.table(
        f"loss {solution['objective']:.6g}" + ("" if solution["optimal"] else ", not proven optimal"),
        ("choice", "layers"),
        sorted(collections.Counter(solution["choices"].values()).items()),
        numeric=(1,),
    )
    most = {budget.cost: f"{budget.max:,.0f}" for budget in problem.budgets if budget.group is None}
    costs = [(cost, f"{value:,.0f}", most.get(cost)) for cost, value in solution["costs"].items()]
    terminal.table("what it costs, summed over layers", ("cost", "sum", "budget"), costs, numeric=(1, 2))
    if path is not None:
        output.write_json(solution, path)
    return solution


def problem_of(args: argparse.Namespace) -> Problem:
    """The problem of a file, or the one that a sensitivity table poses under the budgets of the command line."""
    from mpq_compiler.allocation import pose, sensitivity_table
    from mpq_compiler.allocation.problem import Problem
    from mpq_compiler.driver.budgets import parse_bops, parse_budget, parse_latency

    if sensitivity_table.is_table(args.problem):
        table = sensitivity_table.load(args.problem)
        limit = pose.byte_limit(table["parameters"], *parse_budget(args.weights))
        latency, bops = parse_latency(args.latency), parse_bops(args.bops)
        terms = pose.Terms(args.objective == "paper-db")
        return Problem.from_json(pose.problem(table, limit, args.activations, bops, latency, terms))
    problem = Problem.load(args.problem)  # says of what is neither what is wrong with it
    if args.weights or args.activations or args.bops or args.latency or args.objective:
        raise UserError(
            f"'{args.problem}' is an allocation problem, which has budgets of its own: leave those of the command line "
            "out, or give a sensitivity table"
        )
    return problem
