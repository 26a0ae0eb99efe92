"""`compile`: from a denoiser to an artifact. Resolves the recipe, runs the passes, hands over to a backend."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor, fx

from mpq_compiler import (
    artifact,
    costs,
    decisions,
    formats,
    latency_table,
    pass_manager,
    pipelines,
    prompts,
    recipes,
    recording,
    remote,
    runtime,
    schedule,
    sensitivity_table,
    specialize,
    targets,
    tvm_wheels,
)
from mpq_compiler import denoiser as denoisers
from mpq_compiler.artifact import Artifact
from mpq_compiler.calibration import RANGE, VALUES, input_edge
from mpq_compiler.calibration import batches as in_batches
from mpq_compiler.conditioning import require_guidance
from mpq_compiler.denoiser import Denoiser
from mpq_compiler.errors import UserError, nearest
from mpq_compiler.formats.activation import LEAST_FLOAT_BITS
from mpq_compiler.latency import LOWERED, Latency, require_kernels, runnable
from mpq_compiler.latency_profile import measured
from mpq_compiler.machine import cpu
from mpq_compiler.metrics import sqnr_db
from mpq_compiler.numerics import F32
from mpq_compiler.pass_manager import Pass, Record, Session
from mpq_compiler.program import Program, Stage, TensorStore, run

HELD_OUT = 64
"""Teacher-forced inputs on which a compiled denoiser is judged, none of them seen in calibration."""
HELD_OUT_STEPS = 8
"""Of the trajectories that they are of, at most."""
REFERENCE_MACS = 64e9
"""What the reference interpreter is asked to compute for that, in multiply-accumulates: some minutes at most."""
REFERENCE_LEAST = 4
"""Inputs on which artifact and reference are compared in any case."""
AGREEMENT_DB = 0.1
"""How far the artifact's SQNR may be from the reference's: contract (c)."""
JUDGED_TOGETHER = 8
DEFAULT_BATCHES = (1, 2)
MOST_SEED = 2**31 - 1
EFFORTS: dict[str, dict[str, dict[str, Any]]] = {
    "none": {"distill": {"minutes": 0.0}},
    "fast": {"distill": {"minutes": 0.4, "latent": 0.0, "samples": 16}, "sensitivity": {"inputs": 16}},
    "balanced": {"distill": {"minutes": 8.0, "latent": 0.7, "epochs": 12}},
    "best": {"distill": {"minutes": 30.0, "latent": 0.7, "epochs": 12}},
}
"""Options of passes by the name of an effort; all of `fast` takes two minutes more than rounding to nearest."""
MEASURING = ("sensitivity", "predict-scores", "orthogonality")
"""Passes that say between which formats is chosen."""
ENOUGH_TO_RUN = 4
"""Random inputs with which quantizers get scales, where their values do not matter."""
ENOUGH_ROWS = 64
"""Calibration inputs below which ranges and moments are poor: there is a note."""


@dataclass
class Options:
    """Everything a compilation depends on besides the model; what `mpqc compile` takes."""

    target: str = "native"
    recipe: str | Path = "default"
    pipeline: str | None = None
    weights: str | float | None = None
    """Budget: true average bits, or bytes as "40MB"."""
    activations: float | None = None
    bops: str | float | None = None
    """Budget: bit operations a sample, 2.5e12 or "2.5T"."""
    latency: str | float | None = None
    """Budget: milliseconds of a call, or as "800us"; of the table's samples and threads."""
    objective: str | None = None
    """"noise", or "paper-db": the sum of the layers' SQNR in dB (MixDQ). By default as the recipe says."""
    latency_table: str | Path | None = None
    """What `mpqc latency` measured (docs/latency.md); without one a budget has one measured here."""
    shapes: str | None = None
    """"1x4x64x64,2x4x64x64"; by default batches 1 and 2 at the configuration's size."""
    calibration: str | Path | None = None
    samples: int | None = None
    steps: int | None = None
    scheduler: str | Path | None = None
    prediction_type: str | None = None
    guidance: float | None = None
    """Classifier-free guidance of the calibration's sampling."""
    conditions: str | Path | None = None
    """Safetensors with the conditions to sample with, for models whose encoders are elsewhere."""
    sensitivity: str | Path | None = None
    numerics: str | None = None
    """"portable": the same bits on every CPU target; "fast": also bfloat16 and 8 bits in attentions. By default the
    recipe's, which is portable."""
    effort: str | None = None
    """How much is trained: "none", "fast" (frozen codes), "balanced" (weights, then frozen codes; some 8 minutes) or
    "best" (30). By default as the recipe says."""
    minutes: float | None = None
    """Of training, in place of the effort's."""
    seed: int = 0
    threads: int | None = None
    """Of a call of the artifact, where whoever loads it says nothing else; by default every core it finds then."""
    emit: str | None = None
    """"c": also a C program that runs the artifact without TVM's runtime (docs/standalone.md)."""
    standalone: bool = False
    """Also a program that runs it, with TVM's runtime."""
    wheels: Path | None = None
    """Folder with the wheels of that runtime for the target; by default the installed one."""
    tune: bool = False
    """Search for the fastest tiles of the integer kernels, measured here; no result depends on them."""
    jobs: int = 1
    cache: Path | None = None
    dumps: Path | None = None
    """Folder for the program after every pass."""
    overwrite: bool = False

    def __post_init__(self) -> None:
        for name in ("wheels", "cache", "dumps"):
            if (path := getattr(self, name)) is not None:
                setattr(self, name, Path(path))
        if self.jobs < 1:
            raise UserError(f"--jobs {self.jobs} must be 1 or more")


