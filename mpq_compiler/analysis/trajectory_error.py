"""The error of what a program draws, from the float model's noise in the float model's steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling import loop as sampling
from mpq_compiler.support.execution import batches

PART = 16
"""Inputs of which a thread takes the gradient; the parts of a batch are summed in order."""

SEED = 1 << 20
"""Added to the seed, so that training sees noise that neither calibration nor evaluation draws."""

IMAGE_STEPS = 10


@dataclass
class TrajectoryError:
    """Held-out images of the float model: noise, conditions, and what it draws of them."""

    denoiser: Denoiser
    conditions: Any
    count: int
    seed: int
    session: Session
    reference: np.ndarray
    outputs: list[np.ndarray]
    """Of the float model, call by call, while the reference was drawn."""

    @property
    def steps(self) -> int:
        """Of sampling: `IMAGE_STEPS`, or as few as the model is compiled for."""
        return min(IMAGE_STEPS, self.session.steps or IMAGE_STEPS)

    @classmethod
    def drawn(cls, session: Session, count: int) -> TrajectoryError | None:
        """None where none are wanted, or the model cannot be sampled: its conditions are not known."""
        denoiser = session.denoiser
        assert denoiser is not None
        if not count or not denoiser.conditioning.possible:
            return None
        seed = session.seed + SEED + 2
        made = cls(denoiser, denoiser.conditioning.mixed(count, seed), count, seed, session, np.empty(0), [])

        def model(**inputs: np.ndarray) -> np.ndarray:
            made.outputs.append(denoiser(**inputs).numpy())
            return made.outputs[-1]

        made.reference = made._draw(model)
        return made

    def noise(self, program: Program) -> float:
        """Squared error of what the program draws over the float model's squared latents."""
        error = self._error(self._draw(lambda **inputs: self._run(program, inputs)))
        return float(error / np.square(self.reference.astype(np.float64)).sum())

    def gains(self, program: Program) -> list[tuple[float, float]]:
        """(timestep, squared error of the images by squared error of the output there), by ascending timesteps.

        Measured with the program's own error in one step at a time, and the float model in all others: what a step errs
        at random later steps clean up, and what it errs alike everywhere they do not.
        """
        found: dict[float, float] = {}
        with self.session.track("gains of times", self.steps) as advance:
            for step in range(self.steps):
                found |= self._gain(program, step)
                advance(1)
        return sorted(found.items())

    def _gain(self, program: Program, hit: int) -> dict[float, float]:
        """The gain at the timestep of one step; nothing where the program makes no error there."""
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

        error = self._error(self._draw(model))
        return {time: max(error / caused, 1e-12) for time, caused in seen.items() if caused}

    def _error(self, drawn: np.ndarray) -> float:
        return float(np.square(drawn.astype(np.float64) - self.reference).sum())

    def _run(self, program: Program, inputs: Mapping[str, np.ndarray]) -> np.ndarray:
        specs = self.denoiser.input_specs
        given = {n: torch.from_numpy(np.ascontiguousarray(x)).to(specs[n].dtype) for n, x in inputs.items()}
        return torch.cat(self.session.map(lambda batch: run(program, batch), batches(given, PART))).numpy()

    def _draw(self, model: Callable[..., np.ndarray]) -> np.ndarray:
        return sampling.sample(
            model,
            self.denoiser.scheduler,
            sampling.gaussian(self.count, self.denoiser.latent_shape, self.seed),
            steps=self.steps,
            **self.denoiser.conditioning.arguments(self.conditions, self.count, self.denoiser.guidance),
            latent=self.denoiser.latent,
            seed=self.seed,
            batch=self.count,
        )
