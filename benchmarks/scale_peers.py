"""What peers take to quantize models of real sizes to 8 bits: seconds, memory, bytes, and what is left of the output.

    python -m benchmarks.scale --peers                                  # all models and peers: hours
    python -m benchmarks.scale --peers onnxruntime openvino --models unet-70m
    python -m benchmarks.scale --peers --folder DIR                     # keep checkpoints and peers' models there

Beside `benchmarks.scale`, on the same checkpoints and rows: a peer is calibrated on the rows that our calibration sees,
and judged against the float model on those that we are judged on. It has a process of its own and an empty working
folder, from the checkpoint on: what its user must do before it quantizes counts (`benchmarks.peers`). A process that
needs more memory than the machine has is ended, and the table says so. `pip install -e '.[scale]'` has the peers.
"""

from __future__ import annotations

import importlib.util
import json
import shutil
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cells, documents, peers, realistic
from benchmarks.machine import provenance
from mpq_compiler.evaluation.metrics import sqnr_db

RESULTS = cells.RESULTS / "scale_peers.json"
DOCS = cells.ROOT / "docs" / "scale.md"
MADE = "made"
"""The folder in a model's with what was made of it: peers' models, our artifacts, and the rows."""


def measure(models: Sequence[str], names: Sequence[str], folder: Path, limit: int | None) -> None:
    """Fills the cells of some models and peers, and the table of them all.

    Args:
        models: by name.
        names: peers, of `peers.PEERS`.
        folder: with a folder for each model; peers' models are left in its `MADE`.
        limit: the most bytes of memory of a process; None: what the machine has.
    """
    for model in models:
        cells.prepared(model, folder / model)
        ready = rows_of(model, folder / model, limit)
        for peer in names:
            found = cell(model, peer, folder / model, ready, limit)
            cells.keep(RESULTS, found, ("model", "peer"), {"model": tuple(realistic.MODELS), "peer": peers.PEERS})
            print(" | ".join(line(found)), flush=True)
        documents.insert(DOCS, "scale-peers", table(cells.read(RESULTS)))


def rows_of(model: str, folder: Path, limit: int | None) -> Path | str:
    """The folder of the rows, with the float model's outputs; why there are none, where it cannot run here."""
    rows = folder / MADE / "rows"
    if (rows / "expected.npy").exists():
        return rows
    rows.mkdir(parents=True, exist_ok=True)
    ended = cells.run("benchmarks.peers", "rows", model, str(folder), str(rows), limit=limit)
    return rows if ended.error is None else f"the float model {ended.error}"


def missing(peer: str) -> str | None:
    """Why a peer cannot be tried here."""
    absent = [name for name in peers.PACKAGES[peer.split("-")[0]] if importlib.util.find_spec(name) is None]
    return f"{' and '.join(absent)} not installed" if absent else None


def cell(model: str, peer: str, folder: Path, rows: Path | str, limit: int | None) -> dict[str, Any]:
    """What a peer took for a model, and the SQNR of what came out; or why it does not manage."""
    found: dict[str, Any] = {
        "model": model,
        "peer": peer,
        "parameters": sum(parameter.numel() for parameter in realistic.empty(model).parameters()),
        "checkpoint_bytes": realistic.checkpoint_bytes(folder),
        "rows": cells.ROWS,
        "memory_limit": limit or cells.memory_limit(),
        **provenance(),
    }
    if (reason := missing(peer)) or isinstance(rows, str):
        return {**found, "error": reason or rows}
    found["versions"] |= {name: version(name) for name in peers.PACKAGES[peer.split("-")[0]]}
    target = folder / MADE / peer
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir(parents=True)
    asked = (peer, model, str(folder), str(rows), str(target))
    with tempfile.TemporaryDirectory() as scratch:
        places = dict.fromkeys(("TMPDIR", "HOME", "XDG_CACHE_HOME", "TORCHINDUCTOR_CACHE_DIR"), scratch)
        ended = cells.run(
            "benchmarks.peers", "make", *asked, limit=limit, folder=Path(scratch), environment=places
        )
    found |= ended.taken()
    if ended.error is not None:
        shutil.rmtree(target)
        return {**found, "error": ended.error}
    found |= json.loads((target / "make.json").read_text(encoding="utf-8"))
    (target / "make.json").unlink()
    found["artifact_bytes"] = sum(file.stat().st_size for file in target.iterdir())
    judged = cells.run("benchmarks.peers", "judge", *asked, limit=limit)
    if judged.error is not None:
        return {**found, "error": f"its model cannot be run: {judged.error}"}
    output = np.load(target / "output.npy")
    (target / "output.npy").unlink()
    return {**found, "sqnr_db": round(sqnr_db(np.load(rows / "expected.npy"), output), 3)}


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    row = [f"`{found['model']}`", found["peer"]]
    if "seconds" not in found:
        return [*row, found["error"], "", "", ""]
    ratio = found["peak_bytes"] / found["checkpoint_bytes"]
    row += [f"{found['seconds'] / 60:.1f} min", f"{found['cpu_seconds'] / 60:.1f} min"]
    row += [f"{found['peak_bytes'] / 2**30:.2f} GiB, {ratio:.1f} x"]
    if "error" in found:
        return [*row, found["error"]]
    return [*row, f"{found['artifact_bytes'] / 2**20:.0f} MiB, {found['sqnr_db']:.1f} dB"]


def table(found: Sequence[dict[str, Any]]) -> str:
    """All cells."""
    headers = ("model", "peer", "time", "CPU", "peak memory, of the checkpoint", "what it stores")
    return f"{documents.table(headers, [line(cell) for cell in found])}\n\n{cells.machines(found)}"
