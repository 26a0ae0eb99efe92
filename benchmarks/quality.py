"""Recipes at equal stored bytes: images, distances and true bits, side by side.

    python -m benchmarks.quality                       # the table of what is there
    python -m benchmarks.quality --all                 # computes what is missing, cell by cell; goes on where it was
    python -m benchmarks.quality --all --claims        # and then `default` beside the best other recipe, three seeds
    python -m benchmarks.quality --model fashion-unet --setting W2A8 --recipe default nearest

A cell is a recipe at a setting on a model. ``W2A8`` is the bytes that uniform ``int2`` takes in all layers, overheads
included, one in forty more, which the tables of twenty time groups take in some recipes, and 8-bit activations: what a
recipe does with these bytes is its affair. All draw the same noise in the same
steps. `image_sqnr_db` has a paired bootstrap interval of its difference to the best other recipe: the same images are
drawn with replacement for both. Training has as many minutes in every cell (`mpqc compile --minutes`). A claim is
about `default` and the best other recipe of a setting, each of three seeds of calibration and training, on 1000 images.
A cell is known by its recipe and options; results and the errors of every image lie in benchmarks/results/quality/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np

from benchmarks import documents
from benchmarks.machine import provenance
from benchmarks.timing import interleaved
from mpq_compiler import checkpoint, compiler, costs, denoiser, evaluation, metrics, recipes, svg, terminal
from mpq_compiler.errors import UserError

RESULTS = Path(__file__).parent / "results" / "quality"
SETTINGS = {"W8A8": (8, 8), "W4A8": (4, 8), "W3A8": (3, 8), "W2A8": (2, 8), "W4A4": (4, 4), "W3A6": (3, 6)}
"""Bits of the uniform weights whose bytes are the budget, and of activations."""
SHORT = ("W4A8", "W2A8", "W4A4")
"""The settings of models other than the first."""
MODELS = ("fashion-unet", "fashion-dit", "fashion-text")
STEPS = 10
SEED = 1000
"""Of the images: noise that neither calibration nor training has seen."""
RESAMPLES = 2000
FRECHET_RESAMPLES = 200
CLAIM = {"seeds": 3, "images": 1000}
"""What a cell of a claim is judged by, beside its recipe."""
UNIFORM = (
    "trace,layout,calibrate,time-groups,bit-allocation{{uniform=int{w},activations={a}}},numerics,insert-fake-quant,"
    "residual-branch,round-weights{{method={method}}},fold-fake-quant,fuse-epilogues"
)
BASELINES = {"nearest": "nearest", "gptq": "gptq"}
"""Uniform bits with nothing else, by the rounding: what a recipe is to be better than."""
COLUMNS = {
    "image_sqnr_db": 2,
    "psnr_db": 2,
    "ssim": 4,
    "frechet_to_float": 4,
    "frechet_to_data": 3,
    "class_accuracy": 3,
}


@dataclass(frozen=True)
class Cell:
    """What is compiled and judged."""

    model: str
    setting: str
    recipe: str
    minutes: float
    seed: int = 0
    images: int = 250

    @property
    def name(self) -> str:
        return f"{self.model} {self.setting} {self.recipe} seed {self.seed}"

    @property
    def key(self) -> str:
        """Of the file of its result: changes with all that the result depends on but the code."""
        text = ""
        if self.recipe not in BASELINES:
            recipe = recipes.load(self.recipe)
            text = json.dumps([recipe.pipeline, recipe.options], sort_keys=True)
        digest = hashlib.sha256(f"2 {sorted(asdict(self).items())} {text}".encode()).hexdigest()
        return f"{self.model}-{self.setting}-{self.recipe}-{self.seed}-{digest[:8]}"

    @property
    def file(self) -> Path:
        return RESULTS / f"{self.key}.json"

    def result(self) -> dict[str, Any] | None:
        """The row, where there is one: nothing was computed, or the recipe cannot keep the budget."""
        row = json.loads(self.file.read_text()) if self.file.exists() else {}
        return row if "errors" in row else None

    def options(self, budget: int) -> dict[str, Any]:
        """Of `compiler.compile`, with that budget of bytes."""
        weights, activations = SETTINGS[self.setting]
        if self.recipe in BASELINES:
            pipeline = UNIFORM.format(w=weights, a=activations, method=BASELINES[self.recipe])
            return {"pipeline": pipeline, "seed": self.seed}
        recipe = recipes.load(self.recipe)
        trains = {"minutes": self.minutes} if "distill" in recipe.pipeline else {}
        return {"recipe": self.recipe, "weights": f"{budget}B", "activations": activations, "seed": self.seed, **trains}


def budget_of(model: str, setting: str) -> int:
    """Stored bytes of uniform weights in all layers, and one in forty more."""
    file = RESULTS / "budgets.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    name = f"{model} {setting}"
    if name not in known:
        pipeline = UNIFORM.format(w=SETTINGS[setting][0], a=8, method="nearest")
        lowered = compiler.lower(denoiser.load(model), compiler.Options(pipeline=pipeline, samples=1))
        assert lowered.planned is not None
        known[name] = costs.stored_bytes(lowered.planned) * 41 // 40
        write(file, known)
    return int(known[name])


def _images(painter: evaluation.Painter, conditions: Any, count: int) -> np.ndarray:
    """What a denoiser draws, decoded, from the noise that all have."""
    with terminal.progress(f"drawing with {painter.name}", count) as advance:
        drawn = painter.draw(conditions, count, STEPS, SEED, progress=lambda done, total: advance(0))
    return painter.decode(drawn)


def float_accuracy(model: str, draw: bool = False) -> float | None:
    """Share of the float model's images of a claim that a classifier takes for their class; None: it is not known.

    draw: them, where it is not
    """
    file = RESULTS / "float.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    if model not in known and draw:
        loaded = denoiser.load(model)
        painter = evaluation.from_denoiser(loaded)
        count = CLAIM["images"]
        conditions = painter.conditioning.varied(count)
        images = _images(painter, conditions, count)
        features = metrics.features_for(loaded.features, images.shape[1:])
        accuracy = metrics.compare_images(images, images, *features, conditions.labels)["class_accuracy"]
        known[model] = accuracy and accuracy["value"]
        write(file, known)
    return known.get(model)


def compute(cell: Cell, jobs: int, counts: Sequence[int] = ()) -> list[dict[str, Any]]:
    """The row of a cell: compiled, drawn and judged against the float model.

    counts: of images, a row for each where given; fewer images are the first of more.
    """
    counts = counts or [cell.images]
    begin = time.perf_counter()
    with tempfile.TemporaryDirectory() as scratch:
        path = Path(scratch) / "cell.mpq"
        budget = budget_of(cell.model, cell.setting)
        report = compiler.compile(cell.model, path, terminal.progress, jobs=jobs, **cell.options(budget))
        seconds = time.perf_counter() - begin
        painter = evaluation.from_artifact(path, threads=1)
        loaded = evaluation.float_model(cell.model, painter)
        reference = evaluation.sampled_like(evaluation.from_denoiser(loaded), painter)
        conditions = reference.conditioning.varied(max(counts))
        pictures = []
        one: dict[str, np.ndarray] = {}  # the first of the last call: texts begin as the artifact has them

        def watched(**inputs: np.ndarray) -> np.ndarray:
            one.update({name: value[:1] for name, value in inputs.items()})
            return painter.call(**inputs)

        for each in (reference, replace(painter, call=watched)):
            pictures.append(_images(each, conditions, max(counts)))
        times = interleaved({"step": lambda: painter.call(**one)}, rounds=15, warm=True)["step"]
    known = {
        "true_bits": report.weights["average_bits"],
        "bytes": report.weights["bytes"],
        "budget": budget,
        "sqnr_db": report.quality["sqnr_db"],
        "seconds": seconds,
        "step_ms": statistics.median(times) * 1e3,
        "fallbacks": len(report.fallbacks),
        "notes": report.notes,
        **provenance(),
    }
    features = metrics.features_for(loaded.features, pictures[0].shape[1:])
    rows = []
    for count in counts:
        first = [images[:count] for images in pictures]
        labels = None if conditions.labels is None else conditions.labels[:count]
        rows.append({"cell": asdict(replace(cell, images=count)), **known, **_judged(first, features, labels)})
    return rows


def _judged(
    pictures: Sequence[np.ndarray], features: tuple[metrics.Features | None, str | None], labels: np.ndarray | None
) -> dict[str, Any]:
    """Distances of images to the float model's, which come first."""
    judged = metrics.compare_images(*pictures, *features, labels)
    error, power = (np.square(x.astype(np.float64)).sum((1, 2, 3)) for x in (pictures[1] - pictures[0], pictures[0]))
    extractor, _ = features
    return {
        **{name: judged[name] and judged[name]["value"] for name in COLUMNS},
        "frechet_resamples": extractor and [float(f"{v:.5g}") for v in resampled_frechet(*pictures, extractor)],
        "errors": [float(f"{e:.6g}") for e in error],
        "powers": [float(f"{p:.6g}") for p in power],
    }


