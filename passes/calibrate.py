"""Calibration: records inputs and collects statistics."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from mpq_compiler.frontend import trajectories
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.demand import VALUE_PASSES, Asked, Demand
from mpq_compiler.pipeline.passes import Contract, Pass, Role
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import (
    CALIBRATION,
    GRAM,
    GRAM_COLUMNS,
    GRAM_ROWS,
    PART,
    RANGE,
    VALUES,
    VALUES_PER_EDGE,
    VALUES_PER_INPUT,
    Calibration,
    Collector,
    Statistic,
    collect,
)
from mpq_compiler.support.errors import UserError


@dataclass(frozen=True)
class Calibrate(Pass):
    """Records the denoiser's inputs along sampling trajectories, and measures each tensor that may be quantized.

    The inputs come from the float model's own sampling, all time steps of ``samples`` trajectories of ``steps`` steps,
    or from `--calibration`. Statistics are what later passes ask for, collected in one run; what sees the time and no
    image is measured at times between the recorded ones, too (docs/calibration.md). The graph stays as it is:

        (no change; facts["calibration"] holds inputs, ranges, values and second moments)
      =>
        (no change)
    """

    contract: ClassVar[Contract] = Contract.IDENTICAL
    role: ClassVar[Role | None] = Role.CALIBRATES
    settings: ClassVar[Mapping[str, str]] = {"samples": "samples", "steps": "steps"}
    requires: ClassVar[frozenset[str]] = frozenset({"channels-last"})
    provides: ClassVar[frozenset[str]] = frozenset({"calibration"})

    samples: int = 32
    """Trajectories to record."""
    steps: int = 20
    """Steps of a trajectory."""

    def __post_init__(self) -> None:
        for option in ("samples", "steps"):
            self.require(option, 1)

    def run(self, program: Program, session: Session) -> Program:
        assert session.denoiser is not None
        program = program.fork()
        session.sampled.clear()  # rewrites come before
        if not program.quantizable:
            raise UserError(f"{program.model} has no linear or conv2d layer that could be quantized")
        wanted = session.requests.statistics or frozenset({RANGE, VALUES, GRAM})
        calibration = self._known(program, session, wanted)
        for name, edge in calibration.edges.items():
            if not bool(torch.isfinite(edge.low).all() and torch.isfinite(edge.high).all()):
                raise UserError(f"{program.model} gives values that are not finite at '{name}' during calibration")
        program.facts[CALIBRATION] = calibration
        return program

    def _known(self, program: Program, session: Session, wanted: frozenset[Statistic]) -> Calibration:
        """The calibration that a run which was killed has left, or else a new one."""
        files, attention = session.calibrations, session.requests.attention
        if files is None:
            return self._measured(program, session, wanted)
        assert session.denoiser is not None
        given = session.denoiser, session.calibration, self.samples, self.steps, session.seed
        sampled, decided = trajectories.deciding(*given)
        place = files.place(program, decided, wanted, attention, f"{session.seed} {session.device} {sampled}")
        return files.known(place, lambda: self._measured(program, session, wanted), session.reuse, program.note)

    def _measured(self, program: Program, session: Session, wanted: frozenset[Statistic]) -> Calibration:
        if session.calibration is None:
            return self._sampled(program, session, wanted)
        return collect(program, session.calibration, wanted, session, session.requests.attention)

    def demand(self, asked: Asked) -> Demand:
        sizes, wanted = asked.sizes, asked.requests.statistics
        read = {(layer.edge, layer.columns): layer for layer in sizes.layers}.values()
        sampled = {layer: min(GRAM_ROWS, asked.rows * layer.positions) for layer in read}
        beside = {layer: min(layer.columns, GRAM_COLUMNS) if GRAM in wanted else 1 for layer in read}
        values = max(VALUES_PER_EDGE, asked.rows * VALUES_PER_INPUT) if VALUES in wanted else asked.rows
        counted = Demand(
            products=sum(rows * layer.columns * beside[layer] for layer, rows in sampled.items()),
            traffic=4 * VALUE_PASSES * sum(rows * layer.columns for layer, rows in sampled.items()),
            held=8 * max((rows * layer.columns for layer, rows in sampled.items()), default=0) * PART / asked.rows,
            disk=4 * sum(layer.columns * beside[layer] for layer in read) + 4 * values * len({r.edge for r in read}),
        )
        return asked.running(asked.rows, PART) + counted

    def _sampled(self, program: Program, session: Session, wanted: frozenset[Statistic]) -> Calibration:
        """Measured while the program itself is what the sampler draws with: the float model runs once."""
        denoiser = session.denoiser
        assert denoiser is not None
        total = self.samples * self.steps * denoiser.calls_per_step
        collector = Collector(program, wanted, total, session, session.requests.attention)

        def model(**inputs: np.ndarray) -> np.ndarray:
            arrays = {name: torch.from_numpy(np.ascontiguousarray(x)) for name, x in inputs.items()}
            output = collector.measure({name: x.to(denoiser.input_specs[name].dtype) for name, x in arrays.items()})
            advance(len(output))
            return output.numpy()

        with session.track("calibrating", total) as advance:
            inputs = trajectories.record_calibration(
                denoiser, self.samples, self.steps, session.seed, batch=self.samples, model=model
            )
        return collector.calibration(inputs)
