from __future__ import annotations

import pytest
import torch

from mpq_compiler.ir.interpreter import run
from mpq_compiler.quantization.between_times import TIMES, TimedRows, between
from mpq_compiler.quantization.fitting import Rounding, fit_rows
from mpq_compiler.quantization.statistics import CALIBRATION
from tests.harness import programs


def test_times_lie_evenly_between_those_that_were_recorded():
    made = between({"timestep": torch.tensor([0.0, 600.0, 600.0, 1000.0])})["timestep"]
    assert len(made) == TIMES and (made[0], made[-1]) == (0, 1000)
    assert (made.diff() > 0).all()
    assert ((made < 600).sum() - (made > 600).sum()).abs() <= 1, "as many between one pair of neighbours as another"


def test_times_of_whole_numbers_stay_whole():
    made = between({"timestep": torch.tensor([7, 1, 3])})["timestep"]
    assert made.dtype == torch.int64 and made.unique().tolist() == [1, 2, 3, 4, 5, 6, 7]


def test_conditions_are_those_recorded_at_the_time_before():
    times, labels = torch.tensor([10, 0, 10, 0]), torch.tensor([3, 1, 4, 2])
    made = between({"timestep": times, "class_labels": labels})
    assert set(made["class_labels"][made["timestep"] < 10].tolist()) == {1, 2}
    assert set(made["class_labels"][made["timestep"] == 10].tolist()) <= {1, 2, 3, 4}


def test_one_time_recurs():
    made = between({"timestep": torch.tensor([5.0, 5.0]), "class_labels": torch.tensor([1, 2])})
    assert made["timestep"].tolist() == [5.0] * TIMES
    assert made["class_labels"].bincount().tolist() == [0, TIMES // 2, TIMES // 2]


def test_more_inputs_give_as_many_rows():
    assert len(between({"timestep": torch.arange(3.0 * TIMES)})["timestep"]) == 3 * TIMES


@pytest.mark.parametrize("model", ["dit", "sdxl"])
def test_timed_edges_need_no_image_and_no_text(model):
    program = programs.after(model, "layout")
    timed = TimedRows.of(program, {node.args[0].name for node in program.quantizable})
    assert timed.edges
    large = {spec.name for spec in program.inputs if len(spec.shape) > 2} | {program.inputs[0].name}
    assert not large & {spec.name for spec in timed.part.inputs}


def test_layers_are_fitted_to_times_that_were_not_recorded():
    """GPTQ on the recorded rows alone leaves errors at the times between that calibration does not see."""
    program = programs.after(programs.BUNDLED, "calibrate")
    calibration = program.facts[CALIBRATION]
    layers = [node for node in program.quantizable if node.name.endswith("time_emb_proj")]
    timed = TimedRows.of(program, [layers[0].args[0].name])
    (edge,) = timed.edges
    inputs = {spec.name: calibration.inputs[spec.name] for spec in timed.part.inputs}
    recorded = run(timed.part, inputs)[0]
    between_times = torch.cat([rows[edge] for rows in timed.computed(inputs, "cpu")])
    for layer in layers:
        weight = program.tensors[str(layer.args[1].target)]
        here = fit_rows(weight, "int3", recorded.T @ recorded / len(recorded), Rounding.GPTQ)
        there = fit_rows(weight, "int3", between_times.T @ between_times / len(between_times), Rounding.GPTQ)
        errors = [((fit.dequantize() - weight) @ between_times.T).square().sum() for fit in (here, there)]
        assert errors[1] < 0.5 * errors[0]
