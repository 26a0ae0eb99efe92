"""`mpqc bench`: artifacts against torch, onnxruntime and OpenVINO on this machine, whole and kernel by kernel.

Everything that is compared takes turns, in rounds, so that what else the machine does meets all alike; ratios are
those within a round. The first artifact runs twice under two names: what that control differs by is noise. Artifacts
compute everything in every call, as peers do; what a sampler saves because timesteps and texts come again stands in a
row of its own, ``mpq reusing`` (docs/artifact.md). CPU time of the process is what counts on one thread, for it leaves
out what others do; with more threads it is the wall clock.

Without peers nothing here imports torch, and without TVM's compiler only the peaks of the machine are missing.
"""

from __future__ import annotations

import functools
import math
import statistics
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.artifact.signature import Key
from mpq_compiler.bench import baselines
from mpq_compiler.bench.memory import peak_memory
from mpq_compiler.bench.peak import peaks
from mpq_compiler.bench.prediction import load_table, prediction
from mpq_compiler.bench.rows import kernel_rows, rows
from mpq_compiler.bench.subject import CONTROL, OURS, REUSING, Subject, names_of, of_artifact
from mpq_compiler.evaluation.metrics import sqnr_db
from mpq_compiler.latency import timing
from mpq_compiler.latency.timing import Arrays, Times
from mpq_compiler.runtime import compiled_denoiser
from mpq_compiler.runtime.compiled_denoiser import CompiledDenoiser
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import require_counts, tracked
from mpq_compiler.support.host import cpu
from mpq_compiler.targets import nvidia


def bench(
    paths: Sequence[str | Path],
    against: Sequence[str] = (),
    model: str | None = None,
    threads: int = 1,
    batch: int = 1,
    rounds: int = 15,
    kernels: bool = False,
    memory: bool = True,
    progress: Any = None,
    latency_table: str | Path | None = None,
    key: Key | None = None,
) -> dict[str, Any]:
    """Measures artifacts of one model, and returns plain data (schemas/bench.json).

    Args:
        paths: the artifacts; the first is the one whose kernels are looked at.
        against: peers, or variants of them (`baselines.PEERS`).
        model: the float model that the peers run, where the artifact's is no bundled one.
        latency_table: a file of `mpqc latency`, to hold the first artifact against.
        key: the public key of whoever has to have signed the artifacts, as for `load`.

    UserError: fewer than one round, thread or sample, an unknown peer, an artifact that this machine cannot run, or
    that is of another model.
    """
    _require_possible(against, threads, batch, rounds)
    loaded = [compiled_denoiser.load(path, threads, reuse_bytes=0, key=key) for path in paths]
    first = loaded[0]
    table = None if latency_table is None else load_table(latency_table, first, threads, batch)
    inputs = timing.random_inputs(first.manifest, batch)
    ours = _artifacts(paths, loaded, inputs, threads, key)
    clock = _clock(paths[0], first, threads, against)
    source = baselines.source_of(model, first.manifest) if against else ""
    with tempfile.TemporaryDirectory(prefix="mpq-") as scratch, baselines.torch_threads(threads, bool(against)):
        others, skipped, float_model = baselines.variants(against, source, inputs, threads, Path(scratch), progress)
        machine = peaks(first.manifest)
        if kernels:
            timing.require_timed_kernels(first, batch)
        look = functools.partial(timing.profile, first, inputs) if kernels else None
        times, profiles = _take_turns([*ours, *others, *machine.loops], rounds, look, progress)
        peak_bytes = peak_memory([*ours, *others], batch, threads, key) if memory else {}
        judged = [*zip(names_of(paths), (c.run for c in loaded), strict=True), *((c.name, c.call) for c in others)]
        quality = _quality(float_model, judged)
    found = rows([*ours, *others], times, clock, peak_bytes, quality)
    peak = machine.figures(times, clock) | _reached(first, batch, times[OURS].of(clock), machine.figures(times, clock))
    return {
        "rows": found,
        "peak": peak,
        "rounds": rounds,
        "threads": threads,
        "batch": batch,
        "clock": clock,
        "cpu": cpu(),
        "skipped": skipped,
        "kernels": kernel_rows(first, profiles, batch, clock, peak["gmacs"]) if kernels else None,
        "latency": prediction(first, table, threads, batch, found[0]["ms"]),
    }


