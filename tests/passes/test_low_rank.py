from __future__ import annotations

import pytest
import torch
from torch import fx

from mpq_compiler import formats
from mpq_compiler.formats import low_rank
from mpq_compiler.frontend import denoiser
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.graph import prune
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.verifier import check
from mpq_compiler.passes.low_rank import LowRank
from mpq_compiler.pipeline.manager import run_pipeline
from mpq_compiler.pipeline.parser import parse
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.settle import unsettled
from mpq_compiler.support.errors import UserError
from mpq_compiler.training import student
from tests.harness import programs, tiny

MODEL = "pixart"


def step() -> programs.Step:
    return programs.step(MODEL, "low-rank", programs.LOW_RANK)


def sums(program: Program) -> dict[str, fx.Node]:
    """Node that adds a branch, by the parameter of its layer."""
    return {
        str(n.args[1].args[1].target).split(":")[0]: n
        for n in program.graph.nodes
        if n.target is aten.add.Tensor and getattr(n.args[1], "name", "").endswith("_up")
    }


def test_every_layer_of_the_plan_has_base_and_branch_on_one_input():
    program = step().after
    found = sums(program)
    assert {*found} == {*program.weights}
    for path, total in found.items():
        base, up = total.args
        down = up.args[0]
        assert base.args[0].target is ops.fake_quantize and base.args[0].args[0] is down.args[0]
        assert program.weights[path].sites == (base.name,) and base.name == f"{total.name}_base"
        assert {down.name, up.name} <= {*program.fallbacks}
        rank, shape = len(program.tensors[str(down.args[1].target)]), program.tensors[str(up.args[1].target)].shape
        assert shape[1] == rank <= 4


@pytest.mark.invariant("svdquant-5")
def test_the_sum_is_the_layer_with_the_fitted_weight():
    """A convolution and linear layers: base and branch compute what one layer with the sum of both weights does."""
    program = step().after
    values: dict[str, torch.Tensor] = {}
    run(program, programs.inputs(MODEL, 2), lambda node, value: values.__setitem__(node.name, value))
    kinds = set()
    for path, total in sums(program).items():
        base = total.args[0]
        x, rest = values[base.args[0].args[0].name], values[base.args[1].name]
        branch = program.tensors.read(f"{path}:up") @ program.tensors.read(f"{path}:down").flatten(1)
        difference = values[total.name] - values[base.name]
        wide = base.target(x, branch.reshape(rest.shape), None, *base.args[3:])
        assert float((difference - wide).abs().max()) <= 1e-4 * float(values[total.name].abs().max() + 1)
        kinds.add(base.target)
    assert kinds == {ops.conv2d, aten.linear.default}


def test_what_the_branch_leaves_is_quantized_at_the_fitted_levels():
    program = step().after
    for weight in unsettled(program):
        assert weight.weight.endswith(":rest") and weight.format == "int3"
        path, original = weight.path, program.weights[weight.path]
        assert original.format == "int3+r4"
        name = f"{path}:ohwi" if f"{path}:ohwi" in program.tensors else path
        branch = program.tensors.read(f"{path}:up") @ program.tensors.read(f"{path}:down").flatten(1)
        rest = program.tensors[weight.weight]
        assert torch.allclose(rest.flatten(1) + branch, program.tensors.read(name).flatten(1), atol=1e-6)


@pytest.mark.invariant("olri-3")
def test_factors_learn_from_the_first_update():
    """Neither is zero at the start, which would leave the other without a gradient."""
    program = programs.after(MODEL, "round-weights", programs.LOW_RANK)
    trained = student.variables(program, latent=False)
    leaves = {name: torch.zeros_like(v.start).requires_grad_() for name, v in trained.items()}
    y = student.Student(program, student.values(program, trained, leaves)).run(programs.inputs(MODEL, 3))
    factors = [leaves[name] for name in leaves if views.factor(name)]
    assert len(factors) == 2 * len(program.weights)
    assert all(float(g.abs().sum()) > 0 for g in torch.autograd.grad(y.square().sum(), factors))


