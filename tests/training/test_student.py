from __future__ import annotations

from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch.nn.utils import vector_to_parameters

from mpq_compiler import formats
from mpq_compiler.formats.contract import nearest_codes
from mpq_compiler.ir import ops
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import TIME_GROUPS, TensorStore
from mpq_compiler.ir.verifier import verify
from mpq_compiler.quantization.settle import LATENTS
from mpq_compiler.training import student, trainer
from mpq_compiler.training import variables as training_variables
from mpq_compiler.training.state import RATES, State
from mpq_compiler.training.student import Student
from mpq_compiler.training.variables import Adapted, Kind, Timed, Variable, settled
from tests.harness import programs

PIPELINES = {"tables": programs.MIXED, "branches": programs.RESIDUAL, "parts": programs.REWRITES}


def zeros(variables):
    return {name: v.zeros() for name, v in variables.items()}


def anywhere(variables, size=0.1):
    """Thetas that training might come to."""
    generator = torch.Generator().manual_seed(0)
    return {name: size * torch.randn(v.zeros().shape, generator=generator) for name, v in variables.items()}


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
    weights = training_variables.settled(program)
    assert weights and any(w.signs for w in weights) == (pipeline != "parts")
    moved = 0
    for weight in weights:
        rows = program.tensors.read(program.facts[LATENTS][weight.node.name]).flatten(1)
        names = weight.tables
        parts = [None if n is None else program.tensors[n] for n in (names.scale, names.offset, names.row_class)]
        scale, offset, row_class = parts
        nearest = nearest_codes(rows, scale, offset, weight.table(program), row_class, names.segments)
        same = nearest == weight.merged_codes(program)
        change = (trained[weight.codes].start - rows).abs() / trained[weight.codes].unit
        assert float(change[same].max()) <= training_variables.EDGE + 1e-4
        moved += int((~same).sum())
    assert moved > 100  # GPTQ has chosen other codes than the nearest


CODED = programs.RESIDUAL.replace("int2+b", "ec2")
"""Entropy-coded weights."""


def test_entropy_coded_weights_move_by_their_one_step():
    """Their codes stay, where others are trained too: others of them would take other bytes."""
    program = programs.after("unet2d", "round-weights", CODED)
    assert {program.weights[w.path].format for w in settled(program)} == {"ec2"}
    frozen, trained = (student.variables(program, latent=latent) for latent in (False, True))
    assert frozen.keys() == trained.keys() and not any(v.kind == Kind.LATENT for v in frozen.values())
    moved = student.applied(program, trained, anywhere(trained))
    for before, after in zip(settled(program), settled(moved), strict=True):
        stored = moved.tensors[after.tables.scale]
        assert stored.shape == program.tensors[before.tables.scale].shape
        assert torch.equal(stored, stored[:1].expand_as(stored))
        assert not torch.equal(stored, program.tensors[before.tables.scale])
        assert torch.equal(moved.tensors[after.codes], program.tensors[before.codes])


CLASSES = programs.RESIDUAL.replace("int2+b", "int3m")
"""Rows of several widths in one weight."""
RESIDUAL_CLASSES = CLASSES.replace("int3m", "int3m+b")
TIMES = torch.tensor([0.1, 0.5, 0.9])
PLAIN = [*GPTQ.values(), CLASSES, programs.LOW_RANK, programs.SMALL_FLOATS]


@pytest.mark.parametrize(
    ("pipeline", "svd"), [*((p, False) for p in PLAIN), (GPTQ["branches"], True), (RESIDUAL_CLASSES, True)]
)
@pytest.mark.invariant("efficientdm-1", "efficientdm-2", "tdq-1")
def test_adapters_and_networks_start_where_the_program_is(pipeline, svd):
    """With every format; and wherever training takes them, what is stored is what a program may be."""
    program = programs.after("unet2d", "round-weights", pipeline)
    x = programs.inputs("unet2d", 3)
    trained = student.variables(program, latent=True, adapters=3, times=TIMES, seed=1, svd=svd)
    kinds = {type(v): v.kind for v in trained.values() if type(v) is not Variable}
    assert kinds == {Adapted: Kind.LATENT, Timed: Kind.RANGE}
    assert not {Kind.LATENT, Kind.RANGE} & {v.kind for v in trained.values() if type(v) is Variable}
    with torch.no_grad():
        assert torch.equal(Student(program, student.values(program, trained, zeros(trained))).run(x), run(program, x))
    thetas = anywhere(trained)
    moved = student.applied(program, trained, thetas)
    verify(moved, after="distill")
    with torch.no_grad():
        torch.testing.assert_close(
            run(moved, x), Student(program, student.values(program, trained, thetas)).run(x), rtol=1e-3, atol=1e-3
        )


