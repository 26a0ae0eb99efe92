"""A latency table held against what was measured: its error, and the layers that another format would make faster."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mpq_compiler.latency import table as tables
from mpq_compiler.latency.table import Table
from mpq_compiler.latency.timing import kernel_calls, require_timed_kernels
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.host import cpu

GAIN = 0.02
"""Share of a layer's time from which on another format counts as faster: less is noise."""


def load_table(path: str | Path, subject: CompiledDenoiser, threads: int, batch: int) -> Table:
    """The table in a file. UserError: it does not hold for what is measured here."""
    table = tables.load(path)
    tables.require_of(table, subject.manifest["target"]["name"], cpu(), threads)
    if table.batch != batch:
        raise UserError(f"the latency table (--latency-table) is of batch {table.batch}: add --batch {table.batch}")
    require_timed_kernels(subject, batch)
    return table


def prediction(
    subject: CompiledDenoiser, table: Table | None, threads: int, batch: int, measured: float
) -> dict[str, Any] | None:
    """Predicted against measured time, by the table or by what the artifact was compiled with, and faster formats.

    measured: milliseconds of a call. None: neither a table nor the artifact says anything of this machine.
    """
    if table is None:
        known = subject.manifest.get("plan", {}).get("latency")
        if known is None or (known["cpu"], known["threads"], known["batch"]) != (cpu(), threads, batch):
            return None
        return _against(known["predicted_ms"], measured) | {"missing": known["missing"], "layers": None}
    rows = kernel_calls(subject)
    if any("problem" not in row for row in rows):
        raise UserError(f"{subject.artifact.path} does not say what its kernels compute: compile it again")
    found = tables.predict(table, [row["problem"] for row in rows])
    others = tables.others_of(table)
    layers = [layer for row in rows if (layer := faster(row, others)) is not None]
    layers.sort(key=lambda layer: layer["best_ms"] - layer["ms"])
    return _against(found.ms, measured) | {"missing": len(found.missing), "layers": layers}


def _against(predicted: float, measured: float) -> dict[str, Any]:
    return {"predicted_ms": predicted, "measured_ms": measured, "error": predicted / measured - 1}


def faster(row: Mapping[str, Any], others: Mapping[str, Mapping[str, float]]) -> dict[str, Any] | None:
    """A layer beside its fastest format in the table; None where none gains anything, or nothing is known."""
    times = others.get(tables.in_any_format(row["problem"]) or "", {})
    own = tables.format_of(row["problem"]) or ""
    if own not in times:
        return None
    best = min(times, key=times.__getitem__)
    if times[best] > times[own] * (1 - GAIN):
        return None
    layer = row["layer"] or row["node"]
    return {"layer": layer, "weights": own, "ms": times[own] / 1e3, "best": best, "best_ms": times[best] / 1e3}
