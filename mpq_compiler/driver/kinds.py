"""Specializes a compilation to further kinds of calls, which share its weights and scales."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from mpq_compiler.driver.graft import graft
from mpq_compiler.driver.lower import Packed
from mpq_compiler.driver.options import DEFAULT_BATCHES
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization, kind_name
from mpq_compiler.ir.verifier import VerificationError
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.passes import Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError

REWRITTEN_TO = 1e-3
"""The largest error of a rewritten program in float, relative to the largest magnitude of what it gives."""
TRIED = 4
"""The number of recorded inputs on which that is measured."""


def other_kinds(lowering: Packed, denoiser: Denoiser) -> list[Specialization]:
    """The packed programs of further kinds of calls (`Denoiser.kinds`), which share tensors with the first one's.

    UserError: the calls cannot share its weights; the sentence says why.
    """
    return list(_specialized(lowering, denoiser)) if denoiser.kinds else []


def _specialized(lowering: Packed, denoiser: Denoiser) -> Iterator[Specialization]:
    texts = denoiser.kind_texts
    for index, (kind, there) in enumerate(zip(denoiser.kinds, lowering.laid_out[1:], strict=True), 1):
        try:
            yield Specialization(_packed(lowering, kind, there, kind_name(index)), DEFAULT_BATCHES, index)
        except (UserError, VerificationError) as error:
            raise UserError(
                f"one artifact cannot hold calls of {texts[0]} and of {texts[index]}: {error}; or compile one artifact "
                "for each"
            ) from error


def _packed(lowering: Packed, kind: Denoiser, there: Program, tag: str) -> Program:
    """The packed program for calls of a kind, which were laid out in ``there``."""
    here, passes = lowering.laid_out[0], lowering.passes
    assert lowering.simulated is not None
    _require_equal(graft(here, there, lowering.planned, tag), kind)
    simulated = graft(here, there, lowering.simulated, tag)
    first = next(i for i, step in enumerate(passes) if step.role is Role.PACKS)
    present = frozenset[str]().union(*(step.provides for step in passes[:first]))
    made, _ = manager.run_pipeline(passes[first:], simulated, Session(denoiser=kind), present=present)
    return made


def _require_equal(program: Program, kind: Denoiser) -> None:
    """UserError: what passes made of the float program computes something else in these calls."""
    assert kind.examples is not None
    inputs = {name: value[:TRIED] for name, value in kind.examples.items()}
    expected, found = kind(**inputs), run(program, inputs)
    error = float((expected - found).abs().max()) / max(float(expected.abs().max()), torch.finfo(torch.float32).tiny)
    if not error <= REWRITTEN_TO:
        raise UserError("a pass rewrote the model for the first of them in a way that does not hold for the others")
