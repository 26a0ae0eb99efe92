"""What steps leave out under budgets of time: milliseconds of an image against its error, with and without reuse.

    python -m benchmarks.reuse                                        # the table and the picture of what is there
    python -m benchmarks.reuse --model fashion-unet --steps 20 50     # compiles and judges the cells of these

A cell is a model at a number of sampling steps and a budget: the predicted time of the plan without a budget of time,
over 1, 1.25, 1.6, 1.8, 2 and 2.5, for a step on average. Without reuse the same budget is given to the bits alone.
`ms` is the CPU time of drawing an image on one thread: artifacts take turns, the median over the rounds. Errors are to
the float model's images from the same noise, in as many steps: of the artifact as it draws, and of the same artifact
with every step computed whole. `float` is the float model by the same schedule. Results lie in
benchmarks/results/reuse/.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx

from benchmarks import charts, documents
from benchmarks.cells import RESULTS
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler.analysis.reuse_losses import Drawing, MarkedDrawing, relative_error
from mpq_compiler.api import compile
from mpq_compiler.evaluation import metrics
from mpq_compiler.evaluation.features import features_for
from mpq_compiler.evaluation.painter import Painter, from_artifact, from_denoiser
from mpq_compiler.frontend import checkpoint, denoiser
from mpq_compiler.ir import reuse
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.passes.layout import Layout
from mpq_compiler.passes.trace import Trace
from mpq_compiler.pipeline.session import Session
from mpq_compiler.runtime.compiled_denoiser import load
from mpq_compiler.sampling.reuse import Schedule
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import BudgetError
from mpq_compiler.support.files import encode_json

FOLDER = RESULTS / "reuse"
DOCUMENT = Path(__file__).parents[1] / "docs" / "reuse.md"
PICTURE = DOCUMENT.with_suffix(".svg")
RATIOS = (1.0, 1.25, 1.6, 1.8, 2.0, 2.5)
WEIGHTS = 4
IMAGES, JUDGED_FLOAT = 200, 48
SEED = 1000
"""Of noise that neither calibration nor the measurement of losses has seen."""
ROUNDS = 15
AMPLE = "1000ms"
"""A budget that decides nothing, so that the time of a plan is predicted."""


@dataclass
class Compiled:
    """An artifact, and the report of its compilation."""

    path: Path
    report: Any

    @property
    def painter(self) -> Painter:
        return from_artifact(self.path, threads=1)

    @property
    def whole(self) -> Painter:
        """It draws with every step computed whole."""
        artifact = load(self.path, threads=1)
        return replace(self.painter, call=lambda **inputs: artifact.run(inputs))


def compiled(model: str, path: Path, latency: str, steps: int | None) -> Compiled | str:
    """An artifact under a budget of time, or why there is none."""
    try:
        report = compile.compile(
            model, path, terminal.progress, weights=WEIGHTS, latency=latency, reuse=steps, threads=1, jobs=2
        )
    except BudgetError as error:
        return str(error)
    return Compiled(path, report)


def judged(found: np.ndarray, expected: np.ndarray, painter: Painter, extractor: Any) -> dict[str, float]:
    """Errors of images to the float model's."""
    images = [painter.decode(x) for x in (expected, found)]
    by = metrics.compare_images(images[0], images[1], *extractor, None)
    named = {"sqnr_db": "image_sqnr_db", "psnr_db": "psnr_db", "frechet": "frechet_to_float"}
    return {name: round(by[key]["value"], 4) for name, key in named.items() if by.get(key)}


def of_the_float_model(model: str, steps: int, schedule: Schedule) -> float:
    """The SQNR of the float model's images by a schedule, in dB."""
    session = Session(denoiser.load(model), seed=SEED)
    program = Layout().run(Trace().run(Program(fx.Graph(), TensorStore(), (), Stage.FLOAT), session), session)
    reuse.mark(program, schedule.node)
    drawing = Drawing(session, steps, JUDGED_FLOAT)
    marked = MarkedDrawing(drawing, program, schedule.kept)
    return round(float(-10 * np.log10(relative_error(marked.by(schedule), marked.whole))), 2)


def milliseconds(painters: dict[str, Painter], steps: int) -> dict[str, float]:
    """CPU time of an image of each; they take turns."""

    def call(painter: Painter) -> Callable[[], object]:
        conditions = painter.conditioning.varied(1)
        return lambda: painter.draw(conditions, 1, steps, SEED)

    times = interleaved({name: call(painter) for name, painter in painters.items()}, ROUNDS)
    return {name: round(statistics.median(each) * 1e3, 3) for name, each in times.items()}


