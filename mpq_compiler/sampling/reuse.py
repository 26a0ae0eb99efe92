"""Reuse between the steps of a sampler: which steps compute all, and which take a part of the network as it was.

Deep parts of a denoiser change little from step to step (DeepCache, arXiv 2312.00858), and so does what it puts out
(AdaptiveDiffusion, arXiv 2410.09873). An artifact that was compiled
for so many steps has a `Schedule`; here is who keeps the values, for the runtime as for the compiler, which measures
what reuse costs by the same code. Nothing imports torch.
"""

from __future__ import annotations

import functools
import hashlib
import math
import operator
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, TypedDict

import numpy as np

from mpq_compiler.support.errors import Notice

Array = np.ndarray
Value = Any
"""An array of any library."""
Inputs = Mapping[str, Value]
KEPT, WEIGHTS = "kept", "kept_weights"
"""The inputs of a step that reuses: the kept values [B, `SLOTS`, ...], and what each counts for [B, `SLOTS`]."""
SLOTS = 3
"""The values that are kept at a time: of the last steps that computed one."""
OUTPUT = "output"
"""The value that is kept where a step that reuses computes nothing at all."""
STREAMS = 4
"""The most sets of conditions whose values are kept at a time; guidance has two."""

Source = tuple[int, float]
"""A step, and what the value that it kept counts for."""


class Stated(TypedDict):
    """A schedule as JSON."""

    node: str
    timesteps: list[float]
    sources: list[list[list[float]]]


@dataclass(frozen=True)
class Schedule:
    """What each step of a sampler computes."""

    node: str
    """The value that is kept: that of a node, or the `OUTPUT`."""
    timesteps: tuple[float, ...]
    """The timestep of each step, as the sampler was compiled for."""
    sources: tuple[tuple[Source, ...], ...]
    """What each step sums in place of computing the value; a step with none computes all."""

    @property
    def kept(self) -> frozenset[int]:
        """The steps whose value a later step reads."""
        return frozenset(step for sources in self.sources for step, _ in sources)

    @property
    def reused(self) -> int:
        """The number of steps that reuse."""
        return sum(map(bool, self.sources))

    def weighted(self, weights: Mapping[int, Sequence[float]]) -> Schedule:
        """The schedule with other weights for the sources of some steps."""
        sources = [
            tuple((of, float(weight)) for (of, _), weight in zip(each, weights[step], strict=True))
            if step in weights
            else each
            for step, each in enumerate(self.sources)
        ]
        return replace(self, sources=tuple(sources))

    def to_json(self) -> Stated:
        """The manifest's entry, of which `from_json` makes an equal schedule."""
        sources = [[[float(number) for number in source] for source in step] for step in self.sources]
        return {"node": self.node, "timesteps": list(self.timesteps), "sources": sources}

    @classmethod
    def from_json(cls, value: Stated) -> Schedule:
        """The schedule of a manifest's entry."""
        sources = tuple(tuple((int(step), float(weight)) for step, weight in step_) for step_ in value["sources"])
        return cls(value["node"], tuple(map(float, value["timesteps"])), sources)


def sources_of(whole: Sequence[bool], timesteps: Sequence[float]) -> tuple[tuple[Source, ...], ...]:
    """The sources of each step: the last `SLOTS` that computed the value.

    The last two are extrapolated by the timestep, ``v1 + r (v1 - v0)`` with ``r = (t - t1) / (t1 - t0)``, and those
    before count nothing, until weights are fitted (`Schedule.weighted`). Before there are two, the last value is taken.

    Args:
        whole: whether a step computes all; the first does.
        timesteps: of the steps.
    """
    found: list[tuple[Source, ...]] = []
    computed: list[int] = []
    for step, all_ in enumerate(whole):
        if all_ or not computed:
            computed.append(step)
            found.append(())
        else:
            found.append(extrapolated(step, computed[: -SLOTS - 1 : -1], timesteps))
    return tuple(found)


def extrapolated(step: int, computed: Sequence[int], timesteps: Sequence[float]) -> tuple[Source, ...]:
    """The sources of a step by the steps that computed, the last of them first (`sources_of`)."""
    last, *earlier = computed
    if not earlier:
        return ((last, 1.0),)
    before = earlier[0]
    ratio = float(np.float32((timesteps[step] - timesteps[last]) / (timesteps[last] - timesteps[before])))
    return (last, float(np.float32(1 + ratio))), (before, -ratio), *((other, 0.0) for other in earlier[1:])


@dataclass
class Functions:
    """The three functions of a denoiser that can reuse; a batch is in and out, of arrays of any library."""

    whole: Callable[[Inputs], Value]
    """Computes all."""
    keeping: Callable[[Inputs], tuple[Value, Value]]
    """Computes all: the output, and the value to keep, each [B, ...]."""
    reusing: Callable[[Inputs, Sequence[Value], Sequence[float]], Value]
    """Computes what is left, from `SLOTS` kept values and what each counts for."""


def of_compiled(
    whole: Callable[[Inputs], Array],
    keeping: Callable[[Inputs], Array],
    reusing: Callable[[Inputs], Array],
    output: tuple[int, ...],
    kept: tuple[int, ...],
) -> Functions:
    """The functions of a denoiser by those that are compiled.

    Args:
        whole: computes all.
        keeping: computes all: [B, n], the output of each sample and behind it the kept value, both flat.
        reusing: computes what is left, from inputs with `KEPT` and `WEIGHTS`.
        output: the shape of the output of a sample.
        kept: the shape of its kept value.
    """
    split = math.prod(output)

    def parted(inputs: Inputs) -> tuple[Array, Array]:
        found = keeping(inputs)
        return found[:, :split].reshape(-1, *output), found[:, split:].reshape(-1, *kept)

    def gathered(inputs: Inputs, values: Sequence[Array], weights: Sequence[float]) -> Array:
        rows = np.tile(np.array(weights, np.float32), (len(values[0]), 1))
        return reusing({**inputs, KEPT: np.stack(values, axis=1), WEIGHTS: rows})

    return Functions(whole, parted, gathered)


