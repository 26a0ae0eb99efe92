"""What is printed: on a terminal, without one, and to a log."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mpq_compiler.support import terminal


@pytest.fixture(autouse=True)
def ended() -> Iterator[None]:
    yield
    terminal.reset()
    terminal.configure()


def test_long_work_is_heard_of_now_and_then(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a terminal there are lines by the clock, with the time, whether or not the work advances."""
    monkeypatch.setattr(terminal, "SILENCE", 0.2)
    terminal.configure()
    with terminal.progress("pass 4 of 17: sensitivity", 1), terminal.progress("losses", 1000) as advance:
        for _ in range(1000):
            advance(1, "12.0 dB")
        time.sleep(0.5)
    lines = capsys.readouterr().err.splitlines()
    stamp = r"\d\d:\d\d:\d\d [\d.]+ s: pass 4 of 17: sensitivity"
    assert re.fullmatch(stamp, lines[0])
    assert 2 <= len(lines) <= 4
    assert all(re.fullmatch(stamp + ", losses 1000 of 1000 12.0 dB", line) for line in lines[1:])


def test_a_command_says_what_it_does_and_how_long_that_took(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.configure()
    with terminal.announced("compiling it"):
        assert capsys.readouterr().err == "compiling it\n"
        with terminal.progress("pass 1 of 2: trace", 1):
            terminal.expect(252)
    assert re.fullmatch(r"done in 0\.\d s \(estimated 4 min 12 s\)\n", capsys.readouterr().err)


def test_calls_that_fell_back_for_one_reason_are_told_of_in_one_line() -> None:
    reasons = {**dict.fromkeys("abcde", "a second kernel"), "f": "in floats"}
    told = ["fallback: 'a', 'b', 'c' and 2 more: a second kernel", "fallback: 'f': in floats"]
    assert terminal.fallbacks(reasons) == told


def test_a_command_that_fails_is_not_done(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.configure()
    with pytest.raises(ValueError, match="no"), terminal.announced("compiling it"):
        raise ValueError("no")
    assert capsys.readouterr().err == "compiling it\n"


def everything(**how: Any) -> None:
    """What commands print, of every kind."""
    terminal.configure(**how)
    logger = logging.getLogger("mpq_compiler.passes.some_pass")
    with terminal.announced("compiling it"):
        with terminal.progress("pass 1 of 2: trace", 1):
            logger.info("the cache has it")
        terminal.note("note: of it")
        terminal.table("it", ("what",), [("value",)])
    terminal.error("mpqc: it failed")


def test_quiet_has_results_and_errors_alone(capsys: pytest.CaptureFixture[str]) -> None:
    everything(quiet=True)
    printed = capsys.readouterr()
    assert printed.err == "mpqc: it failed\n" and "value" in printed.out


def test_verbose_has_times_and_what_was_reused(capsys: pytest.CaptureFixture[str]) -> None:
    everything()
    usual = capsys.readouterr().err.splitlines()
    everything(verbose=True)
    more = [line for line in capsys.readouterr().err.splitlines() if line not in usual and "done" not in line]
    assert more == ["the cache has it", "pass 1 of 2: trace took 0.0 s"]


@pytest.mark.parametrize("quiet", [False, True])
def test_a_log_keeps_it_all_behind_what_it_held(tmp_path: Path, quiet: bool) -> None:
    log = tmp_path / "x.log"
    log.write_text("earlier\n")
    everything(quiet=quiet, log=log)
    terminal.reset()
    first, *lines = log.read_text(encoding="utf-8").splitlines()
    assert first == "earlier"
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    said = "\n".join(line[20:] for line in lines)
    for text in ("compiling it", "the cache has it", "pass 1 of 2: trace took", "of it", "value", "done in", "failed"):
        assert text in said


def test_results_stand_among_bars_on_a_terminal(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """What bars erase when they are drawn again is their own lines, not those of a result."""
    monkeypatch.setattr(terminal, "console", Console(stderr=True, force_terminal=True, width=100))
    monkeypatch.setattr(terminal, "output", terminal.console)
    terminal.configure()
    with terminal.progress("pass 1 of 2: trace", 1), terminal.progress("losses", 10) as advance:
        advance(5)
        assert terminal._state.live is not None
        terminal._state.live.refresh()
        terminal.say("a result")
        terminal._state.live.refresh()
    screen = drawn(capsys.readouterr().err)
    assert [line for line in screen if line.strip()] == ["a result"]


def drawn(text: str) -> list[str]:
    """The lines that a terminal shows after it has obeyed this text."""
    lines, row, column = [""], 0, 0
    for count, code, char in re.findall(r"\x1b\[\??([\d;]*)([A-Za-z])|([^\x1b])", text):
        if code == "A":
            row -= int(count or 1)
        elif code == "K":
            lines[row] = ""
        elif char == "\n":
            row, column = row + 1, 0
            lines += [""] * (row + 1 - len(lines))
        elif char == "\r":
            column = 0
        elif char:
            line = lines[row].ljust(column)
            lines[row], column = line[:column] + char + line[column + 1 :], column + 1
    return lines


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.04, "0.0 s"), (3.21, "3.2 s"), (59.6, "1 min"), (252, "4 min 12 s"), (7500, "2 h 5 min"), (3600, "1 h")],
)
def test_durations(seconds: float, text: str) -> None:
    assert terminal.duration(seconds) == text


