"""What commands print: results on standard output, progress and notes on standard error.

A terminal gets Rich tables and progress bars; a file or a pipe gets plain lines that are never wrapped.
"""

from __future__ import annotations

import os
import re
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
Row = Mapping[str, Any]
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
    """Prints a table as wide as the terminal at most; a column without any value is left out.

    Text breaks between words, and long paths behind a dot; a longer name loses its middle.

    Args:
        title: the line above.
        headers: the names of the columns.
        rows: cells; None is an empty one.
        numeric: the columns that are aligned to the right, and never broken.
    """
    cells = [["" if cell is None else str(cell) for cell in row] for row in rows]
    kept = [i for i in range(len(headers)) if not cells or any(row[i] for row in cells)]
    columns = [([headers[i]], [row[i] for row in cells], i in numeric) for i in kept]
    padding, widths = 1, _widths(columns, output.width - 3 * len(kept) - 1)
    if sum(widths) > output.width - 3 * len(kept) - 1:
        padding, widths = 0, _widths(columns, output.width - len(kept) - 1)
    made = Table(header_style="bold", padding=(0, padding))
    for (header, _, right), width in zip(columns, widths, strict=True):
        made.add_column(header[0], justify="right" if right else "left", overflow="fold", width=width)
    for row in cells:
        made.add_row(*(escape(_fitted(row[i], width)) for i, width in zip(kept, widths, strict=True)))
    output.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    output.print(made)


LEAST_WORD = 8
"""Characters that are left of a long word at the least."""


def _widths(columns: Sequence[tuple[list[str], list[str], bool]], room: int) -> list[int]:
    """Widths of columns (header, cells, whether these are numbers) that fill the room at most, where that can be."""
    longest = [max(map(len, header + cells)) for header, cells, _ in columns]
    words = [max(map(len, " ".join(header + cells).split()), default=1) for header, cells, _ in columns]
    numbers = [max(map(len, cells), default=0) if right else 0 for _, cells, right in columns]
    widths = [max(word, number, 1) for word, number in zip(words, numbers, strict=True)]
    texts = [i for i, (*_, right) in enumerate(columns) if not right]
    while sum(widths) > room and texts and widths[most := max(texts, key=widths.__getitem__)] > LEAST_WORD:
        widths[most] -= 1
    wanting = [i for i in range(len(columns)) if widths[i] < longest[i]]
    while sum(widths) < room and wanting:
        widths[least := min(wanting, key=lambda i: widths[i] / longest[i])] += 1
        if widths[least] >= longest[least]:
            wanting.remove(least)
    return widths


def _fitted(text: str, width: int) -> str:
    """The text with words that are longer than their column broken behind dots, slashes, commas, then behind each _.

    What is longer even so loses its middle.
    """

    def shorter(piece: str) -> str:
        head = (width - 1) // 2
        return piece if len(piece) <= width else f"{piece[:head]}…{piece[len(piece) - (width - 1 - head) :]}"

    def broken(word: str) -> str:
        lines, pieces = [""], re.findall(r"[^./,]*[./,]|[^./,]+", word)
        if any(len(piece) > width for piece in pieces):
            pieces = re.findall(r"[^./,_]*[./,_]|[^./,_]+", word)
        for piece in pieces:
            if lines[-1] and len(lines[-1] + piece) > width:
                lines.append("")
            lines[-1] += shorter(piece)
        return "\n".join(lines)

    return " ".join(word if len(word) <= width else broken(word) for word in text.split(" "))


def arranged(rows: Sequence[Row], by: str | None, top: int | None) -> list[Row]:
    """Some rows of a table: sorted by a value, numbers from the largest and names from A, and the first of them.

    Args:
        rows: the rows, with their values by key.
        by: the key that sorts; what has no value is last. None: the order stays.
        top: so many of them. None: all.
    """
    if by is not None:
        having = [row for row in rows if row[by] is not None]
        having.sort(key=lambda row: row[by], reverse=not any(isinstance(row[by], str) for row in having))
        rows = [*having, *(row for row in rows if row[by] is None)]
    return list(rows[:top])


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
