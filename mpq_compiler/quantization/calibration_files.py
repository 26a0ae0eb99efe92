"""Statistics of calibration in the cache until their compilation has ended (`kept_files`).

Calibrating a large model takes up to an hour. A calibration is a folder with a file for each edge and for each tensor
of second moments, and one that is written last and names them.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor

from mpq_compiler.ir.program import Program
from mpq_compiler.quantization import between_times, statistics
from mpq_compiler.quantization.kept_files import KeptFiles, read, write, write_all
from mpq_compiler.quantization.statistics import Calibration, EdgeStatistics, Statistic, arithmetic
from mpq_compiler.support import cache

INDEX = "index"


class CalibrationFiles(KeptFiles[Calibration]):
    """The calibrations of a run."""

    kind: ClassVar[str] = "calibration"
    what: ClassVar[str] = "the calibration"

    def place(
        self,
        program: Program,
        inputs: Mapping[str, Tensor] | Mapping[str, np.ndarray],
        wanted: Iterable[Statistic],
        attention: bool,
        run: str,
    ) -> Path:
        """The folder of a calibration.

        Args:
            program: what is calibrated.
            inputs: what it is calibrated on, or what decides on that.
            wanted: the statistics.
            attention: whether those of attentions are among them.
            run: what else decides on the numbers, such as seed and device.
        """
        sizes = (statistics.PART, statistics.GRAM_ROWS, statistics.GRAM_COLUMNS, statistics.VALUES_PER_EDGE,
                 statistics.VALUES_PER_INPUT, statistics.PROBABILITIES, between_times.TIMES)  # fmt: skip
        about = f"calibration 2 {sizes} {sorted(wanted)} {attention} {run} {arithmetic()}"
        return self.use(cache.digest(about, *statistics.content(program), inputs))

    def _loaded(self, place: Path) -> tuple[Calibration, float]:
        _, text = read(place / INDEX)
        about = json.loads(text)
        inputs, _ = read(place / "inputs")
        outputs, _ = read(place / "outputs")
        found = Calibration(inputs, outputs=outputs["outputs"])
        for number, (name, elements) in enumerate(about["edges"]):
            ranges, _ = read(place / f"edge-{number}")
            found.edges[name] = EdgeStatistics(**ranges, elements=elements)
        for number, calls in enumerate(about["calls"]):
            moments, _ = read(place / f"moments-{number}")
            for call in calls:
                found.grams[call], found.means[call] = moments["gram"], moments["mean"]
        return found, float(about["seconds"])

    def save(self, place: Path, result: Calibration, seconds: float) -> bool:
        edges = result.edges
        calls: dict[int, list[str]] = {}
        for call, gram in result.grams.items():
            calls.setdefault(id(gram), []).append(call)
        assert result.outputs is not None
        files = {"inputs": result.inputs, "outputs": {"outputs": result.outputs}}
        for number, edge in enumerate(edges.values()):
            files[f"edge-{number}"] = {name: getattr(edge, name) for name in ("low", "high", "values")}
        for number, (first, *_) in enumerate(calls.values()):
            files[f"moments-{number}"] = {"gram": result.grams[first], "mean": result.means[first]}
        if not write_all(place, files):
            return False
        about = {"seconds": seconds, "edges": [(name, edge.elements) for name, edge in edges.items()],
                 "calls": [*calls.values()]}  # fmt: skip
        write(place / INDEX, {}, json.dumps(about))
        return True
