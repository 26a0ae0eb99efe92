"""Pages that are written by what they are about: the help of the commands, the passes with their options."""

import argparse
import os

from mkdocs.structure.files import File

from mpq_compiler.cli import mpqc
from mpq_compiler.pipeline import registry
from mpq_compiler.pipeline.describe import describe_pass, pass_text


def _commands():
    os.environ["COLUMNS"] = "100"
    parser = mpqc.parser()
    commands = next(action for action in parser._actions if isinstance(action, argparse._SubParsersAction)).choices
    yield f"# Command line\n\n```text\n{parser.format_help()}```\n"
    yield from (f"## mpqc {name}\n\n```text\n{found.format_help()}```\n" for name, found in commands.items())


def _passes():
    yield "# Passes\n\nIn the order of the default recipe; `mpqc passes NAME` prints the same.\n"
    for found in registry.built_in():
        yield f"## {found.name()}\n\n```text\n{pass_text(describe_pass(found), 100)}\n```\n"


def on_files(files, config):
    for uri, parts in {"commands.md": _commands(), "passes.md": _passes()}.items():
        files.append(File.generated(config, uri, content="\n".join(parts)))
