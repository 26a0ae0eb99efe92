"""What commands print: results on standard output, progress and notes on standard error.

A terminal gets Rich tables and progress bars; a file or a pipe gets plain lines that are never wrapped, and one line of
progress every `SILENCE` seconds. `configure` makes it less (``--quiet``) or more (``--verbose``), and keeps it all in
a file (``--log``).
"""

from __future__ import annotations

import io
import logging
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table

from mpq_compiler.support.errors import named

console = Console(stderr=True)
"""The stream of progress and notes: standard error."""
output = Console()
"""The stream of results: standard output, unless ``output.stderr = True`` leaves that to ``--json -``."""
WIDTH = 200
"""Columns of what is no terminal: names must not be folded on their way to grep or a file."""
if not output.is_terminal and "COLUMNS" not in os.environ:
    output.width = WIDTH
Row = Mapping[str, Any]
SILENCE = 30.0
"""Seconds between two lines of progress where no bar is drawn."""
BAR, BARS = 20, 100
"""Columns of a bar, and of a row with one at most."""


@dataclass(eq=False)
class _Work:
    """A piece of work that is under way."""

    title: str
    total: int
    done: int = 0
    said: str = ""
    began: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def counted(self) -> str:
        return f"{self.done} of {self.total}" if self.total > 1 else ""


@dataclass
class _State:
    """What `configure` sets, and what is under way."""

    verbose: bool = False
    log: TextIO | None = None
    began: float = field(default_factory=time.monotonic)
    """When the command began."""
    announced: bool = False
    """Whether the command said what it does, so that it also says when it is done."""
    estimated: float | None = None
    """The seconds that the command was expected to take."""
    works: list[_Work] = field(default_factory=list)
    """What is under way, each within the one before it."""
    told: float = -SILENCE
    """When the last line of progress was printed."""
    live: Live | None = None


_state = _State()
_logger = logging.getLogger("mpq_compiler")
"""Details that only ``--verbose`` shows and ``--log`` keeps: modules log them under their own names."""


class _Details(logging.Handler):
    """Shows what modules log."""

    def emit(self, record: logging.LogRecord) -> None:
        detail(record.getMessage())


_details = _Details()


def configure(quiet: bool = False, verbose: bool = False, log: str | Path | None = None) -> None:
    """Begins a command: what it shows, beside results and errors, and the file that all of it is added to.

    OSError: the file cannot be written.
    """
    global _state
    _state = _State(verbose=verbose)
    if log is not None:
        _state.log = Path(log).open("a", encoding="utf-8")  # noqa: SIM115 - `reset` closes it
    console.quiet = quiet
    if verbose or log is not None:
        _logger.addHandler(_details)
        _logger.setLevel(logging.INFO)


def reset() -> None:
    """Ends what `configure` began."""
    _logger.removeHandler(_details)
    _logger.setLevel(logging.NOTSET)
    console.quiet = False
    if _state.log is not None:
        _state.log.close()
    _state.verbose, _state.log = False, None


@contextmanager
def announced(sentence: str | None) -> Iterator[None]:
    """Says what a command is about to do, and when it is done how long that took. None: it is not worth it."""
    if sentence is None:
        yield
        return
    note(sentence)
    _state.announced, _state.told = True, time.monotonic()
    with progress(sentence, 1):
        yield
    expected = "" if _state.estimated is None else f" (estimated {duration(_state.estimated)})"
    note(f"done in {duration(elapsed())}{expected}")


def elapsed() -> float:
    """Seconds since the command began."""
    return time.monotonic() - _state.began


def expect(seconds: float | None) -> None:
    """Notes how long the command takes from its beginning, by an estimate, to hold against the truth; None: unknown."""
    _state.estimated = seconds


@contextmanager
def progress(title: str, total: int) -> Iterator[Callable[..., None]]:
    """Shows a progress bar; yields ``advance(n, said="")``, which also shows ``said``, such as a loss.

    Work within work stands below it, and a ``total`` of 1 has no bar. Without a terminal there is a line when the first
    work begins, and one every `SILENCE` seconds.
    """
    state, work = _state, _Work(title, total)

    def advance(n: int, said: str = "") -> None:
        work.done, work.said = work.done + n, said

    first = not state.works
    state.works.append(work)
    try:
        with _shown(state) if first else nullcontext():
            yield advance
    finally:
        state.works.remove(work)
    if state.works or not state.announced:
        detail(f"{title}{f' ({total})' if total > 1 else ''} took {duration(work.seconds)}")


@contextmanager
def _shown(state: _State) -> Iterator[None]:
    """Shows all works of a state until the first of them ends."""
    console.file = sys.stderr  # held fast: passes redirect what libraries write
    drawn = console.is_terminal and not console.quiet
    lines = state.log is not None or not drawn
    ended = threading.Event()

    def tell() -> None:
        while not ended.wait(max(0.0, state.told + SILENCE - time.monotonic())):
            _tell(state)

    if lines and time.monotonic() - state.told >= SILENCE:
        _tell(state)
    teller = threading.Thread(target=tell, name="mpqc progress", daemon=True)
    if lines:
        teller.start()
    if drawn:
        _draw(state)
    try:
        yield
    finally:
        ended.set()
        if state.live is not None:
            state.live.stop()
            state.live = None
        if lines:
            teller.join()
        console.file = None  # type: ignore[assignment]


