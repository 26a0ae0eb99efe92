"""Times as rows of the result (schemas/bench.json): whole calls, and kernel by kernel."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from mpq_compiler.bench.subject import Subject
from mpq_compiler.latency.table import format_of
from mpq_compiler.latency.timing import Times, kernel_calls
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser


def rows(
    entries: Sequence[Subject],
    times: Mapping[str, Times],
    clock: str,
    memory: Mapping[str, int | None],
    quality: Mapping[str, float],
) -> list[dict[str, Any]]:
    """A row for each: its times by the clock, its ratios to the others within each round, peak bytes and SQNR."""
    found = []
    for entry in entries:
        own = times[entry.name].of(clock)
        ratios = {
            other.name: [b / a for a, b in zip(own, times[other.name].of(clock), strict=True)]
            for other in entries
            if other.name != entry.name
        }
        found.append(
            {
                "name": entry.name,
                "ms": 1e3 * statistics.median(own),
                "ms_min": 1e3 * min(own),
                "ms_max": 1e3 * max(own),
                "cpu_ms": 1e3 * statistics.median(times[entry.name].cpu),
                "wall_ms": 1e3 * statistics.median(times[entry.name].wall),
                "bytes": entry.bytes,
                "peak_bytes": memory.get(entry.name),
                "speedup": {name: statistics.median(values) for name, values in ratios.items()},
                "spread": {name: middle(values) for name, values in ratios.items()},
                "sqnr_db": quality.get(entry.name),
            }
        )
    return found


def middle(values: Sequence[float]) -> list[float]:
    """The range of the middle eight tenths of values."""
    return [float(np.quantile(values, q)) for q in (0.1, 0.9)]


def kernel_rows(
    compiled: CompiledDenoiser, profiles: Sequence[Sequence[Any]], batch: int, clock: str, peak: float | None
) -> list[dict[str, Any]]:
    """A row for each kernel call of the profiles, in order: its time, operands and rate, and the share of the peak."""
    column = 1 if clock == "cpu" else 2
    rows = []
    for index, call in enumerate(kernel_calls(compiled)):
        times = [run[index][column] for run in profiles]
        seconds, macs = statistics.median(times), call["macs"] * batch
        gmacs = macs / max(seconds, 1e-9) / 1e9 if macs else None
        rows.append(
            {
                **{key: call[key] for key in ("node", "layer", "kernel", "template")},
                "part": call.get("part", "step"),
                "weights": format_of(call.get("problem", "")),
                "ms": 1e3 * seconds,
                "ms_min": 1e3 * min(times),
                "ms_max": 1e3 * max(times),
                "bytes": profiles[0][index][3],
                "macs": macs,
                "gmacs": gmacs,
                "reached": None if gmacs is None or peak is None else gmacs / peak,
            }
        )
    total = sum(row["ms"] for row in rows)
    return [{**row, "share": row["ms"] / total if total else 0.0} for row in rows]
