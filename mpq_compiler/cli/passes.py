"""`mpqc passes`: the passes, or one of them with its options."""

from __future__ import annotations

import argparse
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal

WIDTH = 110
"""Characters of a line of prose at the most."""


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("passes", run, "the passes, or one of them with its options")
    parser.add_argument("name", nargs="?", metavar="PASS")


def run(args: argparse.Namespace) -> Any:
    """List the passes, or describe one; a pass that cannot be imported is listed with the reason."""
    from mpq_compiler.pipeline import outline

    if not args.name and not args.json and not outline.others():
        _print(outline.built_in())
        return None
    from mpq_compiler.pipeline import registry
    from mpq_compiler.pipeline.describe import describe_pass, pass_text

    if args.name:
        described = describe_pass(registry.find(args.name))
        terminal.say(pass_text(described, min(WIDTH, terminal.output.width)))
        return described
    found, broken = registry.usable()
    everything = [describe_pass(p) for p in found.values()]
    everything += [{"name": name, "broken": reason} for name, reason in broken.items()]
    _print([(d["name"], d.get("contract", "broken"), d.get("summary") or d["broken"]) for d in everything])
    return everything


def _print(rows: list[tuple[str, str, str]]) -> None:
    terminal.table("passes, in the order of the default recipe", ("pass", "contract", "purpose"), rows)
