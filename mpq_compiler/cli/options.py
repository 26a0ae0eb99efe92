"""Commands as parsers, and the groups of options that several of them share."""

from __future__ import annotations

import argparse
import os
from collections.abc import Callable, Iterable
from dataclasses import fields
from pathlib import Path
from typing import Any

from mpq_compiler.support.execution import require_counts

PER_CALL = "threads of a call (default: what the artifact was compiled with, else every core)"
MEASURED_HERE = "times of kernels, by `mpqc latency` (default with --latency: measured here)"


def unannounced(args: argparse.Namespace) -> None:
    """Announces nothing: the command takes a moment."""


class Commands:
    """The commands of a parser, each with the functions that run and announce it (`argparse`'s defaults)."""

    def __init__(self, top: argparse.ArgumentParser, shared: argparse.ArgumentParser) -> None:
        """``top``: the parser of the whole command line. ``shared``: one with the options of every command."""
        self.top, self._shared = top, shared
        self._subparsers = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def add(
        self,
        name: str,
        run: Callable[[argparse.Namespace], Any],
        text: str,
        announce: Callable[[argparse.Namespace], str | None] = unannounced,
    ) -> argparse.ArgumentParser:
        """Adds the parser of a new command.

        Args:
            name: of the command.
            run: returns the command's result as plain data.
            text: says what it is.
            announce: says what a command that takes long is about to do, at once: it imports nothing heavy.
        """
        parser = self._subparsers.add_parser(name, parents=[self._shared], help=text, description=text)
        parser.set_defaults(run=run, announce=announce)
        return parser


def add_machine(group: argparse._ActionsContainer) -> None:
    """Add the options of the machine that compiles: workers and the folder of the cache."""
    cores = os.cpu_count() or 1
    group.add_argument(
        "--jobs", type=int, metavar="N", default=cores, help=f"workers; the result is the same (default: {cores})"
    )
    group.add_argument("--cache", type=Path, metavar="DIR", help="cache folder (default: the user's)")


def add_conditions(group: argparse._ActionsContainer) -> None:
    """Add the options of conditional sampling: guidance and the file of conditions."""
    group.add_argument("--guidance", type=float, metavar="X", help="classifier-free guidance (default: without)")
    group.add_argument(
        "--conditions", metavar="FILE", help="safetensors with conditions to sample with (docs/calibration.md)"
    )


def add_order(parser: argparse.ArgumentParser, of: str, columns: Iterable[str]) -> None:
    """Add which rows a long table has, and their order; ``of`` is the option that prints it."""
    parser.add_argument("--sort", metavar="COLUMN", choices=columns, help=f"of {of}: by {', '.join(columns)}")
    parser.add_argument("--top", type=int, metavar="N", help=f"of {of}: the first N rows")


def add_threads(parser: argparse.ArgumentParser, text: str = PER_CALL) -> None:
    """Add the number of threads of a call; ``text`` is its help."""
    parser.add_argument("--threads", type=int, metavar="N", help=text)


def add_key(parser: argparse.ArgumentParser) -> None:
    """Add the key whose owner has to have signed what is opened."""
    parser.add_argument(
        "--key", metavar="PUBLIC",
        help="refuse what the owner of this key has not signed: a PEM file, or the key in hexadecimal (mpqc sign)",
    )  # fmt: skip


def add_scheduler(parser: argparse.ArgumentParser) -> None:
    """Add the scheduler that a pipeline draws with in the place of its own."""
    parser.add_argument(
        "--scheduler", metavar="NAME", help="another scheduler than a pipeline's: diffusers' name, or a "
        "scheduler_config.json"
    )  # fmt: skip


def scheduler_of(chosen: str | None) -> str | dict[str, object] | None:
    """The scheduler's name, or the configuration in its file. UserError: the file is none."""
    if chosen is None or not chosen.endswith(".json"):
        return chosen
    from mpq_compiler.frontend.checkpoint import read_json

    return read_json(Path(chosen))


