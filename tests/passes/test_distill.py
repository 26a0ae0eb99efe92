from __future__ import annotations

import math
import os
import subprocess
import sys
import textwrap
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

from mpq_compiler.analysis import trajectory_error
from mpq_compiler.frontend import trajectories
from mpq_compiler.ir import blocks
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.ops import fake_quantize
from mpq_compiler.ir.program import NOTES, PLANNED
from mpq_compiler.ir.provenance import DECISIONS
from mpq_compiler.ir.verifier import verify
from mpq_compiler.pipeline import parser
from mpq_compiler.pipeline.options import make as make_pass
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.settle import LATENTS
from mpq_compiler.sampling.loop import gaussian
from mpq_compiler.support.errors import UserError
from mpq_compiler.training import by_parts, outputs, trainer
from mpq_compiler.training import data as training_data
from mpq_compiler.training.data import Data
from mpq_compiler.training.relation_loss import Term
from mpq_compiler.training.state import RATES, Stage
from mpq_compiler.training.trainer import train
from mpq_compiler.training.variables import Kind, settled
from tests.harness import programs

MODEL = "unet2d"
ROOT = Path(__file__).parents[2]
BOTH = Stage("x", True, 8, adapters=4, range_network=True)


@pytest.fixture(scope="module")
def data():
    denoiser = programs.denoiser(MODEL)

    def calls(seed):
        return Data(*trajectories.record_teacher(denoiser, 2, 5, seed))

    return calls(1), calls(2)


def session(tmp_path, **more):
    return Session(programs.denoiser(MODEL), programs.calibration(MODEL), cache=tmp_path, **more)


def start(pipeline=programs.RESIDUAL):
    return programs.after(MODEL, "round-weights", pipeline)


def stored(program):
    return {str(n.target): program.tensors[str(n.target)] for n in program.graph.nodes if n.op == "get_attr"}


def same(a, b):
    a, b = stored(a), stored(b)
    return a.keys() == b.keys() and all(torch.equal(a[n], b[n]) for n in a)


def held_out(program, data):
    error = sum(float((run(program, d.inputs) - d.targets).double().square().sum()) for d in data.parts())
    return error / float(data.targets.double().square().sum())


@pytest.mark.parametrize("pipeline", [programs.RESIDUAL, programs.LOW_RANK])
@pytest.mark.parametrize("latent", [True, False])
@pytest.mark.invariant("efficientdm-2", "mpq-dm-4")
def test_the_error_falls_and_is_that_of_the_stored_program(data, tmp_path, latent, pipeline):
    program = start(pipeline)
    trained, outcome = train(program, Stage("x", latent, 6), *data, session(tmp_path), 0)
    verify(trained, after="distill")
    assert not {*stored(trained)} & {*trained.facts[LATENTS].values()}  # the float weights are left behind
    assert outcome.after < outcome.before and outcome.best_step > 0 and outcome.diverged is None
    assert math.isclose(held_out(trained, data[1]), outcome.after, rel_tol=1e-5)
    for weight in settled(trained):
        codes = trained.tensors[weight.codes]
        table = trained.tensors[weight.tables.lut]
        assert int(codes.max()) < table.shape[1]


@pytest.mark.invariant("efficientdm-2", "tdq-2")
def test_neither_adapters_nor_networks_are_stored(data, tmp_path):
    """The program has the tensors that it had, of other values, and errs as it did in training."""
    program = start()
    trained, outcome = train(program, BOTH, *data, session(tmp_path), 0)
    verify(trained, after="distill")
    assert outcome.after < outcome.before and outcome.best_step > 0
    assert math.isclose(held_out(trained, data[1]), outcome.after, rel_tol=1e-5)
    forms = [sorted((n.split(":")[0], str(t.dtype), t.shape) for n, t in stored(p).items()) for p in (program, trained)]
    assert forms[0] == forms[1] and not same(program, trained)
    operations = [[n.target for n in p.graph.nodes if n.op == "call_function"] for p in (program, trained)]
    assert operations[0] == operations[1]


