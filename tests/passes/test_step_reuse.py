"""What reuse costs images, measured; what is decided with it; and the pass that marks the value."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from mpq_compiler.analysis.reuse_losses import (
    DIFFERENCE,
    GRID,
    REUSE_LOSSES,
    Drawing,
    Gap,
    MarkedDrawing,
    error_of_each,
    fit_weights,
    gaps_of,
    relative_error,
    schedule_of,
    schedule_of_one,
)
from mpq_compiler.driver.options import Options
from mpq_compiler.driver.resolve import resolve
from mpq_compiler.ir import reuse
from mpq_compiler.ir.costs import weight_path
from mpq_compiler.ir.findings import ALLOCATION, LATENCY
from mpq_compiler.ir.interpreter import run
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.keep_values import KeepValues
from mpq_compiler.passes.step_reuse import StepReuse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.sampling.reuse import OUTPUT, KeptSteps, of_compiled
from mpq_compiler.support.errors import BudgetError, UserError
from tests.harness import programs

MODEL, STEPS = programs.BUNDLED, 4


class Times:
    """Times of layers by their weights, the same in all formats but for a little, and one microsecond a node."""

    def costs(self, program, names, dynamic=False):
        nodes = {n.name: 1.0 for n in program.graph.nodes if n.op == "call_function"}
        paths = {str(weight_path(n)) for n in program.quantizable}
        layers = {path: {name: 20.0 + i for i, name in enumerate(names)} for path in paths}
        return dataclasses.make_dataclass("Costs", ["fixed", "layers", "nodes"])(sum(nodes.values()), layers, nodes)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    session = Session(programs.denoiser(MODEL), cache=tmp_path_factory.mktemp("cache"), latency=Times())
    program = programs.after(MODEL, "sensitivity")
    return StepReuse(steps=STEPS, cuts=2, places=3, images=2).run(program, session), session


def allocated(measured, ms: float):
    program, session = measured
    return BitAllocation(weights=6.5, latency=ms).run(program, session)


def whole_ms(measured) -> float:
    return allocated(measured, 1e3).facts[LATENCY]["ms"]


def test_losses_are_those_of_images(measured):
    """The loss of a gap is the error of its images to those without reuse, in the unit of sensitivities."""
    program, session = measured
    found = program.facts[REUSE_LOSSES]
    assert len(found.timesteps) == STEPS and found.gain > 0
    for cut, losses in found.losses.items():
        assert [*losses] == gaps_of(STEPS) and all(loss > 0 for loss in losses.values())
        marked = program.fork()
        reuse.mark(marked, cut.node)
        drawn = MarkedDrawing(Drawing(session, STEPS, 2), marked, {0, 2})
        schedule, latents = drawn.fitted(schedule_of_one(cut, found.timesteps, Gap(2, 1)))
        assert relative_error(latents, drawn.whole) / found.gain == pytest.approx(losses[Gap(2, 1)], rel=1e-4)
        assert np.array_equal(drawn.by(schedule), latents), "the schedule has the weights that it was drawn with"


@pytest.mark.parametrize("number", [0, 1])
def test_fitted_weights_are_nearer_than_a_line(measured, number):
    program, session = measured
    marked = programs.after(MODEL, "layout").fork()
    cut = [*program.facts[REUSE_LOSSES].losses][number]
    reuse.mark(marked, cut.node)
    drawing = Drawing(session, 8, 4)
    line = schedule_of(cut, drawing.timesteps, [Gap(3, 1), Gap(5, 1)])
    drawn = MarkedDrawing(drawing, marked, line.kept)
    schedule, latents = drawn.fitted(line)
    assert relative_error(latents, drawn.whole) < 0.7 * relative_error(drawn.by(line), drawn.whole)
    assert [bool(each) for each in schedule.sources] == [bool(each) for each in line.sources]


def test_weights_of_all_steps_together_are_nearer_than_those_of_each(measured):
    """They are nearer by images of another noise, too, and lie on the grid."""
    program, session = measured
    marked = programs.after(MODEL, "layout").fork()
    drawing, other = Drawing(session, 8, 4), Drawing(dataclasses.replace(session, seed=7), 8, 4)
    drawn = MarkedDrawing(drawing, marked, {0, 2, 4})  # unmarked: the output is kept
    line = schedule_of(next(iter(program.facts[REUSE_LOSSES].losses)), drawing.timesteps, [Gap(2, 1), Gap(4, 2)])
    fitted, _ = drawn.fitted(line)
    refined, latents = drawn.refined(fitted, 4)
    assert np.array_equal(drawn.by(refined), latents)
    assert relative_error(latents, drawn.whole) < 0.8 * relative_error(drawn.by(fitted), drawn.whole)
    unseen = MarkedDrawing(other, marked, {0, 2, 4})
    errors = [relative_error(unseen.by(schedule), unseen.whole) for schedule in (refined, fitted, line)]
    assert errors == sorted(errors), "in the order of how much was fitted"
    assert all((weight / GRID).is_integer() for sources in refined.sources for _, weight in sources)
    assert refined.kept == line.kept and list(map(len, refined.sources)) == list(map(len, line.sources))


def test_weights_that_give_no_images_are_not_taken(measured):
    program, session = measured
    drawing = Drawing(session, 8, 2)
    drawn = MarkedDrawing(drawing, programs.after(MODEL, "layout").fork(), {0, 2})
    line = schedule_of(next(iter(program.facts[REUSE_LOSSES].losses)), drawing.timesteps, [Gap(2, 1)])
    fitted, _ = drawn.fitted(line)
    near, reusing, refused = [weight for _, weight in fitted.sources[3]], drawn._functions.reusing, []

    def fragile(inputs, values, weights):
        if not refused and np.abs(np.subtract(weights[: len(near)], near)).max() > 2 * DIFFERENCE:
            refused.append(weights)
            return np.full_like(values[0], np.nan)
        return reusing(inputs, values, weights)

    drawn._functions = dataclasses.replace(drawn._functions, reusing=fragile)
    _, latents = drawn.refined(fitted, 6)
    assert refused and np.isfinite(latents).all()
    assert relative_error(latents, drawn.whole) <= relative_error(drawn.by(fitted), drawn.whole)


def test_weights_of_a_sum_are_found():
    made = np.random.default_rng(0)
    kept = made.standard_normal((3, 5, 4, 6), np.float32)
    computed = np.tensordot([0.7, -0.2, 0.4], kept, 1)
    assert fit_weights(kept, computed, [1.0, 0.0, 0.0]) == pytest.approx([0.7, -0.2, 0.4], abs=1e-3)
    assert fit_weights(kept, kept[0], [1.0]) == pytest.approx([1.0])
    nothing = np.zeros_like(kept)
    assert fit_weights(nothing, nothing[0], [1.5, -0.5, 0.0]) == [1.5, -0.5, 0.0]


def test_what_is_replayed_is_what_would_be_computed(measured):
    program, session = measured
    found, simulated = program.facts[REUSE_LOSSES], programs.after(MODEL, "layout").fork()
    _, cut = found.losses  # the first is the output's
    reuse.mark(simulated, cut.node)
    drawing = Drawing(session, STEPS, 2)
    schedule = schedule_of(cut, found.timesteps, [Gap(2, 1)])
    all_three = simulated, reuse.keeping(simulated), reuse.reusing(simulated)
    called = ((lambda inputs, p=p: drawing.run(p, inputs)) for p in all_three)
    functions = of_compiled(*called, drawing.denoiser.latent_shape, reuse.kept_shape(simulated))
    steps = KeptSteps(schedule, functions, drawing.denoiser.latent)
    assert np.array_equal(MarkedDrawing(drawing, simulated, {0, 1, 2}).by(schedule), drawing.draw(steps))
    assert steps.reused == 1


def test_a_second_budget_measures_nothing_again(measured):
    program, session = measured
    again = Session(session.denoiser, cache=session.cache)
    found = StepReuse(steps=STEPS, cuts=2, places=3, images=2).run(programs.after(MODEL, "sensitivity"), again)
    assert found.facts[REUSE_LOSSES] == program.facts[REUSE_LOSSES]
    assert any("losses of reuse" in what for what in again.reused)


def test_an_ample_budget_reuses_nothing(measured):
    found = allocated(measured, 1e3)
    assert reuse.REUSE not in found.facts and "reuse" not in found.facts[ALLOCATION]
    assert KeepValues().run(found, measured[1]).facts.get(reuse.REUSE) is None


def test_a_budget_that_bits_cannot_meet_is_met_by_reuse(measured):
    budget = 0.75 * whole_ms(measured)
    without = measured[0].fork()
    del without.facts[REUSE_LOSSES]
    with pytest.raises(BudgetError, match="cannot be met"):
        BitAllocation(weights=6.5, latency=budget).run(without, measured[1])
    found = allocated(measured, budget)
    plan, schedule = found.facts[ALLOCATION]["reuse"], found.facts[reuse.REUSE]
    assert found.facts[LATENCY]["ms"] <= budget * (1 + 1e-9) < found.facts[LATENCY]["whole_ms"]
    assert plan["reused"] == STEPS - len(plan["computed"])
    assert plan["reused"] == schedule.reused > 0 and plan["steps"] == STEPS and plan["node"] == schedule.node
    assert found.facts[LATENCY]["whole_ms"] - found.facts[LATENCY]["ms"] == pytest.approx(plan["saved_ms"])
    kept = KeepValues(images=2).run(found, measured[1])
    assert (reuse.marked(kept) is None) == (schedule.node == OUTPUT)
    found_plan = kept.facts[ALLOCATION]["reuse"]
    assert found_plan["measured"] > 0 and found_plan["noise"] > 0
    alone = KeepValues(images=2, rounds=0).run(found, measured[1]).facts[ALLOCATION]["reuse"]
    assert found_plan["noise"] == alone["noise"] and found_plan["noise_reusing"] <= alone["noise_reusing"]
    assert kept.facts[reuse.REUSE].kept == schedule.kept and kept.facts[reuse.REUSE] != schedule, "weights are fitted"
    inputs = measured[1].denoiser.random_inputs(2, 0)
    assert torch.equal(run(kept, inputs), run(found, inputs))


def test_a_budget_beyond_reuse_is_refused(measured):
    with pytest.raises(BudgetError, match=r"a latency of .* cannot be met: the smallest that the formats allow"):
        allocated(measured, 0.05 * whole_ms(measured))


def test_objectives_that_are_no_noise_are_refused(measured):
    program, session = measured
    with pytest.raises(UserError, match=r"objective=paper-db.* sums something else than noise"):
        BitAllocation(weights=6.5, latency=1e3, objective="paper-db").run(program, session)


def test_a_schedule_by_hand():
    session = Session(programs.denoiser(MODEL))
    program = programs.after(MODEL, "bit-allocation")
    found = KeepValues(every=3, begin=0.5, steps=8, share=0.8, images=2).run(program, session)
    schedule = found.facts[reuse.REUSE]
    assert [bool(sources) for sources in schedule.sources] == [False] * 5 + [True, True, False]
    assert [step for step, _ in schedule.sources[6]] == [4, 3, 2] and schedule.sources[6][2][1] != 0
    assert list(schedule.timesteps) == [float(t) for t in session.denoiser.scheduler.timesteps(8)]
    assert reuse.marked(found) is not None and reuse.marked(program) is None
    with pytest.raises(UserError, match=r"keep-values.every. finds no value that stands for 25% to 1% of the network"):
        KeepValues(every=2, share=0.01).run(program, session)


def test_the_option_adds_both_passes_and_needs_a_budget_of_time():
    names = [step.name() for step in resolve(Options(latency="2ms", reuse=50))]
    assert names.index("sensitivity") < names.index("step-reuse") < names.index("bit-allocation")
    assert names.index("bit-allocation") < names.index("keep-values") < names.index("insert-fake-quant")
    told = {step.name(): step.steps for step in resolve(Options(latency="2ms", reuse=50)) if hasattr(step, "steps")}
    assert told["step-reuse"] == told["keep-values"] == 50
    assert "step-reuse" not in [step.name() for step in resolve(Options(latency="2ms"))]
    with pytest.raises(UserError, match=r"reuse says how many steps .*: add latency, or leave it out"):
        resolve(Options(reuse=20))
    with pytest.raises(UserError, match="option 'steps' of pass 'step-reuse' must be 2 or more, not 1"):
        resolve(Options(latency="2ms", reuse=1))



def test_errors_of_images_have_the_mean_of_all():
    drawn, expected = np.random.default_rng(3).standard_normal((2, 5, 1, 4, 4), np.float32)
    assert error_of_each(drawn, expected).mean() == pytest.approx(relative_error(drawn, expected))
    assert error_of_each(expected, expected).tolist() == [0] * 5
