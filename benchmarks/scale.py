"""Compiles models of real sizes, and says what it took: seconds and memory of every pass, and how both grow.

    python -m benchmarks.scale                                        # all models, both settings: hours
    python -m benchmarks.scale --models unet-70m sd15 --settings w8a8
    python -m benchmarks.scale --folder DIR                           # keep the checkpoints, which are 30 GB, there

Each checkpoint is one of `benchmarks.realistic`, with 64 calibration rows of latents of 32 x 32, and `mpqc compile`
runs in a process of its own with an empty cache. Memory is the most that was resident, anonymous and shared, over all
its processes (`support/usage.py`); pages of mapped files are none of it. Results go to benchmarks/results/scale.json,
cell by cell, and the table of docs/scale.md is made of all that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import documents, realistic
from benchmarks.machine import provenance
from mpq_compiler.support import usage

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "scale.json"
DOCS = ROOT / "docs" / "scale.md"
MODELS = ("unet-70m", "unet-420m", "sd15", "pixart-sigma", "sdxl", "flux2-klein-4b")
SETTINGS = {"w8a8": ("--recipe", "w8a8"), "4 bits": ("--weights", "4", "--effort", "none")}
ROWS, SIZE = 64, 32


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=tuple(realistic.MODELS))
    parser.add_argument("--settings", nargs="+", default=tuple(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: made anew, and deleted)")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        for name in options.models:
            folder = (options.folder or Path(scratch)) / name
            realistic.write(name, folder)
            realistic.write_calls(name, folder / "calls.safetensors", ROWS, SIZE)
            for setting in options.settings:
                keep(cell(name, folder, setting, options.jobs))
    documents.insert(DOCS, "scale", table(json.loads(RESULTS.read_text(encoding="utf-8"))["cells"]))


def cell(name: str, folder: Path, setting: str, jobs: int) -> dict[str, Any]:
    """What it takes to compile a model, printed and returned."""
    files = [file.stat().st_size for file in folder.glob(f"{realistic.STEM}*.safetensors")]
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "mpq_compiler", "compile", str(folder), "-o", f"{scratch}/model.mpq"]
        command += ["--calibration", str(folder / "calls.safetensors"), "--cache", f"{scratch}/cache"]
        command += ["--jobs", str(jobs), "--json", f"{scratch}/report.json", *SETTINGS[setting]]
        if setting_shapes(name):
            command += ["--shapes", f"1x4x{SIZE}x{SIZE}"]
        begin, cpu = time.perf_counter(), usage.cpu_seconds()
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with usage.PeakMemory(process.pid) as peak:
            _, error = process.communicate()
        found = {
            "model": name,
            "setting": setting,
            "parameters": sum(parameter.numel() for parameter in realistic.empty(name).parameters()),
            "checkpoint_bytes": sum(files),
            "rows": ROWS,
            "jobs": jobs,
            "seconds": round(time.perf_counter() - begin, 1),
            "cpu_seconds": round(usage.cpu_seconds() - cpu, 1),
            "peak_bytes": peak.take(),
            **provenance(),
        }
        if process.returncode:
            return {**found, "error": error.strip().splitlines()[-1]}
        report = json.loads(Path(scratch, "report.json").read_text(encoding="utf-8"))
    return {
        **found,
        "passes": report["passes"],
        "artifact_bytes": report["artifact"]["bytes"],
        "bits": report["weights"]["average_bits"],
        "quality": report["quality"],
    }


def setting_shapes(name: str) -> bool:
    """Whether the size of the latents is an option; calls that are recorded have it."""
    return realistic.MODELS[name].config.get("in_channels", 4) == 4


def keep(found: dict[str, Any]) -> None:
    """Adds a cell to the results, in place of an older one, and prints it."""
    known = json.loads(RESULTS.read_text(encoding="utf-8"))["cells"] if RESULTS.exists() else []
    same = (found["model"], found["setting"])
    cells = [cell for cell in known if (cell["model"], cell["setting"]) != same] + [found]
    cells.sort(key=lambda cell: (list(SETTINGS).index(cell["setting"]), cell["parameters"]))
    RESULTS.write_text(json.dumps({"cells": cells}, indent=1) + "\n", encoding="utf-8")
    print(" | ".join(line(found)), flush=True)
    for step in found.get("passes", ()):
        taken = f"{step['seconds']:8.1f} s {step['cpu_seconds']:8.1f} s CPU {step['peak_bytes'] / 2**30:6.2f} GiB"
        print(f"    {step['name']:20} {taken}", flush=True)


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ratio = found["peak_bytes"] / found["checkpoint_bytes"]
    cells = [f"`{found['model']}`", f"{found['parameters'] / 1e6:.0f} M", found["setting"]]
    if "error" in found:
        return [*cells, found["error"], "", "", "", "", ""]
    slowest = max(found["passes"], key=lambda step: step["seconds"])
    cells += [f"{found['seconds'] / 60:.1f} min", f"{found['cpu_seconds'] / 60:.1f} min"]
    cells += [f"{found['peak_bytes'] / 2**30:.2f} GiB, {ratio:.1f} x", f"`{slowest['name']}`"]
    quality = found["quality"]
    agreement = "not run here" if quality["agreement_db"] is None else f"{quality['agreement_db']:+.3f} dB"
    return [*cells, f"{found['artifact_bytes'] / 2**20:.0f} MiB, {quality['sqnr_db']:.1f} dB", agreement]


def table(cells: list[dict[str, Any]]) -> str:
    """All cells, and how CPU time grows with the parameters."""
    headers = ("model", "parameters", "setting", "time", "CPU", "peak memory, of the checkpoint", "slowest pass",
               "artifact", "contract (c)")  # fmt: skip
    text = documents.table(headers, [line(cell) for cell in cells])
    for setting in SETTINGS:
        done = [cell for cell in cells if cell["setting"] == setting and "error" not in cell]
        if len(done) > 2:
            sizes, seconds = ([math.log(cell[key]) for cell in done] for key in ("parameters", "cpu_seconds"))
            power = np.polyfit(sizes, seconds, 1)[0]
            text += f"\n\nCPU time of {setting} grows as parameters to the power {power:.2f}."
    machines = sorted({f"{cell['cpu']}, {cell['cores']} cores" for cell in cells})
    return f"{text}\n\nMeasured on {'; '.join(machines)}."


if __name__ == "__main__":
    main()
