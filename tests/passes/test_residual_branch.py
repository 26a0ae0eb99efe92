from __future__ import annotations

import itertools

import pytest
import torch

from mpq_compiler import formats
from mpq_compiler.formats import contract
from mpq_compiler.formats.base import QuantizedWeight, output_error
from mpq_compiler.formats.contract import nearest_codes
from mpq_compiler.formats.residual import RATIOS, ResidualFormat, _least_squares
from mpq_compiler.formats.uniform import UniformFormat
from mpq_compiler.ir import costs, ops, stored_tensors, verifier, views
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import TensorStore
from tests.harness import programs

RESIDUALS = [f for f in formats.FORMATS.values() if isinstance(f, ResidualFormat)]


def weight(rows: int = 12, columns: int = 40, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(rows, columns, generator=generator) * torch.rand(rows, 1, generator=generator).add(0.1)


def gram(columns: int = 40, seed: int = 1) -> torch.Tensor:
    x = torch.randn(300, columns, generator=torch.Generator().manual_seed(seed)) * torch.linspace(0.1, 2, columns)
    return x.T @ x / len(x)


@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda f: f.name)
@pytest.mark.parametrize("moments", [None, gram()], ids=["weight-error", "output-error"])
@pytest.mark.invariant("fz-rmq-1")
def test_never_worse_than_its_base(residual, moments):
    for seed in range(4):
        w = weight(seed=seed)
        base = UniformFormat("base", residual.base_bits).fit(w, moments)
        fit = residual.fit(w, moments)
        error, base_error = (float(output_error(q.dequantize() - w, moments).sum()) for q in (fit, base))
        assert error < base_error


@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda f: f.name)
@pytest.mark.invariant("fz-rmq-4")
def test_a_quarter_gives_the_even_levels_of_one_more_bit(residual):
    table, alpha = residual.tables(0.25)
    nothing = torch.zeros(1, 1, dtype=torch.uint8)
    _, joint = contract.merge_branch(nothing, table, nothing, alpha)
    steps = joint[0].to(torch.int16).diff().unique()
    assert joint.shape == (1, 2**residual.bits) and len(steps) == 1
    # Uniform levels at half the step: the same values up to the offset.
    uniform = UniformFormat("u", residual.bits).table
    scaled = uniform[0].to(torch.float32) * float(steps)
    assert torch.equal(joint[0].float() - joint[0].float().mean(), scaled - scaled.mean())


@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda f: f.name)
@pytest.mark.parametrize("ratio", RATIOS)
def test_tables_stay_within_int8_and_on_the_grid(residual, ratio):
    table, alpha = residual.tables(ratio)
    assert int(table.to(torch.int16).abs().max()) + int(alpha.abs()) <= contract.LUT_MAX
    unit = int(table[0].to(torch.int16).diff()[0])
    assert alpha.dtype == torch.int8 and abs(int(alpha) - ratio * unit) == 0


@pytest.mark.invariant("fz-rmq-5", "compiler-11")
def test_merging_is_exact():
    generator = torch.Generator().manual_seed(0)
    codes = torch.randint(0, 8, (33, 20), generator=generator, dtype=torch.uint8)
    signs = torch.randint(0, 2, (33, 20), generator=generator, dtype=torch.uint8)
    table, alpha = ResidualFormat("r", 4, base_bits=3).tables(0.375)
    merged, joint = contract.merge_branch(codes, table, signs, alpha)
    base = table[0].to(torch.int16)[codes.long()]
    assert torch.equal(joint[0].to(torch.int16)[merged.long()], base + (2 * signs.to(torch.int16) - 1) * alpha)
    assert merged.dtype == torch.uint8 and int(merged.max()) < 16


@pytest.mark.parametrize("name", [f.name for f in RESIDUALS])
@pytest.mark.invariant("fz-rmq-7")
def test_two_accumulators_are_that_of_the_joint_table(name):
    """Base and signs apart: ``sum q base + alpha (2 sum q sign - sum q)``, all integers."""
    fit = formats.get(name).fit(weight())
    q = torch.randint(0, 256, (7, 40), generator=torch.Generator().manual_seed(2))
    base, signs, alpha = fit.lut[0].long()[fit.codes.long()], fit.signs.long(), int(fit.alpha)
    apart = q @ base.T + alpha * (2 * (q @ signs.T) - q.sum(1, keepdim=True))
    joint = fit.merged()
    assert torch.equal(apart, q @ joint.lut[0].long()[joint.codes.long()].T)


