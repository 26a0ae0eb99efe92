"""Times of kernels measured on a device."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.latency import measure
from mpq_compiler.latency.table import Table
from mpq_compiler.runtime.rpc import CPU, KERNEL, ROUNDS, TIMES, Device, function_for, run_program, send_plans


def measured(
    plans: Sequence[Artifact],
    address: str,
    batch: int = 1,
    threads: int = 1,
    progress: Any = None,
    seconds: float | None = None,
) -> Table:
    """The latency table of artifacts of one target with C programs, measured on a device.

    seconds: to go on for, after `ROUNDS` rounds; by default as `measure.measured` does on this machine.
    UserError: no C program, or no function for the batch; artifacts of different targets; what the device says.
    """
    measure.require_one_target(plan.manifest for plan in plans)
    functions = [function_for(plan, batch) for plan in plans]
    problems = [_problems(plan) for plan in plans]
    runs: list[measure.Runs] = []
    with Device(address) as device:
        send_plans(device, plans, progress)
        end = time.monotonic() + (measure.SECONDS if seconds is None else seconds)
        rounds = 0
        with progress("measuring kernels", ROUNDS) if progress else nullcontext(lambda n: None) as advance:
            while rounds < ROUNDS or time.monotonic() < end:
                for number, plan in enumerate(plans):
                    printed = run_program(device, number, plan, functions[number], threads, "--profile", "kernels")
                    rows = KERNEL.findall(printed)
                    if len(runs) == number:
                        runs.append(measure.Runs(plan.manifest, [problems[number][name] for _, name in rows]))
                    runs[number].calls.append([float(spent) for spent, _ in rows])
                    runs[number].whole.append(1e3 * float(TIMES.findall(printed)[0][0]))
                rounds += 1
                advance(rounds <= ROUNDS)
    return measure.table(runs, CPU.findall(printed)[0].strip(), threads, batch)


def _problems(plan: Artifact) -> dict[str, str]:
    """What the kernels compute, by their names."""
    rows = json.loads(plan.file(bundle.SCHEDULE).read_text(encoding="utf-8"))
    return {row["kernel"]: row["problem"] for row in rows}
