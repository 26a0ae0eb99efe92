"""Measures what images lose where steps of a sampler take a part of the network as it was (`sampling.reuse`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from mpq_compiler.analysis.noise_power import noise_power, rounded
from mpq_compiler.analysis.trajectory_error import PART, SEED, drawn_as
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir import reuse
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.loop import NotFinite
from mpq_compiler.sampling.reuse import (
    SLOTS,
    Functions,
    Inputs,
    KeptSteps,
    Schedule,
    conditions_key,
    extrapolated,
    of_compiled,
    of_outputs,
    sources_of,
)
from mpq_compiler.support.execution import batches

LENGTHS = (1, 2, 3, 4, 6, 9)
"""How many steps in a row may reuse."""
LONGEST = 0.25
"""The share of all steps that may reuse in a row."""
RIDGE = 1e-4
"""What draws fitted weights to those of a line through the last two values, relative to the values' mean square."""
GRID = 2.0**-10
"""The grid of fitted weights: what is off it is 70 dB below the values, and last bits of a sum seldom decide on it."""
LEAST, FAR = 1e-2, 1e3
"""The least error by which an image counts, of the mean one, and the error where drawing gives no images."""
DIFFERENCE = 1e-2
"""By how much a weight changes where it is measured how images change with it."""


@dataclass(frozen=True, order=True)
class Gap:
    """A step that computes all, and how many behind it reuse, until the next one that computes all."""

    begin: int
    length: int

    @property
    def end(self) -> int:
        """The step behind it."""
        return self.begin + self.length + 1


@dataclass(frozen=True)
class ReuseLosses:
    """What each gap loses at each cut, by itself."""

    timesteps: tuple[float, ...]
    losses: Mapping[reuse.Cut, Mapping[Gap, float]]
    """Relative noise power in the unit of `sensitivity`: that of the output, weighted by what it costs images."""
    gain: float
    """The noise power of images over that unit."""

    def schedule(self, cut: reuse.Cut, gaps: Sequence[Gap]) -> Schedule:
        """The schedule in which these gaps reuse, with extrapolated values."""
        return schedule_of(cut, self.timesteps, gaps)


REUSE_LOSSES = Fact[ReuseLosses]("reuse-losses")


def gaps_of(steps: int) -> list[Gap]:
    """All gaps of so many steps."""
    lengths = [length for length in LENGTHS if length <= max(1, LONGEST * steps)]
    return [Gap(begin, length) for length in lengths for begin in range(steps - length)]


def some_gaps(steps: int, places: int) -> list[Gap]:
    """Gaps that stand for all: of each length those at so many places, the first and the last among them."""
    found = []
    by_length: dict[int, list[Gap]] = {}
    for gap in gaps_of(steps):
        by_length.setdefault(gap.length, []).append(gap)
    for several in by_length.values():
        chosen = np.linspace(0, len(several) - 1, min(places, len(several))).round().astype(int)
        found += [several[number] for number in dict.fromkeys(chosen.tolist())]
    return found


def of_all_gaps(measured: Mapping[Gap, float], steps: int) -> dict[Gap, float]:
    """The loss of every gap: logarithms between those of the nearest that were measured, of the same length."""
    known: dict[int, list[tuple[int, float]]] = {}
    for gap, loss in sorted(measured.items()):
        known.setdefault(gap.length, []).append((gap.begin, math.log(max(loss, 1e-30))))
    found = {}
    for gap in gaps_of(steps):
        begins, logarithms = zip(*known[gap.length], strict=True)
        found[gap] = measured.get(gap) or rounded(math.exp(float(np.interp(gap.begin, begins, logarithms))))
    return found


def schedule_of(cut: reuse.Cut, timesteps: Sequence[float], gaps: Sequence[Gap]) -> Schedule:
    """The schedule in which gaps reuse the value of a cut, extrapolated."""
    whole = [True] * len(timesteps)
    for gap in gaps:
        whole[gap.begin + 1 : gap.end] = [False] * gap.length
    return Schedule(cut.node, tuple(timesteps), sources_of(whole, timesteps))


def schedule_of_one(cut: reuse.Cut, timesteps: Sequence[float], gap: Gap) -> Schedule:
    """The schedule in which one gap reuses: from steps as far apart as where all gaps before are of its length."""
    computed = range(gap.begin, -1, -gap.length - 1)[:SLOTS]
    sources = [
        extrapolated(step, computed, timesteps) if gap.begin < step < gap.end else ()
        for step in range(len(timesteps))
    ]
    return Schedule(cut.node, tuple(timesteps), tuple(sources))