def compute(model: str, steps: int) -> None:
    """Compiles and judges the cells of a model at a number of steps, and writes them."""
    loaded = denoiser.load(model)
    reference = from_denoiser(loaded)
    conditions = reference.conditioning.varied(IMAGES)
    progress = terminal.progress(f"{model}, {steps} steps", 2 * len(RATIOS))
    with tempfile.TemporaryDirectory() as scratch, progress as advance:
        expected = reference.draw(conditions, IMAGES, steps, SEED)
        plain = compiled(model, Path(scratch, "plain.mpq"), AMPLE, None)
        assert isinstance(plain, Compiled)
        whole_ms = plain.report.latency["predicted_ms"]
        extractor = features_for(loaded.features, reference.decode(expected[:1]).shape[1:])
        rows: list[dict[str, Any]] = []
        painters: dict[str, Painter] = {}
        for ratio in RATIOS:
            for reused in (None, steps):
                name = f"{'reuse' if reused else 'bits'}-{ratio:g}"
                budget = f"{whole_ms / ratio:.6f}ms"
                found = plain if ratio == 1 else compiled(model, Path(scratch, f"{name}.mpq"), budget, reused)
                advance(1)
                if ratio == 1 and reused:
                    continue
                row: dict[str, Any] = {"ratio": ratio, "reuse": bool(reused), "budget_ms": round(whole_ms / ratio, 4)}
                rows.append(row)
                if isinstance(found, str):
                    row["refused"] = found
                    continue
                painters[name] = found.painter
                latents = painters[name].draw(conditions, IMAGES, steps, SEED)
                row |= judged(latents, expected, reference, extractor)
                row |= {"name": name, "plan": found.report.reuse, "predicted": found.report.latency}
                if found.report.reuse:
                    whole = found.whole.draw(conditions, IMAGES, steps, SEED)
                    row["whole"] = judged(whole, expected, reference, extractor)
                    schedule = Schedule.from_json(load(found.path).manifest["reuse"])
                    row["float_sqnr_db"] = of_the_float_model(model, steps, schedule)
        taken = milliseconds(painters, steps)
        for row in rows:
            if "name" in row:
                row["ms"] = taken[row.pop("name")]
    FOLDER.mkdir(parents=True, exist_ok=True)
    about = {"model": model, "steps": steps, "weights": WEIGHTS, "images": IMAGES, "rows": rows, **provenance()}
    (FOLDER / f"{model}-{steps}.json").write_bytes(encode_json(about))


def table() -> str:
    """The cells that are there, in Markdown."""
    lines = []
    for cell in _cells():
        base = cell["rows"][0]["ms"]
        for row in cell["rows"]:
            how = "reuse" if row["reuse"] else "bits alone"
            head = [cell["model"], str(cell["steps"]), f"{row['ratio']:g}x", "-" if row["ratio"] == 1 else how]
            if "refused" in row:
                lines.append([*head, "-", "cannot be met", *["-"] * 5])
                continue
            plan, whole = row["plan"], row.get("whole")
            lines.append(
                [
                    *head,
                    f"{plan['reused']} of {plan['steps']}, {plan['share']:.0%}" if plan else "-",
                    f"{row['ms']:.2f} ({base / row['ms']:.2f}x)",
                    f"{row['sqnr_db']:.1f}",
                    f"{row['sqnr_db'] - whole['sqnr_db']:+.1f}" if whole else "-",
                    f"{row['frechet']:.2f}" if "frechet" in row else "-",
                    f"{row['float_sqnr_db']:.1f}" if whole else "-",
                    _added(plan),
                ]
            )
    titles = ("model", "steps", "budget", "with", "steps that reuse, share left out", "ms an image", "images: SQNR, dB")
    more = ("of it by reuse, dB", "Fréchet to float", "float with reuse, dB", "sum of losses, measured, dB")
    return documents.table((*titles, *more), lines)


def picture() -> str:
    """The quality of images over the time saved, a line for each model and number of steps, as SVG."""
    series = []
    for number, cell in enumerate(_cells()):
        base = cell["rows"][0]["ms"]
        points = [(base / row["ms"], row["sqnr_db"]) for row in cell["rows"] if "ms" in row]
        series.append((number, f"{cell['model'].removeprefix('fashion-')}, {cell['steps']} steps", points))
    heights = [y for _, _, points in series for _, y in points] or [0.0]
    farthest = max((x for _, _, points in series for x, _ in points), default=1)
    halves = range(2, math.ceil(2 * farthest) + 1)
    return charts.lines(
        series,
        f"images in so many steps under budgets of time, weights of {WEIGHTS} bits",
        charts.Axis((1, halves[-1] / 2), [half / 2 for half in halves], "times faster than every step computed", "x"),
        charts.decibels(
            5 * math.floor(min(heights) / 5),
            5 * math.ceil(max(heights) / 5),
            "SQNR of the images against the float model, dB",
        ),
    )


def _cells() -> list[dict[str, Any]]:
    return [json.loads(path.read_text(encoding="utf-8")) for path in sorted(FOLDER.glob("*.json"))]


def _added(plan: dict[str, Any] | None) -> str:
    if not plan:
        return "-"
    return ", ".join(f"{-10 * np.log10(plan[name]):.1f}" for name in ("loss", "measured"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=checkpoint.bundled(), default=[])
    parser.add_argument("--steps", nargs="+", type=int, default=[20, 50])
    args = parser.parse_args()
    for model in args.model:
        for steps in args.steps:
            compute(model, steps)
    print(table())
    documents.insert(DOCUMENT, "reuse", table())
    PICTURE.write_text(picture(), encoding="utf-8")


if __name__ == "__main__":
    main()
