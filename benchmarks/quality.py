"""Recipes at equal stored bytes: images, distances and true bits, side by side.

    python -m benchmarks.quality               # the tables of what is there
    python -m benchmarks.quality --all         # computes what is missing, cell by cell, and writes tables and plot
    python -m benchmarks.quality --all --distributed ray://HOST:PORT  # a cell on each CPU of a Ray cluster
    python -m benchmarks.quality --all --model fashion-unet --setting W2A8 --recipe default nearest  # those alone

A cell is a recipe at a setting on a model. ``W2A8`` is the bytes that uniform ``int2`` takes in all layers but the
ends, which have 8 bits, overheads included, one in forty more, for the tables of twenty time groups of some recipes,
and 8-bit activations: what a recipe does with these bytes is its affair. Recipes whose activations have several widths
have the average bits of those of one width whose ends have 8. Models are the judges, on which no recipe was
developed (results/judges/README.md), and the bundled ones, on which they were, at two settings. All draw the same noise
in the same steps; judges draw with other samplers too, in 4 to 50 steps, than calibration did. `image_sqnr_db` has a
paired bootstrap interval of its difference to the best published recipe: the same images are drawn with replacement for
both. Training has as many minutes in every cell (`mpqc compile --minutes`). A claim is about `default` and the best
published recipe of a judge's setting on 1000 images; at W2A8 and W4A4 also about the two best, of three seeds each,
`default` trained as long as by `--effort best`, they as long or as usual, whichever makes their images better. A cell
is known by its recipe and options; results and the errors of every image lie in benchmarks/results/quality/, and
`--all` goes on where it was.
"""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import documents, quality_tables
from benchmarks.machine import provenance
from benchmarks.quality_cells import (
    CLAIM,
    COMPARED,
    IMAGES,
    JUDGED,
    MINUTES,
    MODELS,
    RESULTS,
    SAMPLERS,
    SETTINGS,
    Budget,
    Cell,
    budget_of,
    cells_of,
    float_strip,
    source,
    write,
)
from mpq_compiler.api import compile
from mpq_compiler.evaluation import metrics
from mpq_compiler.evaluation.features import Features, features_for
from mpq_compiler.evaluation.painter import BATCH, Painter, from_artifact, from_denoiser, require_same_task
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir.parcels import SHIPPING
from mpq_compiler.sampling.schedulers import exchanged
from mpq_compiler.support import cluster as clusters
from mpq_compiler.support import terminal
from mpq_compiler.support.errors import BudgetError

STEPS = 10
SEED = 1000
"""Of the images: noise that neither calibration nor training has seen."""
STRIP = 10
"""Images that are shown."""
DOCUMENT = Path(__file__).parents[1] / "docs" / "recipes.md"
OWN_DOCUMENT = DOCUMENT.parent / "recipes" / "default.md"