@pytest.mark.invariant("compiler-12")
def test_every_option_of_a_stage_trains_other_bits_from_one_cache(data, tmp_path):
    plain = Stage("x", True, 4)  # after a single update adapters of any rank have moved by the same
    stages = [plain, replace(plain, adapters=4), replace(plain, adapters=5), replace(plain, range_network=True)]
    found = [train(start(), stage, *data, session(tmp_path), 0)[0] for stage in stages]
    assert len([*(tmp_path / "training").iterdir()]) == len(stages)
    assert not any(same(a, b) for a, b in combinations(found, 2))
    again = train(start(), stages[1], *data, session(tmp_path / "b"), 0)[0]
    assert same(found[1], again)
    assert not same(found[1], train(start(), stages[1], *data, session(tmp_path), 1)[0])  # another seed


@pytest.mark.invariant("quest-1")
def test_frozen_codes_stay(data, tmp_path):
    program = start()
    trained, _ = train(program, Stage("x", False, 4), *data, session(tmp_path), 0)
    for before, after in zip(settled(program), settled(trained), strict=True):
        assert (before.codes, before.signs, before.tables.lut) == (after.codes, after.signs, after.tables.lut)
        assert before.tables.scale != after.tables.scale


@pytest.mark.invariant("efficientdm-6")
def test_zero_points_are_codes(data, tmp_path):
    rates = {**RATES, Kind.ZERO: 3.0}
    program = start(programs.RESIDUAL.replace("int2+b", "int2+b,activations=4"))
    trained, _ = train(program, Stage("x", False, 8, rates), *data, session(tmp_path), 0)
    calls = [n for n in trained.graph.nodes if n.target is fake_quantize]
    moved = 0
    for call in calls:
        zero = trained.tensors[str(call.args[2].target)]
        assert call.args[4] == 4 and zero.dtype == torch.uint8 and int(zero.max()) < 2**4
        moved += int((zero != program.tensors[str(call.args[2].target)]).sum())
        assert trained.activations[call.args[0].name].zero_point == str(call.args[2].target)


@pytest.mark.invariant("mtrd-7", "compiler-12")
def test_no_number_of_jobs_changes_a_bit(data, tmp_path):
    found = [
        train(start(), Stage("x", True, 3), *data, session(tmp_path / str(jobs), jobs=jobs), 0)[0] for jobs in (1, 2)
    ]
    assert same(*found)


def killed_at(step, monkeypatch):
    """Ends the training in that update, once; returns what grows by one with every update."""
    update, updates = trainer._adam, []

    def dies(*arguments):
        updates.append(arguments[0].step)
        if len(updates) == step:
            raise KeyboardInterrupt
        update(*arguments)

    monkeypatch.setattr(trainer, "_adam", dies)
    return updates


@pytest.mark.parametrize("stage", [Stage("x", True, 8), BOTH])
def test_goes_on_after_a_kill(data, tmp_path, monkeypatch, stage):
    """A run that dies in the middle and is started again ends with the bits of one that does not."""
    whole, outcome = train(start(), stage, *data, session(tmp_path / "a"), 0)
    updates = killed_at(5, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(start(), stage, *data, session(tmp_path / "b"), 0)
    assert len([*(tmp_path / "b" / "training").iterdir()]) == 1
    resumed, again = train(start(), stage, *data, session(tmp_path / "b"), 0)
    assert again == outcome and same(whole, resumed)
    third, _ = train(start(), stage, *data, session(tmp_path / "b"), 0)
    assert len(updates) == 5 + 8 - 4 and same(whole, third)  # what is finished is not trained again


def related():
    """A stage whose features relate."""
    found = blocks.blocks(programs.denoiser(MODEL).module.model, start())
    return Stage("x", True, 8, relation=Term(next(b.output for b in found if b.repeated), 0.1))


def test_goes_on_after_a_kill_in_another_process(data, tmp_path, monkeypatch):
    """Keys know nothing of the process: no address, no order of sets."""
    code = f"""
    import os
    from tests.passes import test_distill as t
    from mpq_compiler.training import trainer as distillation
    update = distillation._adam
    def dies(state, *arguments):
        if state.step == 5:
            os._exit(9)
        update(state, *arguments)
    distillation._adam = dies
    calls = [t.Data(*t.trajectories.record_teacher(t.programs.denoiser(t.MODEL), 2, 5, seed)) for seed in (1, 2)]
    t.train(t.start(), t.related(), *calls, t.session(t.Path({str(tmp_path)!r})), 0)
    """
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], cwd=ROOT, env=environment)
    assert done.returncode == 9
    updates = killed_at(0, monkeypatch)
    train(start(), related(), *data, session(tmp_path), 0)
    assert updates == [5, 6, 7, 8]


