"""What calibration covered: the values of inputs that the quantizers of an artifact were made for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, cast

import numpy as np

from mpq_compiler.artifact.manifest import Calibration


class Range(NamedTuple):
    """The least and the greatest value of an input."""

    low: float
    high: float

    def widened(self) -> Range:
        """The range with half of its width on either side: values beyond lie outside what calibration covered.

        Sampling from other noise stays inside: of a thousand normal values the greatest is about 3.2, of ten million
        5.2. Zero is taken into the width, as into the grids of quantizers: an input that was constant may change some.
        """
        margin = (max(self.high, 0.0) - min(self.low, 0.0)) / 2
        return Range(self.low - margin, self.high + margin)


def ranges(manifest: Mapping[str, object]) -> dict[str, Range]:
    """The ranges of the float inputs in calibration, by name; none of an artifact that does not state them."""
    stated = cast(Calibration, manifest.get("calibration", {})).get("ranges", {})
    return {name: Range(float(np.float32(x["low"])), float(np.float32(x["high"]))) for name, x in stated.items()}


def clipped(manifest: Mapping[str, object], inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Inputs that were made up, brought into these ranges."""
    known = ranges(manifest)
    return {name: array.clip(*known[name]) if name in known else array for name, array in inputs.items()}
