"""The error of a program's images: it draws from the float model's noise, with the float model's sampler."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.sampling.conditioning import Conditions
from mpq_compiler.sampling.loop import Call
from mpq_compiler.support.execution import batches

PART = 16
"""The number of inputs that a thread runs at a time; parts are summed in their order."""

SEED = 1 << 20
"""An offset of the seed, for noise that neither calibration nor evaluation draws."""

IMAGE_STEPS = 10
"""The number of sampling steps of a held-out image, at most."""


def runs_of_gains(steps: int) -> int:
    """How often `TrajectoryError.gains` runs a model, and what draws its images, in so many steps.

    Once in a step for the images, once in each for the program, and in those behind it for what becomes of its error.
    """
    return 2 * steps + steps * (steps - 1) // 2


@dataclass
class TrajectoryError:
    """Images of the float model, by which programs are judged, or trained."""

    denoiser: Denoiser
    conditions: Any
    count: int
    seed: int
    session: Session
    reference: np.ndarray
    outputs: list[np.ndarray]
    """The float model's outputs, call by call, while the reference was drawn."""

    @property
    def steps(self) -> int:
        """The number of sampling steps: `IMAGE_STEPS`, or as few as the model is compiled for."""
        return min(IMAGE_STEPS, self.session.steps or IMAGE_STEPS)

    @classmethod
    def drawn(cls, session: Session, count: int, number: int = 0) -> TrajectoryError | None:
        """Draws the float model's images; None where ``count`` is 0, or the model's conditions cannot be made.

        Images of another ``number``, from 0, are others.
        """
        denoiser = session.denoiser
        assert denoiser is not None
        if not count or not denoiser.conditioning.possible:
            return None
        seed = session.seed + SEED * (1 + number) + 2
        made = cls(denoiser, denoiser.conditioning.mixed(count, seed), count, seed, session, np.empty(0), [])

        def model(**inputs: np.ndarray) -> np.ndarray:
            made.outputs.append(denoiser(**inputs).numpy())
            return made.outputs[-1]

        made.reference = made.draw(model)
        return made

    @property
    def power(self) -> float:
        """The mean, over the images, of the float model's squared latents."""
        return float(np.square(self.reference.astype(np.float64)).sum() / self.count)

    def noise(self, program: Program) -> float:
        """The squared error of the program's latents over the float model's squared latents."""
        error = self._error(self._drawn_by(program))
        return float(error / np.square(self.reference.astype(np.float64)).sum())

    def typical_noise(self, program: Program) -> float:
        """The geometric mean, over the images, of the squared error over the float model's mean squared latents.

        Of a few images in a hundred the sampler takes another way altogether: they decide on the sum of errors, by
        chance, and not on this.
        """
        return geometric_mean(self.relative(self._drawn_by(program)))

    def relative(self, drawn: np.ndarray) -> np.ndarray:
        """The squared error of each image over the `power`, float64 [count]."""
        each = np.square(drawn.astype(np.float64) - self.reference).reshape(self.count, -1).sum(1)
        relative: np.ndarray = each / self.power
        return relative

    def gains(self, program: Program) -> list[tuple[float, float]]:
        """Measures how much an error at each timestep costs images: (timestep, gain), by ascending timestep.

        The gain is the squared error of the images over the squared error of the output at that timestep. The program
        runs one step at a time and the float model all others, because random errors of a step are cleaned up by later
        steps, and systematic ones are not.
        """
        found: dict[float, float] = {}
        with self.session.track("gains of times", self.steps) as advance:
            for step in range(self.steps):
                found |= self._gain(program, step)
                advance(1)
        return sorted(found.items())

    def _gain(self, program: Program, hit: int) -> dict[float, float]:
        """The gain at the timestep of one step; empty where the program makes no error there."""
        seen: dict[float, float] = {}
        known = iter(self.outputs)

        def model(**inputs: np.ndarray) -> np.ndarray:
            time = float(inputs["timestep"].flat[0])
            seen.setdefault(time, 0.0)
            # until an error was made, everything is as when the reference was drawn
            output = self.denoiser(**inputs).numpy() if any(seen.values()) else next(known)
            if [*seen].index(time) != hit:
                return output
            other = self._run(program, inputs)
            seen[time] += float(np.square(other.astype(np.float64) - output).sum())
            return other

        error = self._error(self.draw(model))
        return {time: max(error / caused, 1e-12) for time, caused in seen.items() if caused}

    def _drawn_by(self, program: Program) -> np.ndarray:
        return self.draw(lambda **inputs: self._run(program, inputs))

    def _error(self, drawn: np.ndarray) -> float:
        return float(np.square(drawn.astype(np.float64) - self.reference).sum())

    def _run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        pieces = self.session.map(lambda batch: run(program, batch), self.parts(inputs, PART))
        return torch.cat(pieces).numpy()

    def parts(self, inputs: Mapping[str, np.ndarray], rows: int) -> Iterator[dict[str, Tensor]]:
        """Splits the inputs of a call into parts of so many rows, of the types that the model takes."""
        specs = self.denoiser.input_specs
        given = {n: torch.from_numpy(np.ascontiguousarray(x)).to(specs[n].dtype) for n, x in inputs.items()}
        return batches(given, rows)

    def draw(self, model: Callable[..., np.ndarray], observe: Callable[[Call], None] | None = None) -> np.ndarray:
        """Draws the images by another model, float32 [count, C, H, W]; ``observe`` sees every call."""
        return drawn_as(self.denoiser, model, self.conditions, self.count, self.steps, self.seed, observe)

    @property
    def guidance(self) -> float:
        """The scale of classifier-free guidance; 1 is without."""
        given = self.denoiser.conditioning.arguments(self.conditions, self.count, self.denoiser.guidance)
        return float(given.get("guidance", 1.0))


def drawn_as(
    denoiser: Denoiser,
    model: Callable[..., np.ndarray],
    conditions: Conditions,
    count: int,
    steps: int,
    seed: int,
    observe: Callable[[Call], None] | None = None,
) -> np.ndarray:
    """The latents that a model draws as a denoiser does, by its sampler and guidance: float32 [count, C, H, W]."""
    return sampling.sample(
        model,
        denoiser.scheduler,
        sampling.gaussian(count, denoiser.latent_shape, seed),
        steps=steps,
        **denoiser.conditioning.arguments(conditions, count, denoiser.guidance),
        latent=denoiser.latent,
        seed=seed,
        batch=count,
        observe=observe,
    )


def geometric_mean(values: np.ndarray) -> float:
    """The geometric mean of numbers of 0 or more; those below 1e-30 count as 1e-30."""
    return float(np.exp(np.log(np.maximum(values, 1e-30)).mean()))
