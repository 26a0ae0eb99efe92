"""The errors a user can cause: one sentence that says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Sequence
from typing import ClassVar

MOST_NAMED = 24
"""Names that a hint lists at the most."""
MOST_SAID = 1500
"""Letters of a sentence, which may quote a name that is as long as a file; longer ones lose their middle."""


class UserError(Exception):
    """Bad input or a condition of the machine; the command line prints its one sentence and exits with 1.

    Sentences name options as the command line spells them (``--lora-rank 4``). In Python they read as the arguments
    that they are (``lora_rank=4``).
    """

    command_line: ClassVar[bool] = False
    """Whether the process is a command."""

    def __str__(self) -> str:
        """The sentence in one line: what it quotes may hold lines, and codes that a terminal would obey."""
        text = _cut("".join(c if c.isprintable() else repr(c)[1:-1] for c in _cut(super().__str__())))
        return text if self.command_line else _OPTION.sub(_argument, text)


def _cut(text: str) -> str:
    """The text, or its beginning and its end."""
    return text if len(text) <= MOST_SAID else f"{text[: MOST_SAID // 2]} ... {text[-MOST_SAID // 2 :]}"


_OPTION = re.compile(r"`[^`]*`|(?<![\w-])--([a-z][a-z-]*)(?: ('[^']*'|-?[\d.]+\w*|[A-Z]+(?::[A-Z]+)?\b))?")
"""An option of the command line, with its value where that is quoted, a number or a placeholder; or a whole command."""


def _argument(found: re.Match[str]) -> str:
    """The option as an argument of Python; commands stay."""
    name, value = found.groups()
    if name is None:
        return found[0]
    return name.replace("-", "_") + (f"={value}" if value else "")


class BudgetError(UserError):
    """A budget is below the smallest value that any allocation reaches."""


class Notice(UserWarning):
    """A warning of ours: what went otherwise than a user would expect; the command line prints it as a note."""


def named(names: Sequence[str], shown: int = 3) -> str:
    """The first of some names, for a sentence, and how many more there are."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(f"'{name}'" for name in names[:shown]) + more


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint for an unknown `name`: ``did you mean 'x'?``, or the list of what there is."""
    names = sorted(known)
    if not names:
        return "there is none"
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"did you mean '{close[0]}'?"
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return "there is: " + ", ".join(names[:MOST_NAMED]) + more