@dataclass
class Report:
    """What a compilation gave; `to_json` is the JSON of ``mpqc compile``."""

    weights: dict[str, Any]
    activations: dict[str, Any]
    quality: dict[str, Any]
    passes: list[dict[str, Any]]
    layers: list[dict[str, Any]]
    artifact: dict[str, Any]
    calibration: dict[str, Any]
    memory: dict[str, Any] | None
    """The manifest's entry (docs/artifact.md), for the targets that have one."""
    target: str
    recipe: str
    pipeline: str
    latency: dict[str, Any] | None
    """What the plan takes by the latency table (`_latency`); None where there is none."""
    training: list[dict[str, Any]]
    """What `distill` did, phase by phase (`distillation.Outcome`); nothing where nothing was trained."""
    additivity: dict[str, Any] | None
    """Noise of the whole plan, weights and activations together: ``measured``, ``expected`` from the sum of losses by
    which it was chosen, ``difference_db`` of the two, on so many ``inputs``. None where no such sum chose it."""
    numerics: dict[str, Any]
    """``mode`` that the artifact has, and ``attentions`` and float ``layers``: those that are not in float32."""
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@contextmanager
def single_threaded() -> Iterator[None]:
    """Torch on one thread: the same bits whatever --jobs, and whatever machine shares the cores."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def resolve(options: Options) -> list[Pass]:
    """The passes of the recipe, with the command line's options over it."""
    by_hand = options.pipeline
    recipe = recipes.load(options.recipe) if by_hand is None else recipes.from_pipeline(by_hand)
    require_guidance(options.guidance)
    if not 0 <= options.seed <= MOST_SEED:
        raise UserError(f"--seed {options.seed} must be 0 to {MOST_SEED}")
    if options.sensitivity is not None:
        recipe.require("sensitivity", "sensitivity")
        if (uniform := recipe.options.get("bit-allocation", {}).get("uniform")) not in (None, "none"):
            raise UserError(f"--sensitivity changes nothing where every layer has the format {uniform}: leave it out")
    bits, size = sensitivity_table.parse_budget(options.weights)
    if bits is not None or size is not None:
        recipe = recipe.override("bit-allocation", weights=bits if bits is not None else "none", bytes=size)
    recipe = recipe.override(
        "bit-allocation",
        activations=options.activations,
        bops=sensitivity_table.parse_bops(options.bops),
        latency=latency_table.parse_latency(options.latency),
        objective=options.objective,
    )
    recipe = recipe.override("calibrate", samples=options.samples, steps=options.steps)
    if options.steps is not None:  # what else is sampled has no other times than those of so few steps
        for name in ("equalize", "rotate", "distill"):
            if name in recipe.pipeline:
                usual = pass_manager.make(name, recipe.options.get(name, {})).options()["steps"]
                recipe = recipe.override(name, steps=min(usual, options.steps))
    if options.numerics != "portable" or "numerics" in recipe.pipeline:
        recipe = recipe.override("numerics", mode=options.numerics)
    if options.activations is not None and options.activations < 8:
        recipe = _with_width(recipe, options.activations)
    if options.effort is not None:
        if options.effort not in EFFORTS:
            raise UserError(f"--effort '{options.effort}' is not known: {nearest(options.effort, EFFORTS)}")
        for name, given in EFFORTS[options.effort].items():
            if name == "distill" or name in recipe.pipeline:
                stated = recipe.options.get(name, {}).keys() - {"minutes"}  # what a recipe is, it stays
                recipe = recipe.override(name, **{o: value for o, value in given.items() if o not in stated})
    recipe = recipe.override("distill", minutes=options.minutes)
    passes = recipe.passes()
    pass_manager.check(passes)
    return passes


def _with_width(recipe: recipes.Recipe, activations: float) -> recipes.Recipe:
    """The recipe for a budget of so many average bits of activations; what it says itself of widths stays."""
    plan, width = recipe.options.get("bit-allocation", {}), max(2, min(8, round(activations)))
    least = LEAST_FLOAT_BITS if plan.get("activation_format") == "float" else 2
    measured = (width,) if plan.get("mixed") is False else tuple(range(least, 9))
    for name, option, value in (
        ("equalize", "activations", width),
        ("rotate", "activations", width),
        ("time-groups", "bits", width),
        ("time-gains", "activations", width),
        ("sensitivity", "activations", measured),
        ("orthogonality", "activations", measured),
    ):
        if name in recipe.pipeline:
            usual = getattr(pass_manager.make(name, {}), option)
            if recipe.options.get(name, {}).get(option, usual) == usual:
                recipe = recipe.override(name, **{option: value})
    return recipe


