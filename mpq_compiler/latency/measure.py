"""Measures latency tables: artifacts run whole, in turns, and each kernel call is timed in place.

`measured` does so on this machine, `remote.measured` on a device. Nothing here imports torch.
"""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import numpy as np

from mpq_compiler.latency import timing
from mpq_compiler.latency.table import Table, timed_as
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import tracked
from mpq_compiler.support.host import cpu

ROUNDS = 25
"""The fewest rounds of a measurement; every artifact takes one turn a round."""
SECONDS = 6.0
"""The least duration of a measurement in seconds, since disturbances of a machine come and go within seconds."""
QUANTILE = 0.25
"""The quantile of the times of all rounds that counts; it is low because disturbances only ever add time."""


@dataclass
class Runs:
    """The measurements of one artifact."""

    manifest: Mapping[str, Any]
    kernels: Sequence[str]
    """What each kernel call of a run computes, in order."""
    calls: list[Sequence[float]] = field(default_factory=list)
    """Microseconds of each kernel call, by round."""
    whole: list[float] = field(default_factory=list)
    """Microseconds of the whole run, by round."""


def table(runs: Sequence[Runs], cpu: str, threads: int, batch: int) -> Table:
    """Makes the latency table of artifacts that took turns on a CPU, with ``threads`` and samples a call."""
    times: dict[str, list[float]] = {}
    beyond = []
    for own in runs:
        spent = np.quantile(np.array(own.calls), QUANTILE, axis=0)
        beyond.append((np.quantile(own.whole, QUANTILE) - spent.sum()) / len(own.kernels))
        for kernel, site in zip(own.kernels, spent, strict=True):
            times.setdefault(timed_as(kernel), []).append(float(site))
    return Table(
        target=runs[0].manifest["target"]["name"],
        cpu=cpu,
        threads=threads,
        batch=batch,
        call_us=statistics.fmean(map(float, beyond)),
        kernels={kernel: statistics.fmean(found) for kernel, found in sorted(times.items())},
        models=tuple(dict.fromkeys(own.manifest["name"] for own in runs)),
        versions=versions(),
    )


def require_one_target(manifests: Iterable[Mapping[str, Any]]) -> None:
    """Raises a UserError where artifacts are of different targets."""
    target, *others = dict.fromkeys(manifest["target"]["name"] for manifest in manifests)
    if others:
        raise UserError(f"one table holds for one target, and the artifacts are for {target} and {others[0]}")


def versions() -> dict[str, str]:
    """The versions of this package and TVM, where they are installed: a device may have TVM's runtime library alone."""
    found = {}
    for name in ("mpq-compiler", "apache-tvm"):
        with suppress(PackageNotFoundError):
            found[name] = version(name)
    return found


def measured(
    loaded: Sequence[CompiledDenoiser],
    batch: int = 1,
    threads: int = 1,
    progress: Any = None,
    seconds: float | None = None,
) -> Table:
    """Measures the latency table of artifacts on this machine.

    One thread is measured by its CPU time, which excludes other processes; several are measured by the wall clock.

    Args:
        loaded: artifacts of one target, loaded with ``threads`` and ``reuse_bytes=0``.
        batch: samples of a call.
        threads: threads of a call.
        progress: opens a progress bar, or None.
        seconds: the least duration, by default `SECONDS`; there are at least `ROUNDS` rounds.

    Raises:
        UserError: no kernels to time, no function for the batch, or artifacts of different targets.
    """
    require_one_target(compiled.manifest for compiled in loaded)
    runs = [Runs(compiled.manifest, _kernels(compiled, batch)) for compiled in loaded]
    inputs = [timing.random_inputs(compiled.manifest, batch) for compiled in loaded]
    calls = [functools.partial(compiled.run, given) for compiled, given in zip(loaded, inputs, strict=True)]
    repeats = [max(timing.repeats(call) for _ in range(3)) for call in calls]  # a call that was disturbed takes longer
    clock, column = ("cpu", 0) if threads == 1 else ("wall", 1)
    whole = [timing.Times() for _ in loaded]
    end = time.monotonic() + (SECONDS if seconds is None else seconds)
    with tracked(progress, "measuring kernels", ROUNDS) as advance:
        while len(runs[0].calls) < ROUNDS or time.monotonic() < end:
            for index, call in enumerate(calls):
                call()  # finds the caches as another artifact left them
                timing.turn(call, repeats[index], whole[index])
                runs[index].calls.append([1e6 * row[column] for row in _seconds(loaded[index], inputs[index])])
            advance(len(runs[0].calls) <= ROUNDS)
    for own, times in zip(runs, whole, strict=True):
        own.whole.extend(1e6 * seconds for seconds in times.of(clock))
    return table(runs, cpu(), threads, batch)


def _seconds(compiled: CompiledDenoiser, inputs: timing.Arrays) -> list[tuple[float, float]]:
    """The CPU seconds and elapsed seconds of each kernel call of a run."""
    return [(used, wall) for _, used, wall, _ in timing.profile(compiled, inputs)]


def _kernels(compiled: CompiledDenoiser, batch: int) -> list[str]:
    """What each kernel call of a run computes, in order. UserError: there is nothing to time."""
    timing.require_timed_kernels(compiled, batch)
    return problems(timing.kernel_calls(compiled), compiled)


def problems(rows: Sequence[Mapping[str, Any]], compiled: CompiledDenoiser) -> list[str]:
    """What the kernel calls of a schedule compute. UserError: an older artifact, which does not say so."""
    if any("problem" not in row for row in rows):
        raise UserError(f"{compiled.artifact.path} does not say what its kernels compute: compile it again")
    return [row["problem"] for row in rows]
