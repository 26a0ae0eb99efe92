"""Trains a quantized program against the float model in stages, and keeps the best state.

A step takes a batch of the float model's calls, of mixed times, and moves the stage's variables against the relative
squared error of the output. Steps are counted, never timed, and gradients are summed part by part in a fixed order. So
a seed gives the same bits whatever else the machine does, and for any number of jobs. The state is saved in the cache
as training proceeds, so that a killed run resumes where it was.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from mpq_compiler.analysis.trajectory_error import PART
from mpq_compiler.formats import contract
from mpq_compiler.ir import ops, segments
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.graph import part_of
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training.data import Data
from mpq_compiler.training.relation_loss import Memory, Relations
from mpq_compiler.training.relation_loss import Step as RelationStep
from mpq_compiler.training.state import Kept, Stage, State, key
from mpq_compiler.training.student import Student, values, variables
from mpq_compiler.training.variables import Kind, Variable, settled

BETAS, EPSILON = (0.9, 0.99), 1e-12
"""Adam's decay rates, and the constant in its denominator."""
CLIP = 4.0
"""The largest norm of a step's gradient, relative to its running mean; larger gradients are scaled down."""
HELD = 1 << 31
"""The most bytes of values that a part of a batch holds for its backward pass; above, segments hold theirs in turn."""


@dataclass(frozen=True)
class Outcome:
    """The outcome of a stage."""

    stage: str
    steps: int
    """Those that were planned."""
    before: float
    """The held-out relative noise power before the stage."""
    after: float
    """The held-out relative noise power of the best state."""
    best_step: int
    diverged: int | None
    """The step at which training gave up; None where it did not."""
    ended: int | None = None
    """The step after which the stage was not worth the others; None where it was."""


TRAINING = Fact[list[dict[str, Any]]]("training")
"""What each phase of training gave: ``phase``, the outcomes of its ``stages``, ``images_before`` and ``images_after``,
and whether it was ``kept``."""


Judge = Callable[[Program], bool]
"""Says of a program that a stage has begun to train whether the stage is worth going on with."""


def train(
    program: Program,
    stage: Stage,
    data: Data,
    held_out: Data,
    session: Session,
    seed: int,
    judge: Judge | None = None,
) -> tuple[Program, Outcome]:
    """Trains one stage; the result has the values of least held-out error, the initial ones among the candidates.

    Args:
        program: fake-quantized, with settled weights.
        stage: what is trained and for how many steps.
        data: the calls to train on.
        held_out: the calls to judge by.
        session: runs the parts of a step, shows progress, and has the cache.
        seed: decides the order of the calls, and all that is drawn.
        judge: of what is best after the stage's ``trial`` steps; None goes on whatever that is.

    Returns:
        The trained program, and the outcome.
    """
    times = group_times(program, data.inputs["timestep"]) if stage.range_network else None
    trained = variables(program, stage.latent, stage.adapters, times, seed, stage.widest)
    kept = Kept(key(program, trained, stage, seed, data, held_out), session)
    worth = None if judge is None else lambda best: judge(applied(program, trained, best))
    state = descend(program, trained, stage, data, held_out, kept, session, seed, worth)
    return applied(program, trained, state.best), outcome_of(stage, state)


def outcome_of(stage: Stage, state: State) -> Outcome:
    """The outcome of a stage that has ended in a state."""
    ended = state.step if state.diverged is None and state.step < stage.steps else None
    return Outcome(stage.name, stage.steps, state.before, state.least, state.best_step, state.diverged, ended)