def parse_shapes(text: str | None) -> dict[tuple[int, int, int] | None, tuple[int, ...]]:
    """Latent shapes [C, H, W] of "1x4x64x64,2x4x64x64,1x4x96x64", in order, with the batch sizes for each.

    The first is the one that is calibrated. None stands for the configuration's.
    """
    if text is None:
        return {None: DEFAULT_BATCHES}
    found: dict[tuple[int, int, int] | None, tuple[int, ...]] = {}
    for item in text.split(","):
        if not re.fullmatch(r"\s*[1-9]\d*(x[1-9]\d*){3}\s*", item):
            raise UserError(f"--shapes '{item.strip()}' must be batch x channels x height x width, such as 1x4x64x64")
        batch, *latent = (int(d) for d in item.split("x"))
        shape = latent[0], latent[1], latent[2]
        found[shape] = tuple(sorted({*found.get(shape, ()), batch}))
    return found


def load_denoiser(model: str | Path | Denoiser, options: Options) -> Denoiser:
    """The model at the first size of ``--shapes``."""
    latents = [latent for latent in parse_shapes(options.shapes) if latent is not None]
    size = latents[0][1:] if latents else None
    if isinstance(model, Denoiser):
        if options.scheduler is not None or options.prediction_type is not None:
            raise UserError("a denoiser in memory has its scheduler: leave scheduler and prediction_type out")
        denoiser = model.sampled(options.guidance, options.conditions)
        if size is not None and size != denoiser.latent_shape[1:]:
            denoiser = denoiser.resized(*size)
    else:
        denoiser = denoisers.load(
            model,
            size=size,
            prediction_type=options.prediction_type,
            scheduler=options.scheduler,
            guidance=options.guidance,
            conditions=options.conditions,
        )
    if options.calibration is not None and recording.has_fractions(options.calibration):
        denoiser = denoiser.with_fractional_times()
    for latent in latents:
        if latent[0] != denoiser.latent_shape[0]:
            wanted = f"--shapes asks for {latent[0]} channels"
            raise UserError(f"{wanted}, and '{denoiser.name}' has {denoiser.latent_shape[0]}")
    return denoiser


@dataclass
class Lowering:
    """What the passes made of a denoiser: the last program, the planned one if there is one, and the laid-out ones."""

    program: Program
    planned: Program | None
    laid_out: list[Program]
    """At every size of ``--shapes``."""
    records: list[Record]
    passes: list[Pass]
    latency: Latency | None = None
    """Times of formats on the target, where they are asked for."""


def lower(denoiser: Denoiser, options: Options, progress: Any = None, passes: list[Pass] | None = None) -> Lowering:
    """Runs the passes. Nothing is written but dumps."""
    passes = resolve(options) if passes is None else passes
    recording.require(denoiser, options.calibration)
    table = None if options.sensitivity is None else sensitivity_table.load(options.sensitivity)
    if table is not None:
        sensitivity_table.require_of(table, denoiser.name, denoiser.parameters)
    everything = resolve(options)  # though some may not run
    budgets = next((p.options() for p in everything if p.name() == "bit-allocation"), {})
    timed = options.latency_table is not None or budgets.get("latency") is not None
    latency = _times(denoiser, options, everything, progress) if timed else None
    session = Session(
        denoiser=denoiser,
        calibration=None
        if options.calibration is None
        else recording.split(recording.load(denoiser, options.calibration))[0],
        sensitivity=table,
        latency=latency,
        numerics=targets.numerics_of(options.target) if any(p.name() == "numerics" for p in passes) else (),
        steps=options.steps,
        seed=options.seed,
        jobs=options.jobs,
        cache=options.cache,
        progress=progress,
        statistics=frozenset().union(*(p.asks() for p in everything)),
    )
    planned: list[Program] = []
    laid_out: list[Program] = []
    observe = _observer(denoiser, options, planned)

    def after(index: int, step: Pass, before: Program, program: Program) -> None:
        observe(index, step, before, program)
        if specialize.is_laid_out(step):
            sizes = [latent[1:] for latent in parse_shapes(options.shapes) if latent is not None][1:]
            laid_out[:] = [program, *(specialize.laid_out(program, denoiser, size, passes) for size in sizes)]
        if step.provides >= {"time-groups"} and session.sensitivity is None:
            _check_budget(program, passes, latency)

    start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
    with single_threaded():
        program, records = pass_manager.run_pipeline(passes, start, session, after)
    return Lowering(program, planned[-1] if planned else None, laid_out, records, passes, latency)