def add_budgets(parser: argparse.ArgumentParser) -> None:
    """Add the budgets that an allocation has to keep, and the objective that it minimizes."""
    budgets = parser.add_argument_group("budgets")
    budgets.add_argument("--weights", metavar="BUDGET", help="true average bits (3.7), or bytes (40MB)")
    budgets.add_argument("--activations", type=float, metavar="BITS", help="average bits of the activations")
    budgets.add_argument("--bops", metavar="N", help="bit operations per sample and step: 2.5e12, 2.5T")
    budgets.add_argument("--latency", metavar="TIME", help="of a call: 12ms, 800us (docs/latency.md)")
    parser.add_argument(
        "--objective",
        choices=("noise", "paper-db"),
        help="what is to be least: the summed noise power (default), or that of each layer in dB, summed (as in MixDQ)",
    )


def add_latency_table(parser: argparse.ArgumentParser, text: str = MEASURED_HERE) -> None:
    """Add the file of a latency table; ``text`` is its help."""
    parser.add_argument("--latency-table", metavar="FILE", help=text)


def add_lowering(parser: argparse.ArgumentParser, table: bool = True) -> None:
    """Add how a model is compiled and calibrated. ``table``: a table makes its plan, and it is trained."""
    how = parser.add_argument_group("how to compile")
    how.add_argument("--recipe", default="default", help="name or .toml file (mpqc recipes)")
    how.add_argument("--pipeline", metavar="PASSES", help='passes by hand: "trace,layout,calibrate{samples=64},..."')
    if table:
        how.add_argument(
            "--effort",
            choices=("none", "fast", "balanced", "best"),
            help="training against the float model: fast tunes scales (half a minute), balanced trains by images, "
            "and packed weights (8 minutes), best goes on for 30 (default: the recipe's)",
        )
        how.add_argument("--minutes", type=float, metavar="N", help="of training, in place of the effort's")
    how.add_argument(
        "--shapes",
        help="batch x channels x height x width, comma-separated (default: batch 1 and 2); several image sizes share "
        "the weights, and the first is calibrated",
    )
    if table:
        how.add_argument("--sensitivity", metavar="TABLE.json", help="use this table instead of measuring")
        how.add_argument("--plan", metavar="PLAN.json", help="use this plan, of `mpqc allocate -o`, instead of budgets")
    add_machine(how)
    how.add_argument(
        "--distributed",
        metavar="ADDRESS",
        help="machines that measure sensitivities, round weights and try plans: ray://HOST:PORT or HOST:PORT of a Ray "
        "cluster, or ray, which starts --jobs processes here; the result is the same (docs/scale.md)",
    )
    how.add_argument(
        "--device",
        default="cpu",
        help="where torch calibrates and measures: cuda for a GPU that it sees, which may decide otherwise "
        "than a CPU where last bits do (default: cpu)",
    )
    _add_calibration(parser)


def _add_calibration(parser: argparse.ArgumentParser) -> None:
    calibration = parser.add_argument_group("calibration")
    calibration.add_argument(
        "--calibration", metavar="FILE", help="recorded inputs, safetensors (docs/calibration.md); else by sampling"
    )
    calibration.add_argument(
        "--latent", metavar="NAME", help="recorded argument with the noisy latents (default: found by its name)"
    )
    calibration.add_argument(
        "--time", metavar="NAME", help="recorded argument with the time (default: found by its name)"
    )
    calibration.add_argument(
        "--samples", type=int, metavar="N", help="sampling trajectories (default: the recipe's, 32)"
    )
    calibration.add_argument(
        "--steps", type=int, metavar="N", help="steps of each trajectory (default: the recipe's, 20)"
    )
    calibration.add_argument("--scheduler", metavar="FILE", help="scheduler_config.json to use instead of the model's")
    calibration.add_argument(
        "--prediction-type",
        choices=("epsilon", "sample", "v_prediction"),
        metavar="TYPE",
        help="epsilon, sample or v_prediction (default: the scheduler's)",
    )
    add_conditions(calibration)
    calibration.add_argument("--seed", type=int, metavar="N", default=0, help="of everything drawn at random (0)")


def of_compilation(args: argparse.Namespace) -> dict[str, Any]:
    """Keyword arguments of `driver.options.Options`: what the command line has of its fields."""
    from mpq_compiler.driver.options import Options

    require_counts(jobs=args.jobs)
    return {field.name: getattr(args, field.name) for field in fields(Options) if hasattr(args, field.name)}
