"""A latency table from artifacts: they run whole, in turns, and each kernel call is timed where it stands. No torch."""

from __future__ import annotations

import functools
import statistics
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from importlib.metadata import version
from typing import Any

from mpq_compiler import bench, contestants
from mpq_compiler.errors import UserError
from mpq_compiler.latency_table import Table, timed_as
from mpq_compiler.machine import cpu
from mpq_compiler.runtime import CompiledDenoiser

ROUNDS = 25
"""In which the artifacts take turns."""


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("mpq-compiler", "apache-tvm")}


def measured(
    loaded: Sequence[CompiledDenoiser], batch: int = 1, threads: int = 1, progress: Any = None, rounds: int = ROUNDS
) -> Table:
    """The table of artifacts of one target that were loaded with ``threads`` and ``reuse_bytes=0``.

    One thread is measured by its CPU time, which leaves out what others do; more by the wall clock. UserError: no
    kernels to time, none for the batch size, artifacts of different targets.
    """
    target, *others = dict.fromkeys(compiled.manifest["target"]["name"] for compiled in loaded)
    if others:
        raise UserError(f"one table holds for one target, and the artifacts are for {target} and {others[0]}")
    kernels = [_kernels(compiled, batch) for compiled in loaded]
    inputs = [contestants.random_inputs(compiled.manifest, batch) for compiled in loaded]
    calls = [functools.partial(compiled.run, given) for compiled, given in zip(loaded, inputs, strict=True)]
    repeats = [bench._repeats(call) for call in calls]
    clock, column = ("cpu", 0) if threads == 1 else ("wall", 1)
    sites: list[list[list[float]]] = [[[] for _ in own] for own in kernels]
    beyond: list[list[float]] = [[] for _ in loaded]
    with progress("measuring kernels", rounds) if progress else nullcontext(lambda n: None) as advance:
        for _ in range(rounds):
            for index, call in enumerate(calls):
                call()  # finds the caches as another artifact left them
                whole = bench.Times()
                bench._turn(call, repeats[index], whole)
                spent = [row[column] for row in _seconds(loaded[index], inputs[index])]
                for site, seconds in zip(sites[index], spent, strict=True):
                    site.append(seconds)
                beyond[index].append((whole.of(clock)[0] - sum(spent)) / len(spent))
            advance(1)
    times: dict[str, list[float]] = {}
    for own, found in zip(kernels, sites, strict=True):
        for kernel, site in zip(own, found, strict=True):
            times.setdefault(timed_as(kernel), []).append(1e6 * statistics.median(site))
    return Table(
        target=target,
        cpu=cpu(),
        threads=threads,
        batch=batch,
        call_us=1e6 * statistics.fmean(statistics.median(each) for each in beyond),
        kernels={kernel: statistics.fmean(found) for kernel, found in sorted(times.items())},
        models=tuple(dict.fromkeys(compiled.manifest["name"] for compiled in loaded)),
        versions=versions(),
    )


def _seconds(compiled: CompiledDenoiser, inputs: contestants.Arrays) -> list[tuple[float, float]]:
    """By CPU time and by the wall, of each kernel call of a run."""
    return [(used, wall) for _, used, wall, _ in bench.profile(compiled, inputs)]


def _kernels(compiled: CompiledDenoiser, batch: int) -> list[str]:
    """What the calls of a run compute, in order."""
    bench._require_kernels(compiled, batch)
    return problems(bench._schedule(compiled), compiled)


def problems(rows: Sequence[Mapping[str, Any]], compiled: CompiledDenoiser) -> list[str]:
    """What the kernels of a schedule compute. UserError: an artifact of before, which does not say so."""
    if any("problem" not in row for row in rows):
        raise UserError(f"{compiled.artifact.path} does not say what its kernels compute: compile it again")
    return [row["problem"] for row in rows]
