"""Compiles a denoiser to an artifact: the steps of a compilation, in order."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

from mpq_compiler.artifact import bundle, signature
from mpq_compiler.artifact.manifest import Manifest
from mpq_compiler.driver import manifest, report
from mpq_compiler.driver.check import check
from mpq_compiler.driver.estimate import Estimate, Workload, fit_jobs, for_report, foreseen
from mpq_compiler.driver.judge import Judge
from mpq_compiler.driver.kinds import other_kinds
from mpq_compiler.driver.lower import Lowering, halves, load_denoiser, lower
from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.driver.report import Report
from mpq_compiler.driver.resolve import resolve
from mpq_compiler.driver.specialize import added_bytes, other_sizes
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import costs, reuse
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.ir.lora import branch_bytes
from mpq_compiler.ir.parcels import SHIPPING
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.ir.stored_tensors import expanded_bytes
from mpq_compiler.pipeline.backend import Backend, BuildRequest, Built, Progress, backend_of
from mpq_compiler.pipeline.manager import Record, recorded
from mpq_compiler.pipeline.stages import StageInstrument
from mpq_compiler.support.cluster import connected
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import RunContext
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.table import Target


def compile_denoiser(
    model: str | Path | Denoiser,
    output: str | Path,
    progress: Progress | None = None,
    planned: Callable[[Estimate, str | None], None] | None = None,
    **options: Any,
) -> Report:
    """Compiles a model to an artifact.

    Args:
        model: a folder, a hub id, a bundled name, or a denoiser in memory (`frontend.denoiser`).
        output: a folder, or a file ending in ``.zip``.
        progress: opens progress bars (`RunContext.progress`), or None.
        planned: is called before anything is measured, with the estimate (of time where that is minutes), and with a
            sentence where the memory lowered the number of jobs.
        options: fields of `Options`.

    Raises:
        UserError: every input that cannot be compiled; nothing is left at ``output`` then.
    """
    chosen = Options(**options)
    check(chosen, output)
    target = targets.resolve(chosen.target)
    backend = backend_of(target)
    with connected(chosen.distributed, SHIPPING, chosen.jobs) as cluster, ExitStack() as stack:
        denoiser = load_denoiser(model, chosen)
        workers = stack.enter_context(backend.standby(chosen.jobs))
        _, rest = halves(resolve(chosen))
        lowered: str | None = None
        expected: Estimate | None = None

        def plan(program: Program) -> int:
            nonlocal chosen, workers, lowered, expected
            workload = Workload.of(program, rest, denoiser, chosen)
            jobs, lowered = fit_jobs(workload, chosen.jobs, chosen.memory_limit)
            expected = foreseen(workload, jobs)
            if planned is not None:
                planned(expected, lowered)
            if jobs < chosen.jobs:
                stack.close()
                workers = stack.enter_context(backend.standby(jobs))
                chosen = replace(chosen, jobs=jobs)
            return jobs

        lowering = lower(denoiser, chosen, progress, cluster=cluster, plan=plan).packed()
        standing = stack.pop_all()  # the cluster is not held while kernels are compiled
    after: list[Record] = []
    with standing, single_threaded():
        others = other_kinds(lowering, denoiser) or other_sizes(lowering.program, lowering.laid_out, chosen)
        batches, *_ = parse_shapes(chosen.shapes).values()
        steps = reuse.specializations(lowering.program, batches)
        if steps and denoiser.kinds:
            raise UserError("--reuse is decided for one kind of calls, and several were recorded: leave it out")
        with recorded("kernels", after, progress):
            built = _built(backend, lowering, target, chosen, [*others, *steps], workers, progress)
    notes = [lowered] if lowered is not None else []
    with single_threaded():
        target = targets.with_features(target, built.features)
        stored = costs.stored_bytes(lowering.planned) + added_bytes(lowering.program, others)
        stored += branch_bytes(lowering.program)
        if not any("coding" in entry for entry in built.entries) and (more := expanded_bytes(lowering.program)):
            stored += more
            lowering.program.note(
                f"'{target.name}' does not decode entropy-coded weights: their codes are stored packed, which takes "
                f"{more} bytes more than the plan says"
            )
        predicted = report.predicted_latency(lowering.latency, lowering.program, built.facts)
        with recorded("judging", after, progress):
            judge = Judge(denoiser, lowering, chosen, RunContext(jobs=chosen.jobs, progress=progress))

            def written(built: Built, tried: Callable[[Path], None] | None = None) -> Manifest:
                document = manifest.describe(denoiser, lowering, built, chosen, target, predicted)
                document["quality"] = judge.reference_quality()
                files = manifest.files(denoiser, lowering, built, chosen, target)
                if chosen.dumps is not None:
                    (chosen.dumps / bundle.DECISIONS).write_bytes(files[bundle.DECISIONS])
                return bundle.write(output, document, files, built.tensors, chosen.overwrite, tried)

            def refute(folder: Path) -> None:
                if wrong := judge.refuted(folder, target):
                    raise _Refuted(wrong)

            try:
                complete = written(built, refute if built.facts.get("from_cache") else None)
            except _Refuted as wrong:
                notes.append(f"kernels that the cache held were thrown away and compiled anew: {wrong}")
                built = _built(backend, lowering, target, chosen, [*others, *steps], None, progress, fresh=True)
                complete = written(built)
            assert complete["weights"]["payload_bytes"] == stored, "payload and plan differ"
            built.tensors.clear()  # the artifact maps its own, and prepares them in memory
            judged = judge.judged(output, target, others)
    lowering.forget()
    assert expected is not None
    told = for_report(expected, lowering.records)
    made = report.report(denoiser, lowering, built, chosen, target, complete, judged, predicted, after, told)
    made.notes[:0] = notes
    return made


class _Refuted(Exception):
    """What is wrong with kernels that the cache held."""


def _built(
    backend: Backend,
    lowering: Lowering,
    target: Target,
    options: Options,
    others: list[Specialization],
    workers: Any,
    progress: Progress | None,
    fresh: bool = False,
) -> Built:
    """Builds the packed program by the backend."""
    batches, *_ = parse_shapes(options.shapes).values()
    emit = "machine" if options.standalone else "c" if options.emit else None
    owner = "" if options.owner_key is None else signature.public_key(options.owner_key).hex()
    instruments: list[StageInstrument] = []
    if (dumps := lowering.dumps) is not None and not fresh:
        behind = len(lowering.passes)
        instruments.append(lambda index, stage, plan: dumps.write_stage(behind + index, stage, plan))
    request = BuildRequest(
        batches, others, options.jobs, workers, options.cache, progress, options.tune, emit, instruments, owner, fresh
    )
    return backend.build(lowering.program, target, request)
