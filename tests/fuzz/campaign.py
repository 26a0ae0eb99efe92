"""Runs attacks in a process of their own, which may crash, hang or take all memory, and counts how mutants ended."""

from __future__ import annotations

import os
import random
import resource
import select
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from tests.fuzz.attacks import ATTACKS, base_of
from tests.harness.tree import ROOT

CRASHED, HUNG, ERROR = "crashed", "hung", "error"
BAD = (CRASHED, HUNG, ERROR)
PATIENCE = 60.0
"""Seconds after which a mutant counts as one that hangs; the machine may be busy."""
MEMORY = 12 << 30
"""Bytes of address space of the process, most of which torch's libraries take; those that want more get an error."""


@dataclass
class Outcome:
    """How the mutants of an attack ended: their number by that, and what those that ended badly said."""

    counts: Counter[str] = field(default_factory=Counter)
    bad: list[tuple[int, str, str]] = field(default_factory=list)
    """(seed, how it ended, what it said)"""
    slowest: float = 0.0
    """Seconds of the slowest mutant."""


def run(name: str, seeds: Iterable[int], folder: Path, until: float | None = None) -> Outcome:
    """Tries mutants of an attack.

    Args:
        name: a key of `ATTACKS`.
        seeds: of the mutants.
        folder: where the base lies, or will.
        until: `time.monotonic` after which no further mutant is tried.
    """
    base = base_of(name, folder)
    found, waiting = Outcome(), [*seeds]
    while waiting and (until is None or time.monotonic() < until):
        waiting = _some(name, waiting, base, found, until)
    return found


def _some(name: str, seeds: list[int], base: Path, found: Outcome, until: float | None) -> list[int]:
    """Tries seeds in one process, as long as it lives; returns those that are left."""
    with tempfile.TemporaryDirectory(prefix="fuzz-") as scratch, tempfile.TemporaryFile() as errors:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.campaign", name, str(base), scratch], cwd=ROOT, stdin=subprocess.PIPE,
            stdout=subprocess.PIPE, stderr=errors, text=True, env={**os.environ, "TMPDIR": scratch},
        )  # fmt: skip
        assert child.stdin is not None and child.stdout is not None
        try:
            assert child.stdout.readline() == "ready\n"
            for number, seed in enumerate(seeds):
                if until is not None and time.monotonic() > until:
                    return seeds[number:]
                child.stdin.write(f"{seed}\n")
                child.stdin.flush()
                begin = time.monotonic()
                ready, _, _ = select.select([child.stdout], [], [], PATIENCE)
                line = child.stdout.readline() if ready else ""
                found.slowest = max(found.slowest, time.monotonic() - begin)
                how, _, what = line.strip().partition(" ")
                if not line:
                    how = HUNG if not ready else CRASHED
                    child.kill()
                    what = f"exit code {child.wait()}"
                found.counts[how] += 1
                if how in BAD:
                    found.bad.append((seed, how, what))
                if not line:
                    return seeds[number + 1 :]
            return []
        finally:
            child.kill()
            child.wait()
            child.stdin.close()
            child.stdout.close()


def _child(name: str, base: Path, scratch: Path) -> None:
    """Tries the seeds that come on standard input."""
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, resource.RLIM_INFINITY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what is printed is no answer
    print("ready", file=answers, flush=True)
    for line in sys.stdin:
        place = scratch / "mutant"
        shutil.rmtree(place, ignore_errors=True)
        place.mkdir()
        try:
            how = ATTACKS[name].mutant(base, place, random.Random(f"{name} {int(line)}"))
        except Exception as error:
            how = f"{ERROR} {type(error).__name__}: {' '.join(str(error).split())[:300]}"
        print(how, file=answers, flush=True)


if __name__ == "__main__":
    _child(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