def descend(
    program: Program,
    trained: Mapping[str, Variable],
    stage: Stage,
    data: Data,
    held_out: Data,
    kept: Kept,
    session: Session,
    seed: int,
    worth: Callable[[Mapping[str, Tensor]], bool] | None = None,
) -> State:
    """Takes the steps of a stage, on from the state that is kept, and returns the last state.

    Args:
        program: fake-quantized, with settled weights.
        trained: its variables.
        stage: what is trained and for how many steps.
        data: the calls to train on.
        held_out: the calls to judge by.
        kept: the saved state.
        session: runs the parts of a step, and shows progress.
        seed: decides the order of the calls.
        worth: says of the best thetas after the stage's ``trial`` steps whether to go on; None goes on.
    """
    state = kept.load() or State.start(trained)
    checks = {stage.trial} | {round(stage.steps * (i + 1) / stage.checks) for i in range(stage.checks)}
    power = float(held_out.squared(held_out.targets).double().mean())
    relations = None
    if stage.relation is not None:
        relations = Relations.start(stage.relation, program, data.inputs)
        relations.memory = Memory(**state.memory) if state.memory else relations.memory
        state.memory = vars(relations.memory)
    last = [] if relations else segments.ends(program, segments.value_bytes(program, data.part), HELD)
    if not state.step:
        state.before = state.least = noise(program, trained, state.thetas, held_out, session)
    with session.track(f"training {stage.name}", stage.steps) as advance:
        advance(state.step)
        while state.step < stage.steps and state.diverged is None:
            if worth is not None and state.step and state.step == stage.trial and not worth(state.best):
                break
            state.step += 1
            index = _batch(state.step, len(data), stage.batch, seed)
            batch, drawn = data.select(index), None
            if relations is not None:
                before = data.before(index, relations.term.window - 1)
                drawn = relations.step(len(batch), torch.Generator().manual_seed((seed << 32) + state.step), before)
            loss, gradients = _gradients(program, trained, state.thetas, batch, power, session, drawn, last)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
            if not math.isfinite(loss + norm):
                state.diverged = state.step
                break
            state.usual = norm if state.step == 1 else 0.9 * state.usual + 0.1 * min(norm, CLIP * state.usual)
            shrink = min(1.0, CLIP * state.usual / max(norm, 1e-30))
            decay = 0.5 * (1 + math.cos(math.pi * (state.step - 1) / stage.steps))
            rates = {name: stage.rates[variable.kind] * decay for name, variable in trained.items()}
            _adam(state, {name: g * shrink for name, g in gradients.items()}, rates)
            state.thetas = {name: trained[name].projected(theta) for name, theta in state.thetas.items()}
            if state.step in checks:
                error = noise(program, trained, state.thetas, held_out, session)
                if error < state.least:
                    state.least, state.best, state.best_step = error, dict(state.thetas), state.step
                kept.save(state)
            advance(1, f"(loss {loss:.2g}, best {-10 * math.log10(max(state.least, 1e-30)):.1f} dB)")
    return state


def group_times(program: Program, timesteps: Tensor) -> Tensor:
    """The middles of the time groups, f32 [G], from 0 to 1 over the range of the timesteps."""
    boundaries = program.facts[TIME_GROUPS]
    low, high = torch.cat([timesteps.to(torch.float32), boundaries]).aminmax()
    ends = torch.cat([low[None], boundaries, high[None]])
    return ((ends[1:] + ends[:-1]) / 2 - low) / (high - low)


