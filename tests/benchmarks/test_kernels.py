"""Which rounds of a measurement count."""

from __future__ import annotations

import json

from benchmarks import kernels
from benchmarks.kernels import Group, figures, known_peak, quiet

GROUP = Group("linear", {"w8": print}, {"w8": 8.0, "peak": 16.0}, "peak", {"other": print})
CALLS = {"peak": print, "w8": print, "other": print}
BUSY = {"peak, 0": [1.0, 1.0], "w8": [2.0, 9.0], "peak, 1": [1.1, 2.4], "other": [4.0, 9.0], "peak, 2": [1.0, 1.0]}
QUIET = {"peak, 0": [1.1, 1.2], "w8": [2.2, 2.4], "peak, 1": [1.1, 1.2], "other": [4.4, 4.8], "peak, 2": [1.0, 1.0]}


def test_rounds_of_a_busy_neighbour_are_taken_again(monkeypatch) -> None:
    """He was there between both calls of the second round: neither of them counts."""
    later = iter([BUSY, QUIET])
    monkeypatch.setattr(kernels, "interleaved", lambda *_, **__: next(later))
    best: dict[str, float] = {}
    times = quiet(GROUP, CALLS, 2, best)
    assert times == {"w8": [2.0, 2.2, 2.4], "other": [4.0, 4.4, 4.8], "peak": [1.1, 1.1, 1.2]}
    assert best == {"peak": 16.0}
    found = figures(GROUP, times)["w8"]
    assert (found["us"], found["other"]) == (2.2e6, 2.0) and abs(found["peak"] - 0.25) < 1e-9


def test_calls_take_turns_with_the_pace(monkeypatch) -> None:
    made = []
    monkeypatch.setattr(kernels, "interleaved", lambda calls, *_, **__: made.extend(calls) or QUIET)
    quiet(GROUP, CALLS, 2, {})
    assert made == ["peak, 0", "w8", "peak, 1", "other", "peak, 2"]


def test_who_is_always_busy_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr(kernels, "interleaved", lambda *_, **__: BUSY)
    times = quiet(GROUP, CALLS, 2, {"peak": 30.0})
    assert times["w8"] == [2.0, 2.0]  # the quietest
    assert f"linear: 0 of {2 * kernels.TURNS} rounds were quiet, fewer than 2" in capsys.readouterr().out


def test_the_peak_of_earlier_runs_is_that_of_the_same_cpu(tmp_path) -> None:
    report = tmp_path / "kernels.json"
    assert known_peak(report, "Xeon") == 0
    report.write_text(json.dumps({"cpu": "Xeon", "peak_gmacs": [1100.0, 2250.0]}))
    assert (known_peak(report, "Xeon"), known_peak(report, "EPYC")) == (2.25e12, 0)
