"""What `benchmarks.quality` shows of its cells: tables, the plot, images side by side; intervals of differences."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from benchmarks import charts, documents
from benchmarks.quality_cells import (
    BEST_MINUTES,
    CLAIM,
    CLAIMED,
    COMPARED,
    COSTS,
    JUDGED,
    MINUTES,
    OURS,
    RESULTS,
    RIVALS,
    SAMPLERS,
    SETTINGS,
    Cell,
    float_strip,
    read,
)
from mpq_compiler.evaluation import image_grid, metrics
from mpq_compiler.evaluation.features import Features
from mpq_compiler.support import terminal

COLUMNS = {
    "image_sqnr_db": 2,
    "psnr_db": 2,
    "ssim": 4,
    "frechet_to_float": 4,
    "frechet_to_data": 3,
    "class_accuracy": 3,
}
"""Of a row that are shown, with their decimals."""
RESAMPLES = 2000
FRECHET_RESAMPLES = 200
TINY = 1e-30
"""What an error counts as at least."""


def resamples(images: int, count: int) -> np.ndarray:
    """Indices [count, images], drawn with replacement: the same for all recipes, whose differences are paired so."""
    return np.random.Generator(np.random.PCG64(0)).integers(0, images, (count, images))


def resampled_frechet(reference: np.ndarray, images: np.ndarray, features: Features) -> list[float]:
    """`metrics.frechet_to_float` of each of `resamples`."""
    found = [features(pictures)[0] for pictures in (reference, images)]
    return [
        metrics.frechet(*(part for values in found for part in metrics.gaussian(values[index])))
        for index in resamples(len(images), FRECHET_RESAMPLES)
    ]


Rows = Sequence[Mapping[str, Any]]
"""Of one recipe, a seed each."""


def paired(one: Rows, other: Rows) -> tuple[float, float, float]:
    """Image SQNR of ``one`` less that of ``other`` in dB, of all seeds; its 95 % interval over images and seeds."""
    errors = [np.array([row["errors"] for row in rows]) for rows in (one, other)]
    index = resamples(errors[0].shape[1], RESAMPLES)
    # the power of the reference is the same for both
    sums = [_of_seeds(np.stack([of_seed[index].sum(1) for of_seed in side])) for side in errors]
    return float(10 * np.log10(errors[1].sum() / errors[0].sum())), *_interval(10 * np.log10(sums[1] / sums[0]))


def paired_psnr(one: Rows, other: Rows) -> tuple[float, float, float]:
    """Mean PSNR of ``one`` less that of ``other`` in dB, with its interval, as `paired`.

    The few images that the sampler takes another way with decide on image SQNR; in the mean of dB all count alike.
    """
    decibels = [np.log10(np.maximum([row["errors"] for row in rows], TINY)) for rows in (one, other)]
    gains = 10 * (decibels[1] - decibels[0])
    index = resamples(gains.shape[1], RESAMPLES)
    return float(gains.mean()), *_interval(_of_seeds(np.stack([of_seed[index].mean(1) for of_seed in gains])))


def _of_seeds(values: np.ndarray) -> np.ndarray:
    """Means [R] of values [seeds, R] over seeds that are drawn anew for each of the resamples, the same for all."""
    seeds, count = values.shape
    drawn = np.random.Generator(np.random.PCG64(1)).integers(0, seeds, (seeds, count))
    return np.asarray(np.take_along_axis(values, drawn, 0).mean(0))


def shown(found: tuple[float, float, float]) -> str:
    """A difference in dB with its interval, for people."""
    return "{:+.2f} ({:+.2f} .. {:+.2f})".format(*found)


def paired_frechet(one: Rows, other: Rows) -> tuple[float, float, float] | None:
    """Fréchet distance to float of ``one`` less that of ``other``, mean of the seeds, with its 95 % interval over
    images and seeds.

    Images that are drawn twice make any distance larger: how resamples spread about their own mean is what counts.
    """
    if any(not row["frechet_resamples"] for row in (*one, *other)):
        return None
    values = [_of_seeds(np.array([row["frechet_resamples"] for row in rows])) for rows in (one, other)]
    means = [statistics.mean(row["frechet_to_float"] for row in rows) for rows in (one, other)]
    found, resampled = means[0] - means[1], values[0] - values[1]
    return found, *_interval(found + resampled - resampled.mean())


def _interval(values: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(values, (0.025, 0.975))
    return float(low), float(high)


def best_other(model: str, setting: str, cells: Sequence[Cell]) -> str | None:
    """The published recipe of the best images, of the cells that are there; None where there is none."""
    return next(iter(best_others(model, setting, cells)), None)


def best_others(model: str, setting: str, cells: Sequence[Cell]) -> list[str]:
    """The recipes that are not `OURS`, those of the best images first, of the cells that are there.

    Those that were judged by as many images as a claim is go by these, where the best by few of them is one of those.
    """

    def ranked(found: dict[str, dict[str, Any]]) -> list[str]:
        return sorted(found, key=lambda name: -float(found[name]["image_sqnr_db"]))

    there = [c for c in cells if (c.model, c.setting) == (model, setting) and c.recipe not in OURS]
    few = ranked({c.recipe: row for c in there if (row := c.result())})
    many = ranked({c.recipe: row for c in there if (row := replace(c, images=CLAIM["images"]).result())})
    return [*many, *(name for name in few if name not in many)] if few[:1] and few[0] in many else few


def claims(cells: Sequence[Cell]) -> list[tuple[list[Cell], list[Cell]]]:
    """For each setting of a judge the cells of `default` and of the best published recipe, of one seed.

    Of claimed settings there are rivals besides, the two best and those that are computed, of all seeds: `default`
    trained as long as by ``--effort best``, they as long or for the usual minutes, whichever makes their images better.
    """
    found = []
    for model, setting in _judged(cells):
        first = replace(cells[0], model=model, setting=setting, recipe="default", images=CLAIM["images"])
        others = best_others(model, setting, cells)
        pairs = [(first, replace(first, recipe=other), 1) for other in others[:1]]
        if setting in CLAIMED:
            best = replace(first, minutes=BEST_MINUTES)
            rivals = [replace(best, recipe=other) for other in others]
            rivals = [cell for rank, cell in enumerate(rivals) if rank < RIVALS or cell.result()]
            pairs += [(best, _better(cell), CLAIM["seeds"]) for cell in rivals]
        found += [tuple([replace(cell, seed=n) for n in range(seeds)] for cell in pair) for *pair, seeds in pairs]
    return found


def _better(cell: Cell) -> Cell:
    """The cell, or that of the usual minutes where its images are better."""
    usual = replace(cell, minutes=MINUTES)
    long, short = cell.result(), usual.result()
    return usual if long and short and short["image_sqnr_db"] > long["image_sqnr_db"] else cell


def _judged(cells: Sequence[Cell]) -> list[tuple[str, str]]:
    """Models and settings of the cells of judges, each pair once."""
    return list(dict.fromkeys((c.model, c.setting) for c in cells if c.model in JUDGED))


CLAIM_HEADERS = (
    "model", "setting", "minutes", "best published", "its minutes", "default, dB", "other, dB", "image SQNR, dB",
    "of each seed", "PSNR, dB", "default, Fréchet", "other, Fréchet", "Fréchet", "class accuracy", "of float's",
)  # fmt: skip


def claimed(cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each claim: `default` less the best published recipe by the seeds there are, with intervals."""
    lines = []
    for default, other in claims(cells):
        rows = ((a.result(), b.result()) for a, b in zip(default, other, strict=True))
        both = [(mine, its) for mine, its in rows if mine and its]
        if not both:
            continue
        ours, theirs = zip(*both, strict=True)
        decibels = (statistics.mean(row["image_sqnr_db"] for row in rows) for rows in (ours, theirs))
        by_seed = ", ".join(f"{paired([a], [b])[0]:+.2f}" for a, b in both) if len(both) > 1 else ""
        distance = paired_frechet(ours, theirs)
        distances = [""] * 3
        if distance:
            means = (statistics.mean(row["frechet_to_float"] for row in rows) for rows in (ours, theirs))
            distances = [*(f"{mean:.4f}" for mean in means), "{:+.4f} ({:+.4f} .. {:+.4f})".format(*distance)]
        first = default[0]
        lines.append(
            [first.model, first.setting, f"{first.minutes:g}", other[0].recipe, f"{other[0].minutes:g}",
             *(f"{db:.2f}" for db in decibels), shown(paired(ours, theirs)), by_seed, shown(paired_psnr(ours, theirs)),
             *distances, *_accuracies(ours)]
        )  # fmt: skip
    return lines


