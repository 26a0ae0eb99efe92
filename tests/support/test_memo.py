"""The memory of a last result: the same objects, the same thread."""

from __future__ import annotations

import threading

from mpq_compiler.support.memo import last_result


def test_only_the_last_call_with_the_same_objects_is_kept():
    calls = []

    @last_result
    def joined(items: list[int], factor: float = 1.0) -> list[float]:
        calls.append(items)
        return [item * factor for item in items]

    one, equal = [1, 2], [1, 2]
    assert joined(one) is joined(one) and len(calls) == 1
    assert joined(equal) == joined(one) and len(calls) == 3  # equal is not the same
    assert joined(one, 2.0) == [2, 4] and joined(one, 2.0) is joined(one, float("2")) and len(calls) == 4
    assert joined(one, factor=2.0) == [2, 4] and len(calls) == 5


def test_each_thread_has_its_own():
    calls = []

    @last_result
    def number(of: list[int]) -> int:
        calls.append(of)
        return len(calls)

    items = [0]
    assert number(items) == 1
    other = threading.Thread(target=number, args=(items,))
    other.start()
    other.join()
    assert len(calls) == 2 and number(items) == 1
