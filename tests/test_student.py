from __future__ import annotations

import pytest
import torch

from mpq_compiler import distillation, formats, ops, student
from mpq_compiler.formats.base import nearest_codes
from mpq_compiler.program import TensorStore, run
from mpq_compiler.student import Kind, Student, settled
from tests import programs

PIPELINES = {"tables": programs.MIXED, "branches": programs.RESIDUAL, "parts": programs.REWRITES}


def zeros(variables):
    return {name: torch.zeros_like(v.start) for name, v in variables.items()}


@pytest.mark.parametrize("model, pipeline", [*(("unet2d", p) for p in PIPELINES), ("dit", "tables")])
@pytest.mark.invariant("lsq-3")
def test_at_the_start_it_is_the_program(model, pipeline):
    """Variables of frozen codes begin with what is stored, bit for bit."""
    program = programs.after(model, "round-weights", PIPELINES[pipeline])
    x = programs.inputs(model, 3)
    trained = student.variables(program, latent=False)
    with torch.no_grad():
        assert torch.equal(Student(program, student.values(program, trained, zeros(trained))).run(x), run(program, x))
    assert {v.kind for v in trained.values()} >= {Kind.SCALE, Kind.RANGE, Kind.ZERO, Kind.FLOAT}


GPTQ = {name: text.replace("round-weights", "round-weights{method=gptq}") for name, text in PIPELINES.items()}


@pytest.mark.parametrize("pipeline", GPTQ)
@pytest.mark.invariant("efficientdm-1")
def test_latent_weights_start_where_the_program_is(pipeline):
    """Their nearest levels are those of the codes that were chosen; where that allows it they are the float weights."""
    program = programs.after("unet2d", "round-weights", GPTQ[pipeline])
    x = programs.inputs("unet2d", 3)
    trained = student.variables(program, latent=True)
    with torch.no_grad():
        at_start = student.values(program, trained, zeros(trained))
        assert torch.equal(Student(program, at_start).run(x), run(program, x))
    weights = student.settled(program)
    assert weights and any(w.signs for w in weights) == (pipeline != "parts")
    moved = 0
    for weight in weights:
        rows = program.tensors.read(program.facts["latents"][weight.node.name]).flatten(1)
        parts = [None if n is None else program.tensors[n] for n in (weight.scale, weight.offset, weight.row_class)]
        scale, offset, row_class = parts
        nearest = nearest_codes(rows, scale, offset, weight.table(program), row_class, weight.segments)
        same = nearest == weight.merged_codes(program)
        change = (trained[weight.codes].start - rows).abs() / trained[weight.codes].unit
        assert float(change[same].max()) <= student.EDGE + 1e-4
        moved += int((~same).sum())
    assert moved > 100  # GPTQ has chosen other codes than the nearest


def test_every_variable_has_a_gradient():
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=True)
    leaves = {name: theta.requires_grad_() for name, theta in zeros(trained).items()}
    y = Student(program, student.values(program, trained, leaves)).run(programs.inputs("unet2d", 6))
    found = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
    reached = {trained[n].kind for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().sum() > 0}
    assert reached == set(Kind)
    dead = [n for n, g in zip(leaves, found, strict=True) if g is None]
    assert not dead


@pytest.mark.invariant("quest-2", "dilatequant-9")
def test_time_groups_that_a_batch_lacks_get_no_gradient():
    """Tables are trained by row: a call of one time moves the rows of its group alone."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=False)
    leaves = {name: theta.requires_grad_() for name, theta in zeros(trained).items()}
    x = dict(programs.inputs("unet2d", 2)) | {"timestep": torch.tensor([999, 999])}
    group = int(ops.time_group(x["timestep"], program.facts["time-groups"])[0])
    y = Student(program, student.values(program, trained, leaves)).run(x)
    tables = [n for n, v in trained.items() if v.kind == Kind.RANGE]
    for gradient in torch.autograd.grad(y.square().sum(), [leaves[n] for n in tables]):
        others = [g for g in range(len(gradient)) if g != group]
        assert (gradient[others] == 0).all() and len(others) == len(program.facts["time-groups"])


@pytest.mark.parametrize("offset", [None, torch.tensor([0.1, -0.2])])
@pytest.mark.parametrize("lut", [None, torch.tensor([[-3, -1, 1, 3]], dtype=torch.int8)])
@pytest.mark.invariant("lsq-1", "lsq-4")
def test_gradients_of_levels(lut, offset):
    """LSQ's, eq. 2-3: with the codes as they are, ``scale * round(t)`` by scale is ``round(t) - t`` inside."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 40, generator=generator).requires_grad_()
    scale = torch.tensor([[0.2], [0.4]], requires_grad=True)
    shift = None if offset is None else offset.clone().requires_grad_()
    level = student._Levels.apply(rows, scale, shift, lut, None, None)
    weights = torch.randn(2, 40, generator=generator)
    (level * weights).sum().backward()
    t = (rows.detach() - (0 if shift is None else shift.detach()[:, None])) / scale.detach()
    most, step = (127.5, 1) if lut is None else (4.0, 2)
    inside = t.abs() <= most
    assert torch.equal(rows.grad, weights * inside)
    entry = t.div(step).round().mul(step) if lut is None else lut[0].float()[(t[..., None] - lut[0]).abs().argmin(-1)]
    expected = (weights * (entry - torch.where(inside, t, 0.0))).sum(1, keepdim=True)
    torch.testing.assert_close(scale.grad, expected)
    if shift is not None:
        torch.testing.assert_close(shift.grad, (weights * ~inside).sum(1))
    again = student._Levels.apply(level.detach(), scale, shift, lut, None, None)
    torch.testing.assert_close(again, level)  # levels are their own nearest


