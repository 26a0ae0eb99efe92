"""The two rings of tests: `make test` runs the first one, `make test-all` both.

Rules stand in tests/rings.toml, CPU seconds of test functions in tests/durations.json. A *case* is one collected test:
a function with one set of parameters. What is chosen depends on the cases, the two files and a seed, on nothing else:
all workers of a run choose the same.

>>> rules, seconds = Rules.read(), Durations.read()
>>> chosen = first_ring(cases, rules, seconds, seed=22)      # indices of cases
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[1]
FIXTURES = ""
"""The key of a suite's set-up among the seconds of its functions."""

LOAD = 0.7
"""The part of a run's time in which its workers run tests that a shard counts on; the rest is imports and waiting."""

Values = tuple[tuple[str, int], ...]
"""One or two parameters, each with the position of its value."""


FIRST = pytest.StashKey[list[pytest.Item]]()
"""The collected tests of the first ring, whichever ring runs: in the stash of pytest's configuration."""


@dataclass(frozen=True)
class Case:
    suite: str
    """The file, relative to the root."""
    function: str
    """The name of the function, behind that of its class if it has one."""
    parameters: Values = ()
    """Names of parameters and the positions of their values in the lists of `parametrize`."""
    id: str = ""
    refuses: bool = False
    """Whether the test expects an error."""

    @property
    def pairs(self) -> frozenset[Values]:
        """Values of single parameters and of every two of them: what a pairwise sample covers."""
        single = itertools.combinations(self.parameters, 1)
        return frozenset((*single, *itertools.combinations(self.parameters, 2)))


@dataclass(frozen=True)
class Rules:
    """The contents of rings.toml."""

    whole: float
    unmeasured: float
    """CPU seconds that a case of a sampled suite is taken for where nobody has measured it."""
    share: Mapping[str, float]
    """CPU seconds of suites that are sampled."""
    always: frozenset[str]
    never: Mapping[str, str]
    """Reasons, by the names of functions."""

    @classmethod
    def read(cls, path: Path = FOLDER / "rings.toml") -> Rules:
        found = tomllib.loads(path.read_text(encoding="utf-8"))
        share = {suite: weight * found["share"] for suite, weight in found["sampled"].items()}
        return cls(found["whole"], found["unmeasured"], share, frozenset(found["always"]), found["never"])


@dataclass
class Durations:
    """CPU seconds, child processes included: of one case of each function, and of a suite's fixtures as a whole."""

    suites: dict[str, dict[str, float]] = field(default_factory=dict)
    unmeasured: float = 0.0

    @classmethod
    def read(cls, path: Path = FOLDER / "durations.json") -> Durations:
        return cls(json.loads(path.read_text(encoding="utf-8")))

    def write(self, path: Path) -> None:
        found = {
            suite: {name: round(seconds, 2) for name, seconds in sorted(functions.items())}
            for suite, functions in sorted(self.suites.items())
        }
        path.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")

    def fixtures(self, suite: str) -> float:
        return self.suites.get(suite, {}).get(FIXTURES, 0.0)

    def of(self, case: Case) -> float:
        """Seconds of a case without those of fixtures."""
        return self.suites.get(case.suite, {}).get(case.function, self.unmeasured)

    def total(self, cases: Iterable[Case]) -> float:
        """Seconds of all these cases on one core, with the fixtures of their suites."""
        cases = list(cases)
        return sum(map(self.of, cases)) + sum(self.fixtures(suite) for suite in {case.suite for case in cases})


def first_ring(cases: Sequence[Case], rules: Rules, seconds: Durations, seed: int) -> set[int]:
    """Positions of the cases in the first ring."""
    suites: defaultdict[str, list[int]] = defaultdict(list)
    for index, case in enumerate(cases):
        suites[case.suite].append(index)
    return {index for suite, own in suites.items() for index in _of_suite(suite, own, cases, rules, seconds, seed)}


def _of_suite(
    suite: str, own: Sequence[int], cases: Sequence[Case], rules: Rules, seconds: Durations, seed: int
) -> set[int]:
    possible = [i for i in own if f"{suite}::{cases[i].function}" not in rules.never]
    if suite not in rules.share:
        small = seconds.total(cases[i] for i in own) <= rules.whole
        return {*possible} if small else set()
    seconds = replace(seconds, unmeasured=rules.unmeasured)
    always = {i for i in possible if cases[i].refuses or rules.always & {suite, f"{suite}::{cases[i].function}"}}
    return _sample({i: cases[i] for i in possible}, always, rules.share[suite], seconds, seed)


def _sample(cases: Mapping[int, Case], always: Iterable[int], share: float, seconds: Durations, seed: int) -> set[int]:
    """Turn by turn one case of every function, cheap functions first, each the one that adds most pairs of values."""
    chosen = {*always}
    spent = seconds.total(cases[i] for i in chosen)
    functions: defaultdict[str, list[int]] = defaultdict(list)
    covered: defaultdict[str, set[Values]] = defaultdict(set)
    for i in sorted(cases.keys() - chosen, key=lambda i: digest(str(seed), cases[i].id)):
        functions[cases[i].function].append(i)
    turn = sorted(functions, key=lambda name: seconds.of(cases[functions[name][0]]))
    while turn:
        following = []
        for name in turn:
            best = max(functions[name], key=lambda i: len(cases[i].pairs - covered[name]))
            cost = seconds.of(cases[best]) + (0.0 if chosen else seconds.fixtures(cases[best].suite))
            if chosen and spent + cost > share:
                continue
            functions[name].remove(best)
            chosen.add(best)
            spent += cost
            covered[name] |= cases[best].pairs
            following += [name] if functions[name] else []
        turn = following
    return chosen


def shard(cases: Sequence[Case], rest: Iterable[int], commit: str, capacity: float, seconds: Durations) -> set[int]:
    """Positions of the cases of ``rest`` that one run takes: functions in an order of the commit's, while time is left.

    commit: any text. capacity: CPU seconds.
    """
    order = sorted(rest, key=lambda i: (digest(commit, cases[i].suite, cases[i].function), digest(commit, cases[i].id)))
    chosen: set[int] = set()
    suites: set[str] = set()
    for i in order:
        suite = cases[i].suite
        cost = seconds.of(cases[i]) + (0.0 if suite in suites else seconds.fixtures(suite))
        if cost <= capacity:
            chosen.add(i)
            suites.add(suite)
            capacity -= cost
    return chosen


def digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()
