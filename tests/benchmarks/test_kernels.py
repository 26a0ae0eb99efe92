"""Which rounds of a measurement count."""

from __future__ import annotations

from benchmarks.kernels import Group, figures, quiet

GROUP = Group("linear", {"w8": print}, {"w8": 8.0, "peak": 16.0}, "peak", {"other": print})


def test_rounds_of_a_busy_neighbour_are_left_out() -> None:
    times = {"peak": [1.0, 2.4, 1.1, 1.2, 2.4], "w8": [2.0, 9.0, 2.2, 2.4, 9.0], "other": [4.0, 9.0, 4.4, 4.8, 9.0]}
    assert quiet(GROUP, times)["w8"] == [2.0, 2.2, 2.4]
    found = figures(GROUP, times)["w8"]
    assert (found["us"], found["other"]) == (2.2e6, 2.0) and abs(found["peak"] - 0.25) < 1e-9


def test_of_few_quiet_rounds_all_count() -> None:
    times = {"peak": [1.0, 2.4, 2.4], "w8": [2.0, 9.0, 9.0], "other": [4.0, 9.0, 9.0]}
    assert quiet(GROUP, times) == times
