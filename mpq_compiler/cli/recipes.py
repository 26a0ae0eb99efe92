"""`mpqc recipes`: the recipes, or the pipeline of one."""

from __future__ import annotations

import argparse
import re
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("recipes", run, "the recipes, or the pipeline of one")
    parser.add_argument("name", nargs="?", metavar="RECIPE")


def run(args: argparse.Namespace) -> Any:
    """List the recipes, or the passes of the one that is named."""
    from mpq_compiler.pipeline.parser import to_text
    from mpq_compiler.pipeline.recipes import load, names

    described = [
        {"name": recipe.name, "description": recipe.description, "pipeline": to_text(recipe.passes())}
        for recipe in map(load, [args.name] if args.name else names())
    ]
    if args.name:
        (recipe,) = described
        terminal.say(f"{recipe['name']}: {recipe['description']}\n")
        terminal.say("\n".join(f"  {text}" for text in _passes(recipe["pipeline"])))
    else:
        rows = [(d["name"], d["description"]) for d in described]
        terminal.table("recipes; `mpqc recipes NAME` shows the passes of one", ("recipe", "what it does"), rows)
    return described


def _passes(pipeline: str) -> list[str]:
    """The passes of a pipeline with their options; commas divide both."""
    return re.findall(r"(?:\{[^}]*\}|[^,{])+", pipeline)