@dataclass
class Drawing:
    """Images for which some steps reuse, drawn from one noise and with one set of conditions."""

    session: Session
    steps: int
    count: int
    fold: int = 0
    """Another one has other noise and other conditions."""

    def __post_init__(self) -> None:
        denoiser = self.session.denoiser
        assert denoiser is not None
        self.denoiser: Denoiser = denoiser
        self.timesteps = tuple(float(t) for t in denoiser.scheduler.timesteps(self.steps))
        self._seed = self.session.seed + 3 * SEED + 2 + self.fold
        self._conditions = denoiser.conditioning.mixed(self.count, self._seed)

    def draw(self, model: Callable[..., np.ndarray]) -> np.ndarray:
        """The latents that a model draws, float32 [count, C, H, W]."""
        return drawn_as(self.denoiser, model, self._conditions, self.count, self.steps, self._seed)

    def run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        """The output of a program for the inputs of a call, in parts on the session's jobs."""
        types = {spec.name: spec.dtype for spec in program.inputs}
        given = {name: torch.from_numpy(np.ascontiguousarray(inputs[name])).to(types[name]) for name in types}
        return torch.cat(self.session.map(lambda part: run(program, part), batches(given, PART))).numpy()


Given = tuple[np.ndarray, np.ndarray | None]
"""What a call gave: the output, and the value that is kept where it was asked for."""
Calls = dict[tuple[int, bytes], Given]
"""What calls gave, by step and conditions."""


class MarkedDrawing:
    """Images of a program that keeps a value: without reuse, and by schedules whose first steps are as without."""

    def __init__(self, drawing: Drawing, program: Program, keeps: Collection[int]) -> None:
        """Draws the images without reuse, and records their calls.

        Args:
            drawing: noise and conditions.
            program: marked (`ir.reuse.mark`), or one whose output is kept.
            keeps: the steps whose values are recorded; a schedule that begins to reuse later needs them.
        """
        self._drawing = drawing
        self._functions = _functions(drawing, program)
        self._numbers = {time: step for step, time in enumerate(drawing.timesteps)}
        self._recorded: Calls = {}

        def recorded(**inputs: np.ndarray) -> np.ndarray:
            found: np.ndarray
            found, value = self._functions.keeping(inputs)
            self._recorded[self._call(inputs)] = found, value if self._step(inputs) in keeps else None
            return found

        self.whole = drawing.draw(recorded)
        """The latents without reuse."""

    def _step(self, inputs: Mapping[str, np.ndarray]) -> int:
        return self._numbers[float(np.asarray(inputs["timestep"]).flat[0])]

    def _call(self, inputs: Mapping[str, np.ndarray]) -> tuple[int, bytes]:
        return self._step(inputs), conditions_key(inputs, self._drawing.denoiser.latent)

    def by(self, schedule: Schedule) -> np.ndarray:
        """The latents by a schedule; its steps before the first that reuses are taken from the record."""
        return self._drawn(schedule, self._functions.reusing)[0]

    def fitted(self, schedule: Schedule) -> tuple[Schedule, np.ndarray]:
        """The schedule with fitted weights, and the latents by it.

        The weights of a step are those with which the kept values come nearest to what would have been computed, in
        least squares over the images as they are drawn with reuse before it; under guidance over those of the first
        call. Of twenty steps of the bundled UNet in which ten reuse that is worth 8 dB over extrapolation.
        """
        weights: dict[int, list[float]] = {}

        def reusing(inputs: Inputs, values: Sequence[np.ndarray], line: Sequence[float]) -> np.ndarray:
            step = self._step(inputs)
            if step not in weights:
                _, computed = self._functions.keeping(inputs)
                weights[step] = fit_weights(values, computed, line[: len(schedule.sources[step])])
            chosen = [*weights[step], *[0.0] * (SLOTS - len(weights[step]))]
            found: np.ndarray = self._functions.reusing(inputs, values, chosen)
            return found

        drawn, _ = self._drawn(schedule, reusing)
        return schedule.weighted(weights), drawn

    def refined(self, schedule: Schedule, rounds: int) -> tuple[Schedule, np.ndarray]:
        """The schedule with weights by which images come nearest to those without reuse, and the latents by it.

        Of all steps together: what one step gets wrong a later one can make up for. Least squares in the error of the
        latents in which drawing ends, by a trust region (`scipy.optimize.least_squares`) from the schedule's weights
        on. An image counts by the inverse of its error there: of some images, which are about to become others, the
        error is a hundred times that of most. Of twenty steps of the bundled UNet in which eight reuse all of it is
        worth 6 dB over `fitted`.

        Args:
            schedule: `fitted`.
            rounds: how often images are drawn by other weights, at most, and their slopes measured.
        """
        from scipy.optimize import least_squares

        steps = [step for step, sources in enumerate(schedule.sources) for _ in sources]
        reusing = self._functions.reusing
        apart = (self.by(schedule).astype(np.float64) - self.whole).reshape(len(self.whole), -1)
        norms = np.linalg.norm(apart, axis=1)
        scale = np.maximum(norms, max(LEAST * norms.mean(), np.finfo(np.float32).tiny)) * math.sqrt(len(apart))

        def weighted(numbers: np.ndarray) -> Schedule:
            weights: dict[int, list[float]] = {}
            for step, number in zip(steps, numbers, strict=True):
                weights.setdefault(step, []).append(float(number))
            return schedule.weighted(weights)

        def scaled(latents: np.ndarray, others: np.ndarray) -> np.ndarray:
            difference = (latents.astype(np.float64) - others).reshape(apart.shape)
            found: np.ndarray = (difference / scale[:, None]).reshape(-1)
            return found

        def error(numbers: np.ndarray) -> np.ndarray:
            try:
                return scaled(self.by(weighted(numbers)), self.whole)
            except NotFinite:  # a step too far, which the trust region takes back
                return np.full(apart.size, FAR)

        def slopes(numbers: np.ndarray) -> np.ndarray:
            base, calls = self._drawn(weighted(numbers), reusing)
            columns = np.empty((base.size, len(steps)))
            for place, step in enumerate(steps):
                changed = weighted(numbers + DIFFERENCE * (np.arange(len(steps)) == place))
                moved, _ = self._drawn(changed, reusing, calls, step)
                columns[:, place] = scaled(moved, base) / DIFFERENCE
                advance(1)
            return columns

        start = np.array([weight for sources in schedule.sources for _, weight in sources])
        with self._drawing.session.track("fitting weights of kept values", rounds * len(steps)) as advance:
            found = weighted(GRID * np.round(least_squares(error, start, slopes, max_nfev=rounds).x / GRID))
        return found, self.by(found)

    def _drawn(
        self,
        schedule: Schedule,
        reusing: Callable[[Inputs, Sequence[np.ndarray], Sequence[float]], np.ndarray],
        known: Calls | None = None,
        begin: int | None = None,
    ) -> tuple[np.ndarray, Calls]:
        """The latents by a schedule, and its calls.

        Args:
            schedule: what each step computes.
            reusing: the function of steps that reuse.
            known: the calls of the steps before ``begin``; those without reuse by default.
            begin: the first step that is another; the first that reuses by default.
        """
        if known is None or begin is None:
            known, begin = self._recorded, next(step for step, sources in enumerate(schedule.sources) if sources)
        calls: Calls = {}

        def once(inputs: Inputs, valued: bool, compute: Callable[[], Given]) -> Given:
            call = self._call(inputs)
            found = known.get(call) if self._step(inputs) < begin else None
            if found is None or (valued and found[1] is None):
                found = compute()
            calls[call] = found
            return found

        def whole(inputs: Inputs) -> np.ndarray:
            return once(inputs, False, lambda: (np.asarray(self._functions.whole(inputs)), None))[0]

        def keeping(inputs: Inputs) -> tuple[np.ndarray, np.ndarray]:
            output, value = once(inputs, True, lambda: self._functions.keeping(inputs))
            assert value is not None
            return output, value

        def again(inputs: Inputs, values: Sequence[np.ndarray], weights: Sequence[float]) -> np.ndarray:
            return once(inputs, False, lambda: (reusing(inputs, values, weights), None))[0]

        functions = Functions(whole, keeping, again)
        return self._drawing.draw(KeptSteps(schedule, functions, self._drawing.denoiser.latent)), calls


