"""`mpqc export`: an artifact's weights in the container of another project."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from mpq_compiler.cli import output
from mpq_compiler.cli.options import Commands, add_key
from mpq_compiler.interchange import FORMATS
from mpq_compiler.support import terminal

if TYPE_CHECKING:
    from mpq_compiler.interchange.container import Written


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("export", run, "write an artifact's weights and plan for another project to load")
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--model", metavar="MODEL", required=True, help="the model that was compiled")
    parser.add_argument(
        "--format",
        metavar="FORMAT",
        default="gguf",
        help=f"{', '.join(FORMATS)}: stable-diffusion.cpp, diffusers and ComfyUI-GGUF load the first (the default), "
        "ComfyUI the second, SD.Next and diffusers the third",
    )
    parser.add_argument("-o", "--output", metavar="FILE|DIR", required=True, help="the new file; of sdnq a folder")
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists, or a folder of sdnq")
    add_key(parser)


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the file or folder, print what became of each quantized layer, and return that."""
    output.require_new(args.output, args.overwrite, folder=args.format == "sdnq")
    from mpq_compiler.interchange.export import export

    made = export(args.artifact, args.output, args.model, args.format, overwrite=args.overwrite, key=args.key)
    quantized = [w for w in made.layers if w.layer.format is not None]
    terminal.table(
        f"{made.path}: {terminal.size(made.bytes)}",
        ("layer", "ours", "theirs", "SQNR, dB", "our bytes", "theirs"),
        [_row(w) for w in quantized],
        numeric=(3, 4, 5),
    )
    ours, theirs = sum(w.layer.bytes for w in quantized), sum(w.bytes for w in quantized)
    exact = sum(w.sqnr_db == float("inf") for w in quantized)
    worst = min(quantized, key=lambda w: w.sqnr_db, default=None)
    terminal.say(
        f"weights: {terminal.size(ours)} in the artifact, {terminal.size(theirs)} there; "
        f"{exact} of {len(quantized)} exact"
        + (f", the worst at {worst.sqnr_db:.1f} dB ({worst.layer.name})" if worst and exact < len(quantized) else "")
    )
    for sentence in made.notes:
        terminal.note(f"note: {sentence}")
    return made.to_json()


def _row(written: Written) -> tuple[object, ...]:
    db = "exact" if written.sqnr_db == float("inf") else f"{written.sqnr_db:.1f}"
    return written.layer.name, written.layer.format, written.type, db, written.layer.bytes, written.bytes