def resamples(images: int, count: int) -> np.ndarray:
    """Indices [count, images], drawn with replacement: the same for all recipes, whose differences are paired so."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, images, (count, images))


def resampled_frechet(reference: np.ndarray, images: np.ndarray, features: metrics.Features) -> list[float]:
    """`metrics.frechet_to_float` of each of `resamples`."""
    found = [features(pictures)[0] for pictures in (reference, images)]
    return [
        metrics.frechet(*(part for values in found for part in metrics.gaussian(values[index])))
        for index in resamples(len(images), FRECHET_RESAMPLES)
    ]


Rows = Sequence[Mapping[str, Any]]
"""Of one recipe, a seed each."""


def paired(one: Rows, other: Rows) -> tuple[float, float, float]:
    """Image SQNR of ``one`` less that of ``other`` in dB, of all seeds, with its 95 % interval over the images."""
    errors = [np.array([row["errors"] for row in rows]).sum(0) for rows in (one, other)]
    index = resamples(len(errors[0]), RESAMPLES)
    # the power of the reference is the same for both
    gains = 10 * np.log10(errors[1][index].sum(1) / errors[0][index].sum(1))
    return float(10 * np.log10(errors[1].sum() / errors[0].sum())), *_interval(gains)


def paired_frechet(one: Rows, other: Rows) -> tuple[float, float, float] | None:
    """Fréchet distance to float of ``one`` less that of ``other``, mean of the seeds, with its 95 % interval.

    Images that are drawn twice make any distance larger: how resamples spread about their own mean is what counts.
    """
    if any(not row["frechet_resamples"] for row in (*one, *other)):
        return None
    values = [np.array([row["frechet_resamples"] for row in rows]).mean(0) for rows in (one, other)]
    means = [statistics.mean(row["frechet_to_float"] for row in rows) for rows in (one, other)]
    found, resampled = means[0] - means[1], values[0] - values[1]
    return found, *_interval(found + resampled - resampled.mean())


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def best_other(model: str, setting: str, cells: Sequence[Cell]) -> str | None:
    """The recipe of the best images beside `default`, of the cells that are there."""
    found = {c.recipe: row for c in cells if (c.model, c.setting) == (model, setting) and (row := c.result())}
    found.pop("default", None)
    return max(found, key=lambda name: found[name]["image_sqnr_db"], default=None)


def claims(cells: Sequence[Cell]) -> list[list[Cell]]:
    """For each setting of a model the cells of `default` and of the best other recipe, a list each."""
    found = []
    for model, setting in dict.fromkeys((c.model, c.setting) for c in cells):
        if other := best_other(model, setting, cells):
            first = replace(cells[0], model=model, setting=setting, images=CLAIM["images"])
            for recipe in ("default", other):
                found.append([replace(first, recipe=recipe, seed=seed) for seed in range(CLAIM["seeds"])])
    return found


CLAIM_HEADERS = (
    "model", "setting", "best other", "default, dB", "other, dB", "image SQNR, dB", "of each seed",
    "default, Fréchet", "other, Fréchet", "Fréchet", "class accuracy", "of float's",
)  # fmt: skip


def claimed(cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each claim whose cells are there: `default` less the best other recipe, with 95 % intervals."""
    lines = []
    both = iter(claims(cells))
    for default, other in zip(both, both, strict=True):
        ours, theirs = ([row for cell in side if (row := cell.result())] for side in (default, other))
        if len(ours) < len(default) or len(theirs) < len(other):
            continue
        decibels = (statistics.mean(row["image_sqnr_db"] for row in rows) for rows in (ours, theirs))
        by_seed = ", ".join(f"{paired([a], [b])[0]:+.2f}" for a, b in zip(ours, theirs, strict=True))
        distance = paired_frechet(ours, theirs)
        distances = [""] * 3
        if distance:
            means = (statistics.mean(row["frechet_to_float"] for row in rows) for rows in (ours, theirs))
            distances = [*(f"{mean:.4f}" for mean in means), "{:+.4f} ({:+.4f} .. {:+.4f})".format(*distance)]
        lines.append(
            [default[0].model, default[0].setting, other[0].recipe, *(f"{db:.2f}" for db in decibels),
             "{:+.2f} ({:+.2f} .. {:+.2f})".format(*paired(ours, theirs)), by_seed, *distances, *_accuracies(ours)]
        )  # fmt: skip
    return lines