def test_a_torn_state_is_trained_anew(data, tmp_path):
    stage = Stage("x", False, 2)
    whole, _ = train(start(), stage, *data, session(tmp_path), 0)
    (file,) = (tmp_path / "training").iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    again, _ = train(start(), stage, *data, session(tmp_path), 0)
    assert same(whole, again)


@pytest.mark.invariant("quest-5", "compiler-9")
def test_divergence_keeps_the_best(data, tmp_path):
    rates = dict.fromkeys(Kind, 1e9)
    program = start()
    trained, outcome = train(program, Stage("x", False, 8, rates), *data, session(tmp_path), 0)
    assert outcome.diverged is not None and outcome.after <= outcome.before
    assert math.isclose(held_out(trained, data[1]), outcome.after, rel_tol=1e-5)


@pytest.mark.invariant("quest-5", "compiler-9")
def test_the_pass_says_what_it_did(tmp_path):
    made = make_pass("distill", {"updates": 8, "samples": 2, "steps": 4, "images": 4})
    program = made.run(start(), session(tmp_path))
    phases = program.facts[DECISIONS][""]["distill"]["phases"]
    stages = [stage for phase in phases for stage in phase["stages"]]
    assert [p["phase"] for p in phases] == ["weights", "scales"] and [s["steps"] for s in stages] == [6, 2]
    assert all(s["after"] <= s["before"] for s in stages)
    nothing = make_pass("distill", {"updates": 0}).run(start(), session(tmp_path))
    assert same(nothing, start()) and NOTES not in nothing.facts
    short = make_pass("distill", {"minutes": 1e-9}).run(start(), session(tmp_path))
    assert "not enough for one update" in short.facts[NOTES][-1]


def test_options_without_an_effect_are_said(tmp_path):
    """Adapters where codes stay, networks of one time group or of activations without scales."""
    options = {"updates": 1, "latent": 0.0, "samples": 1, "steps": 2, "images": 0}
    one = programs.RESIDUAL.replace("groups=3", "groups=1")
    given = [
        (programs.RESIDUAL, {"adapters": 4}, "adapters had no effect"),
        (programs.RESIDUAL, {"adapters_start": "svd"}, "adapters_start had no effect"),
        (one, {"range_network": True}, "one time group"),
    ]
    for pipeline, more, said in given:
        plain, other = (
            make_pass("distill", options | extra).run(start(pipeline), session(tmp_path))
            for extra in ({}, more)
        )
        assert said in other.facts[NOTES][-1] and same(plain, other)
    network = make_pass("distill", {"range_network": True})
    dynamic = start().fork()
    for edge, plan in dynamic.activations.items():
        dynamic.activations[edge] = replace(plan, dynamic=True, scale=None, zero_point=None)
    (note,) = network._without_effect(dynamic, session(tmp_path), network._shares(1, session(tmp_path), None), None)
    assert "no activation has a stored scale" in note
    assert not [*network._without_effect(start(), session(tmp_path), network._shares(1, session(tmp_path), None), None)]
    with pytest.raises(UserError, match="adapters"):
        make_pass("distill", {"adapters": -1})


def test_images_that_get_worse_undo_a_stage(tmp_path, monkeypatch):
    errors = iter([0.1, 0.2, 0.05])
    monkeypatch.setattr(trajectory_error.TrajectoryError, "typical_noise", lambda self, program: next(errors))
    made = make_pass("distill", {"updates": 4, "latent": 0.5, "samples": 2, "steps": 4, "images": 4})
    program = made.run(start(), session(tmp_path))
    first, second = program.facts[DECISIONS][""]["distill"]["phases"]
    assert not first["kept"] and second["kept"] and "undone" in program.facts[NOTES][-1]
    before = {w.codes for w in settled(start())}
    assert {w.codes for w in settled(program)} == before  # the weights are those of before, the scales are not
    assert not same(program, start())


def test_entropy_coded_weights_keep_their_codes(tmp_path):
    options = {"updates": 2, "latent": 0.5, "adapters": 2, "samples": 1, "steps": 2, "images": 0}
    before = start(programs.RESIDUAL.replace("int2+b", "ec2"))
    program = make_pass("distill", options).run(before, session(tmp_path))
    (only,) = program.facts[DECISIONS][""]["distill"]["phases"]
    assert only["phase"] == "scales" and only["stages"][0]["steps"] == 2
    assert {w.codes for w in settled(program)} == {w.codes for w in settled(before)} and not same(program, before)
    (note,) = program.facts[NOTES]
    assert "adapters had no effect" in note and "entropy-coded weights keep their codes" in note