def _times(
    denoiser: Denoiser, options: Options, passes: Sequence[Pass], progress: Any = None, batch: int | None = None
) -> Latency:
    """What answers for times on the target. UserError: the table that was given is not that of the target."""
    target = targets.resolve(options.target)
    batches, *_ = parse_shapes(options.shapes).values()
    kinds: tuple[str, ...] = (F32,)
    fast = next((p.options() for p in passes if p.name() == "numerics" and p.options()["mode"] == "fast"), None)
    if fast is not None:
        kinds += tuple(kind for kind in fast["kinds"] if kind in targets.numerics_of(options.target))
    return Latency(
        target, denoiser, passes, _latency_table(options, target), batch or min(batches), options.threads or 1, kinds,
        options.jobs, options.cache, progress,
    )  # fmt: skip


def _latency_table(options: Options, target: targets.Target) -> latency_table.Table | None:
    """The table that was given. UserError: it is that of another target, of another CPU, of other threads."""
    if options.latency_table is None:
        return None
    table = latency_table.load(options.latency_table)
    here = None if targets.missing_features(target) else cpu()
    latency_table.require_of(table, target.name, here, options.threads)
    return table


def _check_budget(program: Program, passes: Sequence[Pass], latency: Latency | None = None) -> None:
    """UserError for a budget of bytes or time that no allocation meets, before the long measurement that one needs."""
    options = {p.name(): p for p in passes}
    allocation = options.get("bit-allocation")
    measuring = next((options[name] for name in MEASURING if name in options), None)
    if allocation is None or measuring is None:
        return
    measured: Sequence[str] = getattr(measuring, "formats", ())
    floating = getattr(allocation, "activation_format", "int") == "float"
    table = costs.describe(program, names=measured, floating=floating)
    bits, size = getattr(allocation, "weights", None), getattr(allocation, "bytes", None)
    limit = sensitivity_table.byte_limit(table, bits, size)
    choices = {layer["name"]: measured for layer in table["layers"]}
    if limit is not None:
        sensitivity_table.require_bytes(table, limit, choices)
    most = getattr(allocation, "latency", None)
    if latency is not None and most is not None:
        times = latency.costs(program, measured, getattr(allocation, "dynamic", False))
        table = sensitivity_table.with_latencies(table, times.fixed, times.layers)
        sensitivity_table.require_latency(table, most, choices)


def _observer(
    denoiser: Denoiser, options: Options, planned: list[Program]
) -> Callable[[int, Pass, Program, Program], None]:
    write: Callable[[int, Pass, Program, Program], None] | None = None
    if options.dumps is not None:
        from mpq_compiler import probes

        write = probes.Writer(options.dumps, _spread(held_out(denoiser, options), 2), denoiser).write

    def after(index: int, step: Pass, before: Program, program: Program) -> None:
        if program.stage == Stage.PLANNED:
            planned.append(program)
        if write is not None:
            write(index, step, program, before)

    return after


