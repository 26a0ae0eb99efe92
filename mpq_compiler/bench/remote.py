"""Artifacts timed on a device."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.signature import Key
from mpq_compiler.bench.rows import middle
from mpq_compiler.bench.subject import CONTROL, names_of
from mpq_compiler.runtime.rpc import TIMES, Device, function_for, run_program, send_plans
from mpq_compiler.support.execution import require_counts, tracked


def bench(
    paths: Sequence[str | Path],
    address: str,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 15,
    progress: Any = None,
    key: Key | None = None,
) -> dict[str, Any]:
    """Times of artifacts with a C program on a device, in turns; plain data (schemas/bench.json).

    UserError: an artifact without a C program, or without a function for the batch; what the device says.
    """
    require_counts(threads=threads, batch=batch, rounds=rounds)
    opened = [bundle.read(path, key) for path in paths]
    functions = [function_for(each, batch) for each in opened]
    ours, *others = names_of(paths)
    turns = [(ours, 0), (CONTROL, 0), *((name, n) for n, name in enumerate(others, 1))]
    names = [name for name, _ in turns]
    times: dict[str, list[Mapping[str, float]]] = {name: [] for name in names}
    with Device(address) as device:
        send_plans(device, opened, progress)
        with tracked(progress, "benchmark", rounds) as advance:
            for _ in range(rounds):
                for name, number in turns:
                    printed = run_program(device, number, opened[number], functions[number], threads)
                    spent = map(float, TIMES.findall(printed)[0])
                    times[name].append(dict(zip(("median", "least", "most"), spent, strict=True)))
                advance(1)
    rows = []
    for name, number in turns:
        own = [row["median"] for row in times[name]]
        ratios = {
            other: [b["median"] / a for a, b in zip(own, times[other], strict=True)] for other in names if other != name
        }
        rows.append(
            {
                "name": name,
                "ms": statistics.median(own),
                "ms_min": min(row["least"] for row in times[name]),
                "ms_max": max(row["most"] for row in times[name]),
                "cpu_ms": None,
                "wall_ms": statistics.median(own),
                "bytes": opened[number].manifest["weights"]["payload_bytes"],
                "peak_bytes": None,
                "sqnr_db": None,
                "speedup": {other: statistics.median(values) for other, values in ratios.items()},
                "spread": {other: middle(values) for other, values in ratios.items()},
            }
        )
    return {
        "rows": rows,
        "peak": {
            **dict.fromkeys(("gmacs", "float_gmacs", "gbytes", "model_gmacs", "reached")),
            "reason": "on a device",
        },
        "rounds": rounds,
        "threads": threads,
        "batch": batch,
        "clock": "wall",
        "cpu": f"the device at {address}",
        "skipped": {},
        "kernels": None,
        "latency": None,
    }
