"""Recorded arrays: what is recorded of them computes what NumPy computes, and nothing escapes unseen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpq_compiler.runtime.recording import DIMENSIONS, TYPES, Op, Recording
from mpq_compiler.sampling.reuse import OUTPUT, KeptSteps, Schedule, of_outputs, sources_of
from mpq_compiler.sampling.schedulers import PREDICTIONS, Scheduler
from mpq_compiler.support.errors import UserError

Array = np.ndarray
COMPUTED: dict[Op, Callable[..., Any]] = {
    Op.COPY: lambda a, b: a,
    Op.ADD: np.add,
    Op.SUBTRACT: np.subtract,
    Op.MULTIPLY: np.multiply,
    Op.DIVIDE: np.divide,
    Op.LEAST: np.minimum,
    Op.MOST: np.maximum,
    Op.NEGATE: lambda a, b: -a,
    Op.ROUND: lambda a, b: np.rint(a),
    Op.BYTE: lambda a, b: a.astype(np.uint8),
}


def executed(data: dict[str, Array], outputs: list[Array]) -> list[Array]:
    """The buffers after all instructions; ``outputs``: what calls of parts give, in order."""
    buffers = []
    for kind, size, at in data["buffers"]:
        dtype = np.dtype(TYPES[kind])
        content = data["constants"][at : at + size * dtype.itemsize].view(dtype) if at >= 0 else np.zeros(size, dtype)
        buffers.append(content.copy())
    given = iter(outputs)
    for row in data["instructions"]:
        op, shape = Op(row[0]), tuple(row[1 : 1 + DIMENSIONS])
        views = row[1 + DIMENSIONS :].reshape(3, 2 + DIMENSIONS)
        if op is Op.CALL:
            buffers[views[0][0]][:] = next(given).ravel()
        if op >= Op.INPUT:
            continue
        to, a, b = (
            np.lib.stride_tricks.as_strided(buffer[offset:], shape, strides * buffer.itemsize)
            for buffer, (offset, *steps) in ((buffers[view[0]], view[1:]) for view in views)
            for strides in [np.array(steps)]
        )
        to[...] = COMPUTED[op](a, b)
    return buffers


STEPS: tuple[Callable[[Array, Array, np.random.Generator], Array], ...] = (
    lambda x, y, draw: x + y,
    lambda x, y, draw: np.float32(draw.standard_normal()) - x,
    lambda x, y, draw: x * 2.5,
    lambda x, y, draw: x / (np.maximum(y, 0.5)),
    lambda x, y, draw: -x,
    lambda x, y, draw: np.clip(x, -1, 1),
    lambda x, y, draw: np.concatenate([x, y], draw.integers(x.ndim)),
    lambda x, y, draw: np.stack([y, x], 1),
    lambda x, y, draw: x.transpose(draw.permutation(x.ndim)),
    lambda x, y, draw: np.pad(x, [(int(draw.integers(3)), int(draw.integers(3))) for _ in x.shape], constant_values=7),
    lambda x, y, draw: x[..., :: int(draw.integers(1, 3))],
    lambda x, y, draw: x[::-1],
    lambda x, y, draw: np.split(x, [1], draw.integers(x.ndim))[0],
    lambda x, y, draw: np.tile(x, (2, *[1] * (x.ndim - 1))),
    lambda x, y, draw: np.repeat(x, 2, -1),
    lambda x, y, draw: x.reshape(-1, x.shape[-1]),
    lambda x, y, draw: np.expand_dims(x, 0),
    lambda x, y, draw: np.take(x, 0, -1) if x.ndim > 2 else x,
    lambda x, y, draw: np.moveaxis(x, 0, -1),
    lambda x, y, draw: x + np.arange(x.shape[-1], dtype=np.float32),
    lambda x, y, draw: (x * 16).round(),
)


@given(st.lists(st.sampled_from(range(len(STEPS))), max_size=8), st.integers(0, 2**32 - 1))
def test_what_is_recorded_computes_what_numpy_computes(chosen: list[int], seed: int) -> None:
    recording = Recording()
    values = np.random.default_rng(seed).standard_normal((2, 3, 4)).astype(np.float32)
    arrays = values, recording.call(0, 0, [], values.shape)
    results = []
    for x in arrays:
        draw = np.random.default_rng(seed)
        y = x
        for step in chosen:
            if x.size > 3000 or x.ndim > 6:
                break
            made = STEPS[step](x, y if y.shape == x.shape else x, draw)
            x, y = made, x
        results.append(x)
    expected, recorded = results
    assert recorded.shape == expected.shape and recorded.dtype == expected.dtype
    buffer = recording.whole(recorded)
    found = executed(recording.data(), [values])[buffer]
    np.testing.assert_array_equal(found.reshape(expected.shape), expected)


@pytest.mark.parametrize("solver", ["DDIM", "LCM", "EulerDiscrete", "EulerAncestralDiscrete", "FlowMatchEulerDiscrete"])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_schedulers_are_recorded(solver: str, prediction: str) -> None:
    scheduler = Scheduler.from_config({"_class_name": f"{solver}Scheduler", "prediction_type": prediction})
    draw = np.random.default_rng(0)
    x, output, fresh = (draw.standard_normal((2, 4, 3, 5), np.float32) for _ in range(3))
    for index in range(4):
        expected = scheduler.step(output, index, 4, scheduler.scaled(x, index, 4), fresh)
        recording = Recording()
        known = recording.call(0, 0, [], x.shape)
        found = scheduler.step(
            recording.call(0, 0, [], x.shape), index, 4, scheduler.scaled(known, index, 4), fresh
        )
        buffer = recording.whole(found)
        np.testing.assert_array_equal(executed(recording.data(), [x, output])[buffer].reshape(x.shape), expected)


def test_steps_that_sum_earlier_outputs_are_recorded() -> None:
    """A program in C draws by a schedule of `mpqc compile --reuse`: what a step sums is among the instructions."""
    times, shape = (40.0, 30.0, 20.0, 10.0), (2, 4, 3, 5)
    sources = sources_of([True, True, True, False], times)
    schedule = Schedule(OUTPUT, times, sources).weighted({3: [1.5, -0.75, 0.25]})
    outputs = [*np.random.default_rng(0).standard_normal((3, *shape), np.float32)]

    def last(model: Callable[[Any], Any], x: Any) -> Any:
        steps = KeptSteps(schedule, of_outputs(model), "sample")
        return [steps(sample=x, timestep=np.full(2, time)) for time in times][-1]

    given = iter(outputs)
    expected = last(lambda inputs: next(given), np.zeros(shape, np.float32))
    recording = Recording()
    found = last(lambda inputs: recording.call(0, 0, [], shape), recording.call(0, 0, [], shape))
    buffer = recording.whole(found)
    computed = executed(recording.data(), [np.zeros(shape), *outputs])[buffer].reshape(shape)
    np.testing.assert_array_equal(computed, expected)
    np.testing.assert_allclose(expected, 1.5 * outputs[2] - 0.75 * outputs[1] + 0.25 * outputs[0], rtol=1e-4, atol=1e-5)


def test_bytes_and_constants_that_are_equal_are_kept_once() -> None:
    recording = Recording()
    x = recording.call(0, 0, [], (2, 3))
    made = ((x + np.float32(3)) * np.float32(3)).round().astype(np.uint8)
    recording.picture(made[..., None])
    data = recording.data()
    assert sum(1 for _, _, at in data["buffers"] if at >= 0) == 1
    assert data["instructions"][-1][:4].tolist() == [Op.PICTURE, 2, 3, 1]
    values = np.arange(6, dtype=np.float32)
    np.testing.assert_array_equal(executed(data, [values])[made.buffer], ((values + 3) * 3).astype(np.uint8))


REFUSED: dict[str, Callable[[Any], Any]] = {
    "computes 'sin'": np.sin,
    "computes 'sum'": np.sum,
    "computes 'add'": lambda x: np.add(x, x, out=np.empty(x.shape, np.float32)),
    "computes in float64": lambda x: x * np.float64(0.1),
    "converts float32 to int64": lambda x: x.astype(np.int64),
    "writes to a part's output": lambda x: x.__setitem__(0, 1),
}


@pytest.mark.parametrize("said", REFUSED)
def test_what_a_program_cannot_do_is_refused(said: str) -> None:
    with pytest.raises(UserError, match=said):
        REFUSED[said](Recording().call(0, 0, [], (2, 3)))


def test_a_value_that_escapes_shows() -> None:
    recording = Recording()
    lost = np.asarray(recording.call(0, 0, [], (2, 3)))
    with pytest.raises(ValueError, match="escaped the recording"):
        recording.whole(lost)
