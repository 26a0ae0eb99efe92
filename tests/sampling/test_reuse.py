"""Which steps reuse what, and what is kept from call to call."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch

from mpq_compiler.sampling.reuse import (
    KEPT,
    SLOTS,
    STREAMS,
    WEIGHTS,
    KeptSteps,
    Schedule,
    of_compiled,
    of_outputs,
    sources_of,
)
from mpq_compiler.support.errors import Notice

TIMES = (900.0, 700.0, 500.0, 300.0, 100.0)
SHAPE, KEPT_SHAPE = (2, 3), (4,)


def schedule(*whole: bool) -> Schedule:
    return Schedule("inner", TIMES, sources_of(whole, TIMES))


class Network:
    """A network of two parts that counts its calls: the kept value follows from the inputs, the output from both."""

    def __init__(self):
        self.calls = []

    def inner(self, inputs):
        x = inputs["sample"].reshape(len(inputs["sample"]), -1)
        label = np.asarray(inputs["label"])[:, None]
        return (x[:, :4] * 3 + np.asarray(inputs["timestep"])[:, None] + 100 * label).astype(np.float32)

    def outer(self, inputs, inner):
        return inputs["sample"] + inner.sum(1)[:, None, None]

    def whole(self, inputs):
        self.calls.append("whole")
        return self.outer(inputs, self.inner(inputs))

    def keeping(self, inputs):
        self.calls.append("keeping")
        inner = self.inner(inputs)
        return np.concatenate([self.outer(inputs, inner).reshape(len(inner), -1), inner], 1)

    def reusing(self, inputs):
        self.calls.append("reusing")
        assert inputs[KEPT].shape == (len(inputs["sample"]), SLOTS, *KEPT_SHAPE)
        inner = (inputs[KEPT] * inputs[WEIGHTS][:, :, None]).sum(1)
        return self.outer(inputs, inner)

    def steps(self, chosen: Schedule) -> KeptSteps:
        functions = of_compiled(self.whole, self.keeping, self.reusing, SHAPE, KEPT_SHAPE)
        return KeptSteps(chosen, functions, "sample")


def given(step: int, batch: int = 2, label: int = 0, seed: int = 0) -> dict[str, np.ndarray]:
    x = np.random.default_rng([seed, step]).standard_normal((batch, *SHAPE), np.float32)
    return {"sample": x, "timestep": np.full(batch, TIMES[step]), "label": np.full(batch, label)}


def test_sources_are_the_last_values_on_a_line():
    first, second, *_, last = sources_of([True, False, True, False, True, True, False], (*TIMES, 50.0, 20.0))[1:]
    assert first == ((0, 1.0),), "there is one value so far"
    assert second == ()
    assert [step for step, _ in last] == [5, 4, 2], "the last first, and no more than fit"
    weights = [weight for _, weight in last]
    assert sum(weights) == pytest.approx(1) and weights[2] == 0
    assert weights[0] == pytest.approx(1 + 30 / 50), "t goes on as it did from step 4 to step 5"


def test_a_line_is_extrapolated_as_it_goes_on():
    """It is exact where the value is a line in the timestep."""
    sources = sources_of([True, True, False, False, False], TIMES)
    for step in (2, 3, 4):
        assert sum((5 - 2 * TIMES[s]) * w for s, w in sources[step]) == pytest.approx(5 - 2 * TIMES[step], rel=1e-5)


def test_weights_replace_those_of_the_line():
    chosen = schedule(True, True, False, True, False)
    found = chosen.weighted({4: [0.5, 0.25, 0.125]})
    assert found.sources[4] == ((3, 0.5), (1, 0.25), (0, 0.125))
    assert found.sources[:4] == chosen.sources[:4] and found.kept == chosen.kept


def test_a_schedule_travels_as_json():
    chosen = schedule(True, True, False, True, False)
    assert Schedule.from_json(chosen.to_json()) == chosen
    assert chosen.reused == 2 and chosen.kept == {0, 1, 3}


def test_steps_compute_and_reuse_as_scheduled():
    network, chosen = Network(), schedule(True, True, False, True, False)
    steps = network.steps(chosen)
    kept = {}
    for step in range(5):
        inputs = given(step)
        found = steps(**inputs)
        if chosen.sources[step]:
            inner = sum(kept[source] * np.float32(weight) for source, weight in chosen.sources[step])
            assert np.allclose(found, network.outer(inputs, inner), rtol=1e-6)
        else:
            kept[step] = network.inner(inputs)
            assert np.array_equal(found, network.outer(inputs, kept[step]))
    assert network.calls == ["keeping", "keeping", "reusing", "keeping", "reusing"] and steps.reused == 2


def test_where_the_output_is_kept_a_step_that_reuses_calls_nothing():
    network, chosen = Network(), schedule(True, True, False, True, False)
    chosen = chosen.weighted({4: [0.75, 0.5, -0.25]})
    steps = KeptSteps(chosen, of_outputs(network.whole), "sample")
    found = [steps(**given(step)) for step in range(5)]
    assert network.calls == ["whole"] * 3 and steps.reused == 2
    for step in (2, 4):
        expected = sum(found[source] * np.float32(weight) for source, weight in chosen.sources[step])
        assert np.array_equal(found[step], expected)


def test_outputs_of_torch_are_summed_to_the_same_bits_and_may_be_written_to():
    network, chosen = Network(), schedule(True, True, True, False, False).weighted({3: [1.3, 0.7, -0.25]})
    steps = KeptSteps(chosen, of_outputs(network.whole), "sample")
    expected = [steps(**given(step)) for step in range(5)]
    there = KeptSteps(chosen, of_outputs(lambda inputs: torch.from_numpy(network.whole(inputs)), "clone"), "sample")
    for step in range(5):
        found = there(**given(step))
        assert np.array_equal(found.numpy(), expected[step])
        found.zero_()


def test_more_sets_of_conditions_than_are_kept_are_told_of():
    network = Network()
    steps = network.steps(schedule(True, False, True, False, False))
    with pytest.warns(Notice, match=f"more than {STREAMS} sets of conditions"):
        for step in range(2):
            for label in range(STREAMS + 1):
                steps(**given(step, label=label))
    assert "reusing" not in network.calls


def test_a_step_whose_value_nobody_reads_keeps_none():
    network = Network()
    steps = network.steps(schedule(True, True, True, True, False))
    for step in range(5):
        steps(**given(step))
    assert network.calls == ["whole", "keeping", "keeping", "keeping", "reusing"]


def test_guidance_keeps_the_values_of_both_conditions():
    network, alone = Network(), Network()
    chosen = schedule(True, False, True, False, False)
    steps, apart = network.steps(chosen), {label: alone.steps(chosen) for label in (1, 7)}
    for step in range(5):
        for label in (1, 7):
            inputs = given(step, label=label)
            assert np.array_equal(steps(**inputs), apart[label](**inputs)), "the other condition's value was taken"


@pytest.mark.parametrize(
    ("order", "reused"), [([0, 2, 1, 3, 4], []), ([1, 2, 3, 4, 0], []), ([4, 3, 2, 1, 0], []), ([0, 1, 0, 2], [1])]
)
def test_steps_out_of_order_compute_all(order, reused):
    network = Network()
    steps = network.steps(schedule(True, False, False, False, False))
    for step in order:
        steps(**given(step))
    assert [i for i, call in enumerate(network.calls) if call == "reusing"] == reused


def test_a_drawing_that_begins_in_the_middle_computes_until_it_has_what_it_needs():
    network = Network()
    steps = network.steps(schedule(True, True, False, True, False))
    for step in (2, 3, 4):
        steps(**given(step))
    assert "reusing" not in network.calls


def test_the_next_drawing_begins_with_nothing():
    network, fresh = Network(), Network()
    steps, other = network.steps(schedule(True, False, False, True, False)), None
    for seed in (1, 2):
        other = fresh.steps(schedule(True, False, False, True, False))
        for step in range(5):
            inputs = given(step, seed=seed)
            assert np.array_equal(steps(**inputs), other(**inputs))


def test_a_batch_of_another_size_computes_all():
    network = Network()
    steps = network.steps(schedule(True, False, False, False, False))
    steps(**given(0, batch=2))
    steps(**given(1, batch=3))
    assert network.calls == ["keeping", "whole"]


def test_timesteps_of_another_sampler_compute_all_with_one_notice():
    network = Network()
    steps = network.steps(schedule(True, False, False, False, False))
    steps(**given(0))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        steps(**given(1) | {"timestep": np.full(2, 650.0)})
        steps(**given(1) | {"timestep": np.array([700.0, 500.0])})  # samples at different ones
    assert network.calls == ["keeping", "whole", "whole"]
    assert [w.category for w in caught] == [Notice] and "does not follow the 5 steps" in str(caught[0].message)


def test_fewer_steps_at_some_of_the_timesteps_compute_all_with_a_notice():
    network = Network()
    steps = network.steps(schedule(True, False, True, False, False))
    with pytest.warns(Notice, match="at timestep 500 does not follow the 5 steps"):
        for step in (0, 2, 4):
            steps(**given(step))
    assert "reusing" not in network.calls


def test_two_samplers_at_once_keep_their_own():
    network = Network()
    chosen = schedule(True, False, True, False, False)
    first, second = network.steps(chosen), network.steps(chosen)
    alone = {seed: Network().steps(chosen) for seed in (1, 2)}
    for step in range(5):
        for steps, seed in ((first, 1), (second, 2)):
            inputs = given(step, seed=seed)
            assert np.array_equal(steps(**inputs), alone[seed](**inputs))


def test_what_is_kept_is_bounded():
    network = Network()
    steps = network.steps(schedule(True, True, False, True, False))
    for label in range(3 * STREAMS):
        for step in range(5):
            steps(**given(step, label=label))
    assert len(steps._streams) <= STREAMS
    assert all(len(stream.values) <= SLOTS for stream in steps._streams.values())
