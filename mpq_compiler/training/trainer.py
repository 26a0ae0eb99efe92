"""Trains a quantized program against the float model in stages, and keeps the best state.

A step moves the stage's variables against an objective: the error of a batch of single calls, of mixed times
(`outputs`), or of whole images (`images`). Steps are counted, never timed, and gradients are summed part by part in a
fixed order. So a seed gives the same bits whatever else the machine does, and for any number of jobs. The state is
saved in the cache as training proceeds, so that a killed run resumes where it was.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mpq_compiler.analysis.trajectory_error import TrajectoryError
from mpq_compiler.ir.facts import Fact
from mpq_compiler.ir.program import TIME_GROUPS, Program
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training.data import Data
from mpq_compiler.training.images import Images, digest
from mpq_compiler.training.objective import Objective
from mpq_compiler.training.outputs import Outputs
from mpq_compiler.training.state import Kept, Stage, State, key
from mpq_compiler.training.student import applied, values, variables
from mpq_compiler.training.variables import Variable

BETAS, EPSILON = (0.9, 0.99), 1e-12
"""Adam's decay rates, and the constant in its denominator."""
CLIP = 4.0
"""The largest norm of a step's gradient, relative to its running mean; larger gradients are scaled down."""


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


TRAINING = Fact[list[dict[str, Any]]]("training")
"""What each phase of training gave: ``phase``, the outcomes of its ``stages``, ``images_before`` and ``images_after``,
and whether it was ``kept``."""


def train(
    program: Program,
    stage: Stage,
    data: Data,
    held_out: Data,
    session: Session,
    seed: int,
) -> tuple[Program, Outcome]:
    """Trains one stage on single calls; the result has the values of least held-out error, the initial ones among them.

    Args:
        program: fake-quantized, with settled weights.
        stage: what is trained and for how many steps.
        data: the calls to train on.
        held_out: the calls to judge by.
        session: runs the parts of a step, shows progress, and has the cache.
        seed: decides the order of the calls, and all that is drawn.

    Returns:
        The trained program, and the outcome.
    """
    objective = Outputs(program, stage, data, held_out, session, seed)
    return _best(program, stage, objective, (data, held_out), data.inputs["timestep"], session, seed)


def train_images(
    program: Program, stage: Stage, images: Sequence[TrajectoryError], held_out: TrajectoryError, session: Session
) -> tuple[Program, Outcome]:
    """Trains one stage on whole images, else as `train` does.

    Args:
        program: fake-quantized, with settled weights.
        stage: what is trained and for how many steps.
        images: groups of images to train on, one in each step.
        held_out: the images to judge by.
        session: runs the parts of a step, shows progress, and has the cache.

    Returns:
        The trained program, and the outcome, whose errors are typical ones of images.
    """
    objective = Images(program, images, held_out, session)
    timesteps = torch.from_numpy(held_out.denoiser.scheduler.timesteps(held_out.steps).copy())
    return _best(program, stage, objective, (digest([*images, held_out]),), timesteps, session, session.seed)


def _best(
    program: Program,
    stage: Stage,
    objective: Objective,
    calls: Sequence[Data | str],
    timesteps: Tensor,
    session: Session,
    seed: int,
) -> tuple[Program, Outcome]:
    """Trains one stage by an objective, whose ``calls`` enter the key of the kept state (`state.key`)."""
    times = group_times(program, timesteps) if stage.range_network else None
    trained = variables(program, stage.latent, stage.adapters, times, seed, stage.widest, svd=stage.svd)
    kept = Kept(key(program, trained, stage, seed, *calls), session)
    state = descend(program, trained, stage, objective, kept, session)
    return applied(program, trained, state.best), outcome_of(stage, state)


def outcome_of(stage: Stage, state: State) -> Outcome:
    """The outcome of a stage that has ended in a state."""
    return Outcome(stage.name, stage.steps, state.before, state.least, state.best_step, state.diverged)


def descend(
    program: Program,
    trained: Mapping[str, Variable],
    stage: Stage,
    objective: Objective,
    kept: Kept,
    session: Session,
) -> State:
    """Takes the steps of a stage, on from the state that is kept, and returns the last state.

    Args:
        program: fake-quantized, with settled weights.
        trained: its variables.
        stage: what is trained and for how many steps.
        objective: what the steps minimize.
        kept: the saved state.
        session: shows progress.
    """
    state = kept.load() or State.start(trained)
    checks = {round(stage.steps * (i + 1) / stage.checks) for i in range(stage.checks)}
    if not state.step:
        state.before = state.least = objective.error(trained, state.thetas)
    objective.go_on(state)
    with session.track(f"training {stage.name}", stage.steps) as advance:
        advance(state.step)
        while state.step < stage.steps and state.diverged is None:
            state.step += 1
            loss, gradients = _gradients(program, trained, state.thetas, objective, state.step)
            norm = math.sqrt(sum(float(g.double().square().sum()) for g in gradients.values()))
            if not math.isfinite(loss + norm):
                state.diverged = state.step
                break
            state.usual = norm if state.step == 1 else 0.9 * state.usual + 0.1 * min(norm, CLIP * state.usual)
            shrink = min(1.0, CLIP * state.usual / max(norm, 1e-30))
            decay = 0.5 * (1 + math.cos(math.pi * (state.step - 1) / stage.steps))
            rates = {name: stage.rates[variable.kind] * decay for name, variable in trained.items()}
            _adam(state, {name: g * shrink for name, g in gradients.items()}, rates)
            if state.step in checks:
                error = objective.error(trained, state.thetas)
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


def _gradients(
    program: Program,
    trained: Mapping[str, Variable],
    thetas: Mapping[str, Tensor],
    objective: Objective,
    step: int,
) -> tuple[float, dict[str, Tensor]]:
    """The loss of a step, and its gradient by every theta; weights are computed once for all parts of it."""
    leaves = {name: theta.detach().requires_grad_() for name, theta in thetas.items()}
    made = values(program, trained, leaves)
    loss, reached = objective.gradients(step, made)
    if not math.isfinite(loss):
        return loss, {}
    gradients = torch.autograd.grad(
        [made[name] for name in reached], list(leaves.values()), list(reached.values()),
        allow_unused=True, materialize_grads=True,
    )  # fmt: skip
    return loss, dict(zip(thetas, gradients, strict=True))


def _adam(state: State, gradients: Mapping[str, Tensor], rates: Mapping[str, float]) -> None:
    """Takes a step of Adam (Kingma 2015, arXiv 1412.6980, algorithm 1)."""
    for name, g in gradients.items():
        state.first[name] = state.first[name].lerp(g, 1 - BETAS[0])
        state.second[name] = state.second[name].lerp(g.square(), 1 - BETAS[1])
        mean = state.first[name] / (1 - BETAS[0] ** state.step)
        spread = state.second[name] / (1 - BETAS[1] ** state.step)
        state.thetas[name] = state.thetas[name] - rates[name] * mean / (spread.sqrt() + EPSILON)
