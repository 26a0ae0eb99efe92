"""What a backend makes of a packed program: a list of named stages, verified, dumped and compared like passes.

A *plan* is whatever the stages of one backend hand on: a list of kernel calls, a graph of another format.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Generic, Protocol, TypeVar

import numpy as np

from mpq_compiler.pipeline.passes import Contract

_Plan = TypeVar("_Plan")


class LoweringStage(ABC, Generic[_Plan]):
    """One step of a backend's lowering. The first line of its docstring says what it changes."""

    contract: ClassVar[Contract] = Contract.IDENTICAL
    """The promise for every value that the plan has before and after it."""

    @classmethod
    def name(cls) -> str:
        """``FuseQuantizers`` as "fuse-quantizers"."""
        return re.sub(r"(?<!^)(?=[A-Z])", "-", cls.__name__).lower()

    @abstractmethod
    def run(self, plan: _Plan) -> _Plan:
        """The plan after the stage; the one given is left as it is."""


class Inspectable(Protocol):
    """A plan that can be written down and run, for dumps."""

    def text(self, stage: str) -> str:
        """The plan, one call a line, stable and diffable; ``stage`` names what made it."""

    def tolerance(self, value: str) -> float:
        """How far a value may be from the packed program's: floats relative to the largest one, integers absolute.

        0 where every step is an integer's, or one that IEEE 754 defines to the bit.
        """

    def output(self) -> str:
        """The name of the value that is the denoiser's output."""

    def run(
        self, inputs: Mapping[str, np.ndarray], known: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """The value of every node by name, in the order in which they are made.

        known: values that are read in place of those that the plan makes under the same names.
        UserError: this machine cannot run it, and why.
        """


StageInstrument = Callable[[int, LoweringStage[Any], Inspectable], None]
"""``instrument(index, stage, plan)`` looks at a verified step of a lowering."""


def run_stages(
    stages: Sequence[LoweringStage[_Plan]],
    plan: _Plan,
    verify: Callable[[_Plan, str], None],
    observe: Callable[[int, LoweringStage[_Plan], _Plan], None] | None = None,
) -> _Plan:
    """Runs the stages in order; each plan is verified (``verify(plan, stage)``), and then looked at."""
    for index, stage in enumerate(stages):
        plan = stage.run(plan)
        verify(plan, stage.name())
        if observe is not None:
            observe(index, stage, plan)
    return plan
