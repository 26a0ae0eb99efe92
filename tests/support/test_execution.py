"""How work is shared out: tasks on threads."""

from __future__ import annotations

import threading
import time

import pytest

from mpq_compiler.support.execution import RunContext


def slower_first(pause: float, item: int) -> int:
    time.sleep(pause * (3 - item))
    return item * 10


@pytest.mark.parametrize("jobs", [1, 3])
def test_results_are_in_the_order_of_the_items_and_ends_are_told_in_this_thread(jobs: int) -> None:
    told: list[tuple[int, int, bool]] = []
    this = threading.current_thread()

    def ended(item: int, result: int) -> None:
        told.append((item, result, threading.current_thread() is this))

    assert RunContext(jobs=jobs).tasks(slower_first, 0.02, iter(range(4)), ended) == [0, 10, 20, 30]
    assert sorted(told) == [(i, 10 * i, True) for i in range(4)]


def fails(_: None, item: int) -> None:
    time.sleep(0.05)
    raise ValueError(f"item {item}")


def test_an_error_ends_the_tasks_that_have_not_begun() -> None:
    seen: list[int] = []
    begin = time.monotonic()
    with pytest.raises(ValueError, match="item 0"):
        RunContext().tasks(fails, None, range(200), lambda item, result: seen.append(item))
    assert not seen and time.monotonic() - begin < 5


def test_a_cluster_takes_the_place_of_the_threads() -> None:
    class Here:
        def run(self, task, shared, items, ended):
            return [("there", task(shared, item)) for item in items]

    assert RunContext(cluster=Here()).tasks(slower_first, 0.0, [2]) == [("there", 20)]
