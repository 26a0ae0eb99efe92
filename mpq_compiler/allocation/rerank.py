"""Re-ranks candidate allocations by their images, since sums of losses cannot tell which split of a budget is best."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from mpq_compiler.allocation.pose import Terms
from mpq_compiler.allocation.problem import Solution
from mpq_compiler.allocation.reuse_choice import Candidate, Document
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.trajectory_error import TrajectoryError
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.realize import realize
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION

INPUTS = 32
"""The number of calibration inputs to judge by where no image can be drawn."""


@dataclass(frozen=True)
class Solved:
    """An allocation problem and its solution."""

    terms: Terms
    problem: Document
    solution: Solution
    reuse: Candidate | None = None
    """What steps reuse, where that is part of the problem."""


@dataclass
class Reranker:
    """Judges allocations by the images of their programs (`TrajectoryError`).

    The error is the squared error over the squared latents; MixDQ (arXiv 2405.17873) draws one image of each candidate
    and compares pixels. Where a model's conditions cannot be made, outputs on calibration inputs are compared.
    """

    program: Program
    session: Session
    images: int
    planned: Callable[[Solution], Program]
    """Makes the program with a solution's plans."""
    judged: list[dict[str, Any]] = field(default_factory=list)
    """The ``ratio``, ``activation_ratio`` and ``noise`` of every candidate so far."""

    def __post_init__(self) -> None:
        self._judge: Callable[[Program], float] | None = None
        self._known: dict[tuple[tuple[str, str], ...], float] = {}

    def best(self, found: Sequence[Solved]) -> Solved:
        """The candidate of least error; the first of equal ones, and a single one unjudged."""
        if len(found) == 1:
            return found[0]
        with self.session.track("drawing candidates", len(found)) as advance:

            def noise(one: Solved) -> float:
                power = self.noise(one.solution)
                terms = {"ratio": one.terms.ratio, "activation_ratio": one.terms.activation_ratio}
                self.judged.append({**terms, "noise": power})
                advance(1)
                return power

            return min(found, key=noise)

    def noise(self, solution: Solution) -> float:
        """The relative noise power of the images that a solution's program draws; cached by its choices."""
        key = tuple(sorted(solution.choices.items()))
        if key not in self._known:
            self._judge = self._judge or self._made()
            program = realize(self.planned(solution), self.session)
            self._known[key] = float(f"{self._judge(program):.5e}")
        return self._known[key]

    def _made(self) -> Callable[[Program], float]:
        image_error = None if self.session.denoiser is None else TrajectoryError.drawn(self.session, self.images)
        if image_error is not None:
            return image_error.noise
        self.program.note("candidates are judged by the output on calibration inputs: nothing can be drawn here")
        calibration = self.program.facts[CALIBRATION]
        inputs, reference = calibration.select(INPUTS), calibration.select_outputs(INPUTS)
        return lambda program: noise_power(run(program, inputs), reference)