@pytest.mark.invariant("fz-rmq-2")
def test_the_least_squares_of_signs_are_the_mean_magnitude():
    rest = torch.randn(5, 40, generator=torch.Generator().manual_seed(0))
    rest = torch.cat([rest, -rest], 1)  # no offset is left to gain by
    scale, offset = _least_squares(rest.sign(), rest, torch.ones(80))
    torch.testing.assert_close(scale[:, 0], rest.abs().mean(1))
    torch.testing.assert_close(offset, torch.zeros(5, 1))


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.invariant("fz-rmq-3")
def test_levels_and_scales_in_turn_never_raise_the_error(ratio):
    """Without the rounding of what is stored."""
    lut, alpha = ResidualFormat("r", 3, base_bits=2).tables(ratio)
    nothing = torch.zeros(1, 1, dtype=torch.uint8)
    _, table = contract.merge_branch(nothing, lut, nothing, alpha)
    w, importance = weight(), gram().diagonal()
    scale, offset = w.abs().amax(1, keepdim=True) / 20, w.mean(1, keepdim=True)
    errors = []
    for _ in range(6):
        level = table[0].float()[nearest_codes(w, scale, offset[:, 0], table, None).long()]
        errors.append(output_error(scale * level + offset - w, importance))
        scale, offset = _least_squares(level, w, importance)
        errors.append(output_error(scale * level + offset - w, importance))
    assert all((after <= before * (1 + 1e-5)).all() for before, after in itertools.pairwise(errors))
    assert errors[-1].sum() < 0.9 * errors[0].sum()


@pytest.mark.invariant("fz-rmq-8")
def test_without_a_branch_there_is_nothing_to_merge():
    """Z = 0: a plain format merges to itself."""
    for name in ("int2", "int4", "int8"):
        plain = formats.get(name).fit(weight())
        assert plain.merged() is plain and plain.signs is None


@pytest.mark.invariant("fz-rmq-8")
def test_a_branch_of_zero_leaves_the_base():
    fit = formats.get("int2+b").fit(weight())
    silent = QuantizedWeight(fit.codes, fit.scale, fit.offset, fit.lut, fit.signs, torch.zeros_like(fit.alpha))
    base = QuantizedWeight(fit.codes, fit.scale, fit.offset, fit.lut)
    assert torch.equal(silent.dequantize(), base.dequantize())


@pytest.mark.parametrize("residual", RESIDUALS, ids=lambda f: f.name)
@pytest.mark.invariant("fz-rmq-5")
def test_two_to_the_b_plus_one_levels(residual):
    fit = residual.fit(weight(columns=400)).merged()
    assert fit.lut.shape == (1, 2 ** (residual.base_bits + 1))
    levels = max(len(row.unique()) for row in fit.dequantize())
    assert 2**residual.base_bits < levels <= 2 ** (residual.base_bits + 1)


def test_only_layers_that_the_plan_names_get_a_branch():
    step = programs.step("unet2d", "residual-branch")
    planned = {path for path, plan in step.after.weights.items() if plan.format.endswith("+b")}
    branches = [n for n in step.after.graph.nodes if n.target is ops.binary_branch]
    assert {str(n.args[0].target).split(":")[0] for n in branches} == planned
    assert 0 < len(planned) < len(step.after.weights)


def test_branches_bring_the_output_nearer_to_float():
    x = programs.inputs("pixart", 4)
    y = run(programs.after("pixart", "bit-allocation", programs.RESIDUAL), x)
    step = programs.step("pixart", "residual-branch", programs.RESIDUAL)
    assert (run(step.after, x) - y).square().sum() < 0.5 * (run(step.before, x) - y).square().sum()


@pytest.mark.invariant("fz-rmq-5", "fz-rmq-6")
def test_a_base_of_one_bit_has_two_levels_until_it_is_packed():
    pipeline = programs.RESIDUAL.replace("int2+b", "int1+b")
    planned, simulated, packed = (
        programs.after("unet2d", name, pipeline) for name in ("bit-allocation", "round-weights", "fuse-epilogues")
    )
    x = programs.inputs("unet2d", 2)
    assert torch.equal(run_exact(simulated, x), run(packed, x))
    assert sum(each.array.nbytes for each in stored_tensors.stored(packed).values()) == costs.stored_bytes(planned)
    sizes = [
        {tuple(p.tensors[levels.tables.lut].shape) for levels in views.levels_of(views.flatten(p))}
        for p in (simulated, packed)
    ]
    assert sizes == [{(1, 2)}, {(1, 4)}] and not verifier.check(packed)
    one = views.levels_of(views.flatten(packed))[0]
    codes, lut = packed.tensors[one.codes] >> 1, packed.tensors[one.tables.lut][:, :2]
    spoiled = packed.fork(tensors=TensorStore({**packed.tensors, one.codes: codes, one.tables.lut: lut}))
    assert {violation.rule for violation in verifier.check(spoiled)} == {"table-size"}