def _require_possible(against: Sequence[str], threads: int, batch: int, rounds: int) -> None:
    """UserError for what no artifact could be measured with."""
    baselines.chosen(against)
    require_counts(threads=threads, batch=batch, rounds=rounds)
    if against and batch > (most := math.prod(baselines.JUDGED)):
        raise UserError(f"--batch {batch} must be {most} or less with --against: quality is judged on {most} inputs")


def _artifacts(
    paths: Sequence[str | Path],
    loaded: Sequence[CompiledDenoiser],
    inputs: Arrays,
    threads: int,
    key: Key | None,
) -> list[Subject]:
    """The artifacts, after the first itself once more, and where it has parts that it may reuse, with their cache."""
    for path, other in zip(paths, loaded, strict=True):
        if other.input_names != loaded[0].input_names:
            raise UserError(f"'{path}' takes {', '.join(other.input_names)}, and the first artifact something else")
    first, *others = [
        of_artifact(path, compiled, inputs, name)
        for path, compiled, name in zip(paths, loaded, names_of(paths), strict=True)
    ]
    again = compiled_denoiser.load(paths[0], threads, reuse_bytes=0, key=key)
    found = [first, Subject(CONTROL, functools.partial(again.run, inputs))]
    if loaded[0].manifest.get("parts"):
        reusing = compiled_denoiser.load(paths[0], threads, key=key)
        found.append(Subject(REUSING, functools.partial(reusing.run, inputs)))
    return [*found, *others]


def _clock(path: str | Path, compiled: CompiledDenoiser, threads: int, against: Sequence[str]) -> str:
    """The clock that counts: "cpu", or "wall" for several threads and GPUs. UserError: peers beside a GPU."""
    on_gpu = nvidia.is_for(compiled.manifest)
    if on_gpu and against:
        raise UserError(f"peers run on the CPU, and {path} on a GPU; leave --against out")
    return "cpu" if threads == 1 and not on_gpu else "wall"


def _take_turns(
    subjects: Sequence[Subject], rounds: int, look: Callable[[], Any] | None, progress: Any
) -> tuple[dict[str, Times], list[Any]]:
    """Times of each in every round, and what ``look`` returned after each round."""
    calls = {subject.name: subject.call for subject in subjects}
    seen: list[Any] = []
    with tracked(progress, "benchmark", rounds) as advance:
        times = {name: Times() for name in calls}
        repeats = {name: timing.repeats(call) for name, call in calls.items()}
        for index in range(rounds):
            order = list(calls) if index % 2 == 0 else list(calls)[::-1]  # what drifts meets both directions
            for name in order:
                timing.turn(calls[name], repeats[name], times[name])
            if look is not None:
                seen.append(look())
            advance(1)
    return times, seen


def _quality(
    model: baselines.Model | None, judged: Sequence[tuple[str, Callable[[Arrays], np.ndarray]]]
) -> dict[str, float]:
    """SQNR in dB of each output against the float model's, if there is one, on inputs that none was calibrated on."""
    if model is None:
        return {}
    rows = model.recorded(*baselines.JUDGED, seed=1)
    exact = baselines.load("torch-fp32", model.source, model.inputs, 1, model.denoiser)
    expected = np.concatenate([exact(row) for row in rows])
    return {name: sqnr_db(expected, np.concatenate([call(row) for row in rows])) for name, call in judged}


def _reached(
    compiled: CompiledDenoiser, batch: int, seconds: Sequence[float], peak: Mapping[str, Any]
) -> dict[str, float | None]:
    """GMAC/s of whole calls, and their share of the peak; nothing where the artifact does not say what it computes."""
    macs = batch * sum(row["macs"] for row in timing.kernel_calls(compiled))
    if not macs:
        return {}
    rate = macs / statistics.median(seconds) / 1e9
    return {"model_gmacs": rate, "reached": rate / peak["gmacs"] if peak["gmacs"] else None}