def test_cells_are_no_markup(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table("runs[best]", ("what",), [("runs[best]/x",), ("runs[/x]/y",)])
    out = capsys.readouterr().out
    assert "runs[best]/x" in out and "runs[/x]/y" in out


def test_results_and_notes_go_their_own_ways(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(terminal.output, "width", 200)
    terminal.table("[numbers]", ("name", "value"), [("x" * 90, 1)], numeric=(1,))
    terminal.note("a [note]")
    printed = capsys.readouterr()
    assert printed.err == "a [note]\n"
    assert printed.out.startswith("[numbers]\n")
    assert "x" * 90 in printed.out


def narrow(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *table: Any, **numeric: Any) -> str:
    monkeypatch.setattr(terminal.output, "width", 80)
    terminal.table("title", *table, **numeric)
    printed = capsys.readouterr().out
    assert max(map(len, printed.splitlines())) <= 80
    return printed


def test_names_and_numbers_are_whole_in_eighty_columns(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1"
    row = (name, "int2+b", "activation_bits in several words of a sentence that is long", "832.77 kB", "9.8 %")
    printed = narrow(monkeypatch, capsys, ("layer", "weight", "why", "bytes", "share"), [row] * 2, numeric=(3, 4))
    cells = [line.split("│")[1:-1] for line in printed.splitlines() if line.startswith("│")]
    columns = [[column.strip() for column in lines if column.strip()] for lines in zip(*cells, strict=True)]
    assert "".join(columns[0]) == 2 * name and all(part.endswith((".", "linear_1")) for part in columns[0])
    assert " ".join(columns[2]) == f"{row[2]} {row[2]}"
    assert columns[3] == ["832.77 kB"] * 2 and columns[4] == ["9.8 %"] * 2


def test_what_has_no_place_to_break_loses_its_middle(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    printed = narrow(monkeypatch, capsys, ("name", "value"), [("begin" + "x" * 90 + "end", "y" * 20)])
    assert "│ begin" in printed and "…" in printed and "xend │ " in printed and "y" * 20 in printed


def test_many_numbers_stand_close(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    numbers = ("0.955", "0.940", "1.021", "832.77 kB", "131.07 MB", "28.5 dB", "1.01 x", "0.98 .. 1.02")
    headers = ("", "ms", "least", "most", "stored", "peak memory", "SQNR", "against us", "80 % within")
    printed = narrow(monkeypatch, capsys, headers, [("onnxruntime-int8", *numbers)], numeric=range(1, 9))
    assert all(number in printed for number in numbers)


def test_columns_without_a_value_are_left_out(capsys: pytest.CaptureFixture[str]) -> None:
    terminal.table("title", ("name", "ms", "loss"), [("a", None, 1), ("b", "", 2)], numeric=(1, 2))
    printed = capsys.readouterr().out
    assert "loss" in printed and "ms" not in printed
    terminal.table("nothing", ("name", "ms"), [])
    assert "ms" in capsys.readouterr().out


def test_rows_are_sorted_and_the_first_are_shown() -> None:
    rows = [{"name": "b", "loss": 1.0}, {"name": "c", "loss": None}, {"name": "a", "loss": 3}]
    assert [row["name"] for row in terminal.arranged(rows, "loss", None)] == ["a", "b", "c"]
    assert [row["name"] for row in terminal.arranged(rows, "name", 2)] == ["a", "b"]
    assert terminal.arranged(rows, None, None) == rows


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (3.2e9, "3.20 GB")])
def test_sizes(count: float, text: str) -> None:
    assert terminal.size(count) == text