def test_given_calls_are_what_it_trains_on(tmp_path):
    denoiser = programs.denoiser(MODEL)
    given = session(tmp_path)
    data, judged = training_data.calls(given, 99, 99)
    assert len(data) + len(judged) == len(given.calibration["timestep"])
    assert torch.equal(data.targets, denoiser(**data.inputs))
    assert set(data.inputs["timestep"].tolist()) >= set(judged.inputs["timestep"].tolist())
    untaught, again = training_data.calls(given, 99, 99, taught=False)
    assert len(untaught) == len(data) and not untaught.targets.numel()
    assert all(torch.equal(untaught.inputs[name], value) for name, value in data.inputs.items())
    assert torch.equal(again.targets, judged.targets)
    recorded = training_data.calls(replace(given, calibration=None), 2, 3)
    assert [len(d) for d in recorded] == [6, 3 * training_data.HELD_OUT]


@pytest.mark.invariant("efficientdm-5")
def test_calls_are_the_float_models_own_trajectory():
    """Each from the noise by the float model's outputs alone: no quantized program has a part in it."""
    denoiser = programs.denoiser(MODEL)
    inputs, targets = trajectories.record_teacher(denoiser, 2, 5, 1)
    x = gaussian(2, denoiser.latent_shape, 1)
    for step, time in enumerate(denoiser.scheduler.timesteps(5)):
        rows = inputs["timestep"] == time
        output = denoiser(sample=x, timestep=np.full(2, time))
        assert torch.equal(inputs["sample"][rows], torch.from_numpy(x)) and torch.equal(targets[rows], output)
        x = denoiser.scheduler.step(output.numpy(), step, 5, x)
    assert len(targets) == 10 and not targets.requires_grad


def test_noise_of_the_float_program_is_none(data, tmp_path):
    program = programs.after(MODEL, "layout")
    assert outputs.noise(program, {}, {}, data[1], session(tmp_path)) < 1e-9


@pytest.mark.parametrize("stage", [Stage("x", True, 4), replace(BOTH, steps=4)])
@pytest.mark.invariant("quest-1", "dilatequant-7", "dilatequant-8")
def test_blocks_are_trained_one_by_one(data, tmp_path, stage):
    """A block moves its own parameters and the tables of what its layers read, and its own output gets better."""
    program = start()
    found = blocks.blocks(programs.denoiser(MODEL).module.model, program)
    last = [block.output for block in found]
    here = next(i for i, block in enumerate(found) if block.name == "mid_block.attentions.0")

    def stages(number, part):
        return [stage] if number == here else []

    trained, (outcome,) = by_parts.train_parts(program, last, stages, *data, session(tmp_path), 0)
    assert outcome.after < outcome.before
    before, after = stored(program), stored(trained)
    moved = {name.split(":")[0] for name in after.keys() - before.keys()}
    own = found[here].parameters
    readers = {n.args[0].args[0].name for n in program.graph.nodes if blocks.weight_path_of(n) in own}
    assert moved & set(own) and moved - set(own) <= readers


@pytest.mark.parametrize("model", ["unet2d", "pixart", "dit"])
def test_every_layer_is_in_one_block(model):
    program = programs.after(model, "round-weights", programs.RESIDUAL)
    found = blocks.blocks(programs.denoiser(model).module.model, program)
    paths = [path for block in found for path in block.parameters]
    assert len(paths) == len(set(paths)) and {w.path for w in settled(program)} <= set(paths)
    planned = {n.name for n in program.facts[PLANNED].graph.nodes}
    assert {block.output for block in found} <= planned
    assert 1 < sum(len(block.parameters) > 4 for block in found) < len(found)


PARTS = f"{programs.FRONT},bit-allocation{{uniform=int4}},{programs.BACK}".replace("layout,", "layout,split-shortcut,")


