"""The pass manager: checks what each pass requires, runs it, verifies the program after it, and takes the time."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

from mpq_compiler.ir.program import Program
from mpq_compiler.ir.verifier import verify
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.pipeline.passes import Pass
from mpq_compiler.pipeline.registry import usable
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.support.usage import PeakMemory, cpu_seconds, trim


def check(passes: Sequence[Pass], present: Iterable[str] = ()) -> None:
    """Raises a UserError where a pass requires something that no earlier pass provides."""
    have = set(present)
    for p in passes:
        missing = sorted(p.requires - have)
        if missing:
            makers = [name for name, maker in usable()[0].items() if missing[0] in maker.provides]
            hint = f"put {' or '.join(makers)} before it" if makers else "no pass provides it"
            raise UserError(f"pass '{p.name()}' needs '{missing[0]}': {hint}")
        have |= p.provides


LONG = 3.0
"""Seconds of a pass after which freed memory is given back: the next one takes what it needs anew, which costs time."""

Instrument = Callable[[int, Pass, Program, Program], None]
"""An observer ``instrument(index, pass, before, program)`` of verified steps; it may note facts on the program."""


@dataclass
class Record:
    """The record of one pass's run, or of another step, for the report and never for dumps or artifacts."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int
    """The most memory during the run, anonymous and shared, over all processes; pages of mapped files do not count."""
    notes: dict[str, Any] = field(default_factory=dict)


@contextmanager
def recorded(name: str, records: list[Record], progress: Progress | None = None) -> Iterator[None]:
    """Adds the record of a step that is none of the passes: what runs within the block."""
    start, cpu = time.perf_counter(), cpu_seconds()
    with PeakMemory() as memory, tracked(progress, name, 1) as advance:
        yield
        advance(1)
    records.append(_record(name, start, cpu, memory))


def _record(name: str, start: float, cpu: float, memory: PeakMemory) -> Record:
    """The record of a step that is done; what the C library keeps behind a long one goes back."""
    taken = time.perf_counter() - start
    if taken > LONG:
        trim()
    return Record(name, taken, cpu_seconds() - cpu, memory.take())


def run_pipeline(
    passes: Sequence[Pass],
    program: Program,
    session: Session,
    instruments: Sequence[Instrument] = (),
    present: Iterable[str] = (),
    first: int = 0,
    count: int | None = None,
) -> tuple[Program, list[Record]]:
    """Runs passes in order; after each the program is verified, and every instrument observes the step.

    Args:
        passes: the passes.
        program: the program to start from.
        session: what the passes share; it gets the requests of all of them.
        instruments: observers of every step.
        present: the properties that the program has at the start.
        first: the index of the first pass, for the instruments.
        count: the number of passes with those that others run, for the progress; None: of these.

    Returns:
        The last program, and the record of each pass.

    Raises:
        UserError: a pass requires something that is not provided, or refuses the program.
    """
    check(passes, present)
    session = dataclasses.replace(session, requests=Requests.all(p.requests() for p in passes) | session.requests)
    records = []
    count = first + len(passes) if count is None else count
    with PeakMemory() as memory:
        for index, p in enumerate(passes, first):
            start, cpu = time.perf_counter(), cpu_seconds()
            with session.track(f"pass {index + 1} of {count}: {p.name()}", 1) as advance:
                before, program = program, p.run(program, session)
                verify(program, after=p.name())
                advance(1)
            records.append(_record(p.name(), start, cpu, memory))
            for instrument in instruments:
                instrument(index, p, before, program)
    return program, records
