"""Step 4: what NVIDIA's ncu counts of some kernels: pipes, shared memory, caches, and what warps wait for."""

from __future__ import annotations

import csv
import io
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

from . import machine, tables

SECTIONS = ("SpeedOfLight", "ComputeWorkloadAnalysis", "MemoryWorkloadAnalysis", "Occupancy", "WarpStateStats")
METRICS = (
    "sm__inst_executed_pipe_alu.avg.pct_of_peak_sustained_active",
    "sm__pipe_alu_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_tensor_cycles_active.avg.pct_of_peak_sustained_active",
    "sm__pipe_shared_cycles_active.avg.pct_of_peak_sustained_active",
    "l1tex__data_pipe_lsu_wavefronts_mem_shared.avg.pct_of_peak_sustained_elapsed",
    "l1tex__data_bank_conflicts_pipe_lsu.sum",
    *(
        f"smsp__average_warps_issue_stalled_{reason}_per_issue_active.ratio"
        for reason in ("barrier", "long_scoreboard", "short_scoreboard", "math_pipe_throttle", "mio_throttle",
                       "membar", "gmma", "wait", "lg_throttle", "not_selected", "dispatch_stall", "no_instruction")
    ),
)  # fmt: skip
KEPT = ("gpu__time_duration.sum", "launch__registers", "launch__occupancy_limit", "launch__grid_size",
        "launch__shared_mem_per_block_static", "lts__throughput.avg.pct", "dram__throughput.avg.pct",
        "l1tex__throughput.avg.pct", "sm__throughput.avg.pct", "sm__warps_active.avg.pct",
        "sm__inst_issued.avg.per_cycle_active", "sm__inst_executed_pipe_alu.avg", "sm__inst_executed_pipe_fma.avg",
        "sm__inst_executed_pipe_xu.avg", "sm__inst_executed_pipe_lsu.avg", *METRICS)  # fmt: skip
"""Of what the sections count, by the beginnings of names."""
PATIENCE = 60
"""Seconds of one kernel."""


def run(out: Path) -> list[str]:
    """Writes `counters.json`; returns what is wrong."""
    if (program := machine.tool("ncu", "nothing is counted")) is None:
        return []
    path = out / "counters.json"
    found: dict[str, Any] = json.loads(path.read_text()) if path.exists() else {}
    level, failed = machine.facts()["level"], []
    for case in tables.cases():
        for name in case["counted"] if case["level"] == level else ():
            key = f"{case['name']}, {name}"
            if key in found:
                continue
            kernel = case["ours"][name]["kernels"][-1][0]
            child = [sys.executable, str(machine.HERE / "run.py"), "--child", "launch", case["name"], name]
            options = ["--clock-control", "none", "--csv", "--page", "raw", "--metrics", ",".join(METRICS)]
            options += [word for section in SECTIONS for word in ("--section", section)]
            options += ["-k", f"{kernel}_kernel", "--launch-skip", "2", "--launch-count", "1"]
            try:
                done = subprocess.run(
                    [program, *options, *child], capture_output=True, text=True, timeout=PATIENCE, check=False
                )
                found[key] = _counted(done.stdout) or {"failed": (done.stdout + done.stderr)[-500:]}
            except subprocess.TimeoutExpired:
                found[key] = {"failed": f"not done after {PATIENCE} s"}
            if "failed" in found[key]:
                failed.append(f"{key}: {found[key]['failed']}")
            machine.say(f"{key}: {len(found[key])} figures")
            machine.write(path, found)
    return failed


def _counted(text: str) -> dict[str, float]:
    """The figures of ncu's table, each with its unit."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    rows = list(csv.reader(io.StringIO("\n".join(lines))))
    if len(rows) < 3:
        return {}
    found = {}
    for name, unit, value in zip(*rows[:3], strict=False):
        if not name.startswith(KEPT):
            continue
        try:
            found[f"{name} [{unit}]" if unit else name] = float(value.replace(",", ""))
        except ValueError:
            continue
    return found


def child(case_name: str, name: str) -> None:
    """Launches a contestant several times."""
    (case,) = (case for case in tables.cases() if case["name"] == case_name)
    library = machine.load().load_module(str(machine.HERE / "tables" / case["library"]))
    with np.load(machine.HERE / "tables" / case["arrays"]) as stored:
        make, _ = tables.contestant(case["ours"][name], library, stored)
    calls = [make()[0] for _ in range(4)]
    for call in calls:
        call()
    machine.Device().synchronize()