def _accuracies(rows: Rows) -> tuple[str, str]:
    """Class accuracy, mean of the seeds, and its share of the float model's."""
    own, full = [row["class_accuracy"] for row in rows], float_accuracy(rows[0]["cell"]["model"])
    if None in own:
        return "", ""
    mean = statistics.mean(own)
    return f"{mean:.3f}", f"{mean / full:.3f}" if full else ""


def show(cells: list[Cell]) -> None:
    """Tables of the results that are there, a setting of a model at a time; which recipe is best, and by how much."""
    for model, setting in dict.fromkeys((c.model, c.setting) for c in cells):
        rows = {c.recipe: row for c in cells if (c.model, c.setting) == (model, setting) and (row := c.result())}
        if not rows:
            continue
        best = best_other(model, setting, cells)
        lines = []
        for name, row in rows.items():
            gain = ""
            if name == "default" and best:
                gain = "{:+.2f} dB ({:+.2f} .. {:+.2f}) to {}".format(*paired([row], [rows[best]]), best)
            values = [_number(row[column], digits) for column, digits in COLUMNS.items()]
            times = [f"{row['seconds'] / 60:.1f}", f"{row['step_ms']:.2f}"]
            lines.append([name, f"{row['true_bits']:.3f}", f"{row['sqnr_db']:.2f}", *values, *times, gain])
        headers = ["recipe", "true bits", "sqnr_db", *COLUMNS, "minutes", "ms a step", "image SQNR, paired"]
        terminal.table(f"{model}, {setting}", headers, lines, numeric=range(1, len(headers) - 1))


