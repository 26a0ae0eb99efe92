"""What training minimizes: an error that has gradients, and one by which the best state is kept."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor

from mpq_compiler.training.state import State
from mpq_compiler.training.variables import Variable

HELD = 1 << 31
"""The most bytes of values that a part of a step holds for its backward pass."""
VALUES = 3
"""The bytes that training holds for each byte of a value of the program: the value, and what quantizers keep."""


class Objective(ABC):
    """What a stage minimizes: `outputs.Outputs` of single calls, or `images.Images` of whole trajectories."""

    @abstractmethod
    def gradients(self, step: int, made: Mapping[str, Tensor]) -> tuple[float, dict[str, Tensor]]:
        """Computes the loss of a step and its gradients.

        Args:
            step: its number, from 1; it decides what the loss is of.
            made: the values that the program reads (`student.values`); what depends on a variable requires a gradient.

        Returns:
            The loss, and its gradients by the names of those of these that it depends on, in their order.
        """

    @abstractmethod
    def error(self, variables: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> float:
        """Measures the error, on what is held out, of the program with variables at these thetas."""

    @abstractmethod
    def go_on(self, state: State) -> None:
        """Takes from a state what is remembered of earlier steps; called once before the steps."""
