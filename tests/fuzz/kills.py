"""Compilations that are killed at random points, two at a time on one cache: nothing is lost, and the next is right.

Each is a process of its own that compiles a small model over an artifact that is there. After each signal the artifact
is whole; what lies beside it is swept by the next; the cache gives a later compilation the bytes that a fresh one has.
"""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

from mpq_compiler.artifact import bundle
from tests.harness.tree import ROOT

PIPELINE = (
    "trace,layout,calibrate{samples=2,steps=4},time-groups{groups=2},"
    "sensitivity{inputs=4,probes=2,sampled=5000,formats=int2/int4/int8},bit-allocation{weights=5.5},insert-fake-quant,"
    "residual-branch,round-weights{method=gptq},fold-fake-quant,fuse-epilogues"
)
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CODES = {signal.SIGKILL: (-9,), signal.SIGTERM: (143, -15), signal.SIGINT: (130, -2)}
"""Negative ones are of a process that has not come to the command yet."""


def command(model: Path, output: Path, cache: Path) -> list[str]:
    options = ["--pipeline", PIPELINE, "--cache", str(cache), "--overwrite", "--jobs", "1"]
    return [sys.executable, "-m", "mpq_compiler", "compile", str(model), "-o", str(output), *options]


def start(model: Path, output: Path, cache: Path) -> subprocess.Popen[bytes]:
    """A compilation that listens to Ctrl-C, whatever this process does."""
    listening = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    quiet = subprocess.DEVNULL
    return subprocess.Popen(command(model, output, cache), cwd=ROOT, stdout=quiet, stderr=quiet, preexec_fn=listening)


def files(path: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in bundle.read(path).folder.iterdir()}


def campaign(
    folder: Path, kills: int, seed: int = 0, together: int = 2, until: float | None = None
) -> Counter[str]:
    """Kills compilations; returns how often what was seen. AssertionError: something was lost, or is wrong.

    Args:
        folder: for everything.
        kills: how many signals are delivered.
        seed: of their moments.
        together: how many compilations share the cache at a time.
        until: `time.monotonic` after which no further one begins.
    """
    from tests.harness import tiny

    folder.mkdir(parents=True, exist_ok=True)
    model, cache, chance, seen = tiny.save("dit", folder), folder / "cache", random.Random(seed), Counter[str]()
    places = [folder / str(number) / "out.mpq" for number in range(together)]
    begin = time.monotonic()
    for place in places:
        place.parent.mkdir(exist_ok=True)
        assert start(model, place, folder / "first").wait() == 0
    whole = (time.monotonic() - begin) / together  # seconds of one
    right = files(places[0])
    assert all(files(place) == right for place in places)
    while seen["killed"] < kills and (until is None or time.monotonic() < until):
        running = [start(model, place, cache) for place in places]
        begin, waits = time.monotonic(), sorted(chance.random() * whole for _ in places)
        for process, wait in zip(running, waits, strict=True):
            time.sleep(max(0.0, begin + wait - time.monotonic()))
            number = chance.choice(SIGNALS)
            if process.poll() is None:
                process.send_signal(number)
                code = process.wait(300)
                if code:
                    assert code in CODES[number], (code, number)
                    seen["killed"] += 1
                    seen[number.name] += 1
            seen["ended before"] += process.wait() == 0
        for place in places:
            assert files(place) == right, "an artifact was lost or is another"
        if chance.random() < 0.1:  # the cache is that of killed compilations now
            assert start(model, places[0], cache).wait() == 0
            assert files(places[0]) == right, "a compilation with what the killed ones have left has other bytes"
            assert [path.name for path in places[0].parent.iterdir()] == ["out.mpq"], "leftovers were not swept"
            seen["compiled with what was left"] += 1
            if chance.random() < 0.3:
                subprocess.run(["rm", "-rf", str(cache)], check=True)
    return seen
