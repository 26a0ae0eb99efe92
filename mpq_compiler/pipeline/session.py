"""The state that the passes of a run share besides the program."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from mpq_compiler.quantization.calibration_files import CalibrationFiles
from mpq_compiler.quantization.fitting import FitCache
from mpq_compiler.quantization.requests import NONE, Requests
from mpq_compiler.quantization.rewrite_gain import Samples
from mpq_compiler.quantization.row_files import RowFiles
from mpq_compiler.support.execution import RunContext
from mpq_compiler.targets.numerics import NUMERICS

if TYPE_CHECKING:
    from torch import Tensor

    from mpq_compiler.frontend.denoiser import Denoiser
    from mpq_compiler.ir.findings import SensitivityTable
    from mpq_compiler.ir.program import Program


class Times(Protocol):
    """Microseconds of a call, by what decides on them."""

    @property
    def fixed(self) -> float:
        """The part of the time that no weight format changes."""

    @property
    def nodes(self) -> Mapping[str, float]:
        """What of that part each node of the program takes."""

    @property
    def layers(self) -> Mapping[str, Mapping[str, float]]:
        """The times of layers, by the path of the parameter and by format."""


class LayerTimes(Protocol):
    """A source of the times of layers on the target in each format (`latency.candidates`)."""

    def costs(self, program: Program, names: Sequence[str], dynamic: bool = False) -> Times:
        """The times of each layer in each of the formats; ``program`` is calibrated and has its time groups."""


@dataclass
class Session(RunContext):
    """The state that the passes of a run share besides the program."""

    denoiser: Denoiser | None = None
    calibration: dict[str, Tensor] | None = None
    """Recorded inputs by name; None: recorded by sampling."""
    sensitivity: SensitivityTable | None = None
    """A measured table; None: measured here."""
    plan: Mapping[str, str] | None = None
    """The choice of each layer as an allocation names it ("int4 u8"), where a plan is given."""
    latency: LayerTimes | None = None
    """Times of layers in each format on the target, where they are asked for."""
    numerics: tuple[str, ...] = NUMERICS
    """Numerics of attentions that the target has kernels for."""
    steps: int | None = None
    """Steps of the sampler, where the caller sets them."""
    requests: Requests = NONE
    """What the passes of the pipeline ask of each other."""
    fits: FitCache = dataclasses.field(default_factory=FitCache)
    """Fits of weights and activations, which programs of the run share."""
    calibrations: CalibrationFiles | None = None
    """Files of calibrations that took long, for a run that goes on where this one was killed; None: they are lost then.
    """
    rows: RowFiles | None = None
    """Files of rows that it took long to sample, likewise."""
    trajectories: dict[tuple[int, int], dict[str, Tensor]] = dataclasses.field(default_factory=dict)
    """Inputs that rewrites were tried on, by the number of trajectories and of steps: the next rewrite's too."""
    sampled: dict[tuple[int, ...], dict[str, Samples]] = dataclasses.field(default_factory=dict)
    """Rows that rewrites were tried on, by how they were sampled and by the name of the edge: the next rewrite's too.
    """
