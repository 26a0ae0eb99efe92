"""Which tile of Hopper's products is the fastest, and the model by which it is chosen (`cuda.gemm.model`).

    python -m benchmarks.gpu_tiles --build DIR            here, without a GPU: a kit of layers in many tiles
    python3 DIR/run.py --step 3 --out RESULTS             there
    python -m benchmarks.gpu_tiles --fit RESULTS/tables.json   here again: keeps the times, and fits the model to them

Without options what is kept is fitted: products of integers. Those in bfloat16, whose weights are codes (`codes_`), are
timed beside them. The model is judged on the times that it was fitted to.
"""

from __future__ import annotations

import argparse
import functools
import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import nnls

from benchmarks.gpu_kit import __main__ as kit
from benchmarks.gpu_kit import cases
from benchmarks.gpu_kit.cases import Layer
from mpq_compiler.backends.tvm.kernels.cuda import weight_only, wgmma
from mpq_compiler.backends.tvm.kernels.cuda.gemm import kernel, model, tiles
from mpq_compiler.backends.tvm.kernels.cuda.gemm.tiles import Tile
from mpq_compiler.backends.tvm.kernels.cuda.threads import primfunc
from mpq_compiler.backends.tvm.kernels.cuda.weights import CHANNELS, Fragments
from mpq_compiler.backends.tvm.kernels.problems.dequantize import WeightOnly
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul
from mpq_compiler.targets import nvidia

RESULTS = Path(__file__).parent / "results" / "gpu-h200" / "tiles.json"
SIZES = (
    *((rows, 64) for rows in (64, 96, 128, 160, 192)),
    *((rows, 128) for rows in (64, 80, 96, 112, 128, 144, 160, 192)),
    *((rows, 256) for rows in (96, 128, 160, 176)),
    *((rows, 320) for rows in (64, 80, 96)),
)
"""Rows and columns; 256 and 320 columns take less from the level-2 cache for each product."""
LAYERS = (
    Layer("sdxl", 4096, 1, 640, 640),
    Layer("sdxl", 1024, 1, 1280, 1280),
    Layer("sdxl", 1024, 1, 5120, 1280),
    Layer("sdxl", 1024, 1, 1280, 10240),
    Layer("sdxl", 1024, 1, 1280, 10240, gated=True),
    Layer("sd15", 64, 64, 320, 320, 3),
    Layer("sd15", 32, 32, 640, 640, 3),
    Layer("sd15", 16, 16, 1280, 1280, 3),
    Layer("sdxl", 128, 128, 320, 320, 3),
    Layer("sdxl", 64, 64, 640, 640, 3),
    Layer("sdxl", 32, 32, 1280, 1280, 3),
)
FACTORS = ("LAUNCH", "ROUND", "OUTPUT", "COPIED", "EACH", "SPLIT")


def variants(layer: Layer, codes: bool = False) -> cases.Products:
    """The layer at W8A8, or at W4A16, in each tile that its outputs divide into."""
    outputs = Fragments(layer.problem(8)).outputs
    fitting = [size for size in SIZES if outputs % size[1] == 0]
    if codes:
        return {name(*size, codes): (None, functools.partial(_built_of_codes, _tile(*size))) for size in fitting}
    return {name(*size): (8, functools.partial(_built, _tile(*size))) for size in fitting}


def name(rows: int, columns: int, codes: bool = False) -> str:
    """The name of a tile among the results."""
    return f"{'codes_' if codes else ''}r{rows}c{columns}"


