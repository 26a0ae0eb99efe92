"""What a step of the cells of `benchmarks.quality` costs: time, memory, bit operations, side by side in one run.

    python -m benchmarks.step_costs --artifacts build/cells    # compiles those that are not there yet, and times all

Training changes what is stored, not which kernels run: artifacts are compiled without it. One thread and one sample;
bit operations and the memory that a call holds at most are those that an artifact states (docs/allocation.md). Of times
in a round the artifacts of a model have their turns, each once more before it is timed, so that what the others have
left in the caches does not count. Medians over the rounds, by CPU time and by wall time. The control is the first
artifact of a model beside itself, loaded twice.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import quality, quality_cells
from benchmarks.machine import provenance
from benchmarks.quality_tables import STATED, stated
from benchmarks.timing import interleaved, wall
from mpq_compiler.api import compile
from mpq_compiler.evaluation.painter import Painter, from_artifact
from mpq_compiler.support import terminal

ROUNDS = 40
CONTROL = "control"


def compiled(cells: Sequence[quality_cells.Cell], folder: Path, jobs: int) -> dict[str, Path]:
    """Artifacts by setting and recipe, of the cells that have a result."""
    found = {}
    for number, cell in enumerate(cells, 1):
        path = folder / f"{cell.model}-{cell.setting}-{cell.recipe}.mpq"
        if not path.exists():
            print(f"{cell.name} ({number} of {len(cells)}) ...", flush=True)
            budget = quality_cells.budget_of(cell.model, cell.setting)
            given = replace(cell, minutes=0.0).options(budget)
            compile.compile(quality_cells.source(cell.model), path, terminal.progress, jobs=jobs, **given)
        found[f"{cell.setting} {cell.recipe}"] = path
    return found


def step(painter: Painter) -> Callable[[], object]:
    """A call of an artifact with one sample, as its sampler calls it last."""
    last: dict[str, np.ndarray] = {}

    def watched(**inputs: np.ndarray) -> np.ndarray:
        last.update(inputs)
        return painter.call(**inputs)

    conditions = painter.conditioning.varied(1)
    replace(painter, call=watched).draw(conditions, 1, quality.STEPS, quality.SEED)
    return lambda: painter.call(**last)


def costs(artifacts: Mapping[str, Path]) -> dict[str, dict[str, float | None]]:
    """Of a step of each, and of the control: milliseconds, the most bytes that it holds, bit operations."""
    painters = {name: from_artifact(path, threads=1) for name, path in artifacts.items()}
    painters[CONTROL] = from_artifact(next(iter(artifacts.values())), threads=1)
    calls = {name: step(painter) for name, painter in painters.items()}
    clocks: dict[str, dict[str, Any]] = {"ms": {}, "wall_ms": {"seconds": wall}}
    times = {clock: interleaved(calls, rounds=ROUNDS, warm=True, **given) for clock, given in clocks.items()}
    found: dict[str, dict[str, float | None]] = {}
    for name, painter in painters.items():
        assert painter.cost is not None
        of = {clock: round(statistics.median(taken[name]) * 1e3, 4) for clock, taken in times.items()}
        found[name] = {**of, **{key: painter.cost[key] for key in ("peak_bytes", "bops", "float_bops")}}
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = (*quality_cells.JUDGED, *quality_cells.MODELS)
    parser.add_argument("--model", nargs="+", choices=models, default=models)
    parser.add_argument("--artifacts", type=Path, help="a folder where they stay (default: they do not)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.artifacts or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        cells = [cell for cell in quality_cells.cells_of(options.model) if cell.result()]
        artifacts = {
            model: compiled([cell for cell in cells if cell.model == model], folder, options.jobs)
            for model in options.model
        }
        found = {model: costs(paths) for model, paths in artifacts.items()}
    known = quality_cells.read(quality_cells.COSTS)
    quality_cells.write(quality_cells.COSTS, known | {model: {**of, **provenance()} for model, of in found.items()})
    for model, of in found.items():
        first, control = (of[name] for name in (next(iter(of)), CONTROL))
        lines = [[name, f"{row['ms']:.3f}", f"{row['wall_ms']:.3f}", *stated(row)] for name, row in of.items()]
        said = f"{model}: a step, one thread (control {control['ms'] / first['ms']:.3f})"
        terminal.table(said, ["cell", "ms", "ms, wall", *STATED], lines, numeric=(1, 2, 3, 4))


if __name__ == "__main__":
    main()
