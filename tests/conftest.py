"""Which tests a run has (tests/README.md), the cache that they share, and where its time goes."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import hypothesis
import pytest

from tests.harness import cputime, rings
from tests.harness.cuda import silicon

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported: there is a worker for each core

hypothesis.settings.register_profile("mpq", deadline=None, derandomize=True)
hypothesis.settings.load_profile("mpq")

SEED = 22
SLOWEST = 10
NOT_REACHED = "not reached: the run's time is up"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--accept", action="store_true", help="write the golden texts of tests/golden anew")
    parser.addoption("--gpu", action="store_true", help="CUDA kernels run on the GPU here, not on an emulator")
    group = parser.getgroup("rings", "two rings of tests (tests/README.md)")
    group.addoption("--ring", choices=("1", "2", "all"), default="all", help="the first ring, the rest, or both")
    group.addoption("--sample-seed", type=int, default=SEED, help="of the samples in the first ring (%(default)s)")
    group.addoption("--shard", metavar="COMMIT", help="with --ring 2: a part that fits --seconds, chosen by this text")
    group.addoption("--seconds", type=float, help="the time this run may take; tests it does not reach are named")
    group.addoption("--durations-file", type=Path, help="write the CPU seconds of tests, which samples are made by")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("gpu"):
        silicon.ask()
    share_cache(config)
    os.environ.setdefault("MPQ_TEST_BEGIN", str(time.time()))  # workers begin with the run
    if config.getoption("durations_file"):
        config.pluginmanager.register(cputime.Clock())


# --- one cache for the run ------------------------------------------------------------------------------------


def share_cache(config: pytest.Config) -> None:
    """One cache for all suites and workers, never the user's. It outlives the run where $MPQ_TEST_CACHE names it."""
    if "MPQ_TEST_CACHE" not in os.environ:
        folder = os.environ["MPQ_TEST_CACHE"] = tempfile.mkdtemp(prefix="mpq-tests-")
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))
    os.environ["MPQ_CACHE"] = os.environ["MPQ_TEST_CACHE"]


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> None:
    """So that seconds and bits do not depend on the machine's cores."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


# --- which tests ----------------------------------------------------------------------------------------------


REFUSALS = {"raises", "refused"}
"""Names in the code of a test that expects an error."""


def case_of(item: pytest.Item) -> rings.Case:
    assert isinstance(item, pytest.Function)
    name = f"{item.cls.__name__}.{item.originalname}" if item.cls else item.originalname
    parameters = tuple(sorted(item.callspec.indices.items())) if hasattr(item, "callspec") else ()
    refuses = not REFUSALS.isdisjoint(item.function.__code__.co_names)
    return rings.Case(item.location[0].replace(os.sep, "/"), name, parameters, item.nodeid, refuses)


SAID = pytest.StashKey[list[str]]()
"""What the run says about its choice of tests."""


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    ring, commit, seed = (config.getoption(name) for name in ("ring", "shard", "sample_seed"))
    cases = list(map(case_of, items))
    durations = rings.Durations.read()
    first = rings.first_ring(cases, rings.Rules.read(), durations, seed)
    config.stash[rings.FIRST] = [items[i] for i in sorted(first)]
    if ring == "all":
        return
    chosen = first if ring == "1" else {*range(len(items))} - first
    cost = durations.total(cases[i] for i in chosen)
    said = [f"ring {ring}: {len(chosen)} of {len(items)} tests, {cost:.0f} CPU seconds, --sample-seed {seed}"]
    if commit is not None:
        workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", 1))
        seconds = config.getoption("seconds")  # not what is left of them: all workers must choose the same tests
        capacity = (float("inf") if seconds is None else seconds) * workers * rings.LOAD
        rest, chosen = chosen, rings.shard(cases, chosen, commit, capacity, durations)
        said += [f"shard of {commit}: {len(chosen)} of {len(rest)} tests", *parts(cases, chosen, rest)]
    config.stash[SAID] = said
    config.hook.pytest_deselected(items=[item for i, item in enumerate(items) if i not in chosen])
    items[:] = [item for i, item in enumerate(items) if i in chosen]


def parts(cases: Sequence[rings.Case], chosen: set[int], rest: set[int]) -> Iterator[str]:
    """How many of each suite's tests a shard has; suites without any are on the last line."""
    of = Counter(cases[i].suite for i in rest)
    has = Counter(cases[i].suite for i in chosen)
    yield from (f"{has[suite]:5d} of {of[suite]:4d}  {suite}" for suite in sorted(has))
    if without := sorted(of.keys() - has.keys()):
        yield f"in other shards: {' '.join(without)}"


def time_left(config: pytest.Config) -> float:
    seconds = config.getoption("seconds")
    return float("inf") if seconds is None else seconds - (time.time() - float(os.environ["MPQ_TEST_BEGIN"]))


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if time_left(item.config) < 0:
        pytest.skip(NOT_REACHED)


def pytest_sessionfinish(session: pytest.Session) -> None:
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["said"] = session.config.stash.get(SAID, [])


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any) -> None:
    node.config.stash[SAID] = getattr(node, "workeroutput", {}).get("said", [])


# --- what a run says at its end -------------------------------------------------------------------------------


_reports: list[pytest.TestReport] = []


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    _reports.append(report)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter, config: pytest.Config) -> None:
    say, title = terminalreporter.line, lambda text: terminalreporter.section(text, sep="-")
    suites, tests = defaultdict[str, float](float), defaultdict[str, float](float)
    for report in _reports:
        suites[report.location[0]] += report.duration
        tests[report.nodeid] += report.duration
    for kind, seconds, most in (("suite", suites, len(suites)), (f"test, the slowest {SLOWEST}", tests, SLOWEST)):
        if seconds:
            title(f"seconds per {kind}")
            for name, each in sorted(seconds.items(), key=lambda item: -item[1])[:most]:
                say(f"{each:8.1f}  {name}")
    if said := config.stash.get(SAID, []):
        title("rings")
        for line in said:
            say(line)
    if config.getoption("ring") == "1":
        rules = rings.Rules.read()
        for suite in sorted(suites):
            if suites[suite] > rules.whole and suite not in rules.share:
                say(f"{suite} takes {suites[suite]:.0f} s, more than {rules.whole:.0f}: see tests/README.md")
    if late := Counter(r.location[0] for r in _reports if r.skipped and NOT_REACHED in str(r.longrepr)):
        title(NOT_REACHED)
        for suite, count in sorted(late.items()):
            say(f"{count:8d}  {suite}")
    if path := config.getoption("durations_file"):
        known = rings.Durations.read(path) if path.exists() else rings.Durations()
        known.suites |= cputime.durations(_reports).suites
        known.write(path)
