"""The report of a compilation, which is the JSON of ``mpqc compile``."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any, TypedDict

from mpq_compiler.artifact.manifest import Cost, Manifest, cost
from mpq_compiler.driver.judge import Judged, KindQuality
from mpq_compiler.driver.lower import Packed
from mpq_compiler.driver.manifest import layer_rows, numerics_choices, numerics_of
from mpq_compiler.driver.options import Options
from mpq_compiler.frontend import calibration_file
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import costs
from mpq_compiler.ir.findings import ALLOCATION, LATENCY, STORED_HALVES, ReusePlan
from mpq_compiler.ir.program import NOTES, PARAMETERS, Program
from mpq_compiler.ir.reuse import REUSE
from mpq_compiler.latency.candidates import Latency
from mpq_compiler.latency.table import predict
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.backend import Built
from mpq_compiler.pipeline.manager import Record
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.targets.table import Target
from mpq_compiler.training.trainer import TRAINING

ENOUGH_ROWS = 64
"""The number of calibration inputs below which ranges and moments are poor, and there is a note."""


class Taken(TypedDict):
    """What a pass or another step took, as the system counted it."""

    name: str
    seconds: float
    cpu_seconds: float
    peak_bytes: int


@dataclass
class Report:
    """The report of a compilation; `to_json` is the JSON of ``mpqc compile``."""

    weights: dict[str, Any]
    activations: dict[str, Any]
    quality: dict[str, Any]
    passes: list[Taken]
    """Seconds, CPU seconds and peak memory of each pass."""
    after: list[Taken]
    """Seconds, CPU seconds and peak memory of what follows the passes: kernels, judging."""
    estimate: dict[str, Any] | None
    """What was estimated before the first input ran (schemas/estimate.json); None where that was some seconds."""
    layers: list[dict[str, Any]]
    artifact: dict[str, Any]
    cost: Cost
    """Bytes, peak memory and bit operations, beside the float model's."""
    calibration: dict[str, Any]
    memory: dict[str, Any] | None
    """The manifest's entry on memory (docs/artifact.md), for targets that have one."""
    target: str
    recipe: str
    pipeline: str
    latency: dict[str, Any] | None
    """The plan's latency by the latency table (`predicted_latency`); None without one."""
    training: list[dict[str, Any]]
    """The outcomes of `distill`, phase by phase (`trainer.Outcome`); empty without training."""
    additivity: dict[str, Any] | None
    """The noise of the whole plan, beside the sum of losses by which it was chosen; None where no such sum chose it.

    It has ``measured``, ``expected`` (the sum), ``difference_db`` of the two, and the number of ``inputs``.
    """
    reuse: ReusePlan | None
    """What steps of a sampler reuse (`bit-allocation`); None where every step computes all."""
    numerics: dict[str, Any]
    """The artifact's ``mode``, and the ``attentions`` and float ``layers`` that are not in float32."""
    calls: list[KindQuality] = field(default_factory=list)
    """The kinds of calls that the artifact takes, with ``text`` and ``sqnr_db``; empty without recorded calls."""
    fallbacks: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON document (schemas/compile.json)."""
        return asdict(self)


def report(
    denoiser: Denoiser,
    lowering: Packed,
    built: Built,
    options: Options,
    target: Target,
    complete: Manifest,
    judged: Judged,
    predicted: dict[str, Any] | None,
    after: list[Record],
    expected: dict[str, Any] | None,
) -> Report:
    """Makes the report of a compilation.

    Args:
        denoiser: the model.
        lowering: the results of the passes.
        built: the results of the backend.
        options: of the compilation.
        target: of the artifact.
        complete: the artifact's manifest.
        judged: the judgement of the artifact.
        predicted: the predicted latency, or None.
        after: the records of what followed the passes.
        expected: the estimate, or None.
    """
    program, planned = lowering.program, lowering.planned
    parameters, stored = program.facts[PARAMETERS], complete["weights"]["payload_bytes"]
    return Report(
        weights={
            "average_bits": costs.average_bits(stored, parameters),
            "bytes": stored,
            "float_bytes": 4 * parameters,
        },
        activations={"average_bits": costs.activation_bits(planned)},
        quality=judged.quality,
        passes=[_taken(record) for record in lowering.records],
        after=[_taken(record) for record in after],
        estimate=expected,
        layers=layer_rows(planned),
        artifact={
            "bytes": sum(f["bytes"] for f in complete["files"].values()),
            "sha256": complete["artifact_sha256"],
        },
        cost=cost(complete),
        calibration=dict(complete["calibration"]),
        memory=built.memory,
        target=target.name,
        recipe=str(options.recipe) if options.pipeline is None else "custom",
        latency=predicted,
        pipeline=parser.to_text(lowering.passes),
        training=list(program.facts.get(TRAINING, ())),
        additivity=program.facts.get(ALLOCATION, {}).get("additivity"),
        reuse=program.facts.get(ALLOCATION, {}).get("reuse"),
        numerics={
            "mode": numerics_of(program),
            **numerics_choices(planned),
            "halves": planned.facts.get(STORED_HALVES, False),
        },
        fallbacks=dict(program.fallbacks),
        calls=judged.calls,
        notes=[*_notes(denoiser, lowering, built, options), *judged.notes],
    )


def _taken(record: Record) -> Taken:
    return Taken(
        name=record.name, seconds=record.seconds, cpu_seconds=record.cpu_seconds, peak_bytes=record.peak_bytes
    )


def _notes(denoiser: Denoiser, lowering: Packed, built: Built, options: Options) -> list[str]:
    """The notes for the user on the model, the calibration and the kernels."""
    asked = (options.steps, options.guidance, options.scheduler or options.prediction_type)
    differences = [] if options.calibration is None else calibration_file.notes(denoiser, options.calibration, *asked)
    notes = [*denoiser.notes, *differences, *lowering.program.facts.get(NOTES, ()), *built.facts.get("notes", ())]
    reused = dict(lowering.reused)
    if kernels := built.facts.get("from_cache"):
        reused[f"{kernels} of {built.facts['kernels']} kernels"] = 0.0
    if reused:
        saved = sum(reused.values())
        least = f", which took {saved:.0f} s of CPU time there" if saved > 1 else ""
        notes.append(f"an earlier run had left in the cache: {', '.join(reused)}{least}")
    rows = len(lowering.planned.facts[CALIBRATION].timesteps)
    more = denoiser.more_inputs
    if more is None and options.calibration is None:
        more = "raise --samples or --steps"
    elif more is None:
        enough = -(-ENOUGH_ROWS * 4 // 3)
        more = f"record {enough} rows or more, a quarter of which is held out (docs/calibration.md)"
    if rows < ENOUGH_ROWS and more:
        notes.append(f"calibrated on {rows} inputs only, which can cost several dB: {more}")
    return notes


def predicted_latency(latency: Latency | None, program: Program, facts: dict[str, Any]) -> dict[str, Any] | None:
    """Predicts the latency of a call in ms by the latency table; None without one.

    ``predicted_ms`` is the time of the compiled kernels or, where the table lacks some (``missing`` of them), of the
    plan. ``fixed_ms`` is the part of it that no weight format changes, ``average_ms`` what a step takes on average
    where some reuse.
    """
    planned = program.facts.get(LATENCY)
    if latency is None or latency.table is None or planned is None:
        return None
    table = latency.table
    found = predict(table, [row["problem"] for row in facts["schedule"]])
    return {
        "predicted_ms": planned["whole_ms"] if found.missing else found.ms,
        "missing": len(found.missing),
        "fixed_ms": planned["fixed_ms"],
        "budget_ms": planned["budget_ms"],
        "batch": table.batch,
        "threads": table.threads,
        "cpu": table.cpu,
        "table_sha256": table.sha256,
        **({"average_ms": planned["ms"]} if REUSE in program.facts else {}),
    }
