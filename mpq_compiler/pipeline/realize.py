"""A plan made into values quickly: what it would draw, without the passes that refine it."""

from __future__ import annotations

from dataclasses import replace

from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import options
from mpq_compiler.pipeline.session import Session

STEPS = ("insert-fake-quant", "low-rank", "round-weights")
"""What makes a plan's values, quickly: branches are part of the tables, and learned rounding is GPTQ."""


def realize(program: Program, session: Session) -> Program:
    """The program of a plan, quickly: for learned rounding GPTQ stands."""
    requests = replace(session.requests, rounding=session.requests.rounding.quick)
    quick = replace(session, progress=None, requests=requests)
    for name in STEPS:
        program = options.make(name, {}).run(program, quick)
    return program
