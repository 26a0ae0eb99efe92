"""One budget of bytes over the parts of a pipeline: spent by one integer program where pictures lose least.

Sensitivities of a part are relative noise of its own output. What such noise does to pictures is measured once for
each part: it alone is simulated in few bits, all others are the float model's, and the pictures are held against those
of the float pipeline. The ratio of both is the part's gain, by which its losses are summed with those of the others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from mpq_compiler.allocation import pose
from mpq_compiler.allocation.problem import Problem
from mpq_compiler.allocation.solver import solve
from mpq_compiler.artifact.pipeline import Share
from mpq_compiler.driver.held_out import held_out
from mpq_compiler.driver.lower import lower
from mpq_compiler.driver.measure import measure_sensitivity
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.resolve import resolve, with_role
from mpq_compiler.frontend.denoiser import Denoiser
from mpq_compiler.frontend.pipeline_parts import Encoding, Parts
from mpq_compiler.ir.findings import SensitivityTable
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.backend import Progress
from mpq_compiler.pipeline.passes import Role
from mpq_compiler.pipeline.realize import realize
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling import loop
from mpq_compiler.sampling.conditioning import NULL
from mpq_compiler.support.errors import BudgetError
from mpq_compiler.support.execution import RunContext, batches

PICTURES = 8
"""Pictures on which the gains of parts are measured."""
STEPS = 10
"""The most steps of a picture."""
TOGETHER = 4
"""The samples of a call."""
MORE = 0.02
"""How much more of its bytes tells what the next kilobyte is worth in a part."""
ROOM = 1.25
"""How much more than its least bytes a part gets at least where its gain is measured."""

Call = Callable[[dict[str, Tensor]], Tensor]
"""A part, simulated or not: inputs by name, its output [B, ...]."""


@dataclass(frozen=True)
class Part:
    """A part that shares the budget."""

    model: Denoiser
    options: Options

    @property
    def sampled(self) -> Denoiser:
        """The denoiser with the conditions and the guidance of its options."""
        return self.model.sampled(self.options.guidance, self.options.conditions)


def shares(
    parts: Mapping[str, Part],
    limit: int,
    drawing: Drawing,
    scratch: Path,
    progress: Progress | None,
) -> tuple[dict[str, Part], dict[str, Share]]:
    """Shares out a budget.

    Args:
        parts: by name.
        limit: bytes of all of them.
        drawing: draws pictures with the parts.
        scratch: a folder for the tables.
        progress: opens progress bars, or None.

    Returns:
        The parts with their tables, which need not be measured again, and their shares.

    Raises:
        BudgetError: even the least that all parts take is more than the budget.
    """
    tables: dict[str, SensitivityTable] = {}
    found: dict[str, Part] = {}
    for index, (name, part) in enumerate(parts.items(), 1):
        with drawing.context.track(f"sensitivities of part {index} of {len(parts)}: {name}", 1) as advance:
            tables[name] = measure_sensitivity(part.model, progress, **vars(replace(part.options, weights=None)))
            advance(1)
        file = scratch / f"{name}.sensitivity.json"
        file.write_text(json.dumps(tables[name]))
        found[name] = replace(part, options=replace(part.options, sensitivity=file))
    least = {name: _least(table) for name, table in tables.items()}
    if limit < sum(least.values()):
        per_bit = sum(table["parameters"] for table in tables.values()) / 8
        raise BudgetError(
            f"a budget of {limit} bytes ({limit / per_bit:.2f} true average bits) cannot be met: the least that the "
            f"formats allow is {sum(least.values())} bytes ({sum(least.values()) / per_bit:.3f} bits), of which "
            + ", ".join(f"'{name}' takes {size}" for name, size in least.items())
        )
    total = sum(table["parameters"] for table in tables.values())
    equal = {name: limit * table["parameters"] // total for name, table in tables.items()}
    tried = {name: max(equal[name], int(ROOM * least[name])) for name in tables}
    with drawing.context.track("what parts do to pictures", 1 + len(parts)) as advance:
        expected = drawing.pictures({})
        advance(1)
        gains = {}
        for name, part in found.items():
            gains[name] = _gain(name, part, tried[name], drawing, expected)
            advance(1)
    plan = _plan(tables, gains, limit)
    said = {
        name: Share(
            bytes=plan[name][0],
            gain=gains[name],
            loss=plan[name][1],
            worth=_worth({name: tables[name]}, gains, *plan[name]),
            least_bytes=least[name],
            equal_bytes=equal[name],
            equal_loss=_plan({name: tables[name]}, gains, max(equal[name], least[name]))[name][1],
        )
        for name in tables
    }
    return found, said


def _least(table: SensitivityTable) -> int:
    sizes = {layer["name"]: layer["formats"] for layer in table["layers"]}
    return table["fixed_bytes"] + sum(
        min(sizes[name][choice]["bytes"] for choice in losses) for name, losses in table["weights"].items()
    )


def _plan(
    tables: Mapping[str, SensitivityTable], gains: Mapping[str, float], limit: int
) -> dict[str, tuple[int, float]]:
    """The bytes of each part and the noise of pictures by it, where their sum is least under the limit."""
    layers, sizes, losses, owner = [], {}, {}, {}
    for part, table in tables.items():
        monotone = pose.monotone(table)
        costs = {layer["name"]: layer["formats"] for layer in table["layers"]}
        for name, by_format in monotone["weights"].items():
            key = f"{part}/{name}"
            owner[key] = part
            sizes[key] = {choice: costs[name][choice]["bytes"] for choice in by_format}
            losses[key] = {choice: gains[part] * loss for choice, loss in by_format.items()}
            choices = [
                {"name": choice, "loss": losses[key][choice], "costs": {"bytes": sizes[key][choice]}}
                for choice in by_format
            ]
            layers.append({"name": key, "choices": choices})
    fixed = {part: table["fixed_bytes"] for part, table in tables.items()}
    budgets = [{"cost": "bytes", "max": limit - sum(fixed.values())}]
    solution = solve(Problem.from_json({"version": 1, "layers": layers, "budgets": budgets, "links": []}))
    spent, expected = dict(fixed), dict.fromkeys(tables, 0.0)
    for key, choice in solution.choices.items():
        spent[owner[key]] += sizes[key][choice]
        expected[owner[key]] += losses[key][choice]
    return {part: (spent[part], expected[part]) for part in tables}


def _worth(table: Mapping[str, SensitivityTable], gains: Mapping[str, float], size: int, loss: float) -> float:
    """What the next kilobyte would take of the noise of pictures, on average over `MORE` of the part's bytes."""
    more = max(int(MORE * size), 1)
    ((_, less),) = _plan(table, gains, size + more).values()
    return max(loss - less, 0.0) / more * 1000


