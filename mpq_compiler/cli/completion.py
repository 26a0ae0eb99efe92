"""`mpqc completion`: the script with which a shell completes commands, options and their choices."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from functools import partial

from mpq_compiler.cli.options import Commands
from mpq_compiler.support import terminal

FILES = ("ARTIFACT", "MODEL", "DUMPS", "FILE", "OUT", "TABLE", "PUBLIC", "PRIVATE", "KEY")
"""What the names of arguments hold that are files."""


def add(commands: Commands) -> None:
    """Add the command and its options to the command line."""
    text = 'the script that completes commands in a shell: eval "$(mpqc completion bash)" in ~/.bashrc'
    parser = commands.add("completion", partial(run, commands.top), text)
    parser.add_argument("shell", metavar="SHELL", choices=("bash", "zsh"), help="bash or zsh")


def run(top: argparse.ArgumentParser, args: argparse.Namespace) -> dict[str, str]:
    """Print the script, and return it."""
    import shtab

    for action in _actions(top):
        named = str(action.metavar or "")
        if action.choices is None and ("DIR" in named or any(word in named for word in FILES)):
            action.complete = shtab.DIRECTORY if named == "DIR" else shtab.FILE  # type: ignore[attr-defined]
    script = shtab.complete(top, args.shell)
    terminal.say(script)
    return {"shell": args.shell, "script": script}


def _actions(parser: argparse.ArgumentParser) -> Iterator[argparse.Action]:
    """The arguments of a parser and of its commands."""
    for action in parser._actions:
        yield action
        if isinstance(action, argparse._SubParsersAction):
            for command in action.choices.values():
                yield from _actions(command)
