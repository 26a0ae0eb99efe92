"""Whether a denoiser still listens: what its condition changes in its output, at each step of the float model's.

That difference, c - u of the outputs with and without the condition, is what classifier-free guidance multiplies.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypedDict

import numpy as np

from mpq_compiler.sampling.loop import Call

if TYPE_CHECKING:
    import torch

Array = np.ndarray
IMAGES = 16
"""The most images of a denoiser whose calls are looked at."""
PICTURES = 4
"""The most of a pipeline, whose denoiser is called anew for them."""
Model = Callable[..., Array]

Figures = TypedDict(  # noqa: UP013 - a key has the name of its type
    "Figures", {"float": float | None, "compiled": float | None, "cosine": float | None}
)
"""The relative norms of the differences of both models, and their cosine; None where a difference is 0."""


class StepFigures(Figures):
    """Those of a step."""

    timestep: float


class Told(Figures):
    """Those of all steps, and of each."""

    images: int
    steps: list[StepFigures]


@dataclass
class ConditionalDifference:
    """Sums over the outputs of a float and a compiled model with and without conditions, step by step."""

    timesteps: list[float] = field(default_factory=list)
    sums: list[Array] = field(default_factory=list)

    def add(self, step: int, timestep: float, given: tuple[Array, Array], null: tuple[Array, Array]) -> None:
        """Adds the outputs at a step, of the float and the compiled model, given conditions and without."""
        (c, q), (u, v) = (tuple(np.asarray(each, np.float64) for each in pair) for pair in (given, null))
        theirs, ours = c - u, q - v
        found = np.array([(c**2).sum(), (q**2).sum(), (theirs**2).sum(), (ours**2).sum(), (theirs * ours).sum()])
        if step == len(self.sums):
            self.timesteps.append(timestep)
            self.sums.append(found)
        else:
            self.sums[step] += found

    def to_json(self, images: int) -> Told:
        """The relative norms of the differences and their cosine, of all steps and of each (docs/metrics.md)."""
        each = zip(self.timesteps, self.sums, strict=True)
        steps: list[StepFigures] = [{**_figures(sums), "timestep": timestep} for timestep, sums in each]
        return {**_figures(np.sum(self.sums, axis=0)), "images": images, "steps": steps}


def _figures(sums: Array) -> Figures:
    c, q, theirs, ours, product = map(float, sums)

    def ratio(one: float, other: float) -> float | None:
        return one / other if other > 0 else None

    return {
        "float": ratio(theirs**0.5, c**0.5),
        "compiled": ratio(ours**0.5, q**0.5),
        "cosine": ratio(product, (theirs * ours) ** 0.5),
    }


@dataclass
class Observer:
    """Keeps the calls of a float model's first images, and what a compiled one gives for them."""

    null: Mapping[str, Array]
    """The inputs without conditions, N rows each."""
    given: list[tuple[Call, tuple[Array, Array]]] = field(default_factory=list)
    without: list[tuple[Array, Array]] = field(default_factory=list)

    def observe(self, call: Call, output: Array) -> None:
        """Keeps a call of the float model, beside the compiled model's output."""
        if call.rows.start:
            return
        channels = call.latents.shape[1]
        both = call.output[:IMAGES, :channels], output[:IMAGES, :channels]
        if call.guided:
            self.without.append(both)
        else:
            self.given.append((call, both))

    def to_json(self, reference: Model, model: Model) -> Told:
        """The figures of `ConditionalDifference`.

        Where there was no guidance, both models are called here without conditions, in the order of the steps.
        """
        found, count = ConditionalDifference(), len(self.given[0][1][0])
        for call, (output, _) in self.given if not self.without else ():
            inputs = {name: value[:count] for name, value in {**call.inputs, **self.null}.items()}
            theirs, ours = (np.asarray(each(**inputs))[:, : output.shape[1]] for each in (reference, model))
            self.without.append((theirs, ours))
        for step, ((call, outputs), null) in enumerate(zip(self.given, self.without, strict=True)):
            found.add(step, call.timestep, outputs, null)
        return found.to_json(count)


@contextmanager
def observed(
    module: torch.nn.Module, compiled: Callable[..., Sequence[torch.Tensor]], found: ConditionalDifference
) -> Iterator[None]:
    """Adds the calls that a pipeline of diffusers makes of its denoiser for one picture, and what a compiled one gives.

    Those with guidance, in which the first of two samples has no condition, as nearly all pipelines call; others show
    no difference.
    """
    step = 0

    def hook(
        _: object, args: tuple[torch.Tensor, ...], kwargs: dict[str, torch.Tensor], output: Sequence[torch.Tensor]
    ) -> None:
        nonlocal step
        theirs = output[0]
        if len(theirs) != 2:
            return
        taken = [*args, *kwargs.values()]
        ours = compiled(*args, **{**kwargs, "return_dict": False})[0]
        timestep = args[1] if len(args) > 1 else kwargs["timestep"]
        u, c = ([each[row, : len(taken[0][0])].numpy() for each in (theirs, ours)] for row in (0, 1))
        found.add(step, float(timestep.flatten()[0]), (c[0], c[1]), (u[0], u[1]))
        step += 1

    handle = module.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
