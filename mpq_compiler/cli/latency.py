"""`mpqc latency`: a table of how long kernels take, here or on a device, for ``compile --latency``."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpq_compiler.cli import options
from mpq_compiler.cli.output import require_new, write_json
from mpq_compiler.support import terminal

if TYPE_CHECKING:
    from mpq_compiler.latency.table import Table


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add(
        "latency", run, "measure how long kernels take, here or on a device, for `compile --latency`",
        lambda args: f"measuring the kernels of {', '.join(args.sources)}",
    )  # fmt: skip
    parser.add_argument(
        "sources", metavar="MODEL|ARTIFACT|TABLE", nargs="+",
        help="models are compiled in each format and timed whole, artifacts as they are; tables of this machine are "
        "merged with what is measured",
    )  # fmt: skip
    parser.add_argument("-o", "--output", required=True, metavar="TABLE.json", help="for --latency-table")
    parser.add_argument("--target", default="native", help="mpqc targets lists them (default: this machine)")
    parser.add_argument(
        "--formats", metavar="NAMES", help="weight formats, as int4,int8 (default: those the recipe chooses from)"
    )
    parser.add_argument("--batch", type=int, metavar="N", default=1, help="samples of a call (1)")
    options.add_threads(parser, "threads of a call (1: CPU time is measured, with more the wall clock)")
    parser.add_argument(
        "--numerics", choices=("portable", "fast"), help="fast: attentions in bfloat16 and in 8 bits are timed too"
    )
    parser.add_argument(
        "--rpc", metavar="HOST:PORT",
        help="on the device where mpq_rpc listens, with its --target (docs/standalone.md); artifacts need --emit c",
    )  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace a table that exists")
    options.add_lowering(parser, table=False)


def run(args: argparse.Namespace) -> Any:
    """Measure or merge the tables, write the result, and return it."""
    from mpq_compiler.artifact import bundle
    from mpq_compiler.latency.table import merged

    output = Path(args.output)
    require_new(output, args.overwrite)
    files = [source for source in args.sources if Path(source).suffix == ".json"]
    tables = _given(files, args, alone=len(files) == len(args.sources))
    others = [source for source in args.sources if source not in files]
    artifacts = [Path(s) for s in others if Path(s).suffix == ".zip" or (Path(s) / bundle.MANIFEST).is_file()]
    if artifacts:
        tables.append(_of_artifacts(artifacts, args))
    tables += [_of_model(source, args) for source in others if Path(source) not in artifacts]
    table = merged(tables)
    write_json(table.to_json(), output)
    terminal.say(
        f"wrote {output}: {len(table.kernels)} kernels of {', '.join(table.models)} for {table.target} on {table.cpu}, "
        f"{table.threads} thread(s), batch {table.batch}"
    )
    return table.to_json()


def _given(files: Sequence[str], args: argparse.Namespace, alone: bool) -> list[Table]:
    """The tables in files. UserError: they do not go together, or with what is measured here unless ``alone``."""
    from mpq_compiler.latency.table import load, merged, require_alike
    from mpq_compiler.support import host

    tables = [load(file) for file in files]
    if tables:
        both = merged(tables)
        if not args.rpc and not alone:  # before the others are measured
            require_alike(both, cpu=host.cpu(), threads=args.threads or 1, batch=args.batch)
    return tables


def _of_artifacts(paths: Sequence[Path], args: argparse.Namespace) -> Table:
    """Times of artifacts as they are."""
    from mpq_compiler.artifact import bundle
    from mpq_compiler.latency import measure, remote
    from mpq_compiler.runtime import compiled_denoiser

    threads = args.threads or 1
    if args.rpc:
        opened = [bundle.read(path) for path in paths]
        return remote.measured(opened, args.rpc, args.batch, threads, terminal.progress)
    loaded = [compiled_denoiser.load(path, threads, reuse_bytes=0) for path in paths]
    return measure.measured(loaded, args.batch, threads, terminal.progress)


def _of_model(model: str, args: argparse.Namespace) -> Table:
    """Times of a model compiled in each of the formats."""
    from mpq_compiler.driver.measure import measure_latency

    formats = [name.strip() for name in (args.formats or "").split(",") if name.strip()]
    return measure_latency(
        model, terminal.progress, formats, args.batch, args.rpc, **options.of_compilation(args)
    )
