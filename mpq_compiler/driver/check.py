"""Checks that need no model, and run before one is read or sampled."""

from __future__ import annotations

from pathlib import Path

from mpq_compiler.artifact import bundle, signature, tvm_wheels
from mpq_compiler.driver.budgets import parse_memory
from mpq_compiler.driver.lower import latency_table_of
from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.driver.resolve import resolve
from mpq_compiler.ir import device
from mpq_compiler.latency.candidates import require_kernels
from mpq_compiler.pipeline.backend import backend_of
from mpq_compiler.support import cluster
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import require_threads
from mpq_compiler.targets import table as targets


def check(options: Options, output: str | Path | None = None) -> None:
    """Raises a UserError where a compilation would be refused for every model; without ``output`` none is looked at."""
    require_threads(options.threads)
    target = targets.resolve(options.target)
    backend = backend_of(target)
    able = backend.capabilities(target)
    if options.tune and not able.tune:
        raise UserError(f"--tune measures kernels of CPU targets; '{target.name}' has none to choose: leave it out")
    if options.emit not in (None, "c"):
        raise UserError(f"--emit '{options.emit}' is not known: it is 'c' or left out")
    option = "--standalone" if options.standalone else "--emit c" if options.emit else None
    if option and not able.emit:
        raise UserError(f"{option} makes a program of kernels for CPUs; '{target.name}' has none: leave it out")
    backend.require(target)
    cluster.require(options.distributed)
    if device.require(options.device) != device.CPU and options.distributed is not None:
        raise UserError(f"--distributed runs on CPUs, and --device {options.device} is a GPU here: leave one out")
    if options.emit and options.standalone:
        raise UserError("--standalone and --emit c both make the program mpq_run: leave one of them out")
    if options.wheels is not None and not options.standalone:
        raise UserError("--wheels holds TVM's runtime for --standalone: add that, or leave it out")
    if options.owner_key is not None:
        if not option:
            raise UserError("--owner-key is built into a C program: add --emit c or --standalone, or leave it out")
        signature.public_key(options.owner_key)
    if options.standalone:
        tvm_wheels.files(target, options.wheels)
    if options.memory_limit is not None:
        parse_memory(options.memory_limit)
    if output is not None:
        bundle.check_output(output, options.overwrite)
    if options.dumps is not None and not options.overwrite and options.dumps.exists() and any(options.dumps.iterdir()):
        raise UserError(f"the dumps folder '{options.dumps}' is not empty; name another one or add --overwrite")
    dumps, place = options.dumps, None if output is None else Path(output).resolve()
    if dumps is not None and place is not None and dumps.resolve().is_relative_to(place):
        raise UserError(f"the dumps folder '{options.dumps}' lies within the output '{output}'; name another one")
    if any("lora_rank" in step.settings for step in resolve(options)):
        if not able.lora:
            raise UserError(
                f"--lora-rank is for CPU targets and the reference, and '{target.name}' is none: leave it out, and "
                "fuse the LoRA into the model before it is compiled"
            )
        if option:
            raise UserError(f"the program that {option} makes cannot load a LoRA: leave {option} or --lora-rank out")
    if options.latency is not None:
        require_kernels(target)
    if options.reuse is not None and len(parse_shapes(options.shapes)) > 1:
        raise UserError("--reuse is decided for images of one size: give one in --shapes, or leave it out")
    latency_table_of(options, target)
