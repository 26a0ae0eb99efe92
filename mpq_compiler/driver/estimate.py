"""Estimates what a compilation takes, step by step, and fits it into the memory and the disk that there are.

Each pass reckons what it demands from the sizes of the laid-out program (`Pass.demand`); kernels and judging come on
top. Fewer jobs take less memory, and the result is the same with any number of them: so jobs are what is lowered.
"""

from __future__ import annotations

import math
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from mpq_compiler.driver import budgets
from mpq_compiler.driver.check import check
from mpq_compiler.driver.held_out import judged_on
from mpq_compiler.driver.judge import JUDGED_TOGETHER, REFERENCE_LEAST, REFERENCE_MACS, compared_together
from mpq_compiler.driver.lower import check_shapes, halves, load_denoiser, lower
from mpq_compiler.driver.options import Options, parse_shapes
from mpq_compiler.driver.resolve import resolve, with_role
from mpq_compiler.frontend import calibration_file
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.interpreter import single_threaded
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.sizes import Sizes
from mpq_compiler.pipeline.backend import Progress, backend_of
from mpq_compiler.pipeline.demand import Asked, Demand, Speed
from mpq_compiler.pipeline.manager import Record
from mpq_compiler.pipeline.passes import Pass, Role
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.support import usage
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets

SHARE = 0.8
"""The share of the free memory that a compilation may take where no limit is given."""
MARGIN = 1.1
"""The factor by which estimates of memory are too high rather than too low."""
WORKER = 100 << 20
"""Bytes of a process that compiles kernels."""
RUNNING = 100 << 20
"""Bytes that the process grows by when it runs the model for the first time, and keeps."""
COMPILING = 50 << 20
"""Bytes by which such a process grows while it compiles."""
KERNEL_STEPS = 5000.0
"""Small operators that stand for the time in which a kernel is compiled."""
KERNELS_OF_CALL = 0.38
"""Kernels for each call of an operator at a batch size, since equal calls share them."""
EXACT = 3.2
"""How much longer the packed program takes in the reference interpreter than the float model."""
EXACT_VALUES, EXACT_WEIGHT = 3, 12
"""How much larger its values are; bytes for each number of a weight that it multiplies with, in float64 and f32."""
ARTIFACT = 0.2
"""The time of the artifact as a part of the float model's."""
PREPARED = 1.0
"""Bytes of memory for each weight of the artifact that runs, in the order of its kernels."""


@dataclass(frozen=True)
class Step:
    """The estimate of a pass or of another step."""

    name: str
    cpu_seconds: float
    seconds: float
    peak_bytes: int
    """All memory of the compilation at the time."""
    disk_bytes: int
    """Bytes in `TMPDIR` when it has ended."""