@pytest.mark.parametrize("lut", [None, torch.tensor([[-3, -1, 1, 3]], dtype=torch.int8)])
@pytest.mark.invariant("lsq-1")
def test_gradients_are_finite_differences_where_levels_move_smoothly(lut):
    """Weights and scale by one factor, weights and offset by one distance: then no code changes."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(2, 40, generator=generator) * (2 if lut is not None else 90)  # some beyond the ends
    given = [rows, torch.tensor([[0.4], [0.7]]), torch.tensor([0.3, -0.2])]
    weights = torch.randn(2, 40, generator=generator, dtype=torch.float64)

    def total(rows, scale, offset):
        return (student._Levels.apply(rows, scale, offset, lut, None, None).double() * weights).sum()

    leaves = [t.clone().requires_grad_() for t in given]
    found = torch.autograd.grad(total(*leaves), leaves)
    rest = rows - given[2][:, None]
    for direction in ([rest, given[1], torch.zeros(2)], [torch.ones_like(rows), torch.zeros(2, 1), torch.ones(2)]):
        slope = sum(float((g * d).sum()) for g, d in zip(found, direction, strict=True))
        ends = [total(*(x + step * d for x, d in zip(given, direction, strict=True))) for step in (2**-6, -(2**-6))]
        assert slope == pytest.approx(float(ends[0] - ends[1]) * 2**5, rel=1e-3)


@pytest.mark.invariant("lsq-6")
def test_adam_does_not_raise_the_error_of_a_fixed_weight():
    rows = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    fit = formats.get("int3").start(rows)  # over the whole range: too wide
    trained = {
        "scale": student.Variable(Kind.SCALE, fit.scale.float(), torch.ones(()), torch.float16),
        "offset": student.Variable(Kind.OFFSET, fit.offset.float(), fit.scale.float().mean(), torch.float16),
    }
    state, errors = distillation._State.start(trained), []
    for state.step in range(1, 102):
        leaves = {name: theta.requires_grad_() for name, theta in state.thetas.items()}
        made = {name: variable(leaves[name]) for name, variable in trained.items()}
        level = student._Levels.apply(rows, made["scale"], made["offset"], fit.lut, None, None)
        loss = (level - rows).square().sum() / rows.square().sum()
        errors.append(float(loss.detach()))
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        state.thetas = {name: theta.detach() for name, theta in state.thetas.items()}
        distillation._adam(state, gradients, {n: distillation.RATES[v.kind] for n, v in trained.items()})
    assert all(error <= errors[0] for error in errors) and errors[::20] == sorted(errors[::20], reverse=True)


@pytest.mark.invariant("efficientdm-3")
def test_weights_learn_in_steps_of_their_table():
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    scales = {weight.scale: program.tensors[weight.scale] for weight in settled(program)}
    doubled = program.fork(tensors=TensorStore({**program.tensors, **{name: 2 * s for name, s in scales.items()}}))
    once, twice = (student.variables(p, latent=True) for p in (program, doubled))
    latent = [name for name, variable in once.items() if variable.kind == Kind.LATENT]
    assert len(latent) == len(scales)
    assert all(torch.equal(2 * once[name].unit, twice[name].unit) for name in latent)


@pytest.mark.parametrize("theta", [-3.0, 0.0, 0.7, 40.0])
@pytest.mark.invariant("lsq-2")
def test_values_are_what_is_stored(theta):
    """Whatever theta: scales are positive halves, zero points whole codes."""
    for kind, start in ((Kind.SCALE, [0.25, 3.0]), (Kind.RANGE, [1e-3]), (Kind.ZERO, [7.0, 0.0]), (Kind.FLOAT, [-2.5])):
        dtype = torch.uint8 if kind == Kind.ZERO else torch.float16
        variable = student.Variable(kind, torch.tensor(start), torch.ones(()), dtype, most=15)
        value, stored = variable(torch.full((len(start),), theta)), variable.stored(torch.full((len(start),), theta))
        assert stored.dtype == dtype and torch.equal(stored.float(), value) and torch.isfinite(value).all()
        if kind == Kind.ZERO:
            assert value.min() >= 0 and value.max() <= 15
        elif kind != Kind.FLOAT:
            assert (value > 0).all()


def test_quantizers_are_those_of_the_program():
    """`_Rounded` has the values and the gradients of `ops.fake_quantize`, to x, scale and zero point."""
    generator = torch.Generator().manual_seed(0)
    group = torch.tensor([0, 1, 1])
    weights = torch.randn(3, 5, 7, generator=generator)
    found = []
    for rounded in (False, True):
        x = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(1)).mul(2).requires_grad_()
        scale, zero = torch.tensor([0.1, 0.3], requires_grad=True), torch.tensor([7.0, 3.0], requires_grad=True)
        if rounded:
            y = student._Rounded.apply(x, *(ops.per_sample(t, group, x) for t in (scale, zero)), 15)
        else:
            y = ops.fake_quantize(x, scale, zero, group, 4)
        found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), (x, scale, zero))))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1] != 0, found[1][1] != 0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
