"""Measures latency tables on a device."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from typing import Any

from mpq_compiler.artifact import bundle
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.latency import measure
from mpq_compiler.latency.table import Table
from mpq_compiler.runtime.rpc import CPU, KERNEL, ROUNDS, TIMES, Device, function_for, run_program, send_plans
from mpq_compiler.support.execution import tracked


def measured(
    plans: Sequence[Artifact],
    address: str,
    batch: int = 1,
    threads: int = 1,
    progress: Any = None,
    seconds: float | None = None,
) -> Table:
    """Measures the latency table of artifacts on a device.

    Args:
        plans: artifacts of one target with C programs.
        address: HOST:PORT of `mpq_rpc` on the device.
        batch: samples of a call.
        threads: threads of a call.
        progress: opens a progress bar, or None.
        seconds: the least duration, by default `measure.SECONDS`; there are at least `ROUNDS` rounds.

    Raises:
        UserError: no C program, no function for the batch, artifacts of different targets, or a refusal of the device.
    """
    measure.require_one_target(plan.manifest for plan in plans)
    functions = [function_for(plan, batch) for plan in plans]
    problems = [_problems(plan) for plan in plans]
    runs: list[measure.Runs] = []
    with Device(address) as device:
        send_plans(device, plans, progress)
        end = time.monotonic() + (measure.SECONDS if seconds is None else seconds)
        rounds = 0
        with tracked(progress, "measuring kernels", ROUNDS) as advance:
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
    """The work that each kernel of an artifact computes, by the kernel's name."""
    rows = json.loads(plan.file(bundle.SCHEDULE).read_text(encoding="utf-8"))
    return {row["kernel"]: row["problem"] for row in rows}
