"""What each part of a recipe is worth: the recipe without it, all else as in `benchmarks.quality`.

    python -m benchmarks.ablation                      # the table of what is there
    python -m benchmarks.ablation --all                # computes what is missing, row by row; goes on where it was
    python -m benchmarks.ablation --all --setting W4A4 --part GPTQ training --docs docs/recipes/default.md
    python -m benchmarks.ablation --all --recipe mpq-dmv2 --part relation --seeds 3

Every row is the recipe with one part taken away or, behind a plus, with one that it leaves out. Its image SQNR and PSNR
less those of the whole recipe, which is the cell of `benchmarks.quality`, have paired bootstrap intervals over the
images, and over the seeds where several are there. With --minutes 0 nothing is trained. Results lie in
benchmarks/results/ablation/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

from benchmarks import documents, quality, quality_cells
from benchmarks.quality_cells import write
from benchmarks.quality_tables import paired, paired_psnr, shown
from mpq_compiler.pipeline.recipes import Recipe
from mpq_compiler.support import terminal

RESULTS = quality_cells.RESULTS.parent / "ablation"
SETTINGS = ("W2A8", "W4A4")
Change = Callable[[Recipe], Recipe]


def _without(name: str) -> Change:
    return lambda recipe: replace(recipe, pipeline=tuple(n for n in recipe.pipeline if n != name))


def _before(place: str, name: str) -> Change:
    def change(recipe: Recipe) -> Recipe:
        at = recipe.pipeline.index(place)
        return replace(recipe, pipeline=(*recipe.pipeline[:at], name, *recipe.pipeline[at:]))

    return change


def _with(name: str, **options: Any) -> Change:
    return lambda recipe: recipe.override(name, **options)


def _packed(recipe: Recipe) -> Recipe:
    return recipe.override("sensitivity", formats=recipe.options["sensitivity"]["packed"])


def _formats(kept: Callable[[str], bool]) -> Change:
    return lambda recipe: recipe.override(
        "sensitivity", formats=[name for name in recipe.options["sensitivity"]["formats"] if kept(name)]
    )


RATES: dict[str, Change] = {
    "+ half the usual learning rate": _with("distill", rate=0.5),
    "+ twice the usual learning rate": _with("distill", rate=2.0),
}
PARTS: dict[str, dict[str, Change]] = {
    "default": {
        "training": _without("distill"),
        "training by images": _with("distill", unroll=0.0),
        "entropy-coded weights": _packed,
        "GPTQ": _with("round-weights", method="nearest", scales=False, paths=False),
        "several paths": _with("round-weights", paths=False),
        "equalization": _without("equalize"),
        "rotation": _without("rotate"),
        "time groups": _with("time-groups", groups=1),
        "gains of times": _without("time-gains"),
        "mixed activations": _with("bit-allocation", mixed=False),
        "+ 20 time groups": _with("time-groups", groups=20),
        "+ split shortcuts": _before("calibrate", "split-shortcut"),
        "+ learned rounding": _with("round-weights", method="learned", scales=False, paths=False),
        "+ adapters": _with("distill", adapters=32),
        **RATES,
    },
    "mpq-dm": {
        "training": _without("distill"),
        "relation": _with("distill", relation=0.0),
        "rows of several widths": _with("sensitivity", formats=["int2", "int3", "int4", "int8"]),
        **RATES,
    },
    "dilatequant": {
        "training": _without("distill"),
        "dilation": _without("equalize"),
        "training block by block": _with("distill", blocks=False),
        **RATES,
        "+ the usual learning rate": _with("distill", rate=1.0),
        "+ 4 times the usual learning rate": _with("distill", rate=4.0),
        "+ 16 times the usual learning rate": _with("distill", rate=16.0),
        "+ 32 times the usual learning rate": _with("distill", rate=32.0),
    },
    "mpq-dmv2": {
        "training": _without("distill"),
        "relation": _with("distill", relation=0.0),
        "residual orders by row": _formats(lambda name: "m" not in name),
        "residuals": _formats(lambda name: "+b" not in name),
        "+ adapters": _with("distill", adapters=32),
        "+ adapters from the SVD": _with("distill", adapters=32, adapters_start="svd"),
        **RATES,
    },
}
"""The parts of each recipe."""


@dataclass(frozen=True)
class Row(quality_cells.Cell):
    """A recipe with one part changed."""

    part: str = ""
    program: ClassVar[str] = "benchmarks.ablation"

    @property
    def whole(self) -> quality_cells.Cell:
        """The cell of `benchmarks.quality` that it is compared with."""
        return quality_cells.Cell(self.model, self.setting, self.recipe, self.minutes, self.seed, self.images)

    @property
    def asked(self) -> list[str]:
        """Arguments that ask for it, and for what it is compared with: rows are those of all seeds up to its own."""
        given = [*super(Row, replace(self, seed=0)).asked, f"--part={self.part}"]
        return [*given, f"--seeds={self.seed + 1}"] if self.seed else given

    @property
    def name(self) -> str:
        return f"{self.model} {self.setting}, {self.title}, seed {self.seed}"

    @property
    def title(self) -> str:
        if not self.part:
            return "the whole recipe"
        return self.part if self.part.startswith("+") else f"without {self.part}"

    @property
    def used(self) -> Recipe:
        recipe = quality_cells.loaded(self.recipe)
        return PARTS[self.recipe][self.part](recipe) if self.part else recipe

    @property
    def file(self) -> Path:
        if not self.part:
            return self.whole.file
        text = f"{sorted(asdict(self).items())} {json.dumps(self.made, sort_keys=True)}"
        name = self.part.strip("+ ").replace(" ", "-").lower()
        return RESULTS / f"{self.model}-{self.setting}-{name}-{hashlib.sha256(text.encode()).hexdigest()[:8]}.json"

    def options(self, budget: quality_cells.Budget) -> dict[str, Any]:
        given = super().options(budget)
        del given["recipe"]
        return {**given, "pipeline": ",".join(p.text() for p in self.used.passes())}


def compared(rows: list[Row]) -> list[list[str]]:
    """A line for each part that is there: names, seeds, their means, what the part is worth, with its interval.

    A part has the seeds of which the whole recipe is there too; the whole recipe has a line where a part has one.
    """
    lines, known = [], {replace(row, part="", seed=0) for row in rows if row.part and row.result()}
    for part in dict.fromkeys(replace(row, seed=0) for row in rows):
        seeds = [row for row in rows if replace(row, seed=0) == part]
        both = [(row.result(), row.whole.result()) for row in seeds]
        pairs = [(found, whole) for found, whole in both if found and whole]
        if not pairs or replace(part, part="") not in known:
            continue
        found, wholes = zip(*pairs, strict=True)
        sqnr, images, psnr = (f"{statistics.mean(row[name] for row in found):.1f}" for name in MEASURED)
        worth = [shown(by(found, wholes)) if part.part else "" for by in (paired, paired_psnr)]
        lines.append([part.model, part.setting, part.title, str(len(found)), sqnr, images, worth[0], psnr, worth[1]])
    return lines


MEASURED = ("sqnr_db", "image_sqnr_db", "psnr_db")
HEADERS = (
    "model", "setting", "recipe", "seeds", "SQNR, dB", "images: SQNR, dB", "to the whole recipe, dB", "PSNR, dB",
    "to the whole recipe, dB",
)  # fmt: skip


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=quality_cells.MODELS, default=list(quality_cells.MODELS)[:1])
    parser.add_argument("--setting", nargs="+", choices=quality_cells.SETTINGS, default=list(SETTINGS))
    parser.add_argument("--recipe", choices=PARTS, default="default")
    parser.add_argument("--part", nargs="+", help="(default: all of the recipe)")
    parser.add_argument("--all", action="store_true", help="compute the rows that are missing")
    parser.add_argument("--minutes", type=float, default=quality_cells.MINUTES)
    parser.add_argument("--images", type=int, default=quality_cells.IMAGES)
    parser.add_argument("--seeds", type=int, default=1, help="of calibration and training (%(default)s)")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--docs", type=Path, help="write the results into this file, between the marks")
    return parser


def rows_of(options: argparse.Namespace) -> list[Row]:
    """The rows that are asked for, and those of the whole recipe."""
    parts = options.part or list(PARTS[options.recipe])
    return [
        Row(model, setting, options.recipe, options.minutes, seed, options.images, part)
        for model in options.model
        for setting in options.setting
        for part in ("", *parts)
        for seed in range(options.seeds)
    ]


def main() -> None:
    parser = arguments()
    options = parser.parse_args()
    if unknown := set(options.part or ()) - PARTS[options.recipe].keys():
        names = ", ".join(PARTS[options.recipe])
        parser.error(f"{options.recipe} has no part {sorted(unknown)[0]}: choose from {names}")
    rows = rows_of(options)
    missing = [row for row in rows if not row.file.exists()]
    print(f"{len(rows) - len(missing)} of {len(rows)} rows are there", flush=True)
    for row in missing if options.all else ():
        print(f"{row.name} ...", flush=True)
        found = quality.compute(row if row.part else row.whole, options.jobs).rows[0]
        write(row.file, found)
        print(f"{row.name}: {found['image_sqnr_db']:.2f} dB in {found['seconds'] / 60:.1f} minutes", flush=True)
    lines = compared(rows)
    terminal.table(f"parts of {options.recipe}", HEADERS, lines, numeric=(3, 4, 5, 7))
    if options.docs:
        mark = "ablation" if options.minutes else "ablation untrained"
        documents.insert(options.docs, mark, documents.table(HEADERS, lines))


if __name__ == "__main__":
    main()