@dataclass(frozen=True)
class Estimate:
    """What a compilation takes in so many jobs."""

    jobs: int
    steps: list[Step]

    @property
    def cpu_seconds(self) -> float:
        """CPU seconds of all steps."""
        return sum(step.cpu_seconds for step in self.steps)

    @property
    def seconds(self) -> float:
        """Seconds of all steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def peak_bytes(self) -> int:
        """The most memory at a time."""
        return max(step.peak_bytes for step in self.steps)

    @property
    def disk_bytes(self) -> int:
        """The most bytes in `TMPDIR`."""
        return max(step.disk_bytes for step in self.steps)

    def to_json(self) -> dict[str, object]:
        """The estimate as a JSON document (schemas/estimate.json)."""
        return {
            "jobs": self.jobs,
            "seconds": self.seconds,
            "cpu_seconds": self.cpu_seconds,
            "peak_bytes": self.peak_bytes,
            "disk_bytes": self.disk_bytes,
            "steps": [asdict(step) for step in self.steps],
        }


@dataclass(frozen=True)
class Workload:
    """What is left of a compilation when the program is laid out."""

    demands: list[tuple[str, Demand]]
    """The demand of each step, in order."""
    held: int
    """Bytes of memory that are held now."""
    workers: int
    """Bytes of each job's process that compiles kernels; 0 without any."""

    @staticmethod
    def of(program: Program, passes: Sequence[Pass], denoiser: Denoiser, options: Options) -> Workload:
        """The work of passes on a laid-out program, and of what follows them.

        Args:
            program: laid out.
            passes: those that are left.
            denoiser: the model.
            options: of the compilation.
        """
        target = targets.resolve(options.target)
        workers = backend_of(target).capabilities(target).standby
        allocator, calibrating = with_role(passes, Role.ALLOCATES), with_role(passes, Role.CALIBRATES)
        rows, held_out = _rows(denoiser, options, calibrating)
        sizes, requests = Sizes.of(program), Requests.all(step.requests() for step in passes)
        asked = Asked(
            sizes,
            rows,
            requests,
            getattr(allocator, "uniform", None),
            denoiser.conditioning.possible,
            bool(getattr(allocator, "measures_together", False)),
        )
        demands = [(step.name(), step.demand(replace(asked, earlier=passes[:i]))) for i, step in enumerate(passes)]
        if with_role(passes, Role.PACKS) is not None:
            sizes_of_batches = sum(map(len, parse_shapes(options.shapes).values()))
            kernels = KERNELS_OF_CALL * sizes.calls * sizes_of_batches if workers else 0
            compiled = Demand(steps=KERNEL_STEPS * kernels, traffic=8 * sizes.numbers, held=2 * COMPILING)
            demands.append(("kernels", compiled))
            demands.append(("judging", _judging(asked, held_out)))
        return Workload(demands, usage.own_memory(), WORKER if workers else 0)

    def estimate(self, jobs: int, speed: Speed) -> Estimate:
        """What it takes in so many jobs, at a speed of each."""
        found, disk, base = [], 0.0, self.held + RUNNING + jobs * self.workers
        for name, demand in self.demands:
            cpu, disk = demand.cpu_seconds(speed), disk + demand.disk
            seconds, peak = demand.elapsed(speed, jobs), int(MARGIN * (base + demand.memory(jobs)))
            found.append(Step(name, cpu, seconds, peak, int(disk)))
        return Estimate(jobs, found)


def _rows(denoiser: Denoiser, options: Options, calibrating: Pass | None) -> tuple[int, int]:
    """The numbers of inputs that are calibrated and judged on. Those that are given are not held behind this."""
    if options.calibration is not None:
        given = calibration_file.split(calibration_file.load(denoiser, options.calibration))
        rows, held_out = (len(next(iter(inputs.values()))) for inputs in given)
    else:
        recorded = {} if calibrating is None else calibrating.options()
        rows = held_out = recorded.get("samples", 1) * recorded.get("steps", 1) * denoiser.calls_per_step
    return rows, min(held_out, judged_on(denoiser))


def _judging(asked: Asked, inputs: int) -> Demand:
    """Running the float model and the artifact on held-out inputs, and the packed program on some of them."""
    sizes = asked.sizes
    layers = sum(layer.products for layer in sizes.layers)
    compared = min(inputs, max(REFERENCE_LEAST, int(REFERENCE_MACS / max(1, layers))))
    together = compared_together(compared)
    ran, exact = asked.running(inputs, JUDGED_TOGETHER), asked.running(compared, together) * EXACT
    exact = replace(exact, held=sizes.held_bytes(EXACT_VALUES * together, EXACT_WEIGHT))
    return ran * (1 + ARTIFACT) + exact + Demand(shared=PREPARED * sizes.numbers)