def test_branches_bring_the_output_nearer_to_float():
    x = programs.inputs(MODEL, 4)
    y = run(programs.after(MODEL, "bit-allocation", programs.LOW_RANK), x)
    plain = programs.LOW_RANK.replace("int3+r4", "int3")
    errors = [
        float((run(programs.after(MODEL, "round-weights", pipeline), x) - y).square().sum())
        for pipeline in (programs.LOW_RANK, plain)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_without_the_pass_weights_are_not_rounded():
    before = programs.after(MODEL, "insert-fake-quant", programs.LOW_RANK)
    with pytest.raises(UserError, match=r"planned as int3\+r4: put pass 'low-rank' before 'round-weights'"):
        parse("round-weights")[0].run(before, Session())


def test_plans_without_a_branch_are_left_alone():
    program = programs.after(MODEL, "residual-branch", programs.RESIDUAL)
    after = LowRank().run(program, Session())
    assert [n.name for n in after.graph.nodes] == [n.name for n in program.graph.nodes]


def test_a_weight_that_is_used_twice_has_one_pair_of_factors():
    tied = tiny.model("dit")
    tied.transformer_blocks[1].attn1.to_q = tied.transformer_blocks[0].attn1.to_q
    model = denoiser.wrap(tied, name="tied")
    inputs = model.random_inputs(12, 3)
    inputs["timestep"] = torch.tensor([t for t in programs.TIMESTEPS for _ in range(2)])
    passes = parse(f"{programs.FRONT},bit-allocation{{uniform=int4g16+r2}},insert-fake-quant,low-rank,round-weights")
    session = Session(model, inputs)
    program, _ = run_pipeline(passes, programs.empty(), session)
    shared = [plan for plan in program.weights.values() if len(plan.sites) > 1]
    assert shared
    factors = [str(n.target) for n in program.graph.nodes if n.op == "get_attr" and ":up" in str(n.target)]
    assert len(factors) == sum(len(plan.sites) for plan in program.weights.values()) > len({*factors})
    x = model.random_inputs(2, 5)
    packed, _ = run_pipeline(parse("fold-fake-quant,fuse-epilogues"), program, session, present=["codes", "packed"])
    assert torch.equal(run_exact(program, x), run(packed, x))


def test_ranks_tried_one_after_another_share_a_store():
    front = programs.after(MODEL, "time-groups", programs.LOW_RANK)
    present = {p for each in parse(programs.FRONT) for p in each.provides}
    ranks = []
    for rank in (2, 4):
        passes = parse(f"bit-allocation{{uniform=int3+r{rank}}},insert-fake-quant,low-rank,round-weights")
        program, _ = run_pipeline(passes, front, Session(), present=present)
        names = [str(n.target) for n in program.graph.nodes if n.op == "get_attr"]
        ranks.append({program.tensors[name].shape[1] for name in names if views.factor(name) == "up"})
    assert ranks == [{2}, {4}]


def test_a_branch_that_is_lost_or_wider_than_its_type_is_seen():
    program = programs.after(MODEL, "round-weights", programs.LOW_RANK)
    assert not check(program, ["low-rank"])
    lost = program.fork()
    total = next(iter(sums(lost).values()))
    name = total.name
    total.replace_all_uses_with(lost.node(f"{name}_base"))
    prune(lost.graph)
    assert [v.node for v in check(lost, ["low-rank"])] == [f"{name}_w"]
    other = program.fork()
    path = next(iter(other.weights))
    other.weights[path] = type(other.weights[path])("int3", other.weights[path].sites)
    assert {v.rule for v in check(other, ["low-rank"])} == {"low-rank"}
    assert isinstance(formats.get("int3+r4"), low_rank.LowRankFormat)


def test_the_branch_of_a_layer_that_reads_floats():
    """The base computes in float too, and the sum is the layer with the fitted weight."""
    pipeline = programs.LOW_RANK.replace("uniform=int3+r4", "uniform=int3+r4,activations=16")
    for total in sums(programs.after(MODEL, "low-rank", pipeline)).values():
        base, up = total.args
        assert up.args[0].args[0] is base.args[0]
    x = programs.inputs(MODEL, 4)
    y = run(programs.after(MODEL, "bit-allocation", pipeline), x)
    fine = pipeline.replace("int3+r4", "int8+r4")
    errors = [float((run(programs.after(MODEL, "round-weights", p), x) - y).square().mean()) for p in (pipeline, fine)]
    assert errors[1] < 0.01 * errors[0]
