"""What is printed where there is no terminal."""

from __future__ import annotations

from typing import Any

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
