"""Fits of large weights in the cache until their compilation has ended: where it is killed, the next one goes on.

Rounding a large model takes minutes, and its codes lie in files without names (`ir.scratch`) that go with the process.
"""

from __future__ import annotations

import json
from pathlib import Path

from torch import Tensor

from mpq_compiler import formats
from mpq_compiler.formats.base import Fit, QuantizedWeight
from mpq_compiler.ir import scratch
from mpq_compiler.ir.program import TensorStore
from mpq_compiler.quantization.statistics import arithmetic
from mpq_compiler.support import cache

LEAST = 1 << 20
"""The numbers of a weight from which on its fits are kept."""
PARTS = ("codes", "scale", "offset", "lut", "signs", "alpha", "row_class")
"""The tensors of a fit."""


class FitFiles:
    """The files of a run; thread-safe, since every fit has its own."""

    def __init__(self, path: Path | None) -> None:
        """``path``: the cache folder; None takes the user's."""
        self.folder = cache.folder(path) / "fits"
        self.used: list[Path] = []

    def place(self, weight: Tensor, moments: tuple[Tensor | None, ...], format_name: str, rounding: str) -> Path:
        """The file of a fit: its name is the digest of all that the fit depends on.

        Args:
            weight: as stored.
            moments: of the layer's inputs, and their mean.
            format_name: of the weight.
            rounding: how codes are chosen.
        """
        given = TensorStore({str(i): part for i, part in enumerate((weight, *moments)) if part is not None})
        about = f"fit 2 {format_name} {formats.version(format_name)} {rounding} {arithmetic()}"
        key = cache.digest(about, given.content(given))
        self.used.append(self.folder / f"{key}.safetensors")
        return self.used[-1]

    def load(self, place: Path) -> tuple[QuantizedWeight, float] | None:
        """The fit in a file, and the CPU seconds that it took; None where there is none that can be read."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(place, "pt") as file:
                about = json.loads(file.metadata()["fit"])
                parts = {name: scratch.kept(file.get_tensor(name)) for name in file.keys()}  # noqa: SIM118
            segments = about["segments"]
            found = {name: parts.get(name) for name in PARTS[2:]}
            fit = QuantizedWeight(parts["codes"], parts["scale"], **found, segments=segments and tuple(segments))
            return fit, float(about["seconds"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def save(self, place: Path, fit: Fit, seconds: float) -> None:
        """Writes a fit, whole or not at all. UserError: the cache cannot be written."""
        from safetensors.torch import save

        if isinstance(fit, QuantizedWeight):
            parts = {name: part.contiguous() for name in PARTS if (part := getattr(fit, name)) is not None}
            about = json.dumps({"segments": fit.segments, "seconds": seconds})
            cache.write(place, save(parts, {"fit": about}))

    def forget(self) -> None:
        """Deletes the files of the run, which has ended."""
        for place in self.used:
            place.unlink(missing_ok=True)
