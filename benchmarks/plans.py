"""Plans of one model judged side by side: programs of their passes, the output's noise, images from several seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import fx

from benchmarks.machine import provenance
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.trajectory_error import TrajectoryError
from mpq_compiler.driver import judge, options
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import costs
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.requests import Requests
from mpq_compiler.quantization.statistics import Statistic

SEEDS = (101, 102, 103)
"""Of the images: noise by which no plan was chosen."""


class Judge:
    """Runs passes on a model, and judges what comes out against its float program.

    front: the passes of the float program, which others start from; it is `floats`
    steps: in which the model draws; None: as many as are usual
    """

    def __init__(
        self,
        model: str,
        wanted: frozenset[Statistic],
        front: str,
        images: int,
        progress: Any = None,
        steps: int | None = None,
    ) -> None:
        self.model = denoiser.load(model)
        self.session = Session(self.model, progress=progress, requests=Requests(wanted), steps=steps)
        self.held_out = judge.held_out(self.model, options.Options(steps=steps))
        self.present: set[str] = set()
        self.floats = self.passed(front)
        self.reference = run(self.floats, self.held_out)
        galleries = (TrajectoryError.drawn(replace(self.session, seed=seed), images) for seed in SEEDS)
        self.galleries = [gallery for gallery in galleries if gallery is not None]

    def passed(self, pipeline: str, program: Program | None = None) -> Program:
        """The program after the passes; from nothing, that of the model."""
        passes = parser.parse(pipeline)
        self.present |= {p for each in passes for p in each.provides}
        start = program or Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        return manager.run_pipeline(passes, start, self.session, present=self.present)[0]

    def judged(self, plan: Program, program: Program) -> dict[str, Any]:
        """True bits of a plan, and in dB the noise of its program: of the output, and of the images of each seed."""
        return {
            "true_bits": costs.average_bits(costs.stored_bytes(plan), plan.facts[PARAMETERS]),
            "output_db": -10 * math.log10(noise_power(run(program, self.held_out), self.reference)),
            "image_db": [-10 * math.log10(gallery.noise(program)) for gallery in self.galleries],
        }


def decibels(row: dict[str, Any]) -> str:
    """What a row has in dB, for the terminal."""
    images = ", ".join(f"{db:.2f}" for db in row["image_db"])
    return f"output {row['output_db']:.2f} dB, images {images} dB"


def columns(row: dict[str, Any]) -> list[str]:
    """True bits, output and images (mean, least and most) of a row, as cells of a table."""
    images = row["image_db"]
    spread = f"{statistics.mean(images):.1f} ({min(images):.1f} .. {max(images):.1f})"
    return [f"{row['true_bits']:.2f}", f"{row['output_db']:.1f}", spread]


def written(rows: Iterator[dict[str, Any]], path: Path, **about: Any) -> Sequence[dict[str, Any]]:
    """The rows, with what is said about them and the machine; what the file held stays until all are there."""
    found: list[dict[str, Any]] = []
    beside = path.with_suffix(".part")  # with the rows so far
    for row in rows:
        found.append(row)
        beside.write_text(json.dumps({**provenance(), **about, "rows": found}, indent=1) + "\n")
    beside.replace(path)
    return found
