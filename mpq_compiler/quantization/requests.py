"""What the passes of a pipeline ask of each other: statistics to collect, and how values will be quantized."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from functools import reduce
from operator import or_

from mpq_compiler.quantization.fitting import Rounding
from mpq_compiler.quantization.statistics import Statistic


class Activations(IntEnum):
    """How activations are quantized."""

    STATIC = 0
    """Integers, with a scale and a zero point a time group."""
    DYNAMIC = 1
    """Integers, with a scale a row where linear layers alone read the edge."""
    FLOATING = 2
    """Small floats."""


_ROUNDINGS = tuple(Rounding)


@dataclass(frozen=True)
class Requests:
    """What a pass asks for, or all passes of a pipeline together (``a | b``).

    statistics:  what `calibrate` is to collect
    rounding:    how weights are rounded in the end, so that losses are measured of that
    activations: how activations are quantized in the end
    attention:   whether the operands and probabilities of attentions are quantized too
    """

    statistics: frozenset[Statistic] = frozenset()
    rounding: Rounding = Rounding.NEAREST
    activations: Activations = Activations.STATIC
    attention: bool = False

    def __or__(self, other: Requests) -> Requests:
        """Both together: the statistics of both, the finer rounding, what either asks of activations."""
        return Requests(
            self.statistics | other.statistics,
            max(self.rounding, other.rounding, key=_ROUNDINGS.index),
            max(self.activations, other.activations),
            self.attention or other.attention,
        )

    @staticmethod
    def all(requests: Iterable[Requests]) -> Requests:
        """The requests of several passes together."""
        return reduce(or_, requests, Requests())


NONE = Requests()
"""Nothing is asked for: nearest codes, static activations."""