def held_out(denoiser: Denoiser, options: Options) -> dict[str, Tensor]:
    """Inputs over all time steps that calibration has not seen: `HELD_OUT`, or what the calibration file holds."""
    if options.calibration is not None:
        inputs = recording.split(recording.load(denoiser, options.calibration))[1]
        return _spread(inputs, HELD_OUT)
    steps = min(HELD_OUT_STEPS, options.steps or HELD_OUT_STEPS)
    return denoisers.record_calibration(denoiser, -(-HELD_OUT // steps), steps, options.seed + 1)


def _spread(inputs: dict[str, Tensor], count: int) -> dict[str, Tensor]:
    """At most ``count`` rows, evenly spread."""
    rows = len(next(iter(inputs.values())))
    index = torch.linspace(0, rows - 1, min(count, rows)).round().long()
    return {name: value[index] for name, value in inputs.items()}


def check(options: Options, output: str | Path) -> None:
    """UserError where a compilation would be refused whatever the model is: said before one is read or drawn from."""
    if options.threads is not None and options.threads < 1:
        raise UserError(f"threads is {options.threads}; it must be at least 1")
    target = targets.resolve(options.target)
    backend = _backend(target)
    if options.tune and (target.is_cuda or "tune" not in inspect.signature(backend.build).parameters):
        raise UserError(f"--tune measures kernels of CPU targets; '{target.name}' has none to choose: leave it out")
    if options.emit not in (None, "c"):
        raise UserError(f"--emit '{options.emit}' is not known: it is 'c' or left out")
    option = "--standalone" if options.standalone else "--emit c" if options.emit else None
    if option and (target.is_cuda or "emit" not in inspect.signature(backend.build).parameters):
        raise UserError(f"{option} makes a program of kernels for CPUs; '{target.name}' has none: leave it out")
    if target.is_cuda:
        backend.require_compiler(target)
    if options.emit and options.standalone:
        raise UserError("--standalone and --emit c both make the program mpq_run: leave one of them out")
    if options.wheels is not None and not options.standalone:
        raise UserError("--wheels holds TVM's runtime for --standalone: add that, or leave it out")
    if options.standalone:
        tvm_wheels.files(target, options.wheels)
    artifact.check_output(output, options.overwrite)
    if options.dumps is not None and not options.overwrite and options.dumps.exists() and any(options.dumps.iterdir()):
        raise UserError(f"the dumps folder '{options.dumps}' is not empty; name another one or add --overwrite")
    if options.dumps is not None and options.dumps.resolve().is_relative_to(Path(output).resolve()):
        raise UserError(f"the dumps folder '{options.dumps}' lies within the output '{output}'; name another one")
    resolve(options)
    if options.latency is not None:
        require_kernels(target)
    _latency_table(options, target)


@overload
def compile(model: str | Path | Denoiser, output: str | Path, progress: Any = None, **options: Any) -> Report: ...


@overload
def compile(model: Any, output: str | Path, progress: Any = None, **options: Any) -> Any: ...


def compile(model: Any, output: str | Path, progress: Any = None, **options: Any) -> Any:
    """Compiles ``model`` to an artifact at ``output``; options as in `Options`.

    A diffusers pipeline is given back with its denoiser replaced (`pipelines.compile_pipeline`). Raises UserError for
    every input that cannot be compiled; nothing is left at ``output`` then.
    """
    from mpq_compiler import printer

    if pipelines.part_of(model) is not None:
        return pipelines.compile_pipeline(model, output, progress, **options)
    if not isinstance(model, str | Path | Denoiser):
        raise UserError(
            f"cannot compile a {type(model).__name__}: give a folder, a hub id, a bundled name, a diffusers pipeline, "
            "or a denoiser in memory as mpq_compiler.denoiser.wrap(module)"
        )
    chosen = Options(**options)
    check(chosen, output)
    target = targets.resolve(chosen.target)
    backend = _backend(target)
    beside = tvm_wheels.files(target, chosen.wheels) if chosen.standalone else {}
    denoiser = load_denoiser(model, chosen)
    with _standby(backend, chosen.jobs) as ready:
        lowering = lower(denoiser, chosen, progress)
        program, planned, records, passes = lowering.program, lowering.planned, lowering.records, lowering.passes
        if program.stage != Stage.PACKED or planned is None:
            raise UserError("the pipeline ends before 'fold-fake-quant': nothing was packed that a backend could run")
        with single_threaded():
            batches, *_ = parse_shapes(chosen.shapes).values()
            others = _other_sizes(lowering, chosen)
            ready |= {"jobs": chosen.jobs, "progress": progress, "cache": chosen.cache}
            if chosen.tune:
                ready["tune"] = True
            if chosen.standalone or chosen.emit:
                ready["emit"] = "machine" if chosen.standalone else "c"
            built = backend.build(program, target, batches, others=others, **ready)
    with single_threaded():
        target = targets.with_features(target, built.features)
        stored = costs.stored_bytes(planned) + specialize.added_bytes(program, others)
        manifest = {
            **_describe(denoiser, program, planned, chosen, passes),
            "target": _describe_target(target) | {"numerics": _numerics(program)},
            "functions": built.functions,
            "tensors": built.entries,
        }
        if built.prepare is not None:
            manifest["prepare"] = built.prepare
        if built.parts:
            manifest["parts"] = built.parts
        if built.memory is not None:
            manifest["memory"] = built.memory
        if chosen.threads is not None:
            manifest["threads"] = chosen.threads
        if chosen.tune:
            manifest["tiles"] = {node: list(tile) for node, tile in sorted(built.facts["tiles"].items())}
        times = _latency(lowering.latency, program, built.facts)
        if times is not None:
            manifest["plan"]["latency"] = times
        kernels = schedule.describe(program, built.facts.get("schedule", ()))
        decided = decisions.encode(decisions.document(program, schedule.by_layer(kernels)))
        files = {**built.files, **beside, artifact.IR: printer.text(program).encode(), artifact.DECISIONS: decided}
        if kernels:
            files[artifact.SCHEDULE] = schedule.encode(kernels)
        if chosen.dumps is not None:
            (chosen.dumps / artifact.DECISIONS).write_bytes(decided)
        if denoiser.text is not None:
            files[prompts.FILE] = denoiser.text.save
        macs = sum(costs.macs(planned).values())
        session = Session(jobs=chosen.jobs, progress=progress)
        judge = _Judge(denoiser, held_out(denoiser, chosen), program, macs, session)
        manifest["quality"] = {"reference_sqnr_db": judge.reference_sqnr_db, "inputs": judge.compared}
        complete = artifact.write(output, manifest, files, built.tensors, chosen.overwrite)
        assert complete["weights"]["payload_bytes"] == stored, "payload and plan differ"
        compiled, refusal = _loaded(output, target)
        quality = judge.quality(compiled)
        disagreements = [*refusal, *_disagreements(compiled, target, denoiser, others)]
    asked = (chosen.steps, chosen.guidance, chosen.scheduler or chosen.prediction_type)
    differences = [] if chosen.calibration is None else recording.notes(denoiser, chosen.calibration, *asked)
    notes = [*denoiser.notes, *differences, *program.facts.get("notes", ()), *built.facts.get("notes", ())]
    rows = len(planned.facts["calibration"].timesteps)
    if rows < ENOUGH_ROWS:
        notes.append(
            f"calibrated on {rows} inputs only, which can cost several dB: raise --samples or --steps, or give a "
            f"calibration file of {ENOUGH_ROWS} rows or more"
        )
    if abs(quality["agreement_db"] or 0) > AGREEMENT_DB:
        notes.append(
            f"the artifact's SQNR is {quality['agreement_db']:+.2f} dB from the packed program's: its kernels for "
            f"'{target.name}' compute something else, report it with the model"
        )
    notes += disagreements
    parameters = program.facts["parameters"]
    weights = {
        "average_bits": costs.average_bits(stored, parameters),
        "bytes": stored,
        "float_bytes": 4 * parameters,
    }
    size = sum(f["bytes"] for f in complete["files"].values())
    return Report(
        weights=weights,
        activations={"average_bits": costs.activation_bits(planned)},
        quality=quality,
        passes=[{"name": r.name, "seconds": r.seconds, "peak_bytes": r.peak_bytes} for r in records],
        layers=layer_rows(planned),
        artifact={"bytes": size, "sha256": complete["artifact_sha256"]},
        calibration=complete["calibration"],
        memory=built.memory,
        target=target.name,
        recipe=str(chosen.recipe) if chosen.pipeline is None else "custom",
        latency=times,
        pipeline=pass_manager.to_text(passes),
        training=list(program.facts.get("training", ())),
        additivity=program.facts.get("allocation", {}).get("additivity"),
        numerics={"mode": _numerics(program), **_choices(planned)},
        fallbacks=dict(program.fallbacks),
        notes=notes,
    )


def _latency(latency: Latency | None, program: Program, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Milliseconds of a call by the latency table: ``predicted_ms`` of the kernels that were compiled or, where the
    table lacks some (``missing`` of them), of the plan; ``fixed_ms`` of it that no weight format changes."""
    planned = program.facts.get("latency")
    if latency is None or latency.table is None or planned is None:
        return None
    table = latency.table
    found = latency_table.predict(table, [row["problem"] for row in facts["schedule"]])
    return {
        "predicted_ms": planned["ms"] if found.missing else found.ms,
        "missing": len(found.missing),
        "fixed_ms": planned["fixed_ms"],
        "budget_ms": planned["budget_ms"],
        "batch": table.batch,
        "threads": table.threads,
        "cpu": table.cpu,
        "table_sha256": table.sha256,
    }


def _choices(planned: Program) -> dict[str, dict[str, str]]:
    """The numerics that were chosen, of attentions and of float layers."""
    chosen, calls = planned.facts.get("numerics", {}), {node.name for node in planned.attentions}
    attentions = {name: kind for name, kind in chosen.items() if name in calls}
    return {"attentions": attentions, "layers": {n: kind for n, kind in chosen.items() if n not in calls}}


def _numerics(program: Program) -> str:
    """What the program needs, whatever was allowed."""
    return "fast" if program.facts.get("numerics") else "portable"


def _other_sizes(lowering: Lowering, options: Options) -> list[specialize.Specialization]:
    """The packed program at the sizes of ``--shapes`` behind the first."""
    here, *there = lowering.laid_out
    return [
        specialize.Specialization(specialize.transplant(lowering.program, here, other), batches)
        for other, batches in zip(there, [*parse_shapes(options.shapes).values()][1:], strict=True)
    ]


def _loaded(path: str | Path, target: targets.Target) -> tuple[runtime.CompiledDenoiser | None, list[str]]:
    """The artifact, where this machine has what the target needs, and a note where it cannot be loaded all the same."""
    if target.backend == "reference" or targets.missing_features(target):
        return None, []
    try:
        return runtime.load(path), []
    except UserError as error:
        return None, [f"the artifact was not executed here: {error}"]


def _disagreements(
    compiled: runtime.CompiledDenoiser | None,
    target: targets.Target,
    denoiser: Denoiser,
    others: Sequence[specialize.Specialization],
) -> Iterator[str]:
    """Notes on the sizes at which the artifact is not as good as the packed program, on a few random inputs."""
    if compiled is None:
        return
    for other in others:
        resized = denoiser.resized(*specialize.size_of(other.program))
        inputs = resized.random_inputs(REFERENCE_LEAST)
        expected = resized(**inputs).numpy()
        output = compiled.run({name: value.numpy() for name, value in inputs.items()})
        difference = sqnr_db(expected, output) - sqnr_db(expected, run(other.program, inputs).numpy())
        if abs(difference) > AGREEMENT_DB:
            yield (
                f"at {other.size} the artifact's SQNR is {difference:+.2f} dB from the packed program's: its kernels "
                f"for '{target.name}' compute something else, report it with the model"
            )


def _backend(target: targets.Target) -> Any:
    """The module that builds for the target. UserError: it needs a package that is not installed."""
    import importlib

    try:
        return importlib.import_module(f"mpq_compiler.backends.{target.backend}.build")
    except ModuleNotFoundError as error:
        package = "onnx" if target.backend == "onnx" else "compile"
        raise UserError(
            f"target '{target.name}' needs {error.name}, which is not installed: pip install 'mpq-compiler[{package}]'"
        ) from error


@contextmanager
def _standby(backend: Any, jobs: int) -> Iterator[dict[str, Any]]:
    """What a backend takes its time to start, started while the passes run: an argument of its ``build``."""
    if not hasattr(backend, "standby"):
        yield {}
        return
    with backend.standby(jobs) as workers:
        yield {"workers": workers}


class _Judge:
    """Teacher-forced quality against the float model, and the agreement of artifact and packed program.

    The reference computes exactly, which takes hundreds of times as long as the artifact: for large models it is asked
    for some of the inputs only, spread over time, and the two are compared on those.
    """

    def __init__(
        self, denoiser: Denoiser, inputs: dict[str, Tensor], program: Program, macs: int, session: Session
    ) -> None:
        """program: the packed one. macs: multiply-accumulates of its layers, a sample."""
        self.inputs = inputs
        self.count = len(next(iter(inputs.values())))
        self.compared = min(self.count, max(REFERENCE_LEAST, int(REFERENCE_MACS / macs)))
        index = torch.linspace(0, self.count - 1, self.compared).round().long()
        self.rows = index.numpy()
        with session.track("judging", self.count + self.compared) as advance:

            def outputs(of: Callable[[dict[str, Tensor]], Tensor], inputs: dict[str, Tensor]) -> np.ndarray:
                def output(batch: dict[str, Tensor]) -> np.ndarray:
                    found = of(batch).numpy()
                    advance(len(found))
                    return found

                return np.concatenate(session.map(output, in_batches(inputs, JUDGED_TOGETHER)))

            self.expected = outputs(lambda batch: denoiser(**batch), inputs)
            self.packed = outputs(lambda batch: run(program, batch), {n: value[index] for n, value in inputs.items()})
        self.reference_sqnr_db = round(sqnr_db(self.expected[self.rows], self.packed), 6)

    def quality(self, compiled: runtime.CompiledDenoiser | None) -> dict[str, Any]:
        """`sqnr_db` executed by the artifact where there is one that runs here, else by the reference.

        `agreement_db` is what executing the artifact adds to the reference's SQNR on the `reference_inputs`.
        """
        reference = {"reference_sqnr_db": self.reference_sqnr_db, "reference_inputs": self.compared}
        if compiled is None:
            return {
                "sqnr_db": self.reference_sqnr_db,
                "executed_by": "reference",
                "inputs": self.compared,
                **reference,
                "agreement_db": None,
            }
        output = compiled.run({name: value.numpy() for name, value in self.inputs.items()})
        return {
            "sqnr_db": sqnr_db(self.expected, output),
            "executed_by": "artifact",
            "inputs": self.count,
            **reference,
            "agreement_db": sqnr_db(self.expected[self.rows], output[self.rows]) - self.reference_sqnr_db,
        }


def _describe(
    denoiser: Denoiser, program: Program, planned: Program, options: Options, passes: Sequence[Pass]
) -> dict[str, Any]:
    from importlib.metadata import version

    allocation = program.facts.get("allocation", {})
    return {
        "name": denoiser.name,
        "model": {
            "class": str(denoiser.config.get("_class_name", type(denoiser.module.model).__name__)),
            "config": {k: v for k, v in denoiser.config.items() if not k.startswith("_")},
            "parameters": program.facts["parameters"],
            "signature": list(inspect.signature(denoiser.module.model.forward).parameters),
            "call": asdict(denoiser.module.convention),
            "below": {name: s.below for name, s in denoiser.input_specs.items() if s.below is not None},
        },
        "recipe": {"name": str(Path(options.recipe).stem) if options.pipeline is None else "custom"},
        "pipeline": pass_manager.to_text(passes),
        "plan": {
            "layers": layer_rows(planned),
            "boundaries": program.facts["time-groups"].tolist(),
            "stored_bytes": costs.stored_bytes(planned),
            "fallbacks": dict(sorted(program.fallbacks.items())),
            **({"loss": allocation["objective"]} if allocation else {}),
            **({"numerics": program.facts["numerics"]} if program.facts.get("numerics") else {}),
        },
        "sampling": denoiser.sampling(),
        "assumptions": list(program.facts.get("assumptions", ())),
        "calibration": _calibration(denoiser, planned, options, passes),
        "versions": {name: version(name) for name in ("mpq-compiler", "torch", "diffusers", "apache-tvm", "numpy")},
    }


def _calibration(denoiser: Denoiser, planned: Program, options: Options, passes: Sequence[Pass]) -> dict[str, Any]:
    """Where the calibration inputs came from."""
    found: dict[str, Any] = {"seed": options.seed, "inputs": len(planned.facts["calibration"].timesteps)}
    if options.calibration is not None:
        return found | recording.stated(options.calibration)
    calibrate = next(step.options() for step in passes if step.name() == "calibrate")
    guidance = denoiser.conditioning.usual_guidance() if denoiser.guidance is None else denoiser.guidance
    sampled = {"scheduler": denoiser.scheduler.solver, "guidance": guidance}
    conditions = {} if options.conditions is None else {"conditions": recording.sha256(options.conditions)}
    return found | calibrate | sampled | conditions


def _describe_target(target: targets.Target) -> dict[str, Any]:
    described: dict[str, Any] = {
        "name": target.name,
        "arch": target.arch,
        "backend": target.backend,
        "features": list(target.features),
    }
    if target.backend == "tvm":
        described |= {"isa": target.isa, "tvm": dict(target.tvm)}
    if target.is_cuda:
        described["cuda"] = target.cuda
    return described


def layer_rows(planned: Program) -> list[dict[str, Any]]:
    """Name, weight format, activation, bytes, loss and fallback of every layer of a planned program."""
    groups = len(planned.facts["time-groups"]) + 1
    table = planned.facts.get("sensitivity", {"weights": {}})
    rows: list[dict[str, Any]] = []
    layers = {str(costs.weight_path(n)): n for n in reversed(planned.quantizable)}  # shared weights are stored once
    for path, node in reversed(layers.items()):
        plan = planned.weights[path]
        weight = str(node.args[1].target)  # type: ignore[union-attr]
        quantized = formats.get(plan.format).integer or planned.reads_floats(node)
        read = planned.activations.get(input_edge(node).name) if quantized else None
        activation = "float" if read is None else read.label(groups)
        rows.append(
            {
                "name": path,
                "weight": plan.format,
                "activation": activation,
                "bytes": costs.weight_bytes(planned, weight, plan.format),
                "loss": table["weights"].get(path, {}).get(plan.format),
                "fallback": planned.fallbacks.get(node.name),
            }
        )
    others = {n: reason for n, reason in planned.fallbacks.items() if n not in {q.name for q in planned.quantizable}}
    left = {"weight": "float", "activation": "float", "bytes": 0, "loss": 0.0}
    return rows + [{"name": name, **left, "fallback": reason} for name, reason in others.items()]


def measure_sensitivity(model: str | Path | Denoiser, progress: Any = None, **options: Any) -> dict[str, Any]:
    """The sensitivity table of a model: runs the recipe's passes up to `sensitivity` (docs: `sensitivity_table`)."""
    chosen = Options(**options)
    passes = resolve(chosen)
    names = [p.name() for p in passes]
    if "sensitivity" not in names:
        raise UserError(f"the recipe has no pass 'sensitivity' to measure with: {', '.join(names)}")
    denoiser = load_denoiser(model, chosen)
    lowering = lower(denoiser, chosen, progress, passes[: names.index("sensitivity") + 1])
    program, measured = lowering.program, lowering.program.facts["sensitivity"]
    dynamic = measured.get("dynamic", False)
    table = costs.describe(program, dynamic, floating=measured.get("floating", False))
    if lowering.latency is not None:
        kinds = dict.fromkeys(name for losses in measured["weights"].values() for name in losses)
        with single_threaded():
            times = lowering.latency.costs(program, list(kinds), dynamic)
        table = sensitivity_table.with_latencies(table, times.fixed, times.layers)
    return {**table, **measured}


def measure_latency(
    model: str | Path | Denoiser,
    progress: Any = None,
    formats: Sequence[str] = (),
    batch: int = 1,
    rpc: str | None = None,
    **options: Any,
) -> latency_table.Table:
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
    remote.Device(rpc).close()  # refuses before anything is compiled
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
    if batch < 1:
        raise UserError(f"--batch {batch} must be 1 or more")
    if emit is None and (missing := targets.missing_features(target)):
        raise UserError(
            f"times for '{target.name}' are measured on a machine that runs it, and this one lacks "
            f"{', '.join(missing)}: add --rpc HOST:PORT of one (docs/latency.md)"
        )
    denoiser = load_denoiser(model, chosen)
    measuring = next((p for p in passes if p.name() in MEASURING), None)
    allocation = next((p for p in passes if p.name() == "bit-allocation"), None)
    if allocation is None or not {p.name() for p in passes} >= LOWERED - {"low-rank", "fuse-epilogues"}:
        raise UserError("the pipeline packs nothing that has times: it needs 'bit-allocation' to 'fold-fake-quant'")
    uniform = allocation.options().get("uniform")
    names = list(formats or ([uniform] if uniform else measuring.options()["formats"] if measuring else ["int8"]))
    times = _times(denoiser, chosen, passes, progress, batch)
    front = [p for p in passes[: passes.index(allocation)] if p.name() not in MEASURING]
    session = Session(
        denoiser,
        denoiser.random_inputs(ENOUGH_TO_RUN)
        if chosen.calibration is None
        else recording.split(recording.load(denoiser, chosen.calibration))[0],
        cache=chosen.cache,
        statistics=frozenset({RANGE, VALUES}),
    )
    with single_threaded():
        start = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        program, _ = pass_manager.run_pipeline(front, start, session)
        with times.plans(program, names, bool(allocation.options().get("dynamic")), emit) as plans:
            yield plans
