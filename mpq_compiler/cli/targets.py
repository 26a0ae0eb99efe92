"""`mpqc targets`: the targets, and which of them this machine is."""

from __future__ import annotations

import argparse
from typing import Any

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    commands.add("targets", run, "the targets and the CPU features each needs")


def run(args: argparse.Namespace) -> Any:
    """List the targets, with whether this machine runs them and which of them it is."""
    from mpq_compiler.targets.table import missing_features, names, resolve

    native = None
    try:
        native = resolve("native").name
    except UserError as error:
        terminal.note(str(error))
    described: list[dict[str, Any]] = []
    for name in names():
        try:
            target = resolve(name)
        except UserError as error:  # one of another package; the others go on
            terminal.note(str(error))
            continue
        described.append(
            {
                "name": target.name,
                "features": list(target.features),
                "implemented": True,
                "status": target.status,
                "missing_here": sorted(missing_features(target)),
                "native": target.name == native,
            }
        )
    rows = []
    for row in described:
        here = "native" if row["native"] else "no" if row["missing_here"] else "yes"
        rows.append((row["name"], here, row["status"], " ".join(row["features"][-6:])))
    terminal.table("targets", ("target", "runs here", "its kernels", "what it needs, the last of it"), rows)
    return described
