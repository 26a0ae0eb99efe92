"""The errors a user can cause: one sentence that says what is wrong, where, and what to do about it."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(Exception):
    """Bad input or a condition of the machine; the command line prints its one sentence and exits with 1."""

    def __str__(self) -> str:
        """The sentence in one line: what it quotes may hold lines, and codes that a terminal would obey."""
        return "".join(c if c.isprintable() else repr(c)[1:-1] for c in super().__str__())


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
    return f"did you mean '{close[0]}'?" if close else "there is: " + ", ".join(names)
