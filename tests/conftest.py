"""The options --accept and --gpu, and the time of every suite (one test file) after a run, slowest first."""

from __future__ import annotations

import os
from collections import defaultdict

import hypothesis
import pytest

from tests.harness.cuda import silicon

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there is a worker for each core

hypothesis.settings.register_profile("mpq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mpq")


@pytest.fixture(scope="session", autouse=True)
def cache_of_the_run(pytestconfig: pytest.Config, tmp_path_factory: pytest.TempPathFactory) -> None:
    """One cache for the whole run, and never the user's: compiled kernels are shared by all suites and workers."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if hasattr(pytestconfig, "workerinput") else base  # of the workers, not of a run that one starts
    os.environ["MPQ_CACHE"] = str(root / "mpq-cache")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden texts of tests/golden anew")
    parser.addoption("--gpu", action="store_true", help="CUDA kernels run on the GPU here, not on an emulator")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("gpu"):
        silicon.ask()


_seconds: defaultdict[str, float] = defaultdict(float)


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _seconds[report.location[0]] += report.duration


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if _seconds:
        terminalreporter.section("seconds per suite", sep="-")
        for suite, seconds in sorted(_seconds.items(), key=lambda item: -item[1]):
            terminalreporter.line(f"{seconds:8.1f}  {suite}")