def markdown(cells: list[Cell]) -> str:
    """The results that are there, as a table for people."""
    headers = (
        "model", "setting", "recipe", "true bits", "SQNR, dB", "images: SQNR, dB", "PSNR, dB", "Fréchet to float", "ms",
    )  # fmt: skip
    lines = []
    for cell in cells:
        if row := cell.result():
            parts = [f"{row['true_bits']:.2f}", *(f"{row[n]:.1f}" for n in ("sqnr_db", "image_sqnr_db", "psnr_db"))]
            parts += [_number(row["frechet_to_float"], 2), f"{row['step_ms']:.2f}"]
            lines.append([cell.model, cell.setting, f"`{cell.recipe}`", *parts])
    return documents.table(headers, lines)


def plot(cells: list[Cell], model: str) -> str:
    """Image SQNR over true bits at 8-bit activations, a line a recipe, as SVG."""
    points: dict[str, list[svg.Point]] = {}
    for cell in cells:
        if cell.model == model and SETTINGS[cell.setting][1] == 8 and (row := cell.result()):
            label = f"{cell.recipe}: {row['image_sqnr_db']:.2f} dB at {row['true_bits']:.2f} bits"
            points.setdefault(cell.recipe, []).append(svg.Point(row["true_bits"], row["image_sqnr_db"], label))
    lines = [sorted(row, key=lambda point: point.x) for row in points.values()]
    ticks = [f"{bits} bits" if bits else "" for bits in range(9)]
    return svg.lines(lines, f"{model}: image SQNR at equal bytes", "dB", list(points), ticks, height=400)


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def write(file: Path, value: Any) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    beside = file.with_suffix(".part")
    beside.write_text(json.dumps(value) + "\n")
    os.replace(beside, file)


