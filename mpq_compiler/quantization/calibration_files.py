"""Statistics of calibration in the cache until their compilation has ended: where it is killed, the next one goes on.

Calibrating a large model takes up to an hour, and its second moments lie in files without names (`ir.scratch`) that go
with the process. A calibration is a folder with a file for each edge and for each tensor of second moments, and one
that is written last and names them.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np
from torch import Tensor

from mpq_compiler.ir import scratch
from mpq_compiler.ir.program import Program
from mpq_compiler.quantization import statistics
from mpq_compiler.quantization.statistics import Calibration, EdgeStatistics, Statistic, arithmetic
from mpq_compiler.support import cache

LEAST_SECONDS = 30.0
"""The CPU seconds of a calibration from which on it is kept."""
SPARED = 2.0
"""How much more room than a calibration takes has to be there; with less it is not kept."""
INDEX = "index.json"


class CalibrationFiles:
    """The files of a run."""

    def __init__(self, path: Path | None) -> None:
        """``path``: the cache folder; None takes the user's."""
        self.folder = cache.folder(path) / "calibration"
        self.used: list[Path] = []

    def place(
        self,
        program: Program,
        inputs: Mapping[str, Tensor] | Mapping[str, np.ndarray],
        wanted: Iterable[Statistic],
        attention: bool,
        run: str,
    ) -> Path:
        """The folder of a calibration: its name is the digest of all that it depends on.

        Args:
            program: what is calibrated.
            inputs: what it is calibrated on, or what decides on that.
            wanted: the statistics.
            attention: whether those of attentions are among them.
            run: what else decides on the numbers, such as seed and device.
        """
        sizes = (statistics.PART, statistics.GRAM_ROWS, statistics.GRAM_COLUMNS, statistics.VALUES_PER_EDGE,
                 statistics.VALUES_PER_INPUT, statistics.PROBABILITIES)  # fmt: skip
        about = f"calibration 1 {sizes} {sorted(wanted)} {attention} {run} {arithmetic()}"
        text, tensors = statistics.content(program)
        self.used.append(self.folder / cache.digest(about, text, tensors, inputs))
        return self.used[-1]

    def load(self, place: Path) -> tuple[Calibration, float] | None:
        """The calibration in a folder, and the CPU seconds that it took; None where none is whole."""
        from safetensors import SafetensorError

        try:
            about = json.loads((place / INDEX).read_text(encoding="utf-8"))
            found = Calibration(_read(place / "inputs"), outputs=_read(place / "outputs")["outputs"])
            for number, (name, elements) in enumerate(about["edges"]):
                found.edges[name] = EdgeStatistics(**_read(place / f"edge-{number}"), elements=elements)
            for number, calls in enumerate(about["calls"]):
                moments = _read(place / f"moments-{number}")
                for call in calls:
                    found.grams[call], found.means[call] = moments["gram"], moments["mean"]
            return found, float(about["seconds"])
        except (OSError, SafetensorError, KeyError, ValueError, TypeError):
            return None

    def save(self, place: Path, calibration: Calibration, seconds: float) -> bool:
        """Writes a calibration; returns whether there was room for it. UserError: the cache cannot be written."""
        edges = calibration.edges
        calls: dict[int, list[str]] = {}
        for call, gram in calibration.grams.items():
            calls.setdefault(id(gram), []).append(call)
        assert calibration.outputs is not None
        files = {"inputs": calibration.inputs, "outputs": {"outputs": calibration.outputs}}
        for number, edge in enumerate(edges.values()):
            files[f"edge-{number}"] = {name: getattr(edge, name) for name in ("low", "high", "values")}
        for number, (first, *_) in enumerate(calls.values()):
            files[f"moments-{number}"] = {"gram": calibration.grams[first], "mean": calibration.means[first]}
        size = sum(tensor.nbytes for tensors in files.values() for tensor in tensors.values())
        cache.make(place)
        if shutil.disk_usage(place).free < SPARED * size:
            return False
        for name, tensors in files.items():
            _write(place / name, tensors)
        about = {"seconds": seconds, "edges": [(name, edge.elements) for name, edge in edges.items()],
                 "calls": [*calls.values()]}  # fmt: skip
        cache.write(place / INDEX, json.dumps(about).encode())
        return True

    def forget(self) -> None:
        """Deletes the files of the run, which has ended."""
        for place in self.used:
            shutil.rmtree(place, ignore_errors=True)


def _write(path: Path, tensors: Mapping[str, Tensor]) -> None:
    from safetensors.torch import save

    cache.write(path, save({name: tensor.contiguous() for name, tensor in tensors.items()}))


def _read(path: Path) -> dict[str, Tensor]:
    """The tensors of a file; large ones are copied to files without names, as those are that calibration makes."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return {name: scratch.kept(file.get_tensor(name).clone()) for name in file.keys()}  # noqa: SIM118
