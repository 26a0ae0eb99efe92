"""``mpqc``: the frame of its parser, and how errors end."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from pathlib import Path

from mpq_compiler.cli import (
    allocate,
    bench,
    cache,
    compile,
    completion,
    demo,
    evaluate,
    export,
    generate,
    inspect,
    latency,
    models,
    output,
    passes,
    recipes,
    run,
    sensitivity,
    sign,
    targets,
    tokenize,
    verify,
)
from mpq_compiler.cli.options import Commands
from mpq_compiler.cli.parser import Parser
from mpq_compiler.support import checkout, terminal, usage
from mpq_compiler.support.errors import Notice, UserError

TEACH = """\
Compiles diffusion denoisers (any UNet or transformer of diffusers) to
mixed-precision low-bit artifacts.

  mpqc demo                                    see it work: images, sizes, times
  mpqc compile MODEL -o out.mpq --weights 3.5  to 3.5 true average bits
  mpqc generate out.mpq -o grid.png --compare MODEL
                                               the same noise drawn with both
  mpqc compile PIPELINE -o p.mpq               text encoders and decoder, too
  mpqc generate p.mpq -o x.png --prompt "a lighthouse"
                                               from a prompt to a picture
  mpqc inspect out.mpq --layers                which layer got which bits
  mpqc compile MODEL -o out.mpq --dumps d      keep the program after every pass
  mpqc inspect d --diff bit-allocation         ... and see what a pass did
  mpqc inspect d --why LAYER                   ... and why a layer is as it is

MODEL is a folder with config.json and safetensors, a pipeline's folder, a hub
id (owner/name, or owner/name@commit), or a bundled name (mpqc models).
"""

COMMANDS = (
    *(demo, compile, generate, tokenize, evaluate, run, export, verify, sign, bench, inspect, allocate, sensitivity),
    latency,
    *(passes, recipes, targets, models, cache, completion),
)
"""Modules of the commands, in the order in which the help lists them."""

REQUIREMENTS = {
    "torch": ("torch", "mpq-compiler[compile]"),
    "diffusers": ("diffusers", "mpq-compiler[compile]"),
    "highspy": ("highspy", "highspy"),
    "PIL": ("Pillow", "pillow"),
    "scipy": ("scipy", "scipy"),
    "tokenizers": ("tokenizers", "mpq-compiler[pipeline]"),
    "transformers": ("transformers", "mpq-compiler[compile]"),
    "tvm": ("apache-tvm", "mpq-compiler[runtime]"),
    "shtab": ("shtab", "shtab"),
    "gguf": ("gguf", "mpq-compiler[gguf]"),
    "onnx": ("onnx", "mpq-compiler[onnx]"),
    "onnxruntime": ("onnxruntime", "mpq-compiler[onnx]"),
}
"""Modules that a bare installation lacks: the distribution of each, and what brings it."""


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--json", metavar="FILE", help="write the result as JSON ('-': to standard output)")
    shared.add_argument("--debug", action="store_true", help="show the traceback of an error")
    how_much = shared.add_mutually_exclusive_group()
    how_much.add_argument("-q", "--quiet", action="store_true", help="print errors and the result only")
    how_much.add_argument("-v", "--verbose", action="store_true", help="print what each pass took, and what was reused")
    shared.add_argument("--log", metavar="FILE", help="add all that -v prints to this file, with the time")
    top = Parser(
        prog="mpqc", description=TEACH, epilog=f"README.md and docs/ are in {checkout.pages()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    top.add_argument("--version", action="version", version=f"mpqc {version('mpq-compiler')}")
    commands = Commands(top, shared)
    for module in COMMANDS:
        module.add(commands)
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs a command: 0 done, 1 a clear error, 130 Ctrl-C, 143 SIGTERM; argparse exits with 2 for a wrong command line.

    Both signals end it alike: nothing half-written stays, what the cache has stays there.
    """
    if not (sys.argv[1:] if arguments is None else arguments):
        print(parser().format_help(), end="", file=sys.stderr)
        return 2
    args = parser().parse_args(arguments)
    terminal.output.stderr = args.json == "-"
    UserError.command_line = True
    try:
        for file in (None if args.json == "-" else args.json, args.log):
            if file is not None:
                output.require_new(file, overwrite=True)
        terminal.configure(args.quiet, args.verbose, args.log)
        with _ends_by_signals(), _noted(), terminal.announced(args.announce(args)):
            result = usage.with_room(args.run)(args)
        if args.json == "-":
            print(json.dumps(result, indent=1))
        elif args.json:
            output.write_json(result, Path(args.json))
        sys.stdout.flush()
        return 0
    except UserError as error:
        return _fail(args, str(error))
    except KeyboardInterrupt:
        return _ended(_came[0] if _came else signal.SIGINT)
    except BrokenPipeError:  # whoever read us has seen enough: `mpqc passes | head -3`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 128 + signal.SIGPIPE
    except ModuleNotFoundError as error:
        if (module := (error.name or "").partition(".")[0]) not in REQUIREMENTS:
            return _defect(args, error)
        name, package = REQUIREMENTS[module]
        return _fail(args, f"`mpqc {args.command}` needs {name}, which is not installed: pip install '{package}'")
    except OSError as error:
        where = f" '{error.filename}'" if error.filename else ""
        return _fail(args, f"the system refused{where}: {error.strerror or error}; free space or choose another place")
    except MemoryError:
        return _fail(args, "out of memory; use a smaller model, fewer --samples or fewer --jobs")
    except Exception as error:
        return _defect(args, error)
    finally:
        terminal.output.stderr = UserError.command_line = False
        terminal.reset()


_came: list[int] = []
"""The signals that came during a command."""


@contextmanager
def _ends_by_signals() -> Iterator[None]:
    """Makes SIGTERM end a command as Ctrl-C does, and keeps in mind that one came: libraries swallow interrupts."""
    _came.clear()
    if threading.current_thread() is not threading.main_thread():  # no other can be told
        yield
        return

    def end(number: int, frame: object) -> None:
        _came.append(number)
        if number == signal.SIGTERM:
            signal.signal(number, signal.SIG_IGN)  # another one would disturb what is cleared away
        raise KeyboardInterrupt

    asked = [signal.SIGTERM]
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # else it is ignored, or somebody else's
        asked.append(signal.SIGINT)
    before = {number: signal.signal(number, end) for number in asked}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _ended(number: int) -> int:
    """The exit code of a command that a signal has ended."""
    exec("")  # an interrupt inside of an `exec`, as of a dataclass, makes Python end by SIGINT until another one ends
    terminal.error("mpqc: terminated" if number == signal.SIGTERM else "mpqc: interrupted")
    return 128 + number


@contextmanager
def _noted() -> Iterator[None]:
    """Prints warnings of ours as the notes that they are, a sentence without the line of code that gave it."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, category: type[Warning], *where: object) -> None:
            if issubclass(category, Notice):
                terminal.note(f"note: {message}")
            else:
                usual(message, category, *where)  # type: ignore[arg-type]

        warnings.showwarning = show  # type: ignore[assignment]
        yield


def _defect(args: argparse.Namespace, error: Exception) -> int:
    """A defect of ours still ends in one sentence."""
    text = " ".join(str(error).split())
    return _fail(args, f"internal error, report it with what --debug shows: {type(error).__name__}: {text[:300]}")


def _fail(args: argparse.Namespace, sentence: str) -> int:
    if _came:  # what failed is what the interrupt has left half done, such as an import
        return _ended(_came[0])
    if args.debug:
        raise
    terminal.error(f"mpqc: {sentence}")
    return 1


if __name__ == "__main__":
    sys.exit(main())