def _tile(rows: int, columns: int, stages: int = wgmma.STAGES) -> Tile:
    return Tile(rows, columns, 1, columns // CHANNELS, stages)


def _built(tile: Tile, problem: QuantMatmul, function: str) -> object:
    def body(_: Any, buffers: Any) -> None:
        wgmma.Kernel(problem, tile, buffers, tiles.most_splits(problem)).emit(_)

    return primfunc(function, kernel.parameters(problem), body)


def _built_of_codes(tile: Tile, problem: WeightOnly, function: str) -> object:
    return weight_only.built(problem, function, lambda own: tile, weight_only.OnHopper)


def build(folder: Path) -> None:
    """A kit whose step 3 times the layers in all tiles."""
    there = Path(kit.__file__).parent / "there"
    shutil.copytree(there, folder / "there", ignore=shutil.ignore_patterns("__pycache__", "run.py"))
    shutil.copy2(there / "run.py", folder / "run.py")
    kit.carried(folder / "lib", list(kit.PYTHONS))
    (folder / "tables").mkdir()
    found = []
    for number, layer in enumerate(LAYERS):
        library, others = folder / "tables" / f"{number}.so", {**variants(layer), **variants(layer, codes=True)}
        functions = cases.functions(layer, nvidia.HOPPER, others)
        cases.kernels.write(functions, library, lambda text: cases.machine_code.fatbin(text, [nvidia.HOPPER]))
        for batch in model.BATCHES:
            told, stored = cases.described(layer, batch, nvidia.HOPPER, others)
            arrays = f"{number}-{batch}.npz"
            np.savez_compressed(folder / "tables" / arrays, **stored)  # type: ignore[arg-type]
            found.append({**told, "library": library.name, "arrays": arrays, "counted": ()})
        print(layer.name, flush=True)
    (folder / "tables" / "cases.json").write_text(json.dumps(found) + "\n")


def kept(tables: Mapping[str, Any]) -> dict[str, Any]:
    """The times of a run, microseconds by layer and batch, then by tile, with what they were measured on."""
    about = {key: tables[key] for key in ("gpu", "driver", "clocks, temperature, driver", "command")}
    ours = re.compile(r"(codes_)?r\d+c\d+")
    times = {
        case: {one["name"]: round(one["us"], 2) for one in row["rows"] if ours.fullmatch(one["name"])}
        for case, row in tables["cases"].items()
    }
    return about | {"stages": wgmma.STAGES, "us": {case: own for case, own in times.items() if own}}


def fit(results: Mapping[str, Any]) -> dict[str, float]:
    """The factors of the model by their names, of least relative squares, none below zero."""
    times, stages = results["us"], results["stages"]
    rows = [
        np.array(model.terms(layer.problem(8), _tile(*size, stages), batch)) / times[case][name(*size)]
        for layer, batch, case in _cases(times)
        for size in SIZES
        if name(*size) in times[case]
    ]
    factors, error = nnls(np.array(rows), np.ones(len(rows)))
    print(f"{len(rows)} times, {error / np.sqrt(len(rows)):.3f} off (root mean square, relative)")
    return dict(zip(FACTORS, map(float, factors), strict=True))


def _cases(times: Mapping[str, object]) -> list[tuple[Layer, int, str]]:
    named = [(layer, batch, f"{layer.name}, batch {batch}") for layer in LAYERS for batch in model.BATCHES]
    return [each for each in named if each[2] in times]


def judged(times: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Of each layer how many times as long as the best tile the chosen one takes, batches together."""
    found = {}
    for layer in LAYERS:
        own = [times[case] for other, _, case in _cases(times) if other == layer]
        best = [min(each.values()) for each in own]

        def cost(tile: str, own: list[Mapping[str, float]] = own, best: list[float] = best) -> float:
            return sum(each[tile] / least for each, least in zip(own, best, strict=True))

        chosen = wgmma.tile(layer.problem(8))
        found[layer.name] = cost(name(chosen.rows, chosen.columns)) / min(map(cost, own[0]))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--build", type=Path, metavar="DIR", help="the folder to build")
    parser.add_argument("--fit", type=Path, metavar="TABLES", help="the results of step 3, kept from now on")
    options = parser.parse_args()
    if options.build:
        build(options.build)
        return
    if options.fit:
        RESULTS.write_text(json.dumps(kept(json.loads(options.fit.read_text())), indent=1) + "\n")
    results = json.loads(RESULTS.read_text())
    for factor, value in fit(results).items():
        print(f"{factor} {value:.3g} (the model has {getattr(model, factor):.3g})")
    for layer, ratio in judged(results["us"]).items():
        print(f"{layer}: the chosen tile takes {ratio:.2f} times the time of the best")


if __name__ == "__main__":
    main()
