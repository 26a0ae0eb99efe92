"""Races that are planted in small kernels: the emulator names each, also where the values are right by luck."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

pytest.importorskip("tvm")
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import flat, store
from mpq_compiler.backends.tvm.kernels.cuda.threads import barrier, grid, primfunc, shared
from mpq_compiler.backends.tvm.kernels.problems.argument import Argument
from tests.harness.cuda import kernels
from tests.harness.cuda.kernels import Library

THREADS = 64
Body = Callable[[Any, Any, Any, Any], None]
"""Of shared memory, the input, the output and the thread."""


def turned(waiting: Any, x: Any, y: Any, thread: Any, between: Callable[[], None] = barrier) -> None:
    """Writes the input the other way round, by way of shared memory."""
    store(waiting, x[thread], thread)
    between()
    store(y, waiting[THREADS - 1 - thread], thread)


def no_barrier(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    turned(waiting, x, y, thread, lambda: None)


def over_what_is_read(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    turned(waiting, x, y, thread)
    store(waiting, x[thread], thread)


def twice(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    store(waiting, x[0], 0)
    barrier()
    store(y, waiting[0], thread)


def of_nobody(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    with T.If(thread < THREADS - 1), T.Then():
        store(waiting, x[thread], thread)
    barrier()
    store(y, waiting[thread], thread)


def copied(waiting: Any, x: Any, y: Any, thread: Any, wait: bool = True) -> None:
    T.evaluate(T.ptx["cp.async.ca.shared.global"](waiting.ptr_to([thread]), x.ptr_to([thread]), 4))
    T.evaluate(T.ptx.cp.async_.commit_group())
    if wait:
        T.evaluate(T.ptx.cp.async_.wait_group(0))
    barrier()
    store(y, waiting[THREADS - 1 - thread], thread)
    if not wait:
        T.evaluate(T.ptx.cp.async_.wait_group(0))


def a_copy_not_waited_for(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    copied(waiting, x, y, thread, wait=False)


RACES: dict[Body, str] = {
    no_barrier: "reads what",
    over_what_is_read: "just been",  # by whoever comes later
    twice: "writes what has just been written to",
    of_nobody: "reads what nobody has written to",
    a_copy_not_waited_for: "reads what a copy has not brought to",
}


def library(bodies: dict[str, Body]) -> Library:
    arguments = [Argument("x", (THREADS,)), Argument("y", (THREADS,))]

    def made(body: Body) -> Callable[[Any, Any], None]:
        def write(_: Any, buffers: Any) -> None:
            with grid(1, THREADS) as (_, thread):
                body(shared(THREADS), flat(buffers["x"]), flat(buffers["y"]), thread)

        return write

    return Library({name: primfunc(name, arguments, made(body)) for name, body in bodies.items()})


@pytest.mark.parametrize("early", [False, True])
def test_races_are_named(early):
    kernels.needs()
    x = np.arange(THREADS, dtype=np.float32)
    for number, (body, says) in enumerate(RACES.items()):
        if early and body is a_copy_not_waited_for:
            continue  # what is copied at once is there
        own = library({f"race{number}": body})
        (found,) = own.tried([(f"race{number}", [x, np.zeros_like(x)])], early)
        assert found is None and "emulator: a race: thread" in own.said and says in own.said, (body.__name__, own.said)


def test_what_is_no_race():
    kernels.needs()
    x = np.arange(THREADS, dtype=np.float32)
    own = library({"turned": turned, "copied": copied})
    for early in (False, True):
        for result in own.run([(name, [x, np.zeros_like(x)]) for name in ("turned", "copied")], early):
            np.testing.assert_array_equal(result[1], x[::-1])


def before(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    store(y, x[thread], thread - 1)


def behind(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    store(y, x[thread], thread + 1)


def read_before(waiting: Any, x: Any, y: Any, thread: Any) -> None:
    store(y, x[thread - 1024], thread)


@pytest.mark.parametrize(("body", "says"), [(before, "before the beginning"), (behind, "Segf"), (read_before, "Segf")])
def test_what_lies_outside_of_a_buffer(body, says):
    """Behind it begins a page that nobody may touch, and a page or less before it."""
    kernels.needs()
    x = np.arange(THREADS, dtype=np.float32)
    own = library({"outside": body})
    (found,) = own.tried([("outside", [x, np.zeros_like(x)])])
    assert found is None and says in own.said, own.said
