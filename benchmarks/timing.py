"""Calls that take turns, so that what else the machine does meets all of them."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable, Mapping


def interleaved(
    calls: Mapping[str, Callable[[], object]],
    rounds: int,
    window: float = 2e-3,
    process: bool = False,
    warm: bool = False,
    seconds: Callable[[Callable[[], object], int], float] | None = None,
) -> dict[str, list[float]]:
    """Seconds of CPU time of each call in each round; one shorter than ``window`` repeats in a round.

    Of the thread, or of the ``process``: what peers leave to threads of their own counts. ``warm``: one call more comes
    before, untimed, so that what the others have left in the caches does not count. ``seconds``: another clock, which
    gives those of one call over several.
    """
    clock = time.process_time_ns if process else time.thread_time_ns
    seconds = seconds or functools.partial(_seconds, clock)
    repeats = {}
    for name, call in calls.items():
        call()
        repeats[name] = max(1, int(window / max(seconds(call, 1), 1e-9)))
    found: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if warm:
                call()
            found[name].append(seconds(call, repeats[name]))
    return found


def wall(call: Callable[[], object], repeats: int = 1) -> float:
    """Seconds of one call by the wall, over several: a clock of `interleaved`."""
    return _seconds(time.perf_counter_ns, call, repeats)


def _seconds(clock: Callable[[], int], call: Callable[[], object], repeats: int) -> float:
    """Of one call, over several."""
    start = clock()
    for _ in range(repeats):
        call()
    return (clock() - start) / repeats / 1e9
