"""Control flow of emitted code: what is known now is decided now."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from tvm import tirx
from tvm.script.ir_builder import tirx as T

from mpq_compiler.backends.tvm.kernels.common.template import scratch, store
from mpq_compiler.backends.tvm.kernels.cpu.weight_layout import Segment
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul


def when(condition: Any, body: Callable[[], None], otherwise: Callable[[], None] | None = None) -> None:
    """``if condition: body() else: otherwise()``, decided now where the condition is a Python bool."""
    if isinstance(condition, bool):
        chosen = body if condition else otherwise
        if chosen:
            chosen()
        return
    with T.If(condition):
        with T.Then():
            body()
        if otherwise:
            with T.Else():
                otherwise()


def loop(extent: Any, body: Callable[[Any], None]) -> None:
    """``for i in range(extent): body(i)``, without a loop where there is one pass."""
    if isinstance(extent, int) and extent == 1:
        body(0)
        return
    with T.serial(0, extent) as i:
        body(i)


def quotient(a: Any, b: Any) -> Any:
    """The quotient a // b for a >= 0 and b > 0, without the corrections for signs that TVM would add."""
    return a if isinstance(b, int) and b == 1 else tirx.truncdiv(a, b)


def opaque(value: Any) -> Any:
    """A name for an int32, behind a load, so that TVM does not substitute its definition into every index.

    That would change no result, but compiling would take several times as long.
    """
    cell = scratch(1, "int32")
    store(cell, value, 0)
    return T.bind(cell[0])


def each_segment(problem: QuantMatmul, body: Callable[[Segment], None]) -> None:
    """Calls body for each segment, in a loop where several are equal."""
    for first, count in problem.segment_runs:

        def at(i: Any, first: int = first) -> None:
            """Segment i of the run."""
            body(Segment(first, i))

        loop(count, at)
