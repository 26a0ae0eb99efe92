"""Fits of large weights in the cache until their compilation has ended (`kept_files`): rounding takes minutes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats.base import Fit, QuantizedWeight
from mpq_compiler.ir.program import TensorStore
from mpq_compiler.quantization.kept_files import KeptFiles, read, write
from mpq_compiler.quantization.statistics import arithmetic
from mpq_compiler.support import cache

LEAST = 1 << 20
"""The numbers of a weight from which on its fits are kept."""
PARTS = ("codes", "scale", "offset", "lut", "signs", "alpha", "row_class")
"""The tensors of a fit."""


class FitFiles(KeptFiles[Fit]):
    """The fits of a run; thread-safe, since every fit has its own."""

    kind: ClassVar[str] = "fits"
    what: ClassVar[str] = "a fit"

    def place(self, weight: Tensor, moments: tuple[Tensor | None, ...], format_name: str, rounding: str) -> Path:
        """The file of a fit.

        Args:
            weight: as stored.
            moments: of the layer's inputs, and their mean.
            format_name: of the weight.
            rounding: how codes are chosen.
        """
        given = TensorStore({str(i): part for i, part in enumerate((weight, *moments)) if part is not None})
        about = f"fit 4 {format_name} {formats.version(format_name)} {rounding} {arithmetic()}"
        return self.use(cache.digest(about, given.content(given)))

    def _loaded(self, place: Path) -> tuple[Fit, float]:
        parts, text = read(place)
        about = json.loads(text)
        segments = about["segments"]
        found = {name: parts.get(name) for name in PARTS[2:]}
        fit = QuantizedWeight(parts["codes"], parts["scale"], **found, segments=segments and tuple(segments))
        return fit, float(about["seconds"])

    def save(self, place: Path, result: Fit, seconds: float) -> bool:
        """Writes a fit, whole or not at all; kinds that are soon made are none of it."""
        if isinstance(result, QuantizedWeight):
            parts = {name: part for name in PARTS if (part := getattr(result, name)) is not None}
            write(place, parts, json.dumps({"segments": result.segments, "seconds": seconds}))
        return True