@pytest.mark.parametrize("svd", [False, True])
@pytest.mark.invariant("olri-3")
def test_both_adapters_learn_at_once_if_they_start_along_the_error(svd):
    """What they add is the best of its rank for what codes err by, and of zero one learns while the other stands."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=True, adapters=3, svd=svd)
    thetas = {name: theta.requires_grad_() for name, theta in zeros(trained).items()}
    y = Student(program, student.values(program, trained, thetas)).run(programs.inputs("unet2d", 2))
    adapted = {name: v for name, v in trained.items() if isinstance(v, Adapted)}
    gradients = torch.autograd.grad(y.square().sum(), [thetas[name] for name in adapted])
    for gradient, variable in zip(gradients, adapted.values(), strict=True):
        up, down = gradient.split([len(variable.up), len(variable.down)])
        assert (up != 0).any() and bool((down != 0).any()) == svd
    originals = program.facts[LATENTS]
    for weight in settled(program) if svd else ():
        variable = adapted[weight.codes]
        rows = program.tensors.read(originals[weight.node.name]).flatten(1)
        start = variable(torch.zeros(variable.zeros().shape))
        rest = ((rows - start) / variable.unit).double()
        added = ((start - variable.start) / variable.unit).double()
        tail = torch.linalg.svdvals(rest)[variable.down.shape[1] :].square().sum().sqrt()
        torch.testing.assert_close((rest - added).norm(), tail, rtol=1e-2, atol=1e-2)


@pytest.mark.invariant("efficientdm-7")
def test_adapters_are_a_branch_that_is_merged_before_the_quantizer():
    """A convolution to R channels and one of 1 x 1 from there, and the weight's: in floats one convolution."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=True, adapters=3)
    thetas = anywhere(trained)
    weights = [w for w in settled(program) if w.shape[1:-1] == (3, 3)]
    made = student.values(program, trained, thetas)
    for weight in weights:
        variable, theta = trained[weight.codes], thetas[weight.codes]
        rows, (outputs, _, _, inputs) = variable(theta), weight.shape
        up = training_variables.UP * variable.unit * theta[:outputs]
        down = variable.down + training_variables.DOWN * theta[outputs:]
        start, a, merged = (
            w.reshape(-1, 3, 3, inputs).permute(0, 3, 1, 2).double() for w in (variable.start, down.T, rows)
        )
        b = up[:, :, None, None].double() / 3**0.5
        x = torch.randn(2, inputs, 6, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
        beside = F.conv2d(x, start, padding=1) + F.conv2d(F.conv2d(x, a, padding=1), b)
        torch.testing.assert_close(F.conv2d(x, merged, padding=1), beside, rtol=1e-4, atol=1e-4)
        assert not torch.equal(rows, variable.start)
        names = weight.tables
        parts = [made.get(n, program.tensors.get(n)) for n in (names.scale, names.offset, names.row_class)]
        codes = nearest_codes(rows, *parts[:2], weight.table(program), parts[2], names.segments)
        level = ops.dequantize_weight(codes, *parts[:2], weight.table(program), parts[2], weight.shape, names.segments)
        torch.testing.assert_close(made[weight.node.name], level)
    assert len(weights) > 5


@pytest.mark.parametrize("options", [{}, {"adapters": 3, "times": TIMES}])
def test_every_variable_has_a_gradient(options):
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=True, **options)
    leaves = {name: theta.requires_grad_() for name, theta in anywhere(trained, 0.01).items()}
    y = Student(program, student.values(program, trained, leaves)).run(programs.inputs("unet2d", 6))
    found = torch.autograd.grad(y.square().sum(), list(leaves.values()), allow_unused=True)
    reached = {trained[n].kind for n, g in zip(leaves, found, strict=True) if g is not None and g.abs().sum() > 0}
    assert reached == set(Kind)
    dead = [n for n, g in zip(leaves, found, strict=True) if g is None]
    assert not dead


