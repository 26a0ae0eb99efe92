"""Rows on which rewrites are tried, in the cache until their compilation has ended (`kept_files`).

To sample them runs a large model on some inputs, which takes most of the time of a rewrite. They are a folder with a
file for each edge, and one that is written last.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import ClassVar

import numpy as np
from torch import Tensor, fx

from mpq_compiler.ir.edges import RowGeometry
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization import statistics
from mpq_compiler.quantization.kept_files import KeptFiles, read, write, write_all
from mpq_compiler.quantization.rewrite_gain import Samples
from mpq_compiler.quantization.statistics import arithmetic
from mpq_compiler.support import cache

INDEX = "index"
Windows = Mapping[fx.Node, Iterable[RowGeometry]]
"""Edges, and the geometries of the layers that read each."""


class RowFiles(KeptFiles[dict[str, Samples]]):
    """The rows of a run, by the names of edges."""

    kind: ClassVar[str] = "rows"
    what: ClassVar[str] = "what rewrites are tried on"

    def place(
        self, program: Program, inputs: Mapping[str, Tensor] | Mapping[str, np.ndarray], windows: Windows, run: str
    ) -> Path:
        """The folder of rows.

        Args:
            program: it runs.
            inputs: what it runs on, or what decides on that.
            windows: the rows of these.
            run: what else decides on them: how many there are, how they are sampled.
        """
        asked = {edge.name: sorted(map(str, geometries)) for edge, geometries in windows.items()}
        about = f"rows 1 {asked} {run} {arithmetic()}"
        return self.use(cache.digest(about, *statistics.content(program), inputs))

    def _loaded(self, place: Path) -> tuple[dict[str, Samples], float]:
        _, text = read(place / INDEX)
        about = json.loads(text)
        found = {}
        for number, (name, geometries) in enumerate(about["edges"]):
            tensors, _ = read(place / f"edge-{number}")
            parts = {_geometry(given): [tensors[f"rows-{i}"]] for i, given in enumerate(geometries)}
            found[name] = Samples(tensors["largest"], parts)
        return found, float(about["seconds"])

    def save(self, place: Path, result: dict[str, Samples], seconds: float) -> bool:
        files = {
            f"edge-{number}": {
                "largest": samples.largest,
                **{f"rows-{i}": rows for i, rows in enumerate(samples.joined().values())},
            }
            for number, samples in enumerate(result.values())
        }
        if not write_all(place, files):
            return False
        about = {"seconds": seconds, "edges": [(name, [*samples.parts]) for name, samples in result.items()]}
        write(place / INDEX, {}, json.dumps(about))
        return True


def _geometry(given: list[list[int]]) -> RowGeometry:
    return tuple(map(tuple, given))
