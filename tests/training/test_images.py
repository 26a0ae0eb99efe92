from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from mpq_compiler.analysis.trajectory_error import TrajectoryError
from mpq_compiler.ir.program import NOTES, TensorStore
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.ir.verifier import verify
from mpq_compiler.passes.distill import IMAGE_CHECKS
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.training import images, trainer
from mpq_compiler.training.data import BATCH
from mpq_compiler.training.images import Images
from mpq_compiler.training.state import RATES, Stage
from mpq_compiler.training.variables import settled
from tests.harness import programs
from tests.passes.test_distill import killed_at, same, start

MODEL = "unet2d"
STAGE = Stage("images", False, 4, {kind: rate / 3 for kind, rate in RATES.items()}, checks=2)


def session(tmp_path, **more):
    return Session(programs.denoiser(MODEL), cache=tmp_path, steps=4, **more)


def stretched():
    """A program whose weights are all a quarter too large, which any few steps mend a part of."""
    program = start()
    scales = {weight.tables.scale for weight in settled(program)}
    tensors = {name: t * 1.25 if name in scales else t for name, t in program.tensors.items()}
    return program.fork(tensors=TensorStore(tensors))


def drawn(session, groups=2, held_out=6):
    return images.drawn(session, groups), TrajectoryError.drawn(session, held_out)


@pytest.fixture(autouse=True)
def few(monkeypatch):
    monkeypatch.setattr(images, "ROWS", 4)


@pytest.mark.parametrize("rows", [1, 8])
def test_gradients_are_differences_of_the_loss(tmp_path, rows):
    """Of a float program, by biases: through the model, the sampler and the logarithm, in parts of any size."""
    program = programs.after(MODEL, "layout")
    groups, held_out = drawn(session(tmp_path))
    objective = Images(program, groups, held_out, session(tmp_path, jobs=2))
    objective.rows, objective.usual = rows, 1e-3
    generator = torch.Generator().manual_seed(0)
    stored = {str(n.target): program.tensors[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}
    biases = {n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in stored.items() if t.ndim == 1}
    for bias in biases.values():
        bias.requires_grad_()
    _, gradients = objective.gradients(2, biases)
    assert [*gradients] == [*biases]
    direction = {name: torch.randn(t.shape, generator=generator) for name, t in biases.items()}
    slope = sum(float((gradients[name].double() * d).sum()) for name, d in direction.items())
    size = 2e-5 / math.sqrt(sum(float(d.square().sum()) for d in direction.values())) * 100
    more, less = (
        math.log(objective.gradients(2, {n: t + sign * size * direction[n] for n, t in biases.items()})[0])
        for sign in (1, -1)
    )
    assert slope == pytest.approx((more - less) / (2 * size), rel=0.03)


def test_images_get_better_and_codes_stay(tmp_path):
    program, used = stretched(), session(tmp_path)
    groups, held_out = drawn(used)
    trained, outcome = trainer.train_images(program, STAGE, groups, held_out, used)
    verify(trained, after="distill")
    assert outcome.before == held_out.typical_noise(program)
    assert outcome.after == held_out.typical_noise(trained) < outcome.before and outcome.best_step > 0
    assert [w.codes for w in settled(trained)] == [w.codes for w in settled(program)]


@pytest.mark.invariant("compiler-12")
def test_no_number_of_jobs_and_no_kill_changes_a_bit(tmp_path, monkeypatch):
    whole, outcome = trainer.train_images(
        stretched(), STAGE, *drawn(session(tmp_path)), session(tmp_path / "a", jobs=2)
    )
    killed_at(4, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        trainer.train_images(stretched(), STAGE, *drawn(session(tmp_path)), session(tmp_path / "b"))
    assert len([*(tmp_path / "b" / "training").iterdir()]) == 1
    resumed, again = trainer.train_images(stretched(), STAGE, *drawn(session(tmp_path)), session(tmp_path / "b"))
    assert again == outcome and same(whole, resumed)
    other = replace(session(tmp_path / "b"), seed=1)
    assert not same(whole, trainer.train_images(stretched(), STAGE, *drawn(other), other)[0])


@pytest.mark.invariant("quest-5", "compiler-9")
@pytest.mark.parametrize("rate", [0.3, 1e9])
def test_divergence_keeps_the_best(tmp_path, rate):
    """Where the program does not draw any more, and where it draws something else."""
    used = session(tmp_path)
    groups, held_out = drawn(used)
    stage = replace(STAGE, rates=dict.fromkeys(RATES, rate), steps=2)
    trained, outcome = trainer.train_images(start(), stage, groups, held_out, used)
    assert (outcome.diverged is not None) == (rate > 1)
    assert (outcome.best_step, outcome.after) == (0, outcome.before) == (0, held_out.typical_noise(trained))


def test_groups_are_images_of_their_own(tmp_path):
    groups, held_out = drawn(session(tmp_path), 3)
    every = np.concatenate([held_out.reference, *(g.reference for g in groups)])
    assert len(np.unique(every.reshape(len(every), -1), axis=0)) == 6 + 3 * 4
    assert images.digest(groups) == images.digest(drawn(session(tmp_path), 3)[0])
    assert images.digest(groups) != images.digest(groups[:2]) != images.digest(groups[1:])


def test_steps_take_the_time_of_the_updates():
    for updates, calls in ((100, 10), (1000, 10), (1000, 20), (3, 10)):
        steps, groups = images.affordable(updates, calls, 50)
        taken = (images.PASSES * steps + groups) * images.ROWS * calls + 50 * calls
        assert groups == min(steps, images.GROUPS)
        assert not steps or 0.9 < taken / (3 * BATCH * updates) <= 1
    assert images.affordable(3, 10, 50) == (0, 0)


OPTIONS = {"updates": 24, "latent": 0.5, "samples": 1, "steps": 2, "images": 4, "unroll": 0.8}


def test_the_pass_goes_on_from_weights_and_scales_to_images(tmp_path):
    program = make_pass("distill", OPTIONS).run(start(), session(tmp_path))
    phases = program.facts[DECISIONS][""]["distill"]["phases"]
    assert [phase["phase"] for phase in phases] == ["weights", "scales", "images"]
    taken = [phase["stages"][0]["steps"] for phase in phases]
    assert taken[:2] == [2, 3] and taken[2] == images.affordable(19, 4, (IMAGE_CHECKS + 1) * 4)[0]
    assert phases[-1]["kept"] and phases[-1]["images_after"] < phases[-1]["images_before"]
    assert phases[-1]["stages"][0]["after"] == phases[-1]["images_after"]
    assert not [note for note in program.facts.get(NOTES, []) if "unroll" in note]


@pytest.mark.parametrize(
    "change, said", [({"images": 0}, "no images are held out"), ({}, "calls that were given"), ({"updates": 3}, "")]
)
def test_where_no_images_can_be_trained_on_scales_learn_calls(tmp_path, change, said):
    used = session(tmp_path)
    if not change:
        used.calibration = programs.calibration(MODEL)
    made = make_pass("distill", {**OPTIONS, "updates": 2, "latent": 0.0, **change})
    program = made.run(start(), used)
    (only,) = program.facts[DECISIONS][""]["distill"]["phases"]
    assert only["phase"] == "scales" and only["stages"][0]["steps"] == made.updates
    notes = [note for note in program.facts.get(NOTES, []) if "unroll had no effect" in note]
    assert len(notes) == bool(said) and all(said in note for note in notes)