def _gain(name: str, part: Part, size: int, drawing: Drawing, expected: np.ndarray) -> float:
    """The noise of pictures where the part alone is simulated in so many bytes, by the noise of its output."""
    model = part.sampled
    options = replace(part.options, weights=f"{size}B", dumps=None)
    passes = resolve(options)
    allocation = with_role(passes, Role.ALLOCATES)
    assert allocation is not None
    lowering = lower(model, options, None, passes[: passes.index(allocation) + 1])
    simulated = realize(lowering.program, Session(jobs=options.jobs, cache=options.cache, seed=options.seed))
    lowering.forget()
    inputs = held_out(model, options)
    outputs = [(model(**rows), run(simulated, rows)) for rows in batches(inputs, TOGETHER)]
    noise = sum(float((a - b).double().square().sum()) for a, b in outputs)
    power = sum(float(a.double().square().sum()) for a, _ in outputs)
    drawn = drawing.pictures({name: _called(simulated)})
    error = float(np.square(drawn.astype(np.float64) - expected).mean())
    return error / max(noise / power, 1e-12)


def _called(program: Program) -> Call:
    return lambda inputs: run(program, inputs)


def conditions_of(
    parts: Parts, prompts: Sequence[str], context: RunContext, encoded: Callable[[str], dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """What the denoiser is given for prompts, and what guidance leads away from (`Conditioning.from_arrays`).

    ``encoded`` makes the conditions of a prompt, [1, ...] by name.
    """
    rows = context.map(encoded, prompts)
    given = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    given |= {name: np.repeat(value, len(prompts), 0) for name, value in parts.constants().items()}
    if parts.null is not None:
        zeros = parts.null == "zeros"
        given |= {NULL + name: np.zeros_like(v) if zeros else v for name, v in encoded("").items()}
    return {name: np.ascontiguousarray(value) for name, value in given.items()}


@dataclass(frozen=True)
class Drawing:
    """Draws pictures with parts that may be simulated, all others being the float model's."""

    parts: Parts
    models: Mapping[str, Part]
    """The parts that may be simulated."""
    denoiser: Denoiser
    prompts: Sequence[str]
    guidance: float | None
    seed: int
    context: RunContext

    def pictures(self, simulated: Mapping[str, Call]) -> np.ndarray:
        """Pictures [N, channels, H, W] from 0 to 1 of the first prompts, with these parts in place of float ones."""
        prompts, parts = [*self.prompts[:PICTURES]], self.parts

        def encoded(prompt: str) -> dict[str, np.ndarray]:
            return parts.encoded(prompt, lambda encoding, inputs: self._text(simulated, encoding, inputs))

        conditioning = self.denoiser.conditioning
        given = conditions_of(parts, prompts, self.context, encoded)
        conditions = conditioning.from_arrays(given, "the pipeline")
        denoiser: Call = simulated.get(parts.denoiser, self._predicted)
        specs = self.denoiser.input_specs

        def model(**inputs: np.ndarray) -> np.ndarray:
            tensors = {n: torch.from_numpy(np.ascontiguousarray(v)).to(specs[n].dtype) for n, v in inputs.items()}
            return np.concatenate(self.context.map(lambda part: denoiser(part).numpy(), batches(tensors, TOGETHER)))

        latents = loop.sample(
            model,
            self.denoiser.scheduler,
            loop.gaussian(len(prompts), self.denoiser.latent_shape, self.seed + 2),
            steps=min(STEPS, parts.steps),
            **conditioning.arguments(conditions, len(prompts), self.guidance),
            latent=self.denoiser.latent,
            seed=self.seed,
        )

        def decoded(row: np.ndarray) -> np.ndarray:
            z = torch.from_numpy(np.ascontiguousarray(parts.decoded(latents=row[None])["z"]))
            call = simulated.get(parts.decoder_name)
            with torch.no_grad():
                sample: Tensor = (
                    parts.decoder(z) if call is None else call(self._inputs(parts.decoder_name, {"latents": z}))
                )
            return parts.images(sample=sample.numpy())["images"]

        return np.concatenate(self.context.map(decoded, self.denoiser.module.convention.pack(latents)))

    def _predicted(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.denoiser(**inputs)

    def _text(self, simulated: Mapping[str, Call], encoding: Encoding, inputs: dict[str, Tensor]) -> list[Tensor]:
        if (call := simulated.get(encoding.name)) is None:
            return encoding.called(inputs)
        form = self.models[encoding.name].model.form
        assert form is not None
        found = form.returned(call(self._inputs(encoding.name, inputs)))
        return [*found] if isinstance(found, tuple) else [found]

    def _inputs(self, name: str, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        """The inputs of a simulated part, a time among them, of which it knows nothing."""
        specs = self.models[name].model.input_specs
        known = inputs | {"timestep": torch.zeros(len(next(iter(inputs.values()))))}
        return {n: known[n].to(spec.dtype) for n, spec in specs.items()}
