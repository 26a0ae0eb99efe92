"""CPU seconds of tests, those of their child processes included: what samples are made by, since neighbours on a
machine change seconds of a clock and not these."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.harness.rings import FIXTURES, Durations

TICKS = os.sysconf("SC_CLK_TCK")
PROPERTY = "CPU seconds"


def used() -> float:
    """CPU seconds of this process and of all its children so far, the living ones included."""
    times = os.times()
    found = times.user + times.system + times.children_user + times.children_system
    children: defaultdict[int, list[int]] = defaultdict(list)
    ticks: dict[int, int] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                fields = (entry / "stat").read_text().rpartition(")")[2].split()
            except OSError:  # has ended
                continue
            children[int(fields[1])].append(int(entry.name))
            ticks[int(entry.name)] = sum(map(int, fields[11:15]))
    pending = list(children[os.getpid()])
    while pending:
        process = pending.pop()
        found += ticks[process] / TICKS
        pending += children[process]
    return found


class Clock:
    """A plugin of pytest that writes the seconds of each phase into reports."""

    @contextmanager
    def _timed(self, item: pytest.Item, phase: str) -> Iterator[None]:
        begin = used()
        try:
            yield
        finally:
            item.user_properties.append((PROPERTY, (phase, used() - begin)))

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_setup(self, item: pytest.Item) -> Iterator[None]:
        with self._timed(item, "setup"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_call(self, item: pytest.Item) -> Iterator[None]:
        with self._timed(item, "call"):
            return (yield)

    @pytest.hookimpl(wrapper=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> Iterator[None]:
        with self._timed(item, "teardown"):
            return (yield)


def durations(reports: Sequence[pytest.TestReport]) -> Durations:
    """Seconds of suites that these reports are of."""
    calls: defaultdict[str, defaultdict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    fixtures: defaultdict[str, float] = defaultdict(float)
    for report in reports:
        suite, _, name = report.location
        phases = dict(value for key, value in report.user_properties if key == PROPERTY)
        if report.when == "teardown" and "call" in phases:  # not of what was skipped
            calls[suite][name.partition("[")[0]].append(phases["call"])
            fixtures[suite] += phases["setup"] + phases["teardown"]
    return Durations(
        {
            suite: {FIXTURES: fixtures[suite]} | {name: sum(own) / len(own) for name, own in functions.items()}
            for suite, functions in calls.items()
        }
    )