@pytest.mark.parametrize("pipeline", [PARTS, programs.SMALL_FLOATS])
def test_blocks_of_rewritten_programs(pipeline):
    """Parts of layers belong to their layer's block; what is rounded to small floats is none of the float program's."""
    program = programs.after(MODEL, "round-weights", pipeline)
    found = blocks.blocks(programs.denoiser(MODEL).module.model, program)
    assert {w.path for w in settled(program)} <= {path for block in found for path in block.parameters}
    assert {block.output for block in found} <= {n.name for n in program.facts[PLANNED].graph.nodes}


def test_parts_have_the_minutes_of_the_whole():
    """Steps of all parts, and the two streams, take what so many steps of the whole program take."""
    macs, rows = training_data.macs_of(start()), 40
    minutes = 1000 * 3 * training_data.BATCH * macs / training_data.MACS / 60
    assert training_data.affordable(macs, minutes) in (999, 1000)
    each = training_data.part_updates(macs, minutes, 8, rows)
    assert 3 * 8 * each + 2 * rows == pytest.approx(1000 * 3 * training_data.BATCH, rel=0.01)
    assert training_data.part_updates(macs, 1e-9, 8, rows) == 0


def test_the_pass_goes_through_the_blocks(tmp_path):
    options = {"updates": 20, "latent": 0.9, "blocks": True, "samples": 2, "steps": 3, "images": 0}
    program = make_pass("distill", options).run(start(), session(tmp_path))
    first, second = program.facts[DECISIONS][""]["distill"]["phases"]
    assert first["phase"] == "blocks" and len(first["stages"]) > 10 and second["phase"] == "scales"
    assert second["stages"][-1]["after"] < outputs.noise(
        start(), {}, {}, training_data.calls(session(tmp_path), 2, 3)[1], session(tmp_path)
    )


