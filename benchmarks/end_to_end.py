"""Compiled denoisers against torch, onnxruntime and OpenVINO, one step on one thread, interleaved on this machine.

    python -m benchmarks.end_to_end                               # all models, into benchmarks/results/
    python -m benchmarks.end_to_end --model unet-70m --runs 1

The peers run the same model in f32, in bfloat16 and in 8 bits, quantized as their users would
(`bench/baselines.py`); we run it with 8-bit weights, with 4-bit weights, and with `--numerics fast`. Everybody is
calibrated on 32 inputs. Where the CPU has tiles (AMX), which `native` takes, an artifact without them is measured too.
The large models have random weights: their SQNR ranks arithmetic and says nothing of images.
In each run all take turns; a ratio is the median over the runs of the median ratio within rounds, by CPU time, which
leaves out what others do.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from benchmarks.machine import provenance
from mpq_compiler.api import compile
from mpq_compiler.bench.run import bench
from mpq_compiler.bench.show import show
from mpq_compiler.frontend import denoiser
from mpq_compiler.support import terminal
from mpq_compiler.targets import table as targets

RESULTS = Path(__file__).parent / "results" / "end_to_end.json"
PIPELINE = (
    "trace,layout,calibrate{{samples=8,steps=4}},time-groups,bit-allocation{{uniform={}}},numerics{{mode={}}},"
    "insert-fake-quant,residual-branch,round-weights,fold-fake-quant,fuse-epilogues"
)
REGISTERS = "x86-64-avx512vnni"
"""What tiles (AMX) are held against, where they are native."""
OURS = {
    "w8a8": ("int8", "portable", "native"),
    "w8a8-fast": ("int8", "fast", "native"),
    "w4a8": ("int4", "portable", "native"),
    "w8a8-registers": ("int8", "portable", REGISTERS),
}
"""Artifacts by name: format of all weights, numerics, target. The first is the one that peers are held against."""
INT8 = ("onnxruntime-int8", "openvino-int8", "openvino-int8-bf16")
BLOCKS = ("{}DownBlock2D", "{}UpBlock2D")


def unet_70m() -> torch.nn.Module:
    """70 M parameters, 6.8 GMAC a step."""
    from diffusers import UNet2DModel

    kinds = ("", "Attn", "Attn", "")
    return UNet2DModel(
        sample_size=32, in_channels=4, out_channels=4, layers_per_block=2, block_out_channels=(128, 256, 256, 512),
        down_block_types=tuple(BLOCKS[0].format(k) for k in kinds), attention_head_dim=64,
        up_block_types=tuple(BLOCKS[1].format(k) for k in kinds),
    )  # fmt: skip


def unet_420m() -> torch.nn.Module:
    """As wide as Stable Diffusion 1.5, three levels of one layer: 420 M parameters, 58 GMAC a step."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=32, in_channels=4, out_channels=4, cross_attention_dim=768, block_out_channels=(320, 640, 1280),
        layers_per_block=1, down_block_types=(BLOCKS[0].format("CrossAttn"),) * 3,
        up_block_types=(BLOCKS[1].format("CrossAttn"),) * 3,
    )  # fmt: skip


MODELS: Mapping[str, Callable[[], torch.nn.Module] | None] = {
    "fashion-unet": None,
    "unet-70m": unet_70m,
    "unet-420m": unet_420m,
}
"""By name; None where it is bundled."""


def save(name: str, folder: Path) -> str:
    """The model as a folder, with random weights that are always the same; its name where it is bundled."""
    make = MODELS[name]
    if make is None:
        return name
    path = folder / name
    if not path.exists():
        torch.manual_seed(0)
        make().save_pretrained(path / "unet")
    return str(path)


