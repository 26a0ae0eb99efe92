"""What commands print: results on standard output, progress and notes on standard error.

A terminal gets Rich tables and progress bars; a file or a pipe gets plain lines that are never wrapped.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

console = Console(stderr=True)
"""The stream of progress and notes: standard error."""
output = Console()
"""The stream of results: standard output, unless ``output.stderr = True`` leaves that to ``--json -``."""
if not output.is_terminal and "COLUMNS" not in os.environ:
    output.width = 200  # names must not be folded on their way to grep or a file
SILENCE = 30.0
"""Seconds between two lines of progress where no bar is drawn."""


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a progress bar; yields ``advance(n, said="")``, which also shows ``said``, such as a loss.

    Without a terminal it prints a line when the work begins, and one every `SILENCE` seconds.
    """
    if not console.is_terminal:
        print(f"{title} ({total}) ...", file=sys.stderr, flush=True)
        yield _lines(title, total)
        return
    columns = (
        TextColumn("{task.description:>28}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        task = bar.add_task(title, total=total)
        yield lambda n, said="": bar.update(task, advance=n, description=f"{title} {said}".rstrip())


def _lines(title: str, total: int) -> Callable[..., None]:
    done, told = 0, time.monotonic()

    def advance(n: int, said: str = "") -> None:
        nonlocal done, told
        done += n
        if time.monotonic() - told > SILENCE and done < total:
            told = time.monotonic()
            print(f"{title}: {done} of {total} {said}".rstrip(), file=sys.stderr, flush=True)

    return advance


def say(text: str) -> None:
    """Prints a line of the result as it is."""
    output.print(text, markup=False, highlight=False, soft_wrap=True)


def note(text: str) -> None:
    """Prints a note, which is no result: what was assumed, or did not go as asked."""
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def table(title: str, headers: Sequence[str], rows: Iterable[Sequence[object]], numeric: Sequence[int] = ()) -> None:
    """Prints a table; the columns in ``numeric`` are aligned to the right."""
    made = Table(header_style="bold")
    for index, header in enumerate(headers):
        made.add_column(header, justify="right" if index in numeric else "left", overflow="fold")
    for row in rows:
        made.add_row(*("" if cell is None else escape(str(cell)) for cell in row))
    output.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    output.print(made)


def size(count: float) -> str:
    """Bytes for people: 1.6 MB."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count) < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.2f} {unit}"
        count /= 1000
    raise AssertionError


def memory(entry: Mapping[str, Any]) -> str:
    """The memory that running an artifact takes, in words, from the manifest's entry `memory`."""
    most = {kind: size(max(entry[kind].values())) for kind in ("activation_bytes", "workspace_bytes")}
    return (
        f"{size(entry['prepared_bytes'])} of prepared weights, {most['activation_bytes']} of activations, "
        f"{most['workspace_bytes']} of workspaces a thread"
    )


def additivity(entry: Mapping[str, Any]) -> str:
    """How well the losses of single changes add up to the plan's noise, in words, from the report's entry."""
    apart = "" if entry["difference_db"] is None else f" ({entry['difference_db']:+.2f} dB)"
    return f"noise {entry['measured']:.2e} measured together, {entry['expected']:.2e} by the sum of its losses{apart}"
