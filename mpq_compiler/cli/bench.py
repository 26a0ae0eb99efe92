"""`mpqc bench`: the speed of artifacts, here or on a device."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpq_compiler.cli import options, output
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import require_counts

KERNELS = {
    **{"layer": "layer", "kernel": "template", "weights": "weights", "ms": "ms"},
    **{"operands": "bytes", "GMAC/s": "gmacs", "peak": "reached"},
}
"""The columns of kernels that sort them, with their keys in JSON."""


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add(
        "bench", run, "the speed of artifacts on this machine, whole and kernel by kernel, beside others",
        lambda args: f"timing {', '.join([*args.artifacts, *filter(None, args.against.split(','))])}",
    )  # fmt: skip
    parser.add_argument("artifacts", metavar="ARTIFACT", nargs="+", help="of one model; --kernels looks at the first")
    parser.add_argument(
        "--against", metavar="PEERS", default="",
        help="torch,onnxruntime,openvino: the float model there, as it is and in 8 bits; or one variant (torch-bf16)",
    )  # fmt: skip
    parser.add_argument("--model", metavar="MODEL", help="the float model (default: the bundled one of its name)")
    parser.add_argument("--threads", type=int, metavar="N", default=1, help="of every call (1: CPU time is compared)")
    parser.add_argument("--batch", type=int, metavar="N", default=1, help="samples of a call (1)")
    parser.add_argument("--rounds", type=int, metavar="N", default=15, help="in which all take turns (15)")
    parser.add_argument("--kernels", action="store_true", help="also the time of each kernel call")
    options.add_order(parser, "--kernels", KERNELS)
    parser.add_argument(
        "--latency-table", metavar="FILE",
        help="of `mpqc latency`: predicted against measured time, and layers that would be faster in another format",
    )  # fmt: skip
    parser.add_argument("--plot", metavar="FILE", help="write the kernels under the machine's roofs, as SVG")
    parser.add_argument("--no-memory", action="store_true", help="leave out peak memory, measured in processes apart")
    parser.add_argument(
        "--rpc", metavar="HOST:PORT",
        help="on the device where mpq_rpc listens; the environment's MPQ_TOKEN is its token (docs/standalone.md)",
    )  # fmt: skip
    options.add_key(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a plot that exists")


def run(args: argparse.Namespace) -> Any:
    """Time the artifacts here or on a device, show the table, and return it (schemas/bench.json)."""
    from mpq_compiler.bench.show import show

    if (args.sort or args.top is not None) and not args.kernels:
        raise UserError("--sort and --top are of the table of --kernels: add that, or leave them out")
    if args.top is not None:
        require_counts(top=args.top)
    plot = Path(args.plot) if args.plot else None
    if plot is not None:
        if plot.suffix != ".svg":
            raise UserError(f"--plot {plot}: the plot is drawn as SVG; name it {plot.stem}.svg")
        output.require_new(plot, args.overwrite)
    found = _on_device(args) if args.rpc else _here(args)
    show(found, args.kernels, args.sort and KERNELS[args.sort], args.top)
    if plot is not None:
        from mpq_compiler.bench.roofline import roofline

        output.write_text(roofline(found), plot)
        terminal.say(f"wrote {plot}")
    return found


def _on_device(args: argparse.Namespace) -> dict[str, Any]:
    from mpq_compiler.bench import remote

    if args.against or args.kernels or args.plot or args.latency_table:
        raise UserError("--rpc times artifacts alone: leave --against, --kernels, --plot and --latency-table out")
    return remote.bench(args.artifacts, args.rpc, args.threads, args.batch, args.rounds, terminal.progress, args.key)


def _here(args: argparse.Namespace) -> dict[str, Any]:
    from mpq_compiler.bench.run import bench

    return bench(
        args.artifacts,
        [name.strip() for name in args.against.split(",") if name.strip()],
        args.model,
        args.threads,
        args.batch,
        args.rounds,
        kernels=args.kernels or bool(args.plot),
        memory=not args.no_memory,
        progress=terminal.progress,
        latency_table=args.latency_table,
        key=args.key,
    )