def estimate_denoiser(model: str | Path | Denoiser, progress: Progress | None = None, **options: Any) -> Estimate:
    """Estimates what a compilation takes; the model is traced for it, and the speed of a core here measured.

    Args:
        model: as of `compile_denoiser`.
        progress: opens progress bars, or None.
        options: fields of `Options`.

    Raises:
        UserError: what cannot be compiled, or takes more memory or disk than there is.
    """
    chosen = Options(**options)
    check(chosen)
    front, rest = halves(resolve(chosen))
    denoiser = load_denoiser(model, chosen)
    lowering = lower(denoiser, chosen, progress, front)
    if chosen.sensitivity is None:
        check_shapes(lowering.program, [*front, *rest])
    workload = Workload.of(lowering.program, rest, denoiser, chosen)
    jobs, _ = fit_jobs(workload, chosen.jobs, chosen.memory_limit)
    with single_threaded():
        found = workload.estimate(jobs, Speed.measured())
    return with_done(found, lowering.records)


def with_done(found: Estimate, records: Sequence[Record]) -> Estimate:
    """An estimate with what the passes before it took, of all records of passes."""
    names = {step.name for step in found.steps}
    done = [Step(r.name, r.cpu_seconds, r.seconds, r.peak_bytes, 0) for r in records if r.name not in names]
    return Estimate(found.jobs, [*done, *found.steps])


NOMINAL = Speed(5e10, 1.5e10, 5e4)
"""A speed for those who ask for memory, or whether it takes `LONG`."""


LONG = 20.0
"""The seconds of a compilation from which on the speed of a core is measured, in one, to say how long it takes."""


def foreseen(workload: Workload, jobs: int) -> Estimate:
    """What a compilation takes in so many jobs; its time is reckoned by the speed of a core here where it is `LONG`."""
    found = workload.estimate(jobs, NOMINAL)
    if found.seconds < LONG:
        return found
    with single_threaded():
        return workload.estimate(jobs, Speed.measured())


def for_report(expected: Estimate, records: Sequence[Record]) -> dict[str, object] | None:
    """What `foreseen` gave before passes ran, with those before it, as JSON; None where it is less than `LONG`."""
    return None if expected.seconds < LONG else with_done(expected, records).to_json()


def fit_jobs(workload: Workload, jobs: int, limit: str | None) -> tuple[int, str | None]:
    """The number of jobs with which a compilation fits into the memory, and a sentence where that lowered it.

    Args:
        workload: what is to be done.
        jobs: the most jobs.
        limit: of the memory, as users write it; None takes `SHARE` of what is free.

    Raises:
        UserError: one job takes more, or the disk is too small; it says the least that would do.
    """
    most = math.floor(SHARE * (usage.free_memory() + workload.held)) if limit is None else budgets.parse_memory(limit)
    said = f"--memory-limit {limit}" if limit is not None else f"{SHARE:.0%} of the free memory ({_gigabytes(most)})"
    peaks = {count: workload.estimate(count, NOMINAL).peak_bytes for count in range(1, jobs + 1)}
    fitting = [count for count, peak in peaks.items() if peak <= most]
    if not fitting:
        raise UserError(
            f"{said} is less than the compilation takes: about {_gigabytes(peaks[1], up=True)} with --jobs 1; give "
            f"--memory-limit {_gigabytes(peaks[1], up=True)} or more"
        )
    room, needed = shutil.disk_usage(tempfile.gettempdir()).free, workload.estimate(1, NOMINAL).disk_bytes
    if needed > room:
        raise UserError(
            f"about {_gigabytes(needed)} go to '{tempfile.gettempdir()}' on the way, which has {_gigabytes(room)}: "
            "free some space there, or name another folder with TMPDIR"
        )
    if fitting[-1] == jobs:
        return jobs, None
    return fitting[-1], (
        f"{said}: {fitting[-1]} job{'s' if fitting[-1] > 1 else ''} in place of {jobs}, which would take about "
        f"{_gigabytes(peaks[jobs])}"
    )


def _gigabytes(count: float, up: bool = False) -> str:
    """Bytes as an option takes them, ``2.3GB``; ``up`` never rounds down."""
    tenths = count / 1e8
    return f"{(math.ceil(tenths) if up else round(tenths)) / 10:g}GB"