@pytest.mark.invariant("mtrd-7", "mtrd-8")
def test_relations_are_learned_and_survive_a_kill(data, tmp_path, monkeypatch):
    """The loss of features reaches the layers before them, and a queue is as it was after a kill."""
    program = start()
    node = next(b.output for b in blocks.blocks(programs.denoiser(MODEL).module.model, program) if b.repeated)
    alone = Stage("x", True, 8)
    stage = replace(alone, relation=Term(node, 0.1))
    whole, outcome = train(program, stage, *data, session(tmp_path / "a"), 0)
    assert not same(whole, train(program, alone, *data, session(tmp_path / "a"), 0)[0])
    assert same(whole, train(program, stage, *data, session(tmp_path / "c", jobs=2), 0)[0])
    killed_at(6, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(program, stage, *data, session(tmp_path / "b"), 0)
    resumed, again = train(program, stage, *data, session(tmp_path / "b"), 0)
    assert again == outcome and same(whole, resumed)


def test_calls_before_are_those_of_the_trajectory(tmp_path):
    """A step earlier, the same image; a model with guidance has calls of both kinds in a step."""
    calls, _ = training_data.calls(Session(programs.denoiser(MODEL), None, cache=tmp_path), 3, 4)
    index = torch.arange(len(calls))
    one, two = calls.before(index, 2)
    assert calls.stride == 3 and len(calls) == 12
    for name, x in calls.inputs.items():
        assert torch.equal(one[name][3:], x[:-3]) and torch.equal(two[name][6:], x[:-6])
        assert torch.equal(one[name][:3], x[:3]) and torch.equal(two[name][:6], torch.cat([x[:3], x[:3]]))
    labels = calls.inputs.get("class_labels")
    assert labels is None or torch.equal(one["class_labels"], labels)
    assert calls.select(index).before(index, 2) == [] and calls.before(index, 0) == []


def test_relations_of_a_window_are_learned_and_survive_a_kill(data, tmp_path, monkeypatch):
    program, calls = start(), (replace(data[0], stride=2), data[1])
    node = next(b.output for b in blocks.blocks(programs.denoiser(MODEL).module.model, program) if b.repeated)
    stages = [Stage("x", True, 2, relation=Term(node, 0.1, window)) for window in (1, 2)]
    single, whole = (train(program, stage, *calls, session(tmp_path / "a"), 0)[0] for stage in stages)
    assert not same(single, whole)
    assert same(single, train(program, stages[1], *data, session(tmp_path / "c"), 0)[0])  # the order is not known
    killed_at(2, monkeypatch)
    with pytest.raises(KeyboardInterrupt):
        train(program, stages[1], *calls, session(tmp_path / "b"), 0)
    assert same(whole, train(program, stages[1], *calls, session(tmp_path / "b"), 0)[0])


def test_calls_count_by_what_their_errors_do_to_images(data, tmp_path):
    """Weights are 1 on average, go by time, and scale the errors that are trained and judged."""
    image_error = trajectory_error.TrajectoryError.drawn(session(tmp_path), 4)
    gains = image_error.gains(start())
    assert len(gains) == trajectory_error.IMAGE_STEPS
    calls = data[0].weighted(gains)
    assert float(calls.weights.mean()) == pytest.approx(1, rel=1e-5)
    for time in calls.inputs["timestep"].unique().tolist():
        same_time = calls.weights[calls.inputs["timestep"] == time]
        assert (same_time == same_time[0]).all()
    ratio = gains[-1][1] / gains[0][1]
    ends = [calls.weights[calls.inputs["timestep"] == t][0] for t in (calls.inputs["timestep"].max(), 0)]
    assert float(ends[0] / ends[1]) == pytest.approx(ratio, rel=0.5)
    once = calls.select(torch.tensor([0]))
    assert float(once.squared(once.targets)) == pytest.approx(float(ends[0] * once.targets.square().sum()), rel=1e-5)


def test_a_few_given_calls_serve_to_train_on_and_to_judge_by(tmp_path):
    given = {name: value[:3] for name, value in programs.calibration(MODEL).items()}
    chosen = replace(session(tmp_path), calibration=given)
    data, held_out = training_data.calls(chosen, 2, 2)
    assert len(data) == len(held_out) == 3
    assert len(training_data.calls(session(tmp_path), 2, 2)[1]) == 1  # of 12


def test_relations_without_repeated_blocks_say_that_they_do_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(blocks, "repeated", lambda model: set())
    options = "updates=2,relation=0.1,images=0,samples=1,steps=2"
    for more, said in (("", "no block is one of several of a kind"), ("blocks=true,latent=1", "no block is one of")):
        (distill,) = parser.parse(f"distill{{{options}{',' + more if more else ''}}}")
        notes = distill.run(start(), session(tmp_path)).facts[NOTES]
        assert any(f"distill: relation had no effect: {said}" in note for note in notes)
    monkeypatch.undo()
    (distill,) = parser.parse(f"distill{{{options},blocks=true,latent=1}}")
    notes = distill.run(start(), session(tmp_path)).facts[NOTES]
    assert any("relation had no effect: blocks learn their own outputs" in note for note in notes)


def test_a_model_that_takes_too_much_is_trained_part_by_part(tmp_path):
    options = {"updates": 4, "latent": 0.5, "memory": 2e-4, "samples": 2, "steps": 3, "images": 0}
    program = make_pass("distill", options).run(start(), session(tmp_path))
    (told,) = program.facts[DECISIONS][""]["distill"]["phases"]
    titles = [stage["stage"] for stage in told["stages"]]
    assert told["phase"] == "parts" and told["kept"] and len(set(titles)) > 3
    assert all(stage["steps"] == 2 and stage["after"] <= stage["before"] for stage in told["stages"])
    verify(program, after="distill")
    again = make_pass("distill", options).run(start(), session(tmp_path / "again", jobs=3))
    assert same(program, again)  # no number of jobs changes a bit


def test_minutes_that_are_too_few_give_every_part_the_least_updates(tmp_path):
    options = {"minutes": 1e-9, "least": 3, "latent": 0.0, "images": 0}
    program = make_pass("distill", options).run(start(), session(tmp_path))
    (told,) = program.facts[DECISIONS][""]["distill"]["phases"]
    assert told["phase"] == "parts" and [stage["steps"] for stage in told["stages"]] == [3]  # it fits: one part
    assert {w.codes for w in settled(program)} == {w.codes for w in settled(start())}


def test_parts_that_make_outputs_worse_are_undone(tmp_path, monkeypatch):
    errors = iter([0.1, 0.2])
    options = {"updates": 1, "memory": 1e-9, "latent": 0.0, "images": 0}
    monkeypatch.setattr(by_parts, "train_parts", lambda program, *more: (program.fork(), []))
    monkeypatch.setattr(outputs, "noise", lambda *arguments: next(errors))
    program = make_pass("distill", options).run(start(), session(tmp_path))
    assert "undone" in program.facts[NOTES][-1] and same(program, start())