def _images(painter: Painter, conditions: Any, count: int, steps: int = STEPS) -> np.ndarray:
    """What a denoiser draws, decoded, from the noise that all have."""
    with terminal.progress(f"drawing with {painter.name}", steps * -(-count // BATCH)) as advance:
        drawn = painter.draw(conditions, count, steps, SEED, progress=lambda done, total: advance(1))
    return painter.decode(drawn)


@functools.cache
def _float_images(model: str, steps: int, count: int, solver: str | None = None) -> np.ndarray:
    """What the float model draws, with its own sampler or another: the same for all of its cells."""
    painter = from_denoiser(denoiser.load(source(model)))
    painter = painter if solver is None else _sampled(painter, solver)
    return _images(painter, painter.conditioning.varied(count), count, steps)


def _sampled(painter: Painter, solver: str) -> Painter:
    return replace(painter, scheduler=exchanged(painter.scheduler, solver))


def _by_samplers(cell: Cell, painter: Painter) -> dict[str, dict[str, Any]]:
    """Errors of a judge's images by each of the other samplers."""
    found, conditions = {}, painter.conditioning.varied(IMAGES)
    for name, (solver, steps) in SAMPLERS.items() if cell.model in JUDGED else ():
        images = _images(_sampled(painter, solver), conditions, IMAGES, steps)
        found[name] = _errors(_float_images(cell.model, steps, IMAGES, solver), images)
    return found


def float_accuracy(model: str) -> None:
    """Measures the share of the float model's images of a claim that a classifier takes for their class, once."""
    known = quality_tables.float_accuracies()
    if model in known:
        return
    loaded = denoiser.load(source(model))
    conditions = loaded.conditioning.varied(CLAIM["images"])
    images = _float_images(model, STEPS, CLAIM["images"])
    features = features_for(loaded.features, images.shape[1:])
    accuracy = metrics.compare_images(images, images, *features, conditions.labels)["class_accuracy"]
    write(RESULTS / "float.json", known | {model: accuracy and accuracy["value"]})


@dataclass(frozen=True)
class Outcome:
    """What is computed of a cell, on whatever machine."""

    rows: list[dict[str, Any]]
    strips: list[np.ndarray]
    """The first images of the float model and of the cell, where they are shown."""


def compute(cell: Cell, jobs: int, counts: Sequence[int] = (), budget: Budget | None = None) -> Outcome:
    """The rows of a cell: compiled, drawn and judged against the float model.

    counts: of images, a row for each where given; fewer images are the first of more. budget: where it is known
    already.
    """
    counts = counts or [cell.images]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cell.mpq"
        budget = budget_of(cell.model, cell.setting) if budget is None else budget
        report = compile.compile(source(cell.model), path, terminal.progress, jobs=jobs, **cell.options(budget))
        seconds = time.perf_counter() - begin
        painter = from_artifact(path, threads=1)
        loaded = denoiser.load(source(cell.model))
        require_same_task(painter, from_denoiser(loaded))
        assert painter.scheduler.to_config() == loaded.scheduler.to_config()
        conditions = loaded.conditioning.varied(max(counts))
        pictures = [_float_images(cell.model, STEPS, max(counts)), _images(painter, conditions, max(counts))]
        samplers = _by_samplers(cell, painter)
    known = {
        "true_bits": report.weights["average_bits"],
        "bytes": report.weights["bytes"],
        "budget": budget._asdict(),
        "sqnr_db": report.quality["sqnr_db"],
        "seconds": seconds,
        "fallbacks": len(report.fallbacks),
        "trained": next((step for step in report.passes if step["name"] == "distill"), None),
        "notes": report.notes,
        **provenance(),
    }
    features = features_for(loaded.features, pictures[0].shape[1:])
    rows = []
    for count in counts:
        first = [images[:count] for images in pictures]
        labels = None if conditions.labels is None else conditions.labels[:count]
        judged = replace(cell, images=count)
        about = {"cell": asdict(judged), **known, "command": judged.command}
        rows.append({**about, **_judged(first, features, labels)})
        if samplers and count == cell.images:
            rows[-1]["samplers"] = samplers
    return Outcome(rows, [images[:STRIP] for images in pictures] if cell.strip else [])


def _judged(
    pictures: Sequence[np.ndarray], features: tuple[Features | None, str | None], labels: np.ndarray | None
) -> dict[str, Any]:
    """Distances of images to the float model's, which come first."""
    judged = metrics.compare_images(*pictures, *features, labels)
    extractor, _ = features
    return {
        **{name: judged[name] and judged[name]["value"] for name in quality_tables.COLUMNS},
        "frechet_resamples": extractor
        and [float(f"{v:.5g}") for v in quality_tables.resampled_frechet(*pictures, extractor)],
        **_errors(*pictures),
    }


def _errors(reference: np.ndarray, images: np.ndarray) -> dict[str, list[float]]:
    """Squared errors of images, and the squared images that they are of."""
    error, power = (np.square(x.astype(np.float64)).sum((1, 2, 3)) for x in (images - reference, reference))
    return {"errors": [float(f"{e:.6g}") for e in error], "powers": [float(f"{p:.6g}") for p in power]}


def complete(
    name: str, cells: Sequence[Cell], computes: bool, jobs: int, cluster: clusters.Cluster | None = None
) -> None:
    """Says how many are there; computes those that are not, each written as soon as it is there.

    With it is written the same as a cell of a claim. A cluster computes as many at a time as it has CPUs.
    """
    cells = list(dict.fromkeys(cells))
    missing = [cell for cell in cells if not cell.is_there]
    print(f"{len(cells) - len(missing)} of {len(cells)} {name} are there", flush=True)
    if not computes:
        return
    if cluster is not None:
        tasks = ((cell, budget_of(cell.model, cell.setting)) for cell in missing)
        cluster.run(_attempt, 1, tasks, lambda task, found: keep(task[0], found))
        return
    for number, cell in enumerate(missing, 1):
        print(f"{cell.name}, {cell.images} images ({number} of {len(missing)}) ...", flush=True)
        keep(cell, _attempt(jobs, (cell, None)))


def _attempt(jobs: int, task: tuple[Cell, Budget | None]) -> Outcome | str:
    """What is computed of a cell, or why its recipe cannot keep the budget: a task, as of `RunContext.tasks`."""
    cell, budget = task
    try:
        return compute(cell, jobs, sorted({cell.images, CLAIM["images"]}), budget)
    except BudgetError as error:
        return str(error)


def keep(cell: Cell, found: Outcome | str) -> None:
    """Writes what was computed of a cell; a refusal too (a recipe of 4 and 8 bits at 2), or all runs try again."""
    if isinstance(found, str):
        write(cell.file, {"cell": asdict(cell), "refused": found})
        print(f"{cell.name}: {found}", flush=True)
        return
    for images, strip in zip(found.strips, (float_strip(cell.model), cell.strip), strict=False):
        if strip is not None:
            quality_tables.save_strip(images, strip)
    for row in found.rows:
        write(Cell(**row["cell"]).file, row)
    first = found.rows[0]
    print(f"{cell.name}: {first['image_sqnr_db']:.2f} dB in {first['seconds'] / 60:.1f} minutes", flush=True)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=(*JUDGED, *MODELS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS)
    parser.add_argument("--recipe", nargs="+", choices=COMPARED)
    parser.add_argument("--all", action="store_true", help="compute what is missing; of everything: then --write too")
    parser.add_argument("--minutes", type=float, default=MINUTES, help=f"of training in each cell ({MINUTES:g})")
    parser.add_argument("--seed", type=int, default=0, help="of calibration and training (%(default)s)")
    parser.add_argument("--images", type=int, default=IMAGES, help=f"to judge by ({IMAGES})")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument(
        "--distributed", metavar="ADDRESS", help="a Ray cluster whose CPUs compute a cell each (docs/scale.md)"
    )
    parser.add_argument("--write", action="store_true", help=f"tables and pictures, of docs/{DOCUMENT.name}")
    return parser


def main() -> None:
    options = arguments().parse_args()
    whole = not (options.model or options.setting or options.recipe)
    models = options.model or (*JUDGED, *MODELS)
    cells = cells_of(models, options.setting, options.recipe, options.minutes, options.seed, options.images)
    with clusters.connected(options.distributed if options.all else None, SHIPPING, options.jobs) as cluster:
        complete("cells", cells, options.all, options.jobs, cluster)
        if whole or not options.all:
            for _ in range(2 if options.all else 1):  # which minutes are better for a rival is known behind the first
                claims = [cell for sides in quality_tables.claims(cells) for side in sides for cell in side]
                complete("cells of claims", claims, options.all, options.jobs, cluster)
            trained = [cell for place in quality_tables.by_minutes(cells) for cell in place]
            complete("cells by minutes of training", trained, options.all, options.jobs, cluster)
    if whole or not options.all:
        for model in models if options.all else ():
            float_accuracy(model)
    quality_tables.show(cells)
    claimed, gained = quality_tables.claimed(cells), quality_tables.trained(cells)
    terminal.table("default and the best published recipe", quality_tables.CLAIM_HEADERS, claimed)
    sampled = quality_tables.by_samplers(cells)
    terminal.table("image SQNR with other samplers, dB", quality_tables.SAMPLER_HEADERS, sampled)
    terminal.table("default by minutes of training", quality_tables.MINUTES_HEADERS, gained)
    if options.write or (whole and options.all):
        documents.insert(DOCUMENT, "quality", quality_tables.markdown(cells))
        documents.insert(DOCUMENT, "claims", documents.table(quality_tables.CLAIM_HEADERS, claimed))
        documents.insert(DOCUMENT, "samplers", documents.table(quality_tables.SAMPLER_HEADERS, sampled))
        documents.insert(OWN_DOCUMENT, "minutes", documents.table(quality_tables.MINUTES_HEADERS, gained))
        DOCUMENT.with_name("pareto.svg").write_text(quality_tables.plot(cells, next(iter(JUDGED))))
        quality_tables.side_by_side(cells, DOCUMENT.with_suffix(".png"))


if __name__ == "__main__":
    from benchmarks import quality  # by its name, by which other machines find its functions

    quality.main()
