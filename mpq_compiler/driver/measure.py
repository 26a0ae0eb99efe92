"""Measuring without compiling: sensitivity tables and latency tables of a model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import fx

from mpq_compiler.allocation import costs, sensitivity_table
from mpq_compiler.artifact.bundle import Artifact
from mpq_compiler.driver.documented import documented
from mpq_compiler.driver.lower import layer_times, load_denoiser, lower
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.resolve import resolve, with_role
from mpq_compiler.frontend import calibration_file
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.findings import SENSITIVITY, SensitivityTable
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.ir.parcels import SHIPPING
from mpq_compiler.ir.program import Program, Stage, TensorStore
from mpq_compiler.latency import remote
from mpq_compiler.latency.candidates import require_kernels, runnable
from mpq_compiler.latency.measure import measured
from mpq_compiler.latency.table import Table
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.passes import Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import RANGE, VALUES
from mpq_compiler.runtime.rpc import Device
from mpq_compiler.support.cluster import connected
from mpq_compiler.support.errors import UserError
from mpq_compiler.support.execution import require_counts
from mpq_compiler.targets import table as targets

ENOUGH_TO_RUN = 4
"""Random inputs with which quantizers get scales, where their values do not matter."""


@documented
def measure_sensitivity(model: str | Path | Denoiser, progress: Any = None, **options: Any) -> SensitivityTable:
    """The sensitivity table of a model: runs the recipe's passes up to `sensitivity` (docs: `sensitivity_table`)."""
    chosen = Options(**options)
    passes = resolve(chosen)
    end = next((i for i, p in enumerate(passes, 1) if "sensitivity" in p.settings), None)
    if end is None:
        names = ", ".join(p.name() for p in passes)
        raise UserError(f"the recipe has no pass 'sensitivity' to measure with: {names}")
    with connected(chosen.distributed, SHIPPING, chosen.jobs) as cluster:
        denoiser = load_denoiser(model, chosen)
        lowering = lower(denoiser, chosen, progress, passes[:end], cluster)
    program, measured = lowering.program, lowering.program.facts[SENSITIVITY]
    dynamic = measured.get("dynamic", False)
    table = costs.describe(program, dynamic, floating=measured.get("floating", False))
    if lowering.latency is not None:
        kinds = dict.fromkeys(name for losses in measured["weights"].values() for name in losses)
        with single_threaded():
            times = lowering.latency.costs(program, list(kinds), dynamic)
        table = sensitivity_table.with_latencies(table, times.fixed, times.layers)
    return {**table, **measured}


@documented
def measure_latency(
    model: str | Path | Denoiser,
    progress: Any = None,
    formats: Sequence[str] = (),
    batch: int = 1,
    rpc: str | None = None,
    **options: Any,
) -> Table:
    """The latency table of a model: its kernels with all weights in each of ``formats``, on this machine or a device.

    formats: by default those that the recipe chooses from. batch: samples of a call. rpc: HOST:PORT where `mpq_rpc`
    listens. UserError: this machine, or the device, cannot run the target; no target of a device is named.
    """
    threads = options.get("threads") or 1
    if rpc is None:
        with candidate_plans(model, progress, formats, batch, **options) as plans:
            return measured(runnable(plans, threads), batch, threads, progress)
    if options.get("target", "native") == "native":
        raise UserError("--rpc measures on a device, which need not be as this machine: name its target with --target")
    Device(rpc).close()  # refuses before anything is compiled
    with candidate_plans(model, progress, formats, batch, emit="c", **options) as plans:
        return remote.measured(plans, rpc, batch, threads, progress)


@contextmanager
def candidate_plans(
    model: str | Path | Denoiser,
    progress: Any = None,
    formats: Sequence[str] = (),
    batch: int = 1,
    emit: str | None = None,
    **options: Any,
) -> Iterator[list[Artifact]]:
    """The model with all weights in each of ``formats``: for timing and nothing else (`measure_latency`).

    emit: "c", with programs for a device
    """
    chosen = Options(**options)
    passes = resolve(chosen)
    target = targets.resolve(chosen.target)
    require_kernels(target)
    require_counts(batch=batch)
    if emit is None and (missing := targets.missing_features(target)):
        raise UserError(
            f"times for '{target.name}' are measured on a machine that runs it, and this one lacks "
            f"{', '.join(missing)}: add --rpc HOST:PORT of one (docs/latency.md)"
        )
    denoiser = load_denoiser(model, chosen)
    measuring, allocation = with_role(passes, Role.MEASURES), with_role(passes, Role.ALLOCATES)
    if allocation is None or not {p.role for p in passes} >= {Role.SIMULATES, Role.ROUNDS, Role.PACKS}:
        raise UserError("the pipeline packs nothing that has times: it needs 'bit-allocation' to 'fold-fake-quant'")
    uniform = allocation.options().get("uniform")
    names = list(formats or ([uniform] if uniform else measuring.options()["formats"] if measuring else ["int8"]))
    times = layer_times(denoiser, chosen, passes, progress, batch)
    front = [p for p in passes[: passes.index(allocation)] if p.role is not Role.MEASURES]
    session = Session(
        denoiser,
        denoiser.random_inputs(ENOUGH_TO_RUN)
        if chosen.calibration is None
        else calibration_file.split(calibration_file.load(denoiser, chosen.calibration))[0],
        cache=chosen.cache,
        requests=Requests(frozenset({RANGE, VALUES})),
    )
    with single_threaded():
        start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        program, _ = manager.run_pipeline(front, start, session)
        with times.plans(program, names, bool(allocation.options().get("dynamic")), emit) as plans:
            yield plans
