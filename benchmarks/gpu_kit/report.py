"""Tables of what the kit has found on a GPU, for a document.

    python -m benchmarks.gpu_kit.report benchmarks/results/gpu-h200 docs/targets.md
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import documents
from benchmarks.gpu_kit.there import bits

NAME = "gpu"
HALF, INT8, FP8, SDPA = "torch fp16", "torch int8 (_int_mm)", "torch fp8 (_scaled_mm)", "torch SDPA fp16"
GRAPH, COMPILED = "torch fp16, CUDA graph", "torch.compile fp16, CUDA graphs"


def text(folder: Path) -> str:
    """All tables, each below a sentence that says what it is of."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))}
    parts = [_bits(found["bits"]), *_sanitizers(found.get("sanitizers")), _ceilings(found["tables"])]
    parts += [_layers(found["tables"]), _others(found["tables"]), _whole(found["whole"])]
    if "counters" in found:
        parts.append(_counters(found["counters"]))
    return "\n\n".join(parts)


def _bits(found: Mapping[str, Any]) -> str:
    calls = [call for own in found["libraries"].values() for call in own]
    wrong = sum(not bits.right(call) for call in calls)
    exact = sum(not call.get("crashed") and call["off"] == 0 for call in calls)
    off = max(call["off"] for call in calls if not call.get("crashed"))
    return (
        f"{found['gpu']}: of {len(calls)} calls of kernels, each made twice in poisoned memory, {exact} have the "
        f"emulator's bits, the others, whose floats tensor cores add up, are {off:.0e} off at most; {wrong} are wrong."
    )


def _sanitizers(found: Mapping[str, Any] | None) -> list[str]:
    if found is None:
        return []
    tools = [f"{tool} {'found nothing' if not own['code'] else 'DID NOT PASS'}" for tool, own in found.items()
             if isinstance(own, dict)]  # fmt: skip
    return [f"compute-sanitizer over the same calls: {', '.join(tools)}."]


def _ceilings(found: Mapping[str, Any]) -> str:
    most = ", ".join(f"{name} {value:.0f}" if value > 10 else f"{name} {value:.1f}"
                     for name, value in found["ceilings"].items())  # fmt: skip
    return f"What this GPU does at most, products of 8192 x 8192 x 8192: {most} (torch {found['torch']})."


def _times(row: Mapping[str, Any]) -> dict[str, float]:
    return {one["name"]: one["us"] for one in row["rows"]}


def _of(times: Mapping[str, float], name: str) -> str:
    return f"{times[name]:.1f}" if name in times else ""


def _ratio(times: Mapping[str, float], other: str, own: str) -> str:
    return f"{times[other] / times[own]:.2f} x" if other in times and own in times else ""


def _layers(found: Mapping[str, Any]) -> str:
    """Two samples, as guidance calls a denoiser."""
    headers = ["microseconds, batch 2", "W8A8", "W4A8", "W4A16", "fp16", "int8", "fp8"]
    headers += ["W8A8 to fp16", "to int8", "W4A8 to W8A8"]
    lines = []
    for name, row in found["cases"].items():
        times = _times(row)
        if name.endswith("batch 2") and "W8A8" in times:
            own = [_of(times, each) for each in ("W8A8", "W4A8", "W4A16", HALF, INT8, FP8)]
            ratios = [_ratio(times, HALF, "W8A8"), _ratio(times, INT8, "W8A8"), _ratio(times, "W8A8", "W4A8")]
            lines.append([name.removesuffix(", batch 2"), *own, *ratios])
    return documents.table(headers, lines)


def _others(found: Mapping[str, Any]) -> str:
    lines = []
    for name, row in found["cases"].items():
        times = _times(row)
        ours = next((each for each in ("attention bf16", "norm, codes") if each in times), None)
        if name.endswith("batch 2") and ours:
            peer = SDPA if SDPA in times else HALF
            own = [_of(times, ours), _of(times, peer), _ratio(times, peer, ours)]
            lines.append([name.removesuffix(", batch 2"), *own])
    return documents.table(["microseconds, batch 2", "ours", "torch fp16", "ratio"], lines)


def _whole(found: Mapping[str, Any]) -> str:
    headers = ["milliseconds of a call", "W8A8", "W4A8", "fp16", "graph", "compile", "W8A8 to graph", "to compile"]
    lines = []
    for name, row in found.items():
        if not isinstance(row, dict) or "rows" not in row:
            continue
        times = {each: us / 1e3 for each, us in _times(row).items()}
        own = [f"{times[each]:.2f}" if each in times else "" for each in ("W8A8", "W4A8", HALF, GRAPH, COMPILED)]
        lines.append([name, *own, _ratio(times, GRAPH, "W8A8"), _ratio(times, COMPILED, "W8A8")])
    return documents.table(headers, lines)


def _counters(found: Mapping[str, Any]) -> str:
    wanted = {
        "tensor pipe": "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
        "integer pipe": "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
        "shared memory": "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
        "L2": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
        "warps": "sm__warps_active.avg.pct_of_peak_sustained_active",
    }
    lines = []
    for name, figures in found.items():
        if isinstance(figures, dict) and "failed" not in figures:
            lines.append([name, *(f"{_figure(figures, metric):.0f} %" for metric in wanted.values())])
    return documents.table(["busy, of the peak (ncu)", *wanted], lines)


def _figure(figures: Mapping[str, float], metric: str) -> float:
    return next((value for name, value in figures.items() if name.startswith(metric)), float("nan"))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="the results of all steps on one machine")
    parser.add_argument("document", type=Path, help="where the tables go, between the marks of `gpu`")
    options = parser.parse_args(arguments)
    documents.insert(options.document, NAME, text(options.folder))


if __name__ == "__main__":
    main()