SAMPLER_HEADERS = ("model", "setting", "recipe", "minutes", *SAMPLERS)


def by_samplers(cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each cell of a judge: image SQNR with samplers on which it was not calibrated."""
    lines = []
    for cell in cells:
        if (row := cell.result()) and "samplers" in row:
            sums = ([sum(row["samplers"][name][what]) for what in ("powers", "errors")] for name in SAMPLERS)
            decibels = [f"{10 * math.log10(power / error):.2f}" for power, error in sums]
            minutes = f"{cell.minutes:g}" if row["trained"] else ""
            lines.append([cell.model, cell.setting, cell.recipe, minutes, *decibels])
    return lines


def by_minutes(cells: Sequence[Cell]) -> list[list[Cell]]:
    """`default` untrained, with the usual minutes and with those of ``--effort best``, where it is claimed."""
    places = [(model, setting) for model, setting in _judged(cells) if setting in CLAIMED]
    minutes = (0.0, MINUTES, BEST_MINUTES)
    return [[Cell(m, s, "default", t, images=CLAIM["images"]) for t in minutes] for m, s in places]


MINUTES_HEADERS = (
    "model", "setting", "minutes", "true bits", "SQNR, dB", "images: SQNR, dB", "PSNR, dB", "Fréchet to float",
    "class accuracy", "of float's", "gained, dB", "gained, PSNR, dB",
)  # fmt: skip


def trained(cells: Sequence[Cell]) -> list[list[str]]:
    """A line for each of those cells that is there; what it gains over the line before has a 95 % interval."""
    lines = []
    for place in by_minutes(cells):
        before = None
        for cell in place:
            if not (row := cell.result()):
                continue
            parts = [cell.model, cell.setting, f"{cell.minutes:g}", f"{row['true_bits']:.2f}"]
            parts += [f"{row[n]:.1f}" for n in ("sqnr_db", "image_sqnr_db", "psnr_db")]
            parts += [_number(row["frechet_to_float"], 3), *_accuracies([row])]
            gains = [shown(of([row], [before])) if before else "" for of in (paired, paired_psnr)]
            lines.append([*parts, *gains])
            before = row
    return lines


def float_accuracies() -> dict[str, float | None]:
    """Of the models where it is known: share of the float model's images that a classifier takes for their class."""
    file = RESULTS / "float.json"
    return read(file)


def _accuracies(rows: Rows) -> tuple[str, str]:
    """Class accuracy, mean of the seeds, and its share of the float model's."""
    own, full = [row["class_accuracy"] for row in rows], float_accuracies().get(rows[0]["cell"]["model"])
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
                gain = f"{shown(paired([row], [rows[best]]))} dB to {best}"
            values = [_number(row[column], digits) for column, digits in COLUMNS.items()]
            times = [f"{row['seconds'] / 60:.1f}", *_step(row)]
            lines.append([name, f"{row['true_bits']:.3f}", f"{row['sqnr_db']:.2f}", *values, *times, gain])
        headers = ["recipe", "true bits", "sqnr_db", *COLUMNS, "minutes", *STEP, "image SQNR, paired"]
        terminal.table(f"{model}, {setting}", headers, lines, numeric=range(1, len(headers) - 1))


def markdown(cells: list[Cell]) -> str:
    """The results that are there, as a table for people."""
    headers = (
        "model", "setting", "recipe", "true bits", "SQNR, dB", "images: SQNR, dB", "PSNR, dB", "Fréchet to float",
        *STEP,
    )  # fmt: skip
    lines = []
    for cell in cells:
        if row := cell.result():
            parts = [f"{row['true_bits']:.2f}", *(f"{row[n]:.1f}" for n in ("sqnr_db", "image_sqnr_db", "psnr_db"))]
            parts += [_number(row["frechet_to_float"], 2), *_step(row)]
            lines.append([cell.model, cell.setting, f"`{cell.recipe}`", *parts])
    return documents.table(headers, lines)


def plot(cells: list[Cell], model: str) -> str:
    """Image SQNR over true bits at 8-bit activations, a line a recipe, as SVG."""
    points: dict[str, list[tuple[float, float]]] = {}
    for cell in cells:
        if cell.model == model and SETTINGS[cell.setting][1] == 8 and (row := cell.result()):
            points.setdefault(cell.recipe, []).append((row["true_bits"], row["image_sqnr_db"]))
    return chart(points, f"{model}: images of recipes at equal bytes, activations of 8 bits")


def chart(points: Mapping[str, Sequence[tuple[float, float]]], title: str) -> str:
    """Lines of (true bits, dB), each recipe with a color and a mark that are its own."""
    reach = max(y for row in points.values() for _, y in row)
    below = "true average bits of the weights (8 x stored bytes / parameters)"
    return charts.lines(
        [(COMPARED.index(name), name, points[name]) for name in COMPARED if name in points],
        title,
        charts.Axis((1.5, 8.5), range(2, 9), below, "bits"),
        charts.decibels(0, 5 * math.ceil(reach / 5), "SQNR of the images against the float model, dB"),
        bold="default",
    )


def side_by_side(cells: Sequence[Cell], path: Path) -> None:
    """The first images of the float model and of every recipe at one setting, the worst recipe first."""
    rows = [(c.strip, row) for c in cells if c.strip and c.strip.exists() and (row := c.result())]
    rows.sort(key=lambda found: found[1]["image_sqnr_db"])
    titles = [f"{row['cell']['recipe']}, {row['image_sqnr_db']:.1f} dB" for _, row in rows]
    strips = [float_strip(next(iter(JUDGED))), *(strip for strip, _ in rows)]
    if strips[0].exists():
        image_grid.grid([_images(strip) for strip in strips], path, columns=2, scale=3, titles=["float32", *titles])


def save_strip(images: np.ndarray, path: Path) -> None:
    """Writes images [N, 1 or 3, height, width] in [-1, 1] in one row, as PNG."""
    row = np.concatenate(list(image_grid.levels(images).transpose(0, 2, 3, 1)), axis=1)
    Image.fromarray(row[..., 0] if row.shape[2] == 1 else row).save(path)


def _images(strip: Path) -> np.ndarray:
    """Those of a strip, which are square."""
    row = np.asarray(Image.open(strip), np.float32)
    levels = np.stack(np.split(row.reshape(*row.shape[:2], -1), row.shape[1] // row.shape[0], axis=1))
    return levels.transpose(0, 3, 1, 2) / 127.5 - 1


STATED = ("memory, MB", "bit operations, G")
"""Of a step, by what the artifact says."""
STEP = ("ms", *STATED)


def stated(costs: Mapping[str, Any]) -> list[str]:
    """Those columns of what `benchmarks.step_costs` found of a cell; blank where nothing was."""
    of = ((costs.get(key), unit) for key, unit in (("peak_bytes", 1e6), ("bops", 1e9)))
    return [_number(None if value is None else value / unit, 2) for value, unit in of]


@functools.cache
def _step_costs() -> dict[str, Any]:
    return read(COSTS)


def _step(row: Mapping[str, Any]) -> list[str]:
    """`STEP` of a cell, where `benchmarks.step_costs` compared its artifact with the others."""
    cell = row["cell"]
    found = _step_costs().get(cell["model"], {}).get(f"{cell['setting']} {cell['recipe']}", {})
    return [_number(found.get("ms"), 2), *stated(found)]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
