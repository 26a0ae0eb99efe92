"""Lowers a denoiser: loads it and runs the passes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import fx

from mpq_compiler.allocation import costs, pose, sensitivity_table
from mpq_compiler.allocation.problem import load_plan
from mpq_compiler.driver import specialize
from mpq_compiler.driver.dump_writer import Writer
from mpq_compiler.driver.held_out import held_out
from mpq_compiler.driver.instruments import observe
from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.driver.resolve import resolve, with_role
from mpq_compiler.driver.stage_files import StageFiles, before_budget
from mpq_compiler.frontend import calibration_file, call_file
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import device
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.latency import table as tables
from mpq_compiler.latency.candidates import Latency
from mpq_compiler.pipeline import manager
from mpq_compiler.pipeline.manager import Instrument, Record
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.calibration_files import CalibrationFiles
from mpq_compiler.quantization.fit_files import FitFiles
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.kept_files import KeptFiles
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.row_files import RowFiles
from mpq_compiler.quantization.statistics import spread
from mpq_compiler.support.cluster import Cluster
from mpq_compiler.support.errors import BudgetError, UserError
from mpq_compiler.support.host import cpu
from mpq_compiler.support.usage import cpu_seconds
from mpq_compiler.targets import table as targets
from mpq_compiler.targets.numerics import F32


def load_denoiser(model: str | Path | Denoiser, options: Options) -> Denoiser:
    """Loads the model at the first size of ``--shapes``."""
    latents = [latent for latent in parse_shapes(options.shapes) if latent is not None]
    size = latents[0][1:] if latents else None
    recorded = call_file.has_call(options.calibration)
    if (options.latent or options.time) and (isinstance(model, Denoiser) or not recorded):
        raise UserError(
            f"--{'latent' if options.latent else 'time'} says what an argument of recorded calls is: give a file of "
            "calls with --calibration (docs/calibration.md), or leave it out"
        )
    if isinstance(model, Denoiser):
        if options.scheduler is not None or options.prediction_type is not None:
            raise UserError("a denoiser in memory has its scheduler: leave scheduler and prediction_type out")
        denoiser = model.sampled(options.guidance, options.conditions)
        if size is not None and size != denoiser.latent_shape[1:]:
            denoiser = denoiser.resized(*size)
    elif recorded:
        denoiser = _by_calls(model, options, size)
    else:
        denoiser = denoisers.load(
            model,
            size=size,
            tokens=calibration_file.tokens(options.calibration),
            prediction_type=options.prediction_type,
            scheduler=options.scheduler,
            guidance=options.guidance,
            conditions=options.conditions,
        )
    for latent in latents:
        if latent[0] != denoiser.latent_shape[0]:
            wanted = f"--shapes asks for {latent[0]} channels"
            raise UserError(f"{wanted}, and '{denoiser.name}' has {denoiser.latent_shape[0]}")
    return denoiser


def _by_calls(model: str | Path, options: Options, size: tuple[int, int] | None) -> Denoiser:
    """Loads the model as it was called in the calibration file. UserError: options that its calls decide."""
    assert options.calibration is not None
    given = {
        "--shapes": size,
        "--scheduler": options.scheduler,
        "--prediction-type": options.prediction_type,
        "--guidance": options.guidance,
        "--conditions": options.conditions,
    }
    if idle := [name for name, value in given.items() if value is not None]:
        raise UserError(f"the calls in '{options.calibration}' decide what {idle[0]} says: leave it out")
    return denoisers.load_calls(model, options.calibration, options.latent, options.time)


@dataclass(frozen=True)
class Lowering:
    """The results of the passes on a denoiser."""

    program: Program
    """The last program."""
    planned: Program | None
    """The last program in the planned stage; None where no pass planned."""
    laid_out: list[Program]
    """The laid-out program at every size of ``--shapes``, or for every kind of calls."""
    simulated: Program | None
    """The last program in the fake-quantized stage; None where no pass simulated quantizers."""
    records: list[Record]
    passes: list[Pass]
    latency: Latency | None = None
    """The times of formats on the target, where they are asked for."""
    dumps: Writer | None = None
    """The writer of the dumps, where they are asked for."""
    fits: FitCache = field(default_factory=FitCache)
    """The fits of the run."""
    files: tuple[KeptFiles[Any], ...] = ()
    """What is kept of the run for another that goes on where it was killed."""
    reused: Mapping[str, float] = field(default_factory=dict)
    """What an earlier run had left in the cache, and the CPU seconds of it that are known."""

    def forget(self) -> None:
        """Deletes what was kept for a run that goes on, since this one has ended."""
        for files in self.files:
            files.forget()

    def packed(self) -> Packed:
        """Requires a packed program. UserError: the pipeline ends before it packs."""
        if self.program.stage != Stage.PACKED or self.planned is None:
            raise UserError("the pipeline ends before 'fold-fake-quant': nothing was packed that a backend could run")
        return Packed(**vars(self))


@dataclass(frozen=True)
class Packed(Lowering):
    """A lowering whose program a backend can build."""

    planned: Program


def lower(
    denoiser: Denoiser,
    options: Options,
    progress: Any = None,
    passes: list[Pass] | None = None,
    cluster: Cluster | None = None,
    plan: Callable[[Program], int] | None = None,
) -> Lowering:
    """Runs the passes on a denoiser; nothing is written but dumps.

    Args:
        denoiser: the model.
        options: decide the passes, calibration and dumps.
        progress: opens progress bars, or None.
        passes: the passes to run; None takes those of the options.
        cluster: runs the tasks of passes; None: the threads of this process.
        plan: decides by the laid-out program in how many jobs the passes behind it run; None: in those of the options.
    """
    passes = resolve(options) if passes is None else passes
    calibration_file.require(denoiser, options.calibration)
    table = None if options.sensitivity is None else sensitivity_table.load(options.sensitivity)
    if table is not None:
        sensitivity_table.require_of(table, denoiser.name, denoiser.parameters)
    everything = resolve(options)  # though some may not run
    allocator = with_role(everything, Role.ALLOCATES)
    timed = options.latency_table is not None or getattr(allocator, "latency", None) is not None
    latency = layer_times(denoiser, options, everything, progress) if timed else None
    session = Session(
        denoiser=denoiser,
        calibration=None
        if options.calibration is None
        else calibration_file.split(calibration_file.load(denoiser, options.calibration))[0],
        sensitivity=table,
        plan=None if options.plan is None else load_plan(options.plan),
        latency=latency,
        fits=FitCache() if latency is None else latency.fits,
        numerics=targets.numerics_of(options.target) if with_role(passes, Role.CHOOSES_NUMERICS) else (),
        steps=options.steps,
        seed=options.seed,
        jobs=options.jobs,
        cache=options.cache,
        progress=progress,
        device=device.require(options.device),
        cluster=cluster,
        requests=Requests.all(p.requests() for p in everything),
    )
    files = FitFiles(options.cache), CalibrationFiles(options.cache), RowFiles(options.cache)
    session.fits.files, session.calibrations, session.rows = files
    planned: list[Program] = []
    simulated: list[Program] = []
    laid_out: list[Program] = []
    dumps = None if options.dumps is None else Writer(options.dumps, spread(held_out(denoiser, options), 2), denoiser)

    def keep_planned(index: int, step: Pass, before: Program, program: Program) -> None:
        if program.stage == Stage.PLANNED:
            planned.append(program)
        elif program.stage == Stage.FAKE_QUANTIZED:
            simulated[:] = [program]

    def keep_sizes(index: int, step: Pass, before: Program, program: Program) -> None:
        if specialize.is_laid_out(step):
            sizes = [latent[1:] for latent in parse_shapes(options.shapes) if latent is not None][1:]
            laid_out[:] = [program, *(specialize.laid_out(program, denoiser, size, passes) for size in sizes)]
            laid_out.extend(specialize.traced(kind, passes) for kind in denoiser.kinds)
            _check_plan(program, session.plan)
            if session.sensitivity is None:
                check_shapes(program, passes)
        if step.provides >= {"time-groups"} and session.sensitivity is None:
            _check_budget(program, passes, latency)

    instruments: list[Instrument] = [observe, keep_planned, *([dumps.write] if dumps else []), keep_sizes]
    front, rest = halves(passes)
    start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
    with single_threaded():
        program, records = manager.run_pipeline(front, start, session, instruments, count=len(passes))
        if plan is not None:
            session = replace(session, jobs=plan(program))

        def run(steps: Sequence[Pass], program: Program) -> tuple[Program, list[Record]]:
            present = {fact for step in passes[: len(records)] for fact in step.provides}
            return manager.run_pipeline(steps, program, session, instruments, present, len(records), len(passes))

        free = before_budget(rest) if dumps is None else []  # dumps have every stage
        if free:
            stage = StageFiles(program, free, session)
            if (left := stage.load()) is not None:
                program, seconds = left
                session.reuse(", ".join(step.name() for step in free), seconds)
                records += [Record(step.name(), 0.0, 0.0, 0) for step in free]
                if session.sensitivity is None:
                    _check_budget(program, passes, latency)
            else:
                begin = cpu_seconds()
                program, further = run(free, program)
                if stage.save(program, cpu_seconds() - begin):
                    _, calibrations, rows = files
                    calibrations.forget()  # a run that goes on begins behind them
                    rows.forget()
                records += further
        program, further = run(rest[len(free) :], program)
    records += further
    kept = simulated[-1] if simulated else None
    last = planned[-1] if planned else None
    reused = session.reused
    return Lowering(program, last, laid_out, kept, records, passes, latency, dumps, session.fits, files, reused)


def halves(passes: Sequence[Pass]) -> tuple[list[Pass], list[Pass]]:
    """Splits passes behind the one that lays the program out; before it nothing is measured."""
    end = next((i for i, step in enumerate(passes, 1) if specialize.is_laid_out(step)), len(passes))
    return [*passes[:end]], [*passes[end:]]


def layer_times(
    denoiser: Denoiser, options: Options, passes: Sequence[Pass], progress: Any = None, batch: int | None = None
) -> Latency:
    """The times of candidate plans on the target.

    Args:
        denoiser: the model.
        options: have the target, the table and the threads.
        passes: of the compilation.
        progress: opens progress bars, or None.
        batch: samples of a call; None takes the smallest of ``--shapes``.

    Raises:
        UserError: the given table is another target's.
    """
    target = targets.resolve(options.target)
    batches, *_ = parse_shapes(options.shapes).values()
    kinds: tuple[str, ...] = (F32,)
    chooser = with_role(passes, Role.CHOOSES_NUMERICS)
    chosen = {} if chooser is None else chooser.options()
    if chosen.get("mode") == "fast":
        kinds += tuple(kind for kind in chosen["kinds"] if kind in targets.numerics_of(options.target))
    return Latency(
        target, denoiser, passes, latency_table_of(options, target), batch or min(batches), options.threads or 1, kinds,
        options.jobs, options.cache, progress,
    )  # fmt: skip


def latency_table_of(options: Options, target: targets.Target) -> tables.Table | None:
    """Loads the given latency table; None without one. UserError: it is for another target, CPU or thread count."""
    if options.latency_table is None:
        return None
    table = tables.load(options.latency_table)
    here = None if targets.missing_features(target) else cpu()
    tables.require_of(table, target.name, here, options.threads)
    return table


def _check_plan(program: Program, plan: Mapping[str, str] | None) -> None:
    """Raises a UserError for a given plan of which no layer is the program's; `BitAllocation` is as exact as can be."""
    if plan is not None and not plan.keys() & {str(weight_path(node)) for node in program.quantizable}:
        raise UserError(f"the plan is another model's: {program.model} has none of its {len(plan)} layers")


