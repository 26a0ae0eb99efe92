"""Prints the time of every suite (one test file) after a run, slowest first."""

from __future__ import annotations

from collections import defaultdict

import pytest

_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.location[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _seconds:
        terminalreporter.section("seconds per suite", sep="-")
        for suite, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{seconds:8.1f}  {suite}")
