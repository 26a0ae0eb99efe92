"""Compiles models of real sizes, and says what it took: seconds and memory of every pass, and how both grow.

    python -m benchmarks.scale                                        # all models, both settings: hours
    python -m benchmarks.scale --models unet-70m sd15 --settings w8a8
    python -m benchmarks.scale --folder DIR                           # keep the checkpoints, which are 30 GB, there
    python -m benchmarks.scale --folder DIR --keep                    # and the artifacts, for benchmarks.scale_steps
    python -m benchmarks.scale --peers                                # peers instead: benchmarks.scale_peers

Each checkpoint is one of `benchmarks.realistic`, with 64 calibration rows of latents of 32 x 32, and `mpqc compile`
runs in a process of its own with an empty cache. Memory is the most that was resident, anonymous and shared, over all
its processes (`support/usage.py`); pages of mapped files are none of it. Results go to benchmarks/results/scale.json,
cell by cell, and the table of docs/scale.md is made of all that are there. CPU seconds are held against parameters, and
against multiply-accumulates of a row times rows, products of attentions included.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import cells, documents, peers, realistic, scale_peers
from benchmarks.cells import ROWS, SIZE
from benchmarks.machine import provenance

RESULTS = cells.RESULTS / "scale.json"
DOCS = cells.ROOT / "docs" / "scale.md"
MODELS = ("unet-70m", "unet-420m", "sd15", "pixart-sigma", "sdxl", "flux2-klein-4b")
SETTINGS = {"w8a8": ("--recipe", "w8a8"), "4 bits": ("--weights", "4", "--effort", "none")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, choices=tuple(realistic.MODELS))
    parser.add_argument("--settings", nargs="+", default=tuple(SETTINGS), choices=tuple(SETTINGS))
    parser.add_argument("--folder", type=Path, help="where checkpoints are kept (default: made anew, and deleted)")
    parser.add_argument("--keep", action="store_true", help="keep artifacts in the folder too")
    parser.add_argument("--estimates", action="store_true", help="only estimate anew what was measured before")
    parser.add_argument("--peers", nargs="*", choices=peers.PEERS, help="try these peers instead, or all")
    parser.add_argument("--memory", type=float, help="GiB that a process may use (default: the machine's but 2)")
    parser.add_argument("--jobs", type=int, default=2)
    options = parser.parse_args()
    if options.keep and options.folder is None:
        parser.error("--keep needs --folder")
    limit = None if options.memory is None else int(options.memory * 2**30)
    with tempfile.TemporaryDirectory() as scratch:
        place = (options.folder or Path(scratch)).absolute()
        if options.peers is not None:
            scale_peers.measure(options.models, options.peers or peers.PEERS, place, limit)
            return
        for name in options.models:
            cells.prepared(name, place / name)
            for setting in options.settings:
                if options.estimates:
                    estimate_anew(name, place / name, setting)
                else:
                    keep(cell(name, place / name, setting, options.jobs, options.keep, limit))
    documents.insert(DOCS, "scale", table(cells.read(RESULTS)))


def artifact_of(folder: Path, setting: str) -> Path:
    """Where the artifact of a model is kept, in a folder beside those of peers."""
    return folder / scale_peers.MADE / f"{peers.OURS}-{setting.replace(' ', '-')}" / "model.mpq"


def cell(
    name: str, folder: Path, setting: str, jobs: int, kept: bool = False, limit: int | None = None
) -> dict[str, Any]:
    """What it takes to compile a model; its artifact is left in the folder where it is to be kept."""
    with tempfile.TemporaryDirectory() as scratch:
        made, said = Path(scratch, "model.mpq"), Path(scratch, "report.json")
        command = command_of(name, folder, setting, jobs, said)
        ended = cells.run("mpq_compiler", *command, "-o", str(made), "--cache", f"{scratch}/cache", limit=limit)
        found = {
            "model": name,
            "setting": setting,
            "parameters": sum(parameter.numel() for parameter in realistic.empty(name).parameters()),
            "checkpoint_bytes": realistic.checkpoint_bytes(folder),
            "rows": ROWS,
            "jobs": jobs,
            "macs": realistic.macs(name, SIZE),
            **ended.taken(),
            **provenance(),
        }
        if ended.error is not None:
            return {**found, "error": ended.error}
        report = json.loads(said.read_text(encoding="utf-8"))
        estimate = report["estimate"] or estimated(command, said)  # of what takes seconds there is none
        if kept:
            place = artifact_of(folder, setting)
            shutil.rmtree(place.parent, ignore_errors=True)
            place.parent.mkdir(parents=True)
            shutil.move(made, place)
    return {
        **found,
        "estimate": estimate,
        "passes": [*report["passes"], *report["after"]],
        "artifact_bytes": report["artifact"]["bytes"],
        "bits": report["weights"]["average_bits"],
        "quality": report["quality"],
    }


def command_of(name: str, folder: Path, setting: str, jobs: int, said: Path) -> list[str]:
    """The command that compiles a model in a setting, but for where to, and writes its result to ``said``."""
    command = ["compile", str(folder), "--calibration", str(folder / "calls.safetensors"), "--jobs", str(jobs)]
    command += ["--json", str(said), *SETTINGS[setting]]
    return command + (["--shapes", f"1x4x{SIZE}x{SIZE}"] if setting_shapes(name) else [])


def estimate_anew(name: str, folder: Path, setting: str) -> None:
    """Estimates a cell again that was measured before, and prints both."""
    for found in cells.read(RESULTS):
        if (found["model"], found["setting"]) == (name, setting) and "error" not in found:
            with tempfile.TemporaryDirectory() as scratch:
                said = Path(scratch, "estimate.json")
                keep({**found, "estimate": estimated(command_of(name, folder, setting, found["jobs"], said), said)})


def estimated(command: list[str], said: Path) -> dict[str, Any]:
    """What ``--estimate`` says of a command that writes its result to ``said``."""
    ended = cells.run("mpq_compiler", *command, "--estimate")
    if ended.error is not None:
        raise SystemExit(ended.error)
    found: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    return found


def setting_shapes(name: str) -> bool:
    """Whether the size of the latents is an option; calls that are recorded have it."""
    return bool(realistic.MODELS[name].config.get("in_channels", 4) == 4)


def keep(found: dict[str, Any]) -> None:
    """Adds a cell to the results, in place of an older one, and prints it."""
    cells.keep(RESULTS, found, ("model", "setting"), {"setting": tuple(SETTINGS)})
    print(" | ".join(line(found)), flush=True)
    estimates = {step["name"]: step for step in (found.get("estimate") or {}).get("steps", ())}
    for step in found.get("passes", ()):
        taken = f"{step['seconds']:8.1f} s {step['cpu_seconds']:8.1f} s CPU {step['peak_bytes'] / 2**30:6.2f} GiB"
        if (said := estimates.get(step["name"])) is not None:
            taken += f"; estimated {said['cpu_seconds']:8.1f} s {said['peak_bytes'] / 2**30:6.2f} GiB"
        print(f"    {step['name']:20} {taken}", flush=True)


def line(found: dict[str, Any]) -> list[str]:
    """A row of the table."""
    ratio = found["peak_bytes"] / found["checkpoint_bytes"]
    row = [f"`{found['model']}`", f"{found['parameters'] / 1e6:.0f} M", found["setting"]]
    if "error" in found:
        return [*row, found["error"], *[""] * 6]
    slowest = max(found["passes"], key=lambda step: step["seconds"])
    row += [f"{found['seconds'] / 60:.1f} min", f"{found['cpu_seconds'] / 60:.1f} min"]
    row += [f"{found['peak_bytes'] / 2**30:.2f} GiB, {ratio:.1f} x", f"`{slowest['name']}`"]
    said, cpu, peak = found["estimate"], found["cpu_seconds"], found["peak_bytes"]
    row.append("" if said is None else f"{said['cpu_seconds'] / cpu:.2f} x, {said['peak_bytes'] / peak:.2f} x")
    quality = found["quality"]
    return [*row, f"{found['artifact_bytes'] / 2**20:.0f} MiB, {quality['sqnr_db']:.1f} dB", agreement(quality)]


def agreement(quality: dict[str, Any]) -> str:
    """Contract (c) in words; cells of earlier states have no standard error."""
    difference, error = quality["agreement_db"], quality.get("agreement_error_db")
    if difference is None:
        return "not run here"
    if error is None:
        return f"{difference:+.3f} dB"
    return f"{difference:+.3f} +- {error:.3f} dB by {quality['reference_inputs']} inputs"


def table(found: list[dict[str, Any]]) -> str:
    """All cells, and how CPU time grows with the parameters and with the work of a calibration."""
    headers = ("model", "parameters", "setting", "time", "CPU", "peak memory, of the checkpoint", "slowest pass",
               "estimated CPU, memory", "artifact", "contract (c)")  # fmt: skip
    text = documents.table(headers, [line(cell) for cell in found])
    for setting in SETTINGS:
        done = [cell for cell in found if cell["setting"] == setting and "error" not in cell]
        powers = {
            "parameters": power([(cell["parameters"], cell["cpu_seconds"]) for cell in done]),
            "multiply-accumulates x rows": power(
                [(cell["macs"] * cell["rows"], cell["cpu_seconds"]) for cell in done if "macs" in cell]
            ),
        }
        said = [f"{of} to the power {value:.2f}" for of, value in powers.items() if value is not None]
        if said:
            text += f"\n\nCPU time of {setting} grows as {', and as '.join(said)}."
    return f"{text}\n\n{cells.machines(found)}"


def power(points: list[tuple[float, float]]) -> float | None:
    """The exponent of the power law that fits points best; None for fewer than three."""
    if len(points) < 3:
        return None
    sizes, seconds = np.log(np.array(points, np.float64)).T
    return float(np.polyfit(sizes, seconds, 1)[0])


if __name__ == "__main__":
    main()
