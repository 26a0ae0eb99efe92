"""Measures what images lose where steps of a sampler take a part of the network as it was (`sampling.reuse`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.analysis.trajectory_error import PART, SEED, drawn_as
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import reuse
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.reuse import Functions, KeptSteps, Schedule, conditions_key, sources_of
from mpq_compiler.support.execution import batches


@dataclass(frozen=True)
class Option:
    """What the steps of a stretch do: the first of every so many computes all, the others reuse."""

    stretch: int
    interval: int
    order: int

    @property
    def name(self) -> str:
        """The option in words, as plans name it."""
        return f"every {self.interval}, order {self.order}"


@dataclass(frozen=True)
class ReuseLosses:
    """What each option loses at each cut, by itself."""

    timesteps: tuple[float, ...]
    stretches: tuple[tuple[int, int], ...]
    """The first step of each stretch, and the one behind its last."""
    losses: Mapping[reuse.Cut, Mapping[Option, float]]
    """Relative noise power in the unit of `sensitivity`: that of the output, weighted by what it costs images."""
    gain: float
    """The noise power of images over that unit."""

    def schedule(self, cut: reuse.Cut, chosen: Sequence[Option]) -> Schedule:
        """The schedule of options, one for each stretch that has any."""
        return schedule_of(cut, self.timesteps, self.stretches, chosen)

    def reused(self, option: Option) -> int:
        """The number of steps of an option that reuse."""
        begin, end = self.stretches[option.stretch]
        return _reused(end - begin, option.interval)


REUSE_LOSSES = Fact[ReuseLosses]("reuse-losses")


def stretches_of(steps: int, count: int) -> tuple[tuple[int, int], ...]:
    """Cuts so many steps into at most so many stretches of two or more, the longer ones first."""
    count = max(1, min(count, steps // 2))
    ends = np.cumsum([len(part) for part in np.array_split(np.arange(steps), count)]).tolist()
    return tuple(zip([0, *ends[:-1]], ends, strict=True))


def options_of(stretches: Sequence[tuple[int, int]], orders: Sequence[int]) -> list[Option]:
    """The options of all stretches: intervals that reuse more steps than the shorter ones, in each order."""
    found = []
    for number, (begin, end) in enumerate(stretches):
        most = 0
        for interval in range(2, end - begin + 1):
            if (count := _reused(end - begin, interval)) > most:
                most = count
                found += [Option(number, interval, order) for order in orders]
    return found


def _reused(length: int, interval: int) -> int:
    return length - -(-length // interval)


def schedule_of(
    cut: reuse.Cut, timesteps: Sequence[float], stretches: Sequence[tuple[int, int]], chosen: Sequence[Option]
) -> Schedule:
    """The schedule of options at a cut."""
    whole, orders = [True] * len(timesteps), [0] * len(timesteps)
    for option in chosen:
        begin, end = stretches[option.stretch]
        for step in range(begin, end):
            whole[step], orders[step] = (step - begin) % option.interval == 0, option.order
    return Schedule(cut.node, tuple(timesteps), sources_of(whole, timesteps, orders))


@dataclass
class Drawing:
    """Images for which some steps reuse, drawn from one noise and with one set of conditions."""

    session: Session
    steps: int
    count: int

    def __post_init__(self) -> None:
        denoiser = self.session.denoiser
        assert denoiser is not None
        self.denoiser: Denoiser = denoiser
        self.timesteps = tuple(float(t) for t in denoiser.scheduler.timesteps(self.steps))
        self._seed = self.session.seed + 3 * SEED + 2
        self._conditions = denoiser.conditioning.mixed(self.count, self._seed)

    def draw(self, model: Callable[..., np.ndarray]) -> np.ndarray:
        """The latents that a model draws, float32 [count, C, H, W]."""
        return drawn_as(self.denoiser, model, self._conditions, self.count, self.steps, self._seed)

    def run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of a program for the inputs of a call, in parts on the session's jobs."""
        types = {spec.name: spec.dtype for spec in program.inputs}
        given = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to(types[name]) for name in types}
        return torch.cat(self.session.map(lambda part: run(program, part), batches(given, PART))).numpy()


class MarkedDrawing:
    """Images of a program that keeps a value: without reuse, and by schedules whose first steps are as without."""

    def __init__(self, drawing: Drawing, program: Program, keeps: Collection[int]) -> None:
        """Draws the images without reuse, and records their calls.

        Args:
            drawing: noise and conditions.
            program: marked (`ir.reuse.mark`).
            keeps: the steps whose values are recorded; a schedule that begins to reuse later needs them.
        """
        self._drawing, self._program = drawing, program
        self._keeping, self._reusing = reuse.keeping(program), reuse.reusing(program)
        self._numbers = {time: step for step, time in enumerate(drawing.timesteps)}
        self._recorded: dict[tuple[int, bytes], np.ndarray] = {}

        def recorded(**inputs: np.ndarray) -> np.ndarray:
            found = drawing.run(self._keeping, inputs)
            self._recorded[self._call(inputs)] = found if self._step(inputs) in keeps else found[:, : self._size]
            return found[:, : self._size].reshape(-1, *self._shape)

        self._shape = tuple(shapes(program, 1)[operand(program.graph.output_node(), 0).name].shape[1:])
        self._size = math.prod(self._shape)
        self.whole = drawing.draw(recorded)
        """The latents without reuse."""

    def _step(self, inputs: Mapping[str, np.ndarray]) -> int:
        return self._numbers[float(np.asarray(inputs["timestep"]).flat[0])]

    def _call(self, inputs: Mapping[str, np.ndarray]) -> tuple[int, bytes]:
        return self._step(inputs), conditions_key(inputs, self._drawing.denoiser.latent)

    def by(self, schedule: Schedule) -> np.ndarray:
        """The latents by a schedule; its steps before the first that reuses are taken from the record."""
        first = next(step for step, sources in enumerate(schedule.sources) if sources)

        def known(inputs: Mapping[str, np.ndarray]) -> np.ndarray | None:
            return self._recorded[self._call(inputs)] if self._step(inputs) < first else None

        def whole(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            if (found := known(inputs)) is not None:
                return found[:, : self._size].reshape(-1, *self._shape)
            return self._drawing.run(self._program, inputs)

        def keeping(inputs: Mapping[str, np.ndarray]) -> np.ndarray:
            found = known(inputs)
            whole = found is not None and found.shape[1] > self._size  # with the value that is kept
            return found if found is not None and whole else self._drawing.run(self._keeping, inputs)

        functions = Functions(whole, keeping, lambda inputs: self._drawing.run(self._reusing, inputs))
        kept = reuse.kept_shape(self._program)
        return self._drawing.draw(
            KeptSteps(schedule, functions, self._shape, kept, self._drawing.denoiser.latent)
        )


def relative_error(drawn: np.ndarray, expected: np.ndarray) -> float:
    """The squared error of latents over the squared latents."""
    return noise_power(torch.from_numpy(drawn), torch.from_numpy(expected))
