"""Benchmark results as tables."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mpq_compiler.bench.baselines import JUDGED
from mpq_compiler.bench.subject import OURS, REUSING
from mpq_compiler.support import terminal
from mpq_compiler.support.legend import legend

SHOWN = 20
"""Layers that are told of, of those that would be faster otherwise."""


def show(found: Mapping[str, Any], kernels: bool, sort: str | None = None, top: int | None = None) -> None:
    """Prints the result, and all ``kernels`` or the ``top`` ones, in the order of a value or in that of the program."""
    ours = found["rows"][0]
    clock = "CPU" if found["clock"] == "cpu" else "wall"
    terminal.table(
        f"{found['cpu']}: batch {found['batch']}, {found['threads']} thread(s), {found['rounds']} rounds, {clock} time",
        ("", "ms", "least", "most", "stored", "peak memory", "SQNR", f"against {ours['name']}", "80 % within"),
        [
            (
                row["name"],
                *(f"{row[key]:.3f}" for key in ("ms", "ms_min", "ms_max")),
                "" if row["bytes"] is None else terminal.size(row["bytes"]),
                "" if row["peak_bytes"] is None else terminal.size(row["peak_bytes"]),
                "" if row["sqnr_db"] is None else f"{row['sqnr_db']:.1f} dB",
                "" if row is ours else f"{ours['speedup'][row['name']]:.2f} x",
                "" if row is ours else "{:.2f} .. {:.2f}".format(*ours["spread"][row["name"]]),
            )
            for row in found["rows"]
        ],
        numeric=range(1, 8),
    )
    if any(row["name"] == REUSING for row in found["rows"]):
        terminal.say(
            f"'{OURS}' computes everything in every call; '{REUSING}' knows what depends on timesteps and texts alone, "
            "as a sampler does from its second image on (of texts: from the second step on)"
        )
    if any(row["sqnr_db"] is not None for row in found["rows"]):
        samples, steps = JUDGED
        terminal.say(f"SQNR: of calls along {samples} trajectories of {steps} steps that nobody was calibrated on")
    for name, reason in found["skipped"].items():
        terminal.say(f"skipped {name}: {reason}")
    peak = found["peak"]
    if peak["gmacs"]:
        reached = ""
        if peak["reached"]:
            reached = f"; the model runs at {peak['model_gmacs']:.0f}, {100 * peak['reached']:.0f} % of it"
        terminal.say(
            f"one core does {peak['gmacs']:.0f} GMAC/s of 8-bit integers and {peak['float_gmacs']:.0f} of f32 at most, "
            f"and copies {peak['gbytes']:.1f} GB/s{reached}"
        )
    elif peak["reason"]:
        terminal.note(f"no peak: {peak['reason']}")
    if found["latency"] is not None:
        _show_latency(found["latency"])
    if kernels:
        _show_kernels(found["kernels"], sort, top)


def _show_latency(found: Mapping[str, Any]) -> None:
    beyond = f"; the table lacks {found['missing']} of the kernel calls" if found["missing"] else ""
    terminal.say(
        f"predicted {found['predicted_ms']:.4g} ms, measured {found['measured_ms']:.4g} ms: "
        f"{100 * found['error']:+.1f} %{beyond}"
    )
    if found["layers"] is None:
        return
    saved = sum(row["ms"] - row["best_ms"] for row in found["layers"])
    terminal.table(
        f"layers that would be faster with other weights, by {saved:.4f} ms in all",
        ("layer", "weights", "ms", "faster with", "ms", "saves"),
        [
            (
                row["layer"].removesuffix(".weight"),
                row["weights"],
                f"{row['ms']:.4f}",
                row["best"],
                f"{row['best_ms']:.4f}",
                f"{100 * (1 - row['best_ms'] / row['ms']):.1f} %",
            )
            for row in found["layers"][:SHOWN]
        ],
        numeric=(2, 4, 5),
    )


def _show_kernels(rows: Sequence[terminal.Row], sort: str | None, top: int | None) -> None:
    families: dict[str, list[float]] = {}
    for row in rows:
        families.setdefault(row["template"], []).append(row["ms"])
    parts: dict[str, list[float]] = {}
    for row in rows:
        parts.setdefault(row["part"], []).append(row["ms"])
    total = sum(row["ms"] for row in rows)
    shown = terminal.arranged(rows, sort, top)
    terminal.table(
        "kernels" + (f", {len(shown)} of {len(rows)}" if len(shown) < len(rows) else ""),
        ("layer or node", "kernel", "weights", "ms", "share", "operands", "GMAC/s", "of the peak"),
        [
            (
                (row["layer"] or row["node"]).removesuffix(".weight"),
                row["template"],
                row["weights"] or "",
                f"{row['ms']:.4f}",
                f"{100 * row['share']:.1f} %",
                terminal.size(row["bytes"]),
                "" if row["gmacs"] is None else f"{row['gmacs']:.1f}",
                "" if row["reached"] is None else f"{100 * row['reached']:.0f} %",
            )
            for row in shown
        ],
        numeric=range(3, 8),
    )
    if said := legend([row["weights"] or "" for row in shown], terminal.output.width):
        terminal.say(said)
    terminal.table(
        f"families, {total:.3f} ms in all",
        ("kernel", "calls", "ms", "share"),
        [
            (name, len(times), f"{sum(times):.4f}", f"{100 * sum(times) / total:.1f} %")
            for name, times in sorted(families.items(), key=lambda item: -sum(item[1]))
        ],
        numeric=(1, 2, 3),
    )
    if len(parts) > 1:
        terminal.table(
            "what is computed in every step, and what once for each timestep or text",
            ("part", "calls", "ms", "share"),
            [
                (name, len(times), f"{sum(times):.4f}", f"{100 * sum(times) / total:.1f} %")
                for name, times in parts.items()
            ],
            numeric=(1, 2, 3),
        )
