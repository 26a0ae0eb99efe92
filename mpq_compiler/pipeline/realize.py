"""Realizes plans quickly: simulates a planned program without the passes that refine its values."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline import options, registry
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.pipeline.session import Session


def realize(program: Program, session: Session) -> Program:
    """Simulates a planned program by the built-in passes that decide kernels; GPTQ replaces learned rounding."""
    requests = replace(session.requests, rounding=session.requests.rounding.quick)
    quick = replace(session, progress=None, requests=requests)
    for step in registry.built_in():
        if step.decides_kernels and step.role is not Role.PACKS:  # binary branches are part of the tables already
            program = step().run(program, quick)
    return program


def uniform(name: str, allocator: type[Pass] | None = None, **more: Any) -> Pass:
    """The pass that plans every layer in one format.

    Args:
        name: the weight format.
        allocator: the class of the pass; by default the built-in one.
        more: further options of it.
    """
    chosen = allocator or next(step for step in registry.built_in() if step.role is Role.ALLOCATES)
    return options.make(chosen.name(), {"uniform": name, **more})