def chosen(options: argparse.Namespace) -> Iterator[Cell]:
    for model in options.model:
        for setting in options.setting or (SETTINGS if model == MODELS[0] else SHORT):
            for recipe in options.recipe:
                yield Cell(model, setting, recipe, options.minutes, images=options.images)


def compute_missing(cells: Sequence[Cell], jobs: int) -> None:
    """Each is written as soon as it is there, and with it the same as a cell of a claim."""
    missing = [cell for cell in cells if not cell.file.exists()]
    for number, cell in enumerate(missing, 1):
        print(f"{cell.name}, {cell.images} images ({number} of {len(missing)}) ...", flush=True)
        try:
            rows = compute(cell, jobs, sorted({cell.images, CLAIM["images"]}))
        except UserError as error:  # a recipe of 4 and 8 bits at 2: kept, or each run would try again
            write(cell.file, {"cell": asdict(cell), "refused": str(error)})
            print(f"{cell.name}: {error}", flush=True)
            continue
        for row in rows:
            write(Cell(**row["cell"]).file, row)
        print(f"{cell.name}: {rows[0]['image_sqnr_db']:.2f} dB in {rows[0]['seconds'] / 60:.1f} minutes", flush=True)


def main() -> None:
    known = [*BASELINES, *(name for name in recipes.names() if name != "w8a8")]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=checkpoint.bundled(), default=list(MODELS))
    parser.add_argument("--setting", nargs="+", choices=SETTINGS)
    parser.add_argument("--recipe", nargs="+", choices=known, default=known)
    parser.add_argument("--all", action="store_true", help="compute the cells that are missing")
    parser.add_argument("--claims", action="store_true", help="with --all: those of the claims too")
    parser.add_argument("--minutes", type=float, default=4.0, help="of training in each cell (4)")
    parser.add_argument("--images", type=int, default=250, help="to judge by (250)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="write the results into this file, between the marks")
    parser.add_argument("--plot", type=Path, help="write the Pareto plot of the first model, as SVG")
    options = parser.parse_args()
    cells = list(chosen(options))
    print(f"{sum(cell.file.exists() for cell in cells)} of {len(cells)} cells are there", flush=True)
    if options.all:
        compute_missing(cells, options.jobs)
    of_claims = [cell for side in claims(cells) for cell in side]
    print(f"{sum(c.file.exists() for c in of_claims)} of {len(of_claims)} cells of claims are there", flush=True)
    if options.all and options.claims:
        compute_missing(of_claims, options.jobs)
        for model in options.model:
            float_accuracy(model, draw=True)
    show(cells)
    lines = claimed(cells)
    images = "default and the best other recipe, {seeds} seeds, {images} images".format(**CLAIM)
    terminal.table(images, CLAIM_HEADERS, lines)
    if options.docs:
        documents.insert(options.docs, "quality", markdown(cells))
        none = "No cell of a claim has been computed yet."
        documents.insert(options.docs, "claims", documents.table(CLAIM_HEADERS, lines) if lines else none)
    if options.plot:
        options.plot.write_text(plot(cells, options.model[0]))


if __name__ == "__main__":
    main()
