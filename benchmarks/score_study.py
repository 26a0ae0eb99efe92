"""What Qua2SeDiMo's scores say of UNets and of transformers: what a bit is worth, and which format, by operation.

    python -m benchmarks.score_study [--models NAME ...] [--configurations N] [--docs docs/recipes/qua2sedimo.md]

A graph neural network scores each layer in each format of the recipe, by how random configurations rank whose labels
were measured (`predict-scores`). Scores of a model are in standard deviations of its own, so that operations and blocks
are compared within one, orders between models. *A bit* is the best score of a layer in 4 bits less that in 3; formats
are those of the best score in 4 bits. Results go to results/score_study.json, and with --docs tables and figure to the
page.
"""

from __future__ import annotations

import argparse
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import fx

from benchmarks import documents, plans
from benchmarks.quality_cells import MODELS
from mpq_compiler import formats
from mpq_compiler.allocation.pose import SCORES
from mpq_compiler.frontend import denoiser
from mpq_compiler.inspection.score_report import box
from mpq_compiler.ir import interpreter, provenance
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.pipeline import manager, parser, recipes
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.support import svg, terminal

RECIPE = recipes.load("qua2sedimo")
FORMATS: Sequence[str] = RECIPE.options["predict-scores"]["formats"]
METHODS = {"int4": "uniform", "km4": "K-means of the tensor", "km4t": "K-means of rows"}
"""The formats of 4 bits, and what they are in the paper."""
RESULTS = Path(__file__).parent / "results" / "score_study.json"
FIGURE = "scores.svg"
KINDS = ("operation", "block")
HEADERS = ("layers", "a bit: median (least .. most)", "uniform", "K-means of the tensor", "of rows")


def scored(model: str, configurations: int) -> dict[str, Any]:
    """How well scores rank a model, and what a bit is worth to its operations and blocks, and which formats."""
    step = f"predict-scores{{formats={'/'.join(FORMATS)},level=operation,configurations={configurations}}}"
    passes = parser.parse(f"trace,layout,split-shortcut,calibrate,time-groups,{step}")
    requests = Requests.all(each.requests() for each in passes)
    session = Session(denoiser.load(model), progress=terminal.progress, requests=requests)
    program = manager.run_pipeline(passes, Program(fx.Graph(), TensorStore(), (), Stage.FLOAT), session)[0]
    said = provenance.document(program)
    found: dict[str, Any] = {"model": model, "correlations": said["program"]["predict-scores"]["correlations"]}
    for kind in KINDS:
        groups: dict[str, list[Mapping[str, float]]] = {}
        for unit in program.facts[SCORES]["units"]:
            (layer,) = unit["layers"]
            groups.setdefault(said["layers"][layer]["predict-scores"][kind], []).append(unit["variants"])
        found[kind] = {name: _group(layers) for name, layers in groups.items()}
    return found


def _group(layers: Sequence[Mapping[str, float]]) -> dict[str, Any]:
    best = [{bits: max((s, f) for f, s in x.items() if formats.get(f).bits == bits) for bits in (3, 4)} for x in layers]
    chosen = Counter(found[4][1] for found in best)
    return {"bit": [found[4][0] - found[3][0] for found in best], "formats": {name: chosen[name] for name in METHODS}}


def table(rows: Sequence[Mapping[str, Any]], kind: str) -> list[list[str]]:
    """A line for each group of each model, the one that a bit is worth most to first."""
    lines = []
    for row in rows:
        for name, found in _ranked(row, kind):
            low, _, median, _, high = box(found["bit"])
            counts = [str(found["formats"][method]) for method in METHODS]
            worth = f"{median:.2f} ({low:.2f} .. {high:.2f})"
            lines.append([row["model"], name, str(len(found["bit"])), worth, *counts])
    return lines


def figure(rows: Sequence[Mapping[str, Any]]) -> str:
    """Box plots of what a bit is worth, an operation a row, with the shares of the formats."""
    drawn = [
        svg.Row(f"{row['model']}: {name}", box(found["bit"]), [found["formats"][m] for m in METHODS])
        for row in rows
        for name, found in _ranked(row, "operation")
    ]
    title = "what a fourth bit is worth, by operation, and the best format in it"
    return svg.boxes(drawn, title, "score", [*METHODS.values()])


def _ranked(row: Mapping[str, Any], kind: str) -> list[tuple[str, Any]]:
    return sorted(row[kind].items(), key=lambda item: -statistics.median(item[1]["bit"]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--configurations", type=int, default=500, help="random ones to measure (500)")
    parser.add_argument("--docs", type=Path, help="write the table into this file, and the figure beside it")
    options = parser.parse_args()

    def rows() -> Iterator[dict[str, Any]]:
        for model in options.models:
            yield scored(model, options.configurations)

    with interpreter.single_threaded():
        found = plans.written(rows(), RESULTS, configurations=options.configurations)
    for kind in KINDS:
        headers, lines = ("model", kind, *HEADERS), table(found, kind)
        terminal.table(f"what a bit is worth by {kind}, in scores", headers, lines, numeric=(2, 4, 5, 6))
        if options.docs:
            documents.insert(options.docs, f"score-study-{kind}", documents.table(headers, lines))
    if options.docs:
        options.docs.with_name(FIGURE).write_text(figure(found))


if __name__ == "__main__":
    main()
