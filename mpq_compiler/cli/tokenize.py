"""`mpqc tokenize`: the file from which the C program of a pipeline draws a prompt (`--emit c`)."""

from __future__ import annotations

import argparse
from pathlib import Path

from mpq_compiler.cli import options, output
from mpq_compiler.support import terminal


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("tokenize", run, "make the file from which a pipeline's C program draws a prompt")
    parser.add_argument("pipeline", metavar="PIPELINE", help="compiled with --emit c, for any target")
    parser.add_argument("-o", "--output", required=True, metavar="FILE", help="tokens, noise, and the steps")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="what is drawn")
    parser.add_argument("--negative-prompt", metavar="TEXT", help="what guidance leads away from")
    parser.add_argument("--images", type=int, default=1, metavar="N", help="images in the picture (1)")
    parser.add_argument("--steps", type=int, metavar="N", help="sampling steps (default: the pipeline's)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the noise (0)")
    parser.add_argument(
        "--guidance", type=float, metavar="X", help="classifier-free guidance (default: the pipeline's)"
    )
    options.add_scheduler(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def run(args: argparse.Namespace) -> dict[str, object]:
    """Write the file, and return what it holds."""
    from mpq_compiler.evaluation.painter import check
    from mpq_compiler.runtime import tokens_file

    output.require_new(Path(args.output), args.overwrite)
    check(args.images, 1 if args.steps is None else args.steps, args.seed)
    found = tokens_file.write(
        args.pipeline, args.output, args.prompt, args.negative_prompt, images=args.images, steps=args.steps,
        guidance=args.guidance, seed=args.seed, scheduler=options.scheduler_of(args.scheduler),
        note=lambda said: terminal.note(f"note: {said}"),
    )  # fmt: skip
    terminal.say(f"wrote {args.output}: {found['calls']} calls of parts, {found['bytes'] / 1e3:.1f} kB")
    terminal.say(f"draw it with {args.pipeline}/mpq_run --tokens {args.output} -o x.png, on the device")
    return {"output": str(args.output), "prompt": args.prompt, **found}