def _draw(state: _State) -> None:
    """Begins to draw bars; standard output is left alone, since it may be a file."""
    state.live = Live(get_renderable=_bars, console=console, transient=True, redirect_stdout=False)
    state.live.start()


def _tell(state: _State) -> None:
    """Prints the line of what is under way."""
    state.told = time.monotonic()
    inner = state.works[1:] if state.announced else state.works
    parts = [" ".join(filter(None, (work.title, work.counted, work.said))) for work in inner or state.works]
    line = f"{duration(elapsed())}: {', '.join(parts)}"
    _record(line)
    if not console.is_terminal:
        _print(f"{time.strftime('%H:%M:%S')} {line}")


def _bars() -> RenderableType:
    """The works that are under way as a grid, one a row."""
    grid = Table.grid(padding=(0, 1))
    grid.width = min(BARS, console.width)
    grid.add_column(ratio=1, no_wrap=True, overflow="ellipsis")
    for style in (None, "green", "yellow", "cyan"):
        grid.add_column(style=style, no_wrap=True)
    for index, work in enumerate([*_state.works]):
        seconds = elapsed() if _state.announced and not index else work.seconds
        bar = ProgressBar(work.total, work.done, width=BAR) if work.total > 1 else ""
        ahead = f"{duration(seconds / work.done * (work.total - work.done))} left" if bar and work.done else ""
        grid.add_row(f"{work.title} {work.said}".rstrip(), bar, work.counted, duration(seconds), ahead)
    return grid


def _print(text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)


def _record(text: str) -> None:
    """Adds lines with the time to the log."""
    if _state.log is not None:
        now = time.strftime("%Y-%m-%d %H:%M:%S")
        _state.log.writelines(f"{now} {line}\n" for line in text.splitlines())
        _state.log.flush()


def _result(printed: str | Table, style: str | None = None) -> None:
    """Prints a part of the result; text stands as it is."""
    if _state.live is not None:
        _state.live.stop()
    text, plain = io.StringIO(), isinstance(printed, str)
    for to in (output, Console(file=text, width=WIDTH)):
        to.print(printed, style=style, markup=not plain, highlight=not plain, soft_wrap=plain)
    if _state.live is not None:
        _draw(_state)
    _record(text.getvalue())


def say(text: str) -> None:
    """Prints a line of the result as it is."""
    _result(text)


def note(text: str) -> None:
    """Prints a note, which is no result: what was assumed, or did not go as asked."""
    _record(text)
    _print(text)


def detail(text: str) -> None:
    """Prints what only ``--verbose`` shows and a log has."""
    _record(text)
    if _state.verbose:
        _print(text)


def error(text: str) -> None:
    """Prints an error, which ``--quiet`` shows, too."""
    _record(text)
    print(text, file=sys.stderr, flush=True)


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
    _result(title, style="bold")
    _result(made)


def duration(seconds: float) -> str:
    """Seconds for people: 3.2 s, 4 min 12 s, 2 h 5 min."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return " ".join(filter(None, (f"{minutes} min" if minutes else "", f"{rest} s" if rest else "")))
    return f"{minutes // 60} h" + (f" {minutes % 60} min" if minutes % 60 else "")


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


def count(number: float) -> str:
    """A large number for people, as options take it: 2.50T."""
    for unit in ("", "k", "M", "G", "T"):
        if abs(number) < 1000 or unit == "T":
            return f"{number:.0f}" if unit == "" else f"{number:.2f}{unit}"
        number /= 1000
    raise AssertionError


def memory(entry: Mapping[str, Any]) -> str:
    """The memory that running an artifact takes, in words, from the manifest's entry `memory`."""
    most = {kind: size(max(entry[kind].values())) for kind in ("activation_bytes", "workspace_bytes")}
    return (
        f"{size(entry['prepared_bytes'])} of prepared weights, {most['activation_bytes']} of activations, "
        f"{most['workspace_bytes']} of workspaces a thread"
    )


def fallbacks(entry: Mapping[str, str]) -> list[str]:
    """The calls that fell back, in a line for each reason, from the report's entry: reasons by call."""
    calls: dict[str, list[str]] = {}
    for name, reason in entry.items():
        calls.setdefault(reason, []).append(name)
    return [f"fallback: {named(names)}: {reason}" for reason, names in calls.items()]


def additivity(entry: Mapping[str, Any]) -> str:
    """How well the losses of single changes add up to the plan's noise, in words, from the report's entry."""
    apart = "" if entry["difference_db"] is None else f" ({entry['difference_db']:+.2f} dB)"
    return f"noise {entry['measured']:.2e} measured together, {entry['expected']:.2e} by the sum of its losses{apart}"