@pytest.mark.parametrize(
    ("model", "pipeline", "by_weights"),
    [("unet2d", CODED, {False}), ("dit", CODED, {False}), ("unet2d", programs.MIXED, {False, True})],
)
def test_scales_of_rows_have_their_gradients_from_outputs(model, pipeline, by_weights, monkeypatch):
    """The same as by way of the weight, which has none then; weights with offsets or groups go on having one."""
    program = programs.after(model, "round-weights", pipeline)
    x, trained = programs.inputs(model, 3), student.variables(program, latent=False)
    thetas = {name: theta.requires_grad_() for name, theta in anywhere(trained, 0.01).items()}

    def found() -> tuple[list[torch.Tensor], set[bool]]:
        made = student.values(program, trained, thetas)
        weights = {made[w.node.name].requires_grad for w in settled(program) if w.node.name in made}
        y = Student(program, made).run(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(thetas.values()))], weights

    ours, with_gradients = found()
    assert with_gradients == by_weights
    monkeypatch.setattr(training_variables.Settled, "by_row", lambda self, tables: False)
    theirs, with_gradients = found()
    assert with_gradients == {True} and torch.equal(ours[0], theirs[0])
    for name, one, other in zip(thetas, ours[1:], theirs[1:], strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm(), name


@pytest.mark.invariant("quest-2", "dilatequant-9")
def test_time_groups_that_a_batch_lacks_get_no_gradient():
    """Tables are trained by row: a call of one time moves the rows of its group alone."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=False)
    leaves = {name: theta.requires_grad_() for name, theta in zeros(trained).items()}
    x = dict(programs.inputs("unet2d", 2)) | {"timestep": torch.tensor([999, 999])}
    group = int(ops.time_group(x["timestep"], program.facts[TIME_GROUPS])[0])
    y = Student(program, student.values(program, trained, leaves)).run(x)
    tables = [n for n, v in trained.items() if v.kind == Kind.RANGE]
    found = torch.autograd.grad(y.square().sum(), [leaves[n] for n in tables])
    for gradient in found:
        others = [g for g in range(len(gradient)) if g != group]
        assert (gradient[others] == 0).all() and len(others) == len(program.facts[TIME_GROUPS])
    assert all(gradient[group] != 0 for gradient in found)


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
        "scale": Variable(Kind.SCALE, fit.scale.float(), torch.ones(()), torch.float16),
        "offset": Variable(Kind.OFFSET, fit.offset.float(), fit.scale.float().mean(), torch.float16),
    }
    state, errors = State.start(trained), []
    for state.step in range(1, 102):
        leaves = {name: theta.requires_grad_() for name, theta in state.thetas.items()}
        made = {name: variable(leaves[name]) for name, variable in trained.items()}
        level = student._Levels.apply(rows, made["scale"], made["offset"], fit.lut, None, None)
        loss = (level - rows).square().sum() / rows.square().sum()
        errors.append(float(loss.detach()))
        gradients = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
        state.thetas = {name: theta.detach() for name, theta in state.thetas.items()}
        trainer._adam(state, gradients, {n: RATES[v.kind] for n, v in trained.items()})
    assert all(error <= errors[0] for error in errors) and errors[::20] == sorted(errors[::20], reverse=True)


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.invariant("efficientdm-3")
def test_weights_learn_in_steps_of_their_table(adapters):
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    scales = {weight.tables.scale: program.tensors[weight.tables.scale] for weight in settled(program)}
    doubled = program.fork(tensors=TensorStore({**program.tensors, **{name: 2 * s for name, s in scales.items()}}))
    once, twice = (student.variables(p, latent=True, adapters=adapters) for p in (program, doubled))
    latent = [name for name, variable in once.items() if variable.kind == Kind.LATENT]
    assert len(latent) == len(scales)
    assert all(torch.equal(2 * once[name].unit, twice[name].unit) for name in latent)


@pytest.mark.parametrize("adapters", [0, 3])
@pytest.mark.invariant("efficientdm-3")
def test_twice_the_weight_is_moved_twice_as_far(adapters):
    """By ten steps of Adam against a target of its size, to the bit: two is no rounding."""
    rows, target = torch.randn(2, 8, 64, generator=torch.Generator().manual_seed(0))
    fit = formats.get("int3").start(rows)
    found = []
    for size in (1, 2):
        start, scale, offset = size * rows, size * fit.scale.float(), size * fit.offset.float()
        generator = torch.Generator().manual_seed(1)
        variable = Variable(Kind.LATENT, start, 2 * scale, torch.float32)
        trained = {"rows": student._adapted(start, 2 * scale, adapters, generator) if adapters else variable}
        state = State.start(trained)
        for state.step in range(1, 11):
            theta = state.thetas["rows"].requires_grad_()
            level = student._Levels.apply(trained["rows"](theta), scale, offset, fit.lut, None, None)
            loss = (level - size * target).square().sum() / (size * target).square().sum()
            (gradient,) = torch.autograd.grad(loss, theta)
            state.thetas["rows"] = theta.detach()
            trainer._adam(state, {"rows": gradient}, {"rows": 0.05})
        found.append((trained["rows"](state.thetas["rows"]) - start).detach())
    assert torch.equal(2 * found[0], found[1]) and float(found[0].abs().max()) > float(fit.scale.max()) / 100


@pytest.mark.invariant("tdq-2")
def test_tables_are_what_networks_make_of_the_times_of_groups():
    """Four linear layers with ReLU between them and softplus behind, at each group's time alone."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    trained = student.variables(program, latent=False, times=TIMES, seed=1)
    thetas = anywhere(trained, 1.0)
    moved = student.applied(program, trained, thetas)
    layers = [torch.nn.Linear(*sizes) for sizes in pairwise(training_variables.WIDTHS)]
    network = torch.nn.Sequential(*layers[:1], *(m for layer in layers[1:] for m in (torch.nn.ReLU(), layer)))
    tables = {plan.scale: moved.activations[edge].scale for edge, plan in program.activations.items()}
    assert tables.keys() == {name for name, v in trained.items() if v.kind == Kind.RANGE}
    for before, after in tables.items():
        variable, own = trained[before], program.tensors[before].float()
        vector_to_parameters(variable.network + variable.unit * thetas[before], network.parameters())
        scales = [s * F.softplus(network(e))[0] for s, e in zip(own, variable.embedding, strict=True)]
        assert moved.tensors[after].dtype == torch.float16
        torch.testing.assert_close(moved.tensors[after].float(), torch.stack(scales).detach(), rtol=1e-3, atol=1e-6)
        assert not torch.equal(moved.tensors[after], program.tensors[before])


@pytest.mark.parametrize("theta", [-1e4, -3.0, 0.7, 1e4])
@pytest.mark.invariant("tdq-3")
def test_scales_of_networks_are_positive(theta):
    table = Variable(Kind.RANGE, torch.tensor([0.01, 0.02, 30.0]), torch.ones(()), torch.float16)
    variable = student._timed(table, student._embedding(TIMES), torch.Generator().manual_seed(0))
    thetas = torch.full_like(variable.zeros(), theta)
    assert (variable.stored(thetas) > 0).all() and variable.stored(thetas).isfinite().all()
    assert torch.equal(variable.stored(thetas).float(), variable(thetas))


@pytest.mark.invariant("tdq-4")
def test_networks_learn_of_a_group_what_others_are_like():
    """A step on the scale of one time moves those of other times, and more that of a neighbour."""
    times = torch.tensor([0.5, 0.501, 0.9])
    table = Variable(Kind.RANGE, torch.full((3,), 0.25), torch.ones(()), torch.float16)
    variable = student._timed(table, student._embedding(times), torch.Generator().manual_seed(0))
    theta = variable.zeros().requires_grad_()
    (gradient,) = torch.autograd.grad(variable.moved(theta)[0], theta)
    own, near, far = (variable.moved(1e-3 * gradient) - variable.moved(theta)).tolist()
    assert own >= near > far > 0


@pytest.mark.invariant("tdq-5")
def test_times_of_groups_lie_in_them():
    """In the range of the timesteps that there were; a sampler's other steps read their group's."""
    program = programs.after("unet2d", "round-weights", programs.MIXED)
    timesteps = torch.tensor([1, 200, 999])
    times = trainer.group_times(program, timesteps)
    boundaries = program.facts[TIME_GROUPS]
    assert torch.equal(ops.time_group(1 + times * 998, boundaries), torch.arange(len(boundaries) + 1))
    assert len(times) == len(boundaries) + 1 and times.min() > 0 and times.max() < 1
    late = trainer.group_times(program, torch.tensor([999, 950]))  # calls of the last group alone
    assert (late.diff() > 0).all() and late.isfinite().all()


@pytest.mark.parametrize("theta", [-40.0, -3.0, 0.0, 0.7, 40.0])
@pytest.mark.invariant("lsq-2")
def test_values_are_what_is_stored(theta):
    """Whatever theta: scales are positive halves, zero points whole codes."""
    for kind, start in ((Kind.SCALE, [0.25, 3.0]), (Kind.RANGE, [1e-3]), (Kind.ZERO, [7.0, 0.0]), (Kind.FLOAT, [-2.5])):
        dtype = torch.uint8 if kind == Kind.ZERO else torch.float16
        variable = Variable(kind, torch.tensor(start), torch.ones(()), dtype, most=15)
        value, stored = variable(torch.full((len(start),), theta)), variable.stored(torch.full((len(start),), theta))
        assert stored.dtype == dtype and torch.equal(stored.float(), value) and torch.isfinite(value).all()
        if kind == Kind.ZERO:
            assert value.min() >= 0 and value.max() <= 15
        elif kind != Kind.FLOAT:
            assert (value > 0).all()


@pytest.mark.invariant("lsq-1", "lsq-4")
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
            tables = [ops.per_sample(t, group, x) for t in (scale, zero)]
            y = student._Rounded.apply(x, *tables, 15)
            assert torch.equal(student._Rounded.apply(y, *tables, 15), y)
        else:
            y = ops.fake_quantize(x, scale, zero, group, 4)
        found.append((y.detach(), *torch.autograd.grad((y * weights).sum(), (x, scale, zero))))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1] != 0, found[1][1] != 0)
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)