def _batch(step: int, count: int, most: int, seed: int) -> Tensor:
    """The indices of a step's calls; an epoch has every call once, in an order of its own."""
    size = min(most, count)
    epoch, place = divmod(step - 1, count // size)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed + (epoch << 32)))
    return order[place * size : (place + 1) * size]


def _gradients(
    program: Program,
    trained: Mapping[str, Variable],
    thetas: Mapping[str, Tensor],
    batch: Data,
    power: float,
    session: Session,
    relation: RelationStep | None = None,
    last: Sequence[str] = (),
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a batch, its relative squared error, and the gradient by every theta.

    Weights are computed once for all parts of the batch. A ``relation`` adds its term to the loss. Segments, where
    ``last`` names the last calls of several, hold their values in turn.
    """
    leaves = {name: theta.detach().requires_grad_() for name, theta in thetas.items()}
    made = values(program, trained, leaves)

    def part(numbered: tuple[int, Data]) -> tuple[float, tuple[Tensor | None, ...], Tensor | None]:
        number, piece = numbered
        inner = {name: value.detach().requires_grad_() for name, value in made.items()}
        wanted = relation and relation.relations.term.node

        def outputs(inputs: Mapping[str, Tensor]) -> tuple[list[Tensor], Tensor]:
            """The features that the relation compares, where there is one, and the output."""
            seen: list[Tensor] = []
            output = Student(program, inner).run(
                inputs, watch=lambda node, value: seen.append(value) if node.name == wanted else None
            )
            return seen, output

        def error(output: Tensor) -> Tensor:
            return piece.squared(output - piece.targets).sum() / (len(batch) * power)

        if len(last) > 1:
            losses: list[Tensor] = []

            def by_output(output: Tensor) -> tuple[Tensor, ...]:
                losses.append(error(output.requires_grad_()))
                return torch.autograd.grad(losses[0], output)

            with torch.enable_grad():
                segments.backward(Student(program, inner), piece.inputs, last, by_output)
            return float(losses[0].detach()), tuple(value.grad for value in inner.values()), None
        seen, output = outputs(piece.inputs)
        share, pixels = len(piece) / len(batch), None
        loss = error(output)
        if relation is not None:
            rows = slice(number * PART, number * PART + len(piece))
            more, pixels = relation.loss(seen[0], piece.inputs, rows, lambda inputs: outputs(inputs)[0][0])
            loss = loss + more * share
        return float(loss.detach()), torch.autograd.grad(loss, list(inner.values()), allow_unused=True), pixels

    pieces = session.map(part, enumerate(batch.parts()))
    if relation is not None:
        group = ops.time_group(batch.inputs["timestep"], program.facts[TIME_GROUPS])
        relation.push(torch.cat([pixels for *_, pixels in pieces if pixels is not None]), group)
    reached: dict[str, Tensor] = {}
    for name, *parts in zip(made, *(found for _, found, _ in pieces), strict=True):
        sums = [g for g in parts if g is not None]
        if sums:
            reached[name] = torch.stack(sums).sum(0) if len(sums) > 1 else sums[0]
    gradients = torch.autograd.grad(
        [made[name] for name in reached], list(leaves.values()), list(reached.values()),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return sum(loss for loss, *_ in pieces), dict(zip(thetas, gradients, strict=True))


def _adam(state: State, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
    """Takes a step of Adam (Kingma 2015, arXiv 1412.6980, algorithm 1)."""
    for name, g in gradients.items():
        state.first[name] = state.first[name].lerp(g, 1 - BETAS[0])
        state.second[name] = state.second[name].lerp(g.square(), 1 - BETAS[1])
        mean = state.first[name] / (1 - BETAS[0] ** state.step)
        spread = state.second[name] / (1 - BETAS[1] ** state.step)
        state.thetas[name] = state.thetas[name] - rates[name] * mean / (spread.sqrt() + EPSILON)


@torch.no_grad()
def noise(
    program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor], data: Data, session: Session
) -> float:
    """The weighted squared error of the outputs over the teacher's squared outputs: the inverse of the SQNR.

    Args:
        program: fake-quantized.
        trained: its variables.
        thetas: their values.
        data: the calls.
        session: runs the parts.
    """

    made = values(program, trained, thetas)

    def part(piece: Data) -> float:
        output = Student(program, made).run(piece.inputs)
        return float(piece.squared(output - piece.targets).double().sum())

    return sum(session.map(part, data.parts())) / float(data.squared(data.targets).double().sum())


@torch.no_grad()
def applied(program: Program, trained: Mapping[str, Variable], thetas: Mapping[str, Tensor]) -> Program:
    """Stores the variables' values, and the codes of latent weights, in a copy of the program."""
    program = program.fork()
    renamed: dict[str, str] = {}

    def store(name: str, tensor: Tensor) -> None:
        renamed[name] = program.tensors.add(f"{name.split(':')[0]}:{part_of(name) or 'trained'}", tensor)

    for name, variable in trained.items():
        if variable.kind != Kind.LATENT:
            store(name, variable.stored(thetas[name]))
    for weight in settled(program):
        if weight.codes not in trained:
            continue
        rows = trained[weight.codes].stored(thetas[weight.codes])
        tables = weight.values(program, lambda name: program.tensors[renamed.get(name, name)])
        codes = contract.quantize(rows, tables)
        if weight.signs is None:
            store(weight.codes, codes)
        else:
            store(weight.codes, codes >> 1)
            store(weight.signs, codes & 1)
    for node in program.graph.nodes:
        if node.op == "get_attr" and node.target in renamed:
            node.target = renamed[str(node.target)]
    for edge, plan in program.activations.items():
        scale_name, zero = (None if n is None else renamed.get(n, n) for n in (plan.scale, plan.zero_point))
        program.activations[edge] = replace(plan, scale=scale_name, zero_point=zero)
    return program
