"""`mpqc sensitivity`: what each layer costs in quality at each format, measured once for `mpqc allocate`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpq_compiler.cli import options
from mpq_compiler.cli.output import require_new, write_json
from mpq_compiler.support import terminal

SHOWN = 20
"""Layers in the printed table, the most sensitive first."""


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("sensitivity", run, "measure what each layer costs in quality at each format", _announce)
    parser.add_argument("model", metavar="MODEL", help="folder, hub id, or bundled name (mpqc models)")
    parser.add_argument("-o", "--output", required=True, metavar="TABLE.json", help="for `mpqc allocate`")
    parser.add_argument("--overwrite", action="store_true", help="replace a table that exists")
    parser.add_argument("--activations", type=float, metavar="BITS", help="average that the table is for (8)")
    options.add_latency_table(parser, "adds the times of layers, for `mpqc allocate --latency`")
    options.add_lowering(parser, table=False)


def _announce(args: argparse.Namespace) -> str:
    return f"measuring the sensitivities of {args.model}: recipe {args.recipe}"


def run(args: argparse.Namespace) -> Any:
    """Measure the table, write it, print the most sensitive layers, and return it."""
    from mpq_compiler.driver.measure import measure_sensitivity

    output = Path(args.output)
    require_new(output, args.overwrite)
    table = measure_sensitivity(args.model, terminal.progress, **options.of_compilation(args))
    write_json(table, output)
    formats = list(next(iter(table["weights"].values())))
    rows = sorted(table["weights"].items(), key=lambda item: -item[1][formats[0]])
    terminal.table(
        "relative noise power of the output, most sensitive layers first",
        ("layer", *formats),
        [(name.removesuffix(".weight"), *(f"{losses[f]:.1e}" for f in formats)) for name, losses in rows[:SHOWN]],
        numeric=range(1, len(formats) + 1),
    )
    return table
