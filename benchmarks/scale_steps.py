"""A step of a model of real size through our runtime, OpenVINO's and onnxruntime's: seconds and memory, one call each.

    python -m benchmarks.scale --models sdxl --settings w8a8 --folder DIR --keep     # what is run has to be made first
    python -m benchmarks.scale --models sdxl --peers onnxruntime openvino --folder DIR
    python -m benchmarks.scale_steps --model sdxl --folder DIR

In each round all take turns, with each number of threads, in a process that loads the model, makes a first call and
some later ones, one row each. Medians over the rounds; later calls by their median within a process. Loading begins
before the runtime is imported. Memory is anonymous and shared as in `benchmarks.scale`; pages of mapped files, such as
weights that are read in place, stand apart. Our artifacts compute everything in every call. Float torch in bfloat16
runs beside them where the CPU has instructions for it. Results go to benchmarks/results/scale_steps.json and
docs/scale.md.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cells, documents, peers, realistic, scale_peers
from benchmarks.machine import provenance
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.targets.table import host_features

RESULTS = cells.RESULTS / "scale_steps.json"
BF16 = "-bf16"
"""The ending of the names of what computes in bfloat16 what is not quantized."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=tuple(realistic.MODELS), default=["sdxl"])
    parser.add_argument("--folder", type=Path, required=True, help="where benchmarks.scale left what is run")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--calls", type=int, default=5, help="later calls of a process (default: 5)")
    parser.add_argument("--memory", type=float, help="GiB that a process may use (default: the machine's but 2)")
    options = parser.parse_args()
    limit = None if options.memory is None else int(options.memory * 2**30)
    for name in options.model:
        measure(name, options.folder.absolute() / name, options.threads, options.rounds, options.calls, limit)
    documents.insert(scale_peers.DOCS, "scale-steps", table(cells.read(RESULTS)))


def contestants(folder: Path) -> dict[str, Path]:
    """The folders of what is there to be run, by name: our artifacts first, float torch last."""
    made = folder / scale_peers.MADE
    found = {path.parent.name: path.parent for path in sorted(made.glob(f"{peers.OURS}-*/model.mpq"), reverse=True)}
    half = bool({"avx512_bf16", "amx_bf16", "bf16"} & host_features())
    for peer in (*peers.ONNXRUNTIME, *peers.OPENVINO):
        if any(made.glob(f"{peer}/model.*")):
            found[peer] = made / peer
            if half and peer in peers.OPENVINO:
                found[peer + BF16] = made / peer
    return found | ({peers.FLOAT: made / "rows"} if half else {})


def measure(name: str, folder: Path, threads: Sequence[int], rounds: int, calls: int, limit: int | None) -> None:
    """Lets all contestants of a model take turns, and keeps a cell for each, and number of threads."""
    rows = scale_peers.rows_of(name, folder, limit)
    if isinstance(rows, str):
        raise SystemExit(f"{name}: {rows}")
    known = contestants(folder)
    turns: dict[tuple[str, int], list[dict[str, Any]]] = {(who, n): [] for n in threads for who in known}
    for index in range(rounds):
        order = [*turns] if index % 2 == 0 else [*turns][::-1]  # what drifts meets both directions
        for who, count in order:
            if not any("error" in turn for turn in turns[who, count]):
                turns[who, count].append(turn(who, name, folder, rows, known[who], count, calls, limit))
    about = {
        "model": name,
        "parameters": sum(parameter.numel() for parameter in realistic.empty(name).parameters()),
        "rounds": rounds,
        "calls": calls,
        **provenance(),
    }
    for (who, count), taken in turns.items():
        found = {**about, "subject": who, "threads": count, **summary(taken)}
        cells.keep(RESULTS, found, ("model", "subject", "threads"), {"model": tuple(realistic.MODELS)})
        print(" | ".join(line(found)), flush=True)


def turn(
    who: str, name: str, folder: Path, rows: Path, target: Path, threads: int, calls: int, limit: int | None
) -> dict[str, Any]:
    """What one process took, or its error."""
    environment = {"OMP_NUM_THREADS": str(threads)}
    with tempfile.TemporaryDirectory() as scratch:
        asked = (who, name, str(folder), str(rows), str(target), str(threads), str(calls), scratch)
        ended = cells.run("benchmarks.peers", "step", *asked, limit=limit, environment=environment)
        if ended.error is not None:
            return {"error": ended.error}
        taken: dict[str, Any] = json.loads(Path(scratch, "step.json").read_text(encoding="utf-8"))
        output = np.load(Path(scratch, "output.npy"))
    expected = np.load(rows / "expected.npy")[: len(output)]
    return {**taken, "peak_bytes": ended.peak_bytes, "sqnr_db": sqnr_db(expected, output)}


def summary(turns: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Medians over the rounds."""
    for taken in turns:
        if "error" in taken:
            return {"error": taken["error"]}

    def median(values: Sequence[float]) -> float:
        return round(statistics.median(values), 4)

    return {
        "load_seconds": median([taken["load_seconds"] for taken in turns]),
        "first_seconds": median([taken["calls"][0] for taken in turns]),
        "later_seconds": median([statistics.median(taken["calls"][1:]) for taken in turns]),
        "later_cpu_seconds": median([statistics.median(taken["cpu_calls"][1:]) for taken in turns]),
        "peak_bytes": max(taken["peak_bytes"] for taken in turns),
        "mapped_bytes": max(taken["mapped_bytes"] for taken in turns),
        "sqnr_db": round(turns[0]["sqnr_db"], 3),
        "turns": list(turns),
    }


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    row = [f"`{found['model']}`", found["subject"], str(found["threads"])]
    if "error" in found:
        return [*row, found["error"], "", "", "", "", ""]
    row += [f"{found[key]:.2f} s" for key in ("load_seconds", "first_seconds", "later_seconds")]
    row += [f"{found[key] / 2**30:.2f} GiB" for key in ("peak_bytes", "mapped_bytes")]
    return [*row, f"{found['sqnr_db']:.1f} dB"]


def table(found: Sequence[dict[str, Any]]) -> str:
    """All cells."""
    headers = ("model", "", "threads", "load", "first call", "later calls", "peak memory", "mapped files", "of one row")
    return f"{documents.table(headers, [line(cell) for cell in found])}\n\n{cells.machines(found)}"


if __name__ == "__main__":
    main()
