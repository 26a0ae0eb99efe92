from __future__ import annotations

import itertools

import pytest
import torch

from mpq_compiler.ir import ops
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import TIME_GROUPS, Program, TensorStore
from mpq_compiler.passes.time_groups import TimeGroups, best_cut
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION
from mpq_compiler.support.errors import UserError
from tests.harness import programs


def brute_force(costs: torch.Tensor, groups: int) -> float:
    """The least cost of any cut into at most ``groups`` intervals."""
    count, least = len(costs), float("inf")
    for used in range(1, groups + 1):
        for inner in itertools.combinations(range(1, count), used - 1):
            ends = [0, *inner, count]
            least = min(least, sum(float(costs[a, b - 1]) for a, b in itertools.pairwise(ends)))
    return least


@pytest.mark.parametrize("seed", range(40))
def test_dynamic_program_equals_brute_force(seed):
    generator = torch.Generator().manual_seed(seed)
    count, groups = 1 + seed % 8, 1 + seed % 4
    costs = torch.rand(count, count, generator=generator, dtype=torch.float64)
    if seed % 2:
        costs = costs.round(decimals=1)  # ties
    groups = min(groups, count)
    starts = best_cut(costs, groups)
    assert starts[0] == 0 and starts == sorted({*starts}) and len(starts) <= groups
    total = sum(float(costs[a, b - 1]) for a, b in itertools.pairwise([*starts, count]))
    assert total == pytest.approx(brute_force(costs, groups), abs=1e-12)


def test_boundaries_lie_between_calibrated_timesteps():
    for model in programs.MODELS:
        program = programs.after(model, "time-groups")
        boundaries, steps = program.facts[TIME_GROUPS], program.facts[CALIBRATION].timesteps.unique()
        assert len(boundaries) == 2 and (boundaries[1:] > boundaries[:-1]).all()
        assert not {*boundaries.tolist()} & {*steps.tolist()}
        assert steps[0] < boundaries[0] and boundaries[-1] < steps[-1]


def test_many_timesteps_are_taken_together():
    """Of 6 timesteps in 3 places, cuts lie between places only; what a cut costs is still that of all the values."""
    before = programs.after("unet2d", "calibrate")
    steps = before.facts[CALIBRATION].timesteps.unique()
    assert len(steps) == 6
    after = TimeGroups(groups=3, places=3).run(before, Session())
    assert after.facts[TIME_GROUPS].tolist() == [(steps[1] + steps[2]) / 2, (steps[3] + steps[4]) / 2]


@pytest.mark.invariant("efficientdm-4")
def test_a_group_for_every_step_is_a_table_that_fewer_steps_stride():
    """A sampler that takes every second or third of the steps reads the rows of those."""
    before = programs.after("unet2d", "calibrate")
    steps = before.facts[CALIBRATION].timesteps.unique()
    boundaries = TimeGroups(groups=len(steps)).run(before, Session()).facts[TIME_GROUPS]
    rows = ops.time_group(steps, boundaries)
    assert rows.tolist() == list(range(len(steps)))
    for stride in (2, 3):
        fewer = steps.flip(0)[::stride]
        assert torch.equal(ops.time_group(fewer, boundaries), rows.flip(0)[::stride])


def test_no_groups_at_all():
    with pytest.raises(UserError, match="'places' of pass 'time-groups' must be 1 or more"):
        TimeGroups(places=0)


@pytest.mark.invariant("vidit-q-5")
def test_timesteps_outside_the_range_fall_into_the_nearest_group():
    boundaries = torch.tensor([250.0, 750.0])
    timesteps = torch.tensor([-1000, -1, 0, 249, 250, 251, 749, 750, 999, 10**6])
    assert ops.time_group(timesteps, boundaries).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]
    assert ops.time_group(timesteps, boundaries[:0]).tolist() == [0] * 10
    x = dict(programs.inputs("unet2d", 2))
    program = programs.after("unet2d", "fuse-epilogues")
    x["timestep"] = torch.tensor([-5, 5000])
    assert torch.isfinite(run(program, x)).all()


@pytest.mark.parametrize("pass_name", ["fold-fake-quant", "fuse-epilogues"])
@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("dilatequant-6", "compiler-5")
def test_a_mixed_batch_equals_its_samples(model, pass_name):
    """Bit for bit: integer contractions are exact, and the reference runs float ops sample by sample alike."""
    program = programs.after(model, pass_name)
    boundaries = program.facts[TIME_GROUPS]
    x = dict(programs.inputs(model, 3)) | {"timestep": torch.tensor([999, int(boundaries[0]) + 1, 0])}
    assert ops.time_group(x["timestep"], boundaries).tolist() == [2, 1, 0]
    together = run(program, x)
    for row in range(3):
        alone = run(program, {name: value[row : row + 1] for name, value in x.items()})
        assert torch.equal(together[row], alone[0]), row


@pytest.mark.parametrize("model", programs.MODELS)
@pytest.mark.invariant("compiler-4")
def test_other_groups_rows_change_nothing(model):
    """Tables of the other groups set to nonsense: the output of this group's samples keeps every bit."""
    program = programs.after(model, "fuse-epilogues")
    x = dict(programs.inputs(model, 2))
    x["timestep"] = torch.tensor([0, 1])  # both of group 0
    assert ops.time_group(x["timestep"], program.facts[TIME_GROUPS]).tolist() == [0, 0]
    spoiled = dict(program.tensors)
    for plan in program.activations.values():
        for name, nonsense in ((plan.scale, 7.0), (plan.zero_point, 3)):
            table = spoiled[name].clone()
            table[1:] = nonsense
            spoiled[name] = table
    other: Program = program.fork(tensors=TensorStore(spoiled))
    assert torch.equal(run(program, x), run(other, x))
    x["timestep"] = torch.tensor([0, 999])
    mixed, mixed_spoiled = run(program, x), run(other, x)
    assert torch.equal(mixed[0], mixed_spoiled[0]) and not torch.equal(mixed[1], mixed_spoiled[1])