def _functions(drawing: Drawing, program: Program) -> Functions:
    """The functions of a marked program; of one without a mark the output is kept."""
    if reuse.marked(program) is None:
        return of_outputs(partial(drawing.run, program))
    programs = program, reuse.keeping(program), reuse.reusing(program)
    whole, keeping, reusing = (partial(drawing.run, each) for each in programs)
    output = tuple(shapes(program, 1)[operand(program.graph.output_node(), 0).name].shape[1:])
    return of_compiled(whole, keeping, reusing, output, reuse.kept_shape(program))


def fit_weights(kept: Sequence[np.ndarray], computed: np.ndarray, start: Sequence[float]) -> list[float]:
    """The weights of kept values with the least squared error of their sum, drawn a little to where they start.

    Args:
        kept: the values, each [B, ...], at least as many as there are weights.
        computed: what they stand for [B, ...].
        start: the weights of a line through the last values.
    """
    count = len(start)
    gram, right = np.zeros((count, count)), np.zeros(count)
    for sample, expected in enumerate(computed):
        each = np.stack([value[sample].reshape(-1) for value in kept[:count]]).astype(np.float64)
        gram += each @ each.T
        right += each @ (expected.reshape(-1) - np.asarray(start) @ each)
    gram += RIDGE * max(np.trace(gram) / count, np.finfo(np.float64).tiny) * np.eye(count)
    found = np.asarray(start) + np.linalg.solve(gram, right)
    return [float(GRID * np.round(weight / GRID)) for weight in found]


def relative_error(drawn: np.ndarray, expected: np.ndarray) -> float:
    """The squared error of latents over the squared latents."""
    return noise_power(torch.from_numpy(drawn), torch.from_numpy(expected))


def error_of_each(drawn: np.ndarray, expected: np.ndarray) -> np.ndarray:
    """The squared error of each image over the squared latents of all, whose mean is `relative_error`: float64 [N]."""
    apart = ((drawn.astype(np.float64) - expected) ** 2).reshape(len(drawn), -1).sum(axis=1)
    found: np.ndarray = apart * len(drawn) / (expected.astype(np.float64) ** 2).sum()
    return found
