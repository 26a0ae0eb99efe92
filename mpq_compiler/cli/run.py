"""`mpqc run`: one call of an artifact on tensors from a file."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from mpq_compiler.cli import options
from mpq_compiler.cli.output import require_new
from mpq_compiler.support import terminal
from mpq_compiler.support.files import write_whole


def add(commands: options.Commands) -> None:
    """Add the command and its options to the command line."""
    parser = commands.add("run", run, "run an artifact once on tensors from a file")
    parser.add_argument("artifact", metavar="ARTIFACT")
    parser.add_argument("--input", required=True, metavar="FILE", help="safetensors with the inputs by name")
    parser.add_argument(
        "--output", required=True, metavar="FILE", help="safetensors to write, with the tensor 'output'"
    )
    options.add_threads(parser)
    options.add_key(parser)
    parser.add_argument("--overwrite", action="store_true", help="replace a file that exists")


def run(args: argparse.Namespace) -> Any:
    """Call the artifact on the tensors of the file, write the output, and return its path and shape."""
    from mpq_compiler.runtime import compiled_denoiser
    from mpq_compiler.support import tensorfile

    output = Path(args.output)
    require_new(output, args.overwrite)
    inputs = tensorfile.load(args.input)
    compiled = compiled_denoiser.load(args.artifact, args.threads, key=args.key)
    result = compiled.run(inputs)
    write_whole(output, lambda stream: tensorfile.save(stream, {"output": result}))
    terminal.say(f"wrote {output}: f32{list(result.shape)}")
    return {"output": str(output), "shape": list(result.shape), "saturated": compiled.saturated}
