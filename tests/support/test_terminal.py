"""What is printed where there is no terminal."""

from __future__ import annotations

import pytest

from mpq_compiler.support import terminal


def test_long_work_is_heard_of(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(terminal, "SILENCE", -1.0)
    with terminal.progress("counting", 3) as advance:
        for _ in range(3):
            advance(1)
    assert capsys.readouterr().err.splitlines() == ["counting (3) ...", "counting: 1 of 3", "counting: 2 of 3"]


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


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (1500, "1.50 kB"), (3.2e9, "3.20 GB")])
def test_sizes(count: float, text: str) -> None:
    assert terminal.size(count) == text
