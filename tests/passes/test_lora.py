"""Branches for LoRA: zero as they are compiled, in the basis of their layer, and only where they can be."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from mpq_compiler.ir import ops, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.findings import ATTENTION_NUMERICS
from mpq_compiler.ir.interpreter import run
from mpq_compiler.ir.lora import LORA, branch_bytes, module_of
from mpq_compiler.ir.program import NOTES, PLANNED, Program
from mpq_compiler.ir.verifier import check
from mpq_compiler.ir.weight_basis import basis_of
from mpq_compiler.passes.lora import LoraBranches
from mpq_compiler.pipeline.session import Session
from mpq_compiler.support.errors import UserError
from tests.harness import programs

PIPELINES = {
    "plain": ("unet2d", programs.RESIDUAL),
    "rewritten": ("unet2d", programs.REWRITES.replace("equalize{", "equalize{rule=dilation,")),
    "rotated": ("pixart", programs.ROTATED),
    "low rank": ("unet2d", programs.LOW_RANK),
    "other numerics": ("unet2d", programs.FAST),
    "small floats": ("pixart", programs.SMALL_FLOATS),
}


def folded(name: str) -> Program:
    model, pipeline = PIPELINES[name]
    return programs.after(model, "fold-fake-quant", pipeline)


def branched(name: str, **options) -> Program:
    return LoraBranches(**options).run(folded(name), Session())


@pytest.mark.parametrize("name", PIPELINES)
def test_branches_change_no_bit_and_break_no_rule(name: str) -> None:
    program, x = branched(name, rank=4, layers=("*",)), dict(programs.inputs(PIPELINES[name][0], 2))
    assert torch.equal(run(program, x), run(folded(name), x))
    assert not check(program)
    branches = program.facts[LORA].branches
    assert branches.keys() == program.weights.keys() and all(branch.rank <= 4 for branch in branches.values())
    calls = {call.name for call in views.flatten(program)}
    assert {site for plan in program.weights.values() for site in plan.sites} <= calls
    assert program.facts.get(ATTENTION_NUMERICS, {}).keys() <= calls


@pytest.mark.parametrize("name", ["rewritten", "rotated"])
def test_every_weight_is_the_models_in_its_basis(name: str) -> None:
    """What LoRA factors go through is what the weight went through."""
    planned = folded(name).facts[PLANNED]
    steps = set()
    for path, weight in {str(views.stored(n.args[1])).split(":")[0]: n.args[1] for n in planned.quantizable}.items():
        basis, now = basis_of(planned, path), planned.tensors.read(str(weight.target))
        own = basis.rewritten(planned.tensors.read(basis.origin).movedim(1, -1))
        assert torch.allclose(own, now, atol=1e-6 * float(now.abs().max()))
        steps |= {(type(step).__name__, getattr(step, "outputs", None)) for step in basis.steps}
    both = {("Scaled", True), ("Scaled", False), ("Part", None)}
    assert steps == (both if name == "rewritten" else {("Rotated", None)})


@pytest.mark.parametrize("name", ["rewritten", "rotated"])
def test_factors_in_that_basis_change_the_weight(name: str) -> None:
    """The sum of layer and branch is the layer with the sum of both weights, in each layer, on its own input."""
    program, generator = branched(name, rank=2, layers=("*",)), torch.Generator().manual_seed(0)
    changes, values = {}, {}
    for path, branch in program.facts[LORA].branches.items():
        up, down = program.tensors[branch.up], program.tensors[branch.down]
        for factor, tensor in ((branch.up, up), (branch.down, down)):
            random = (torch.randn(tensor.shape, generator=generator) / 8).half()
            program = program.fork(tensors=type(program.tensors)({**program.tensors, factor: random}))
        changes[path] = (program.tensors.read(branch.up) @ program.tensors.read(branch.down).flatten(1)).reshape(
            len(up), *down.shape[1:]
        )
    x = dict(programs.inputs(PIPELINES[name][0], 2))
    run(program, x, lambda node, value: values.__setitem__(node.name, value))
    totals = [n for n in program.graph.nodes if n.target is aten.add.Tensor and f"{n.name}_lora_up" in values]
    assert len(totals) == len(changes)
    for total in totals:
        base, up = total.args
        narrow = up.args[0]
        path = str(narrow.args[1].target).split(":")[0]
        wide = narrow.target(values[narrow.args[0].name], changes[path], None, *narrow.args[3:])
        found = values[total.name] - values[base.name]
        assert float((found - wide).abs().max()) <= 1e-4 * float(values[total.name].abs().max() + 1)


def test_linear_layers_have_a_branch_unless_others_are_named() -> None:
    program = branched("plain")
    chosen = program.facts[LORA].branches
    pixels = {path for path in program.weights if program.tensors[path].shape[2:].numel() == 1}
    assert chosen.keys() == pixels < program.weights.keys()
    assert any(program.tensors[path].dim() == 4 for path in chosen) and {ops.conv2d} < {
        n.target for n in program.graph.nodes if n.name.endswith("_lora_down")
    }
    assert branch_bytes(program) == sum(
        2 * branch.rank * (len(program.tensors[path]) + program.tensors[path].flatten(1).shape[1])
        for path, branch in chosen.items()
    )
    named = branched("plain", layers=("*.to_q", "*.conv1")).facts[LORA].branches
    assert {path.split(".")[-2] for path in named} == {"to_q", "conv1"}


def test_a_layer_that_cannot_have_one_is_named() -> None:
    program = folded("plain")
    path = next(p for p in program.weights if p.endswith("to_q.weight"))
    planned = program.facts[PLANNED]
    weight = str(next(n for n in planned.quantizable if str(n.args[1].target) == path).args[1].target)
    other = planned.fork()
    node = next(n for n in other.graph.nodes if n.op == "get_attr" and n.target == weight)
    node.target = other.tensors.add(f"{path}:other", other.tensors[weight] * 1.01)
    own = program.fork()
    own.facts[PLANNED] = other
    name = module_of(path)
    with pytest.raises(UserError, match=r"no layer of this model can have a branch for LoRA: leave lora_rank out"):
        LoraBranches(layers=(name,)).run(own, Session())
    found = LoraBranches(layers=("*",)).run(own, Session())
    assert found.facts[LORA].branches.keys() == program.weights.keys() - {path}
    assert f"'{name}' has no branch, for a pass has rewritten its weight" in found.facts[NOTES][-1]


def test_what_branches_cannot_stand_with_is_refused() -> None:
    with pytest.raises(
        UserError, match=r"no layer is called '\*\.to_x' \(lora_layers\): patterns are of module paths"
    ):
        branched("plain", layers=("*.to_x",))
    with pytest.raises(UserError, match="put it before 'fuse-epilogues'"):
        LoraBranches().run(programs.after("unet2d", "fuse-epilogues", programs.RESIDUAL), Session())
    with pytest.raises(UserError, match=r"pass .bos-split. has made constants of .* leave it out"):
        LoraBranches().run(programs.after("sd15", "fold-fake-quant", programs.REWRITES), Session())
    with pytest.raises(UserError, match="option 'rank' of pass 'lora' must be 1 or more, not 0"):
        LoraBranches(rank=0)


def test_a_branch_that_is_lost_or_of_another_type_is_seen() -> None:
    program = branched("plain")
    assert not check(program, ["lora"])
    path, branch = next(iter(program.facts[LORA].branches.items()))
    wide = program.fork(
        tensors=type(program.tensors)({**program.tensors, branch.up: program.tensors[branch.up].float()})
    )
    assert [v.node for v in check(wide, ["lora"])] == [path]
    unlisted = program.fork()
    unlisted.facts[LORA] = dataclasses.replace(program.facts[LORA], branches={})
    assert "that is not listed" in check(unlisted, ["lora"])[0].what