def check_shapes(program: Program, passes: Sequence[Pass]) -> None:
    """Raises a UserError for a budget of bytes below what layers of these shapes take, before anything is measured.

    What passes may add does not count here, nor scales of activations; the sentence names a budget that has these, too.
    """
    allocation, measuring = with_role(passes, Role.ALLOCATES), with_role(passes, Role.MEASURES)
    uniform = getattr(allocation, "uniform", None)
    names = getattr(measuring, "formats", ()) if uniform is None else (uniform,)
    if allocation is None or not names:
        return
    parameters = program.facts[PARAMETERS]
    limit = pose.byte_limit(parameters, getattr(allocation, "weights", None), getattr(allocation, "bytes", None))
    if limit is None or limit >= (least := costs.least_bytes(program, names)):
        return
    grouping = with_role(passes, Role.GROUPS_TIME)
    least += costs.scale_bytes(program, 1 if grouping is None else getattr(grouping, "groups", 1))
    hint = "" if uniform is None else "; use the default recipe, which mixes formats"
    raise BudgetError(f"{pose.unmet(limit, least, parameters)}{hint}")


def _check_budget(program: Program, passes: Sequence[Pass], latency: Latency | None = None) -> None:
    """Raises a UserError for a budget of bytes or time that no allocation meets, before the long measurement."""
    allocation, measuring = with_role(passes, Role.ALLOCATES), with_role(passes, Role.MEASURES)
    if allocation is None or measuring is None:
        return
    measured: Sequence[str] = getattr(measuring, "formats", ())
    floating = getattr(allocation, "activation_format", "int") == "float"
    table = costs.describe(program, names=measured, floating=floating)
    bits, size = getattr(allocation, "weights", None), getattr(allocation, "bytes", None)
    limit = pose.byte_limit(table["parameters"], bits, size)
    choices = {layer["name"]: measured for layer in table["layers"]}
    if limit is not None:
        pose.require_bytes(table, limit, choices)
    most = getattr(allocation, "latency", None)
    if latency is not None and most is not None and not any("reuse" in step.settings for step in passes):
        times = latency.costs(program, measured, getattr(allocation, "dynamic", False))
        table = sensitivity_table.with_latencies(table, times.fixed, times.layers)
        pose.require_latency(table, most, choices)
