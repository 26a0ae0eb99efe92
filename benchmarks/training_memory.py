"""What memory training takes: a network as a whole, block by block as DilateQuant has it, part by part.

    python -m benchmarks.training_memory --docs docs/recipes/dilatequant.md
    python -m benchmarks.training_memory --models unet-70m --folder DIR  # keeps the checkpoint there

The same program, uniform `int4` with 8-bit activations, is trained by a few updates of the weights; a way is an option
of `distill`. Each runs in a process of its own, and memory is the most that was resident in that pass, anonymous and
shared; what the process had before is that of a pass that trains nothing. Results go to
benchmarks/results/training_memory.json.
"""

from __future__ import annotations

import argparse
import multiprocessing
import tempfile
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

from benchmarks import cells, documents
from benchmarks.machine import provenance
from benchmarks.quality_cells import UNIFORM, read, write
from mpq_compiler.driver import lower
from mpq_compiler.driver.options import Options
from mpq_compiler.support import terminal

RESULTS = cells.RESULTS / "training_memory.json"
BUNDLED = ("fashion-unet", "fashion-dit")
LARGE = "unet-70m"
"""Of random weights (`benchmarks.realistic`); its calls are given, 64 rows of latents of 32 x 32."""
UPDATES = "updates=8,latent=1,images=0"
WHOLE = f"{UPDATES},memory=1024"
"""Of GiB as many as any of them has no use for."""
WAYS = {
    "nothing": "updates=0",
    "as a whole": WHOLE,
    "block by block": f"{WHOLE},blocks=true",
}
PARTED = {
    "part by part": UPDATES,
    "part by part, memory=0.5": f"{UPDATES},memory=0.5",
}
"""Of those whose variables take more than `memory`, which is 2 GiB: no others are trained so."""
HEADERS = ("model", "trained", "peak memory, MB", "more than untrained, MB", "CPU s")


def options(calls: str | None, way: str) -> Options:
    """Uniform weights, rounded to nearest, and training with these options at the end."""
    steps, _ = UNIFORM.format(w=4, a=8, method="nearest").split(",fold-fake-quant")
    shapes = calls and f"1x4x{cells.SIZE}x{cells.SIZE}"
    return Options(pipeline=f"{steps},distill{{{way}}}", jobs=2, calibration=calls, shapes=shapes)


def taken(model: str, calls: str | None, way: str) -> dict[str, Any]:
    """What `distill` takes with these options; to be called in a process that did nothing before."""
    given = options(calls, way)
    lowered = lower.lower(lower.load_denoiser(model, given), given)
    (record,) = (record for record in lowered.records if record.name == "distill")
    return {"peak_bytes": record.peak_bytes, "cpu_seconds": record.cpu_seconds}


def measured(model: str, folder: Path) -> dict[str, dict[str, Any]]:
    """Every way of a model, one after the other."""
    path, calls, ways = model, None, WAYS
    if model not in BUNDLED:
        path, calls, ways = str(folder / model), str(cells.prepared(model, folder / model)), WAYS | PARTED
    found = {}
    for name, way in ways.items():
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as alone:
            found[name] = alone.submit(taken, path, calls, way).result()
        print(f"{model}, {name}: {found[name]['peak_bytes'] / 1e6:.0f} MB", flush=True)
    return found


def lines(results: Mapping[str, Any]) -> list[list[str]]:
    """A line for each way of a model."""
    found = []
    for model, of in results.items():
        base = of["ways"]["nothing"]["peak_bytes"]
        for name, way in of["ways"].items():
            more = f"{(way['peak_bytes'] - base) / 1e6:.0f}"
            found.append([model, name, f"{way['peak_bytes'] / 1e6:.0f}", more, f"{way['cpu_seconds']:.0f}"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=(*BUNDLED, LARGE), default=(*BUNDLED, LARGE))
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: made anew, and deleted)")
    parser.add_argument("--docs", type=Path, help="write the results into this file, between the marks")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for model in asked.models:
            found = {"ways": measured(model, (asked.folder or Path(scratch)).absolute()), **provenance()}
            write(RESULTS, read(RESULTS) | {model: found})
    table = lines(read(RESULTS))
    terminal.table("memory of training", HEADERS, table, numeric=(2, 3, 4))
    if asked.docs:
        documents.insert(asked.docs, "memory", documents.table(HEADERS, table))


if __name__ == "__main__":
    main()