def compiled(source: str, name: str, folder: Path, jobs: int) -> tuple[Path, float]:
    """(the artifact, seconds that it took to compile; 0 where it was there)."""
    weights, numerics, target = OURS[name]
    path = folder / f"{Path(source).name}-{name}" / f"{name}.mpq"
    if path.exists():
        return path, 0.0
    path.parent.mkdir(parents=True, exist_ok=True)
    model = denoiser.load(source)
    chosen: dict[str, Any] = {"pipeline": PIPELINE.format(weights, numerics), "jobs": jobs, "target": target}
    if not model.conditioning.possible:  # no text encoder: random conditions, as the peers get
        chosen["calibration"] = folder / f"{Path(source).name}.safetensors"
        if not chosen["calibration"].exists():
            from safetensors.torch import save_file

            inputs = model.random_inputs(44, 0)  # every fourth but the last is kept to judge by
            inputs["timestep"] = torch.linspace(999, 1, 44).round().to(inputs["timestep"].dtype)
            save_file({n: t.contiguous() for n, t in inputs.items()}, chosen["calibration"])
    start = time.perf_counter()
    compile.compile(model, path, **chosen)
    return path, time.perf_counter() - start


def measure(
    name: str, folder: Path, chosen: list[str], runs: int, rounds: int, against: list[str], jobs: int
) -> dict[str, Any]:
    """The document of a model: the artifacts that are chosen, every run, and the ratios."""
    source = save(name, folder)
    paths, seconds = [], {}
    for ours in chosen:
        target = OURS[ours][2]
        if target == targets.resolve("native").name or targets.missing_features(targets.resolve(target)):
            continue  # is there, or does not run here
        path, seconds[ours] = compiled(source, ours, folder, jobs)
        paths.append(path)
    found = []
    for _ in range(runs):
        found.append(bench(paths, against, source, rounds=rounds, progress=terminal.progress))
        show(found[-1], kernels=False)
        against = [row["name"] for row in found[-1]["rows"] if not row["name"].startswith("mpq")]
    return {"model": name, "compile_s": seconds, "runs": found, **summary(found)}


def summary(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """What the issue of all runs is."""
    names = [row["name"] for row in runs[0]["rows"]]
    rows = {name: [next(r for r in run["rows"] if r["name"] == name) for run in runs] for name in names}

    def ratio(slow: str, fast: str) -> float:
        return round(statistics.median(row["speedup"][slow] for row in rows[fast]), 3)

    speedup = {name: ratio(name, "mpq") for name in names if name != "mpq"}
    eights = [name for name in INT8 if name in rows]
    best = min(eights, key=speedup.__getitem__, default=None)
    four, fast = "mpq w4a8" in rows, "mpq w8a8-fast" in rows
    return {
        "ms": {name: round(statistics.median(row["ms"] for row in rows[name]), 4) for name in names},
        "sqnr_db": {name: rows[name][0]["sqnr_db"] for name in names},
        "bytes": {name: rows[name][0]["bytes"] for name in names},
        "speedup": speedup,
        "best_int8": best and {"name": best, "speedup": speedup[best]},
        "w4a8_against_w8a8": ratio("mpq", "mpq w4a8") if four else None,
        "w4a8_bytes_against_int8": (
            round(rows["mpq w4a8"][0]["bytes"] / rows[best][0]["bytes"], 3) if best and four else None
        ),
        "fast_against_portable": ratio("mpq", "mpq w8a8-fast") if fast else None,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--ours", nargs="+", choices=OURS, default=list(OURS), help="artifacts, w8a8 first")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--jobs", type=int, default=2, help="to compile with")
    parser.add_argument("--against", default="torch,onnxruntime,openvino")
    parser.add_argument("--folder", type=Path, help="for models and artifacts, kept between calls (default: temporary)")
    parser.add_argument("--json", type=Path, default=RESULTS, help="where results go; those of other models stay")
    options = parser.parse_args()
    if options.ours[0] != next(iter(OURS)):
        parser.error(f"--ours begins with {next(iter(OURS))}, which peers are held against")
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        for name in options.model:
            against = options.against.split(",")
            row = measure(name, folder, options.ours, options.runs, options.rounds, against, options.jobs)
            told = {key: row[key] for key in ("best_int8", "w4a8_against_w8a8", "fast_against_portable", "compile_s")}
            print(f"{name}: {json.dumps(told)}", flush=True)
            known = json.loads(options.json.read_text()) if options.json.exists() else {}
            models = {m["model"]: m for m in known.get("models", ())} | {name: row}
            document = {**provenance(), "models": [models[n] for n in MODELS if n in models]}
            options.json.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
