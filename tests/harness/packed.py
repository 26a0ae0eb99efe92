"""Packed programs and artifacts of small denoisers, made once a test session: what backends are tested on.

>>> packed = tests.harness.packed.program("unet2d")            # a tiny configuration, or "fashion-unet"
>>> packed.denoiser, packed.planned, packed.program    # the float model, its plan, the packed program
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.artifact import bundle
from mpq_compiler.frontend import denoiser as denoisers
from mpq_compiler.frontend import trajectories
from mpq_compiler.ir.program import PARAMETERS, Program, Stage, TensorStore
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.backend import Built
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support import cache
from mpq_compiler.targets.table import Target
from tests.harness import tiny

BUNDLED = "fashion-unet"
PIPELINE = (
    "trace,layout,{}calibrate,time-groups,bit-allocation{{uniform={}}},insert-fake-quant,residual-branch,low-rank,"
    "round-weights,fold-fake-quant,fuse-epilogues"
)


@dataclass(frozen=True)
class Packed:
    denoiser: denoisers.Denoiser
    laid_out: Program
    planned: Program
    program: Program
    inputs: dict[str, Tensor]
    """64 teacher-forced inputs of mixed timesteps: of a sampling trajectory for the bundled model, else random."""


@functools.cache
def program(name: str, weights: str = "int8", rewrites: str = "") -> Packed:
    """The denoiser after the whole pipeline, all weights in one format; ``rewrites`` are passes behind `layout`.

    With rewrites all texts begin with one token, as `bos-split` needs it.
    """
    torch.set_num_threads(1)
    bundled = name == BUNDLED
    size = tiny.SIZES.get(name)
    model = denoisers.load(name) if bundled else denoisers.wrap(tiny.model(name), name=name, size=size)
    session = Session(model)
    generator = torch.Generator().manual_seed(0)
    if bundled:
        calls = trajectories.record_calibration(model, 16, 10, seed=1)
        rows = torch.randperm(len(calls["timestep"]), generator=generator)
        session.calibration = {key: value[rows[64:128]] for key, value in calls.items()}
        inputs = {key: value[rows[:64]] for key, value in calls.items()}
    else:
        session.calibration = model.random_inputs(16, generator)
        inputs = model.random_inputs(64, generator)
    if rewrites and "encoder_hidden_states" in inputs:
        for values in (session.calibration, inputs):
            values["encoder_hidden_states"][:, 0] = torch.linspace(-3, 3, values["encoder_hidden_states"].shape[-1])
    stages: dict[str, Program] = {}
    final, _ = manager.run_pipeline(
        parser.parse(PIPELINE.format(rewrites and f"{rewrites},", weights)),
        Program(fx.Graph(), TensorStore(), (), Stage.FLOAT),
        session,
        [lambda index, each, before, after: stages.__setitem__(each.name(), after)],
    )
    return Packed(model, stages["layout"], stages["bit-allocation"], final, inputs)


def sqnr_db(y: Tensor, reference: Tensor) -> float:
    return -10 * math.log10(max(noise_power(y, reference), 1e-20))


def write(
    path: Path,
    program: Program,
    target: Target,
    built: Built,
    model: Mapping[str, object] = MappingProxyType({}),
    assumptions: Sequence[object] = (),
) -> Path:
    """An artifact of a built program, with just what the runtime asks for; `model` has more of its entry."""
    manifest: dict[str, Any] = {
        "name": path.stem,
        "target": {
            "name": target.name,
            "arch": target.arch,
            "backend": target.backend,
            "features": list(target.features),
        },
        "model": {"class": "Test", "config": {}, "parameters": program.facts[PARAMETERS], **model},
        "functions": built.functions,
        "tensors": built.entries,
        "versions": {},
    }
    if built.prepare is not None:
        manifest["prepare"] = built.prepare
    if assumptions:
        manifest["assumptions"] = [*assumptions]
    if built.parts:
        manifest["parts"] = built.parts
    bundle.write(path, manifest, built.files, built.tensors)
    return path


def kernel_cache() -> Path:
    """The run's folder of compiled kernels and measurements, shared by all suites and workers."""
    return cache.folder()


def take(inputs: dict[str, Tensor], rows: Sequence[int] | slice) -> dict[str, Tensor]:
    return {name: value[rows] for name, value in inputs.items()}