def of_outputs(whole: Callable[[Inputs], Value], copy: str = "copy") -> Functions:
    """The functions of a denoiser whose outputs are what is kept: a step that reuses sums them, and calls nothing.

    Args:
        whole: computes all.
        copy: the method that copies an output, to which a sampler may write.
    """
    copied = operator.methodcaller(copy)

    def keeping(inputs: Inputs) -> tuple[Value, Value]:
        found = whole(inputs)
        return found, copied(found)

    def reusing(inputs: Inputs, values: Sequence[Value], weights: Sequence[float]) -> Value:
        first, *others = (value * float(np.float32(weight)) for value, weight in zip(values, weights, strict=True))
        return functools.reduce(operator.add, others, first)

    return Functions(whole, keeping, reusing)


@dataclass
class _Stream:
    """What is kept of the calls with one set of conditions."""

    last: int = -1
    """The step of the last call."""
    batch: int = 0
    values: dict[int, Value] = field(default_factory=dict)
    """The kept value of each step, [B, ...]; the last `SLOTS`."""


def conditions_key(inputs: Mapping[str, Array], latent: str) -> bytes:
    """A digest of the inputs of a call that stay the same from step to step."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(inputs.keys() - {latent, "timestep"}):
        digest.update(name.encode())
        value = inputs[name]
        place = getattr(value, "index", None)  # where a recorded array lies, whose values are not known yet
        digest.update(np.ascontiguousarray(value if place is None else place).tobytes())
    return digest.digest()


class KeptSteps:
    """A denoiser as one sampler calls it, step after step, with the values that its steps keep.

    Calls are told apart by their conditions, as guidance makes two in a step. Whatever is not as the schedule says is
    computed whole: timesteps of another sampler, samples of a batch at different ones, steps out of order, a batch of
    another size. Samplers that draw at the same time have one of these each.
    """

    def __init__(
        self,
        schedule: Schedule,
        functions: Functions,
        latent: str,
        key: Callable[[Inputs, str], Hashable] = conditions_key,
    ) -> None:
        """Begins with nothing kept.

        Args:
            schedule: what each step computes.
            functions: the denoiser's.
            latent: the name of the input that changes with every step.
            key: tells calls by their conditions, from the inputs and the name of the latents.
        """
        self.schedule, self.functions = schedule, functions
        self._latent, self._key = latent, key
        self._steps = {time: step for step, time in enumerate(schedule.timesteps)}
        self._streams: dict[Hashable, _Stream] = {}
        self.reused = 0
        """The number of calls that reused a value."""
        self._warned = False

    def __call__(self, **inputs: Value) -> Value:
        """Predicts as the denoiser does; the arrays have the batch first, and the timesteps are NumPy's."""
        times = np.unique(np.asarray(inputs["timestep"], np.float64))
        step = self._steps.get(float(times[0])) if len(times) == 1 else None
        if step is None:
            self._warn(times)
            return self.functions.whole(inputs)
        batch = inputs[self._latent].shape[0]
        stream = self._stream(self._key(inputs, self._latent))
        if step != stream.last + 1 or batch != stream.batch:
            stream.values.clear()
            if -1 < stream.last < step - 1:  # steps are left out; a drawing begins at any
                self._warn(times)
        stream.last, stream.batch = step, batch
        sources = self.schedule.sources[step]
        if sources and all(source in stream.values for source, _ in sources):
            return self._reused(stream, sources, inputs)
        if step not in self.schedule.kept:
            return self.functions.whole(inputs)
        found, value = self.functions.keeping(inputs)
        if len(stream.values) == SLOTS:
            del stream.values[min(stream.values)]
        stream.values[step] = value
        return found

    def _stream(self, key: Hashable) -> _Stream:
        found = self._streams.pop(key, None) or _Stream()
        self._streams[key] = found  # the latest used is the last
        if len(self._streams) > STREAMS:
            evicted = self._streams.pop(next(iter(self._streams)))
            if evicted.last < len(self._steps) - 1:
                self._say(
                    f"calls have more than {STREAMS} sets of conditions before the last step: what is computed for the "
                    "earliest of these is not kept; give the same tensors in every step, and draw for fewer at a time"
                )
        return found

    def _reused(self, stream: _Stream, sources: Sequence[Source], inputs: Inputs) -> Value:
        self.reused += 1
        read = [*sources, *[(sources[0][0], 0.0)] * (SLOTS - len(sources))]
        return self.functions.reusing(inputs, [stream.values[step] for step, _ in read], [each for _, each in read])

    def _warn(self, times: Array) -> None:
        steps = len(self.schedule.timesteps)
        self._say(
            f"a call at timestep {times[0]:g} does not follow the {steps} steps for which it was decided what may "
            f"be reused: such calls are computed whole; draw in {steps} steps of the sampler it was compiled for"
        )

    def _say(self, sentence: str) -> None:
        if not self._warned:
            self._warned = True
            warnings.warn(sentence, Notice, stacklevel=5)
