"""`mpqc recipes`: the recipes, or the pipeline of one."""

from __future__ import annotations

import argparse
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("recipes", run, "the recipes, or the pipeline of one")
    parser.add_argument("name", nargs="?", metavar="RECIPE")


def run(args: argparse.Namespace) -> Any:
    """List the recipes with their pipelines, or the one that is named."""
    from mpq_compiler.pipeline.parser import to_text
    from mpq_compiler.pipeline.recipes import load, names

    described = [
        {"name": recipe.name, "description": recipe.description, "pipeline": to_text(recipe.passes())}
        for recipe in map(load, [args.name] if args.name else names())
    ]
    rows = [(d["name"], d["description"], d["pipeline"].replace(",", ", ")) for d in described]
    terminal.table("recipes", ("recipe", "what it does", "pipeline"), rows)
    return described
