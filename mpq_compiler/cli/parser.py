"""The parser of commands: what is misspelt ends in one sentence with the nearest name, and exit code 2."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from typing import NoReturn

from mpq_compiler.support.errors import nearest


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one sentence; argparse prints the usage, and no suggestion."""

    def error(self, message: str) -> NoReturn:
        """Ends the process with one sentence, which says where the help is."""
        self.exit(2, f"mpqc: {message} (`{self.prog} --help`)\n")

    def parse_known_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> tuple[argparse.Namespace, list[str]]:
        """Refuses unknown options first: what is missing may be what was misspelt."""
        args = sys.argv[1:] if args is None else args
        for option in self._options(args):
            if not any(known.startswith(option) for known in self._option_string_actions):
                names = [known[2:] for known in self._option_string_actions if known.startswith("--")]
                hint = nearest(option.lstrip("-"), names).replace("'", "'--", 1)  # dashes make all of them alike
                if not hint.startswith("did"):
                    of_a_command = "did you mean it for a command? Its options stand behind it"
                    hint = of_a_command if self._subparsers is not None else ""
                self.error(f"there is no option '{option}'" + (hint and f": {hint}"))
        found, rest = super().parse_known_args(args, namespace)
        if rest:
            self.error(f"'{rest[0]}' is too much: no argument is left that takes it")
        return found, rest

    def _options(self, args: Sequence[str]) -> Iterable[str]:
        """What looks like an option of this parser, without its value; those behind a command are the command's."""
        for text in args:
            if text == "--" or (self._subparsers is not None and not text.startswith("-")):
                return
            if text.startswith("--") or (text[:1] == "-" and text[1:2].isalpha()):
                yield text.partition("=")[0] if text.startswith("--") else text[:2]

    def _check_value(self, action: argparse.Action, value: object) -> None:
        if action.choices is None or value in action.choices:
            return
        if isinstance(action, argparse._SubParsersAction):
            self.error(f"there is no command '{value}': {nearest(str(value), action.choices)}")
        name = "/".join(action.option_strings) or action.metavar or action.dest
        self.error(f"{name} '{value}' is not known: {nearest(str(value), map(str, action.choices))}")
