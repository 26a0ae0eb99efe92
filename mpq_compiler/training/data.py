"""Training data: inputs and outputs of the float model along its sampling trajectories."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.analysis.time_weights import by_gains
from mpq_compiler.analysis.trajectory_error import PART, SEED
from mpq_compiler.frontend.calibration_file import held_out_rows, latent_numbers
from mpq_compiler.frontend.trajectories import record_teacher
from mpq_compiler.ir import costs
from mpq_compiler.ir.program import PLANNED, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.execution import batches

BATCH = 32
"""The number of calls in a step of training."""

MACS = 2.4e10
"""Multiply-accumulates of layers per second of training on two cores, those of the gradients included."""

HELD_OUT = 8
"""The number of held-out trajectories; of given calls one in so many is held out."""


@dataclass(frozen=True)
class Data:
    """Calls of the float model, to train on or to judge by."""

    inputs: dict[str, Tensor]
    """The inputs [N, ...] by name."""
    targets: Tensor
    """The float model's outputs [N, C, H, W]."""
    weights: Tensor | None = None
    """How much the error of each call counts, f32 [N]; None counts all alike."""
    stride: int | None = None
    """The distance in calls from one step of a trajectory to the next; None where the order is not known."""
    part: int = PART
    """The number of calls that a thread runs at a time."""

    def __len__(self) -> int:
        return len(self.targets)

    def select(self, index: Tensor) -> Data:
        """The calls at these indices."""
        weights = None if self.weights is None else self.weights[index]
        inputs = {name: x[index] for name, x in self.inputs.items()}
        return replace(self, inputs=inputs, targets=self.targets[index], weights=weights, stride=None)

    def before(self, index: Tensor, steps: int) -> list[dict[str, Tensor]]:
        """The inputs of the ``steps`` calls before those of ``index`` in their trajectories, the nearest first.

        The first call of a trajectory stands in for the calls before it. The list is empty where the order of the calls
        is not known.
        """
        found: list[dict[str, Tensor]] = []
        while self.stride is not None and len(found) < steps:
            index = torch.where(index < self.stride, index, index - self.stride)
            found.append({name: x[index] for name, x in self.inputs.items()})
        return found

    def weighted(self, gains: Sequence[tuple[float, float]]) -> Data:
        """Weights the calls' errors by gains at ascending timesteps (`time_weights.by_gains`), 1 on average."""
        weights = by_gains(self.inputs["timestep"], gains)
        return replace(self, weights=(weights / weights.mean()).float())

    def tensors(self) -> dict[str, Tensor]:
        """All that the outcome of training depends on, by names of their own, for a cache key."""
        return self.inputs | {"": self.targets} | ({} if self.weights is None else {" ": self.weights})

    def squared(self, values: Tensor) -> Tensor:
        """Sums the squares of values [N, ...] over each call and applies its weight, f32 [N]."""
        sums = values.square().flatten(1).sum(1)
        return sums if self.weights is None else sums * self.weights

    def parts(self) -> Iterator[Data]:
        """Splits the calls into parts, in order."""
        for start in range(0, len(self), self.part):
            yield self.select(torch.arange(start, min(start + self.part, len(self))))


def calls(
    session: Session, samples: int, steps: int, judging: int = HELD_OUT, taught: bool = True
) -> tuple[Data, Data]:
    """Records calls of the float model to train on, and others to judge by.

    Args:
        session: has the denoiser; with recorded inputs, their calls are split instead of sampling any.
        samples: the number of trajectories to train on.
        steps: of a trajectory.
        judging: the number of trajectories to judge by.
        taught: whether what is trained on recorded inputs reads the model's outputs; parts have targets of their own.
    """
    denoiser = session.denoiser
    assert denoiser is not None
    if session.calibration is not None:
        return _split(session.calibration, session, taught)
    with session.track("teaching", (samples + judging) * steps * denoiser.calls_per_step) as advance:
        teacher = _teacher(session, advance)
        seed = session.seed + SEED
        stride = samples * denoiser.calls_per_step
        return (
            Data(*record_teacher(denoiser, samples, steps, seed, teacher), stride=stride),
            Data(*record_teacher(denoiser, judging, steps, seed + 1, teacher)),
        )


def _split(given: Mapping[str, Tensor], session: Session, taught: bool) -> tuple[Data, Data]:
    """Calls to train on and to judge by of those that are given: all of them for both where none can be held out."""
    held_out = held_out_rows(latent_numbers(given), given["timestep"], HELD_OUT)
    train, judged = ({name: value[rows] for name, value in given.items()} for rows in (~held_out, held_out))
    sides = [train, judged] if bool(held_out.any()) else [train]
    asked = sides if taught else sides[-1:]
    with session.track("teaching", sum(len(side["timestep"]) for side in asked)) as advance:
        teacher = _teacher(session, advance)
        outputs = [torch.from_numpy(np.concatenate([teacher(**batch) for batch in batches(side)])) for side in asked]
    if len(asked) < len(sides):
        outputs.insert(0, torch.empty(len(train["timestep"]), 0))
    found = [Data(side, made) for side, made in zip(sides, outputs, strict=True)]
    return found[0], found[-1]


def _teacher(session: Session, advance: Callable[[int], None]) -> Callable[..., np.ndarray]:
    """The float model, which says how many calls it has answered."""
    denoiser = session.denoiser
    assert denoiser is not None

    def teacher(**inputs: Tensor) -> np.ndarray:
        output = denoiser(**inputs).numpy()
        advance(len(output))
        return output

    return teacher


def macs_of(program: Program) -> int:
    """The multiply-accumulates of a call."""
    return sum(costs.macs(program.facts[PLANNED]).values())


def affordable(macs: int, minutes: float) -> int:
    """The number of training steps that fit in ``minutes``, estimated from the size of the model alone."""
    return int(minutes * 60 * MACS / (3 * BATCH * max(macs, 1)))


def part_updates(macs: int, minutes: float, batch: int, rows: int) -> int:
    """The number of training steps of each part of a program that fit in ``minutes``, by the size of the model alone.

    Args:
        macs: of the whole program, which runs once on all calls, as the float program does.
        minutes: of training.
        batch: calls in a step.
        rows: calls to train on and to judge by.
    """
    return max(0, int((minutes * 60 * MACS / max(macs, 1) - 2 * rows) / (3 * batch)))


def trajectories(updates: int, epochs: int, steps: int) -> int:
    """The number of trajectories of ``steps`` steps with which ``updates`` see each call ``epochs`` times at most."""
    return -(-updates * BATCH // (epochs * steps))
