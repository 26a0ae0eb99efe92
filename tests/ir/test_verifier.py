"""Every rule has a mutated program that it alone rejects; real programs break none."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx

from mpq_compiler.ir import ops, verifier
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.program import (
    PARAMETERS,
    TIME_GROUPS,
    ActivationPlan,
    InputSpec,
    Program,
    Stage,
    TensorStore,
    WeightPlan,
)
from mpq_compiler.ir.reuse import REUSE
from mpq_compiler.ir.verifier import RULES, VerificationError, check, verify
from tests.harness import programs
from tests.harness.tree import ROOT

MODEL = "unet2d"
LINEAR = "time_embedding_linear_1"

MUTANTS: dict[str, Callable[[], Program]] = {}


def mutant(rule: str, pass_name: str, pipeline: str = programs.RESIDUAL):
    """Registers ``change(program)``, which spoils the program after that pass for one rule."""

    def register(change: Callable[[Program], Program | None]):
        def make() -> Program:
            program = programs.after(MODEL, pass_name, pipeline).fork()
            return change(program) or program

        MUTANTS[rule] = make
        return change

    return register


def with_tensor(program: Program, name: str, tensor: Tensor) -> Program:
    return program.fork(tensors=TensorStore({**program.tensors, name: tensor}))


def first(program: Program, target) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target is target)


def path_of(node: fx.Node) -> str:
    return str(node.target)


# --- structure ----------------------------------------------------------------------------------------------


@mutant("order", "layout")
def _(program):
    silu = first(program, aten.silu.default)
    silu.args[0].prepend(silu)


@mutant("unique-names", "layout")
def _(program):
    a, b = [n for n in program.graph.nodes if n.op == "get_attr"][:2]
    a.name = b.name


@mutant("stored-attributes", "layout")
def _(program):
    next(n for n in program.graph.nodes if n.op == "get_attr").target = "no.such.weight"


@mutant("regions", "fuse-epilogues")
def _(program):
    call = next(n for n in program.graph.nodes if n.op == "call_module")
    call.args = call.args[:-1]


# --- graph --------------------------------------------------------------------------------------------------


@mutant("no-dead-nodes", "layout")
def _(program):
    silu = first(program, aten.silu.default)
    with program.graph.inserting_after(silu):
        program.graph.call_function(aten.neg.default, (silu,))


@mutant("inputs", "layout")
def _(program):
    next(n for n in program.graph.nodes if n.op == "placeholder").target = "sampel"


@mutant("dialect", "layout")
def _(program):
    first(program, aten.silu.default).target = torch.nn.functional.silu


@mutant("shapes", "layout")
def _(program):
    name = path_of(program.node(LINEAR).args[2])
    return with_tensor(program, name, torch.zeros(len(program.tensors[name]) + 1))


@mutant("kept-values", "keep-values", programs.KEPT)
def _(program):
    """A step takes the value of one that took it itself."""
    schedule = program.facts[REUSE]
    last = next(step for step, sources in enumerate(schedule.sources) if sources)
    later = ((last, 1.0),)
    program.facts[REUSE] = dataclasses.replace(schedule, sources=(*schedule.sources[: last + 1], later))


@mutant("rows-of-samples", "round-weights")
def _(program):
    """Six copies of the batch, whatever its size: the rows no longer tell the samples apart."""
    call = program.node(LINEAR)
    quantizer = call.args[0]
    edge = quantizer.args[0]
    with program.graph.inserting_before(quantizer):
        row = program.graph.call_function(aten.unsqueeze.default, (edge, 0))
        copies = program.graph.call_function(aten.expand.default, (row, [6, -1, -1]))
    quantizer.update_arg(0, copies)
    with program.graph.inserting_after(call):
        one = program.graph.call_function(aten.select.int, (call, 0, 0))
    call.replace_all_uses_with(one, delete_user_cb=lambda user: user is not one)
    program.activations[copies.name] = program.activations.pop(edge.name)


@mutant("finite", "layout")
def _(program):
    name = path_of(program.node(LINEAR).args[1])
    weight = program.tensors[name].clone()
    weight[0, 0] = torch.nan
    return with_tensor(program, name, weight)


@mutant("permutes", "layout")
def _(program):
    silu = next(n for n in program.graph.nodes if n.target is aten.silu.default and n.args[0].target is ops.group_norm)
    norm = silu.args[0]
    with program.graph.inserting_before(silu):
        there = program.graph.call_function(aten.permute.default, (norm, [0, 3, 1, 2]))
        back = program.graph.call_function(aten.permute.default, (there, [0, 2, 3, 1]))
    silu.update_arg(0, back)


@mutant("reasons", "layout")
def _(program):
    program.fallbacks[LINEAR] = " "


# --- plans --------------------------------------------------------------------------------------------------


def _first_plan(program: Program) -> tuple[str, WeightPlan]:
    return next(iter(program.weights.items()))


def _edge(program: Program) -> tuple[str, ActivationPlan]:
    return next(iter(program.activations.items()))


@mutant("plan-formats", "bit-allocation")
def _(program):
    path, plan = _first_plan(program)
    program.weights[path] = dataclasses.replace(plan, format="int7")


@mutant("plan-sites", "bit-allocation")
def _(program):
    path, plan = _first_plan(program)
    program.weights[path] = dataclasses.replace(plan, sites=())


@mutant("float-leftovers", "bit-allocation")
def _(program):
    readers = [n for n in program.quantizable if sum(m.args[0] is n.args[0] for m in program.quantizable) > 1]
    del program.weights[path_of(readers[0].args[1]).split(":")[0]]


@mutant("activation-plans", "bit-allocation")
def _(program):
    del program.activations[_edge(program)[0]]


@mutant("dynamic-activations", "bit-allocation")
def _(program):
    edge = program.node("conv_in").args[0].name
    program.activations[edge] = ActivationPlan(8, None, None, dynamic=True)


@mutant("numerics", "insert-fake-quant")
def _(program):
    program.attentions[0].kwargs = {"numerics": "int8"}


@mutant("activation-bits", "bit-allocation")
def _(program):
    edge, plan = _edge(program)
    program.activations[edge] = dataclasses.replace(plan, bits=9)


@mutant("activation-scales", "bit-allocation")
def _(program):
    name = _edge(program)[1].scale
    return with_tensor(program, name, torch.zeros_like(program.tensors[name]))


@mutant("zero-points", "bit-allocation")
def _(program):
    edge, plan = _edge(program)
    program.activations[edge] = dataclasses.replace(plan, bits=4)
    return with_tensor(program, plan.zero_point, torch.full_like(program.tensors[plan.zero_point], 16))


@mutant("group-tables", "bit-allocation")
def _(program):
    name = _edge(program)[1].scale
    return with_tensor(program, name, program.tensors[name].repeat(2))


@mutant("group-tables", "bit-allocation")
def _(program):
    name = _edge(program)[1].scale
    return with_tensor(program, name, program.tensors[name][:, None].repeat(1, 4))  # one a channel


@mutant("small-floats", "bit-allocation", programs.SMALL_FLOATS)
def _(program):
    del program.fallbacks[LINEAR]


@mutant("boundaries", "bit-allocation")
def _(program):
    program.facts[TIME_GROUPS] = program.facts[TIME_GROUPS].flip(0)


@mutant("one-time-group", "round-weights")
def _(program):
    group = program.node("g")
    with program.graph.inserting_after(group):
        second = program.graph.call_function(ops.time_group, group.args)
    first(program, ops.fake_quantize).update_arg(3, second)


# --- quantized weights --------------------------------------------------------------------------------------


def _part(program: Program, place: int) -> str:
    """Store name of a part of a packed layer: 2 codes, 3 scale, 4 offset, 5 table."""
    return path_of(program.node(LINEAR).args[place])


@mutant("codes", "fold-fake-quant")
def _(program):
    name = _part(program, 2)
    codes = program.tensors[name].clone()
    codes[0, 0] = 8
    return with_tensor(program, name, codes)


@mutant("table-range", "fold-fake-quant")
def _(program):
    name = _part(program, 5)
    table = program.tensors[name].clone()
    table[0, 0] = -128
    return with_tensor(program, name, table)


@mutant("table-size", "fold-fake-quant")
def _(program):
    name = _part(program, 5)
    return with_tensor(program, name, program.tensors[name].repeat(1, 2))


@mutant("weight-scales", "fold-fake-quant")
def _(program):
    name = _part(program, 3)
    return with_tensor(program, name, program.tensors[name] * 0)


@mutant("offsets", "fold-fake-quant")
def _(program):
    name = _part(program, 4)
    return with_tensor(program, name, program.tensors[name][:-1])


@mutant("row-classes", "fold-fake-quant")
def _(program):
    name = _part(program, 5)
    return with_tensor(program, name, program.tensors[name].repeat(2, 1))


@mutant("branches", "round-weights")
def _(program):
    name = path_of(first(program, ops.binary_branch).args[0])
    return with_tensor(program, name, program.tensors[name] + 2)


@mutant("shared-weights", "fold-fake-quant")
def _(program):
    """to_k becomes a second call of to_q's parameter, with codes of its own."""
    to_q, to_k = (program.node(f"mid_block_attentions_0_to_{part}") for part in "qk")
    paths = [path_of(n.args[2]).split(":")[0] for n in (to_q, to_k)]
    with program.graph.inserting_before(to_k):
        other = program.graph.get_attr(program.tensors.add(f"{paths[0]}:codes", program.tensors[f"{paths[1]}:codes"]))
    old = to_k.args[2]
    to_k.update_arg(2, other)
    program.graph.erase_node(old)
    plan = program.weights[paths[0]]
    program.weights[paths[0]] = dataclasses.replace(plan, sites=(to_q.name, to_k.name))
    del program.weights[paths[1]]


@mutant("segments", "fold-fake-quant")
def _(program):
    layer = program.node(LINEAR)
    layer.update_arg(10, [layer.args[10][0] - 1])


@mutant("operand-tables", "fold-fake-quant")
def _(program):
    layer = program.node(LINEAR)
    other = next(n for n in program.graph.nodes if n.target is ops.quantize and n is not layer.args[0])
    group = program.node("g")
    with program.graph.inserting_after(group):
        scale = program.graph.get_attr(str(other.args[1].target))
    layer.update_arg(7, [scale])


@mutant("low-rank", "round-weights")
def _(program):
    """A norm's weight that goes by the name of a factor."""
    read = first(program, ops.group_norm).args[2]
    name = f"{path_of(read).split(':')[0]}:up"
    tensor = program.tensors[path_of(read)]
    read.target = name
    return with_tensor(program, name, tensor)


@mutant("lora", "fold-fake-quant")
def _(program):
    """A bias that goes by the name of a factor."""
    read = next(n for n in program.graph.nodes if n.op == "get_attr" and path_of(n).endswith(".bias:f16"))
    name = f"{path_of(read).split(':')[0]}:lora_up"
    tensor = program.tensors[path_of(read)]
    read.target = name
    return with_tensor(program, name, tensor)


@mutant("simulated-operands", "round-weights")
def _(program):
    quantizer = next(n for n in program.graph.nodes if n.target is ops.fake_quantize and len(n.users) > 1)
    next(iter(quantizer.users)).update_arg(0, quantizer.args[0])


@mutant("stored-types", "fold-fake-quant")
def _(program):
    name = path_of(first(program, ops.group_norm).args[2])
    return with_tensor(program, name, program.tensors[name].to(torch.float32))


def packed_linear(channels: int) -> Program:
    """One packed linear layer, 1 x ``channels``, all weights at the largest entry of an INT2 table."""
    tensors = {
        "time_groups.boundaries": torch.tensor([500.0]),
        "x:scale": torch.ones(2, dtype=torch.float16),
        "x:zero_point": torch.zeros(2, dtype=torch.uint8),
        "w": torch.zeros(1, channels),
        "w:codes": torch.full((1, channels), 3, dtype=torch.uint8),
        "w:scale": torch.ones(1, 1, dtype=torch.float16),
        "w:offset": torch.zeros(1, dtype=torch.float16),
        "w:lut": torch.tensor([[-127, 0, 1, 127]], dtype=torch.int8),
    }
    graph = fx.Graph()
    x, t = graph.placeholder("x"), graph.placeholder("timestep")
    node = {name: graph.get_attr(name) for name in tensors if name != "w"}
    g = graph.call_function(ops.time_group, (t, node["time_groups.boundaries"]))
    g.name = "g"
    q = graph.call_function(ops.quantize, (x, node["x:scale"], node["x:zero_point"], g, 8))
    parts = (node["w:codes"], node["w:scale"], node["w:offset"], node["w:lut"], None)
    tables = ([node["x:scale"]], [node["x:zero_point"]])
    y = graph.call_function(ops.quant_linear, (q, g, *parts, *tables, None, [channels]))
    graph.output(y)
    return Program(
        graph,
        TensorStore(tensors),
        (InputSpec("x", ("B", channels), torch.float32), InputSpec("timestep", ("B",), torch.int64)),
        Stage.PACKED,
        weights={"w": WeightPlan("int2", (y.name,))},
        activations={"x": ActivationPlan(8, "x:scale", "x:zero_point")},
        facts=Facts({TIME_GROUPS: torch.tensor([500.0]), PARAMETERS: channels}),
    )


MUTANTS["accumulators"] = lambda: packed_linear(66_400)


# --- tests --------------------------------------------------------------------------------------------------


def test_every_rule_has_a_mutant():
    assert {*MUTANTS} == {*RULES}
    assert len(RULES) >= 18
    assert all(rule.check.__name__ != "<lambda>" for rule in RULES.values())


@pytest.mark.parametrize("name", RULES)
@pytest.mark.invariant("quest-3", "compiler-2")
def test_the_rule_alone_rejects_its_mutant(name):
    program = MUTANTS[name]()
    found = check(program)
    assert {v.rule for v in found} == {name}, "\n".join(map(str, found))
    with pytest.raises(VerificationError, match=f"rule '{name}' at %.* after pass 'a-pass'.*report it"):
        verify(program, after="a-pass")
    if not RULES[name].structural:  # without those, others would read a graph that cannot be read
        assert not check(program, [n for n in RULES if n != name])


@pytest.mark.parametrize("model", programs.MODELS)
def test_programs_of_the_compiler_break_no_rule(model):
    for step in programs.steps(model):
        assert check(step.after) == [], step.step.name()


def test_accumulators_just_below_the_limit_pass():
    assert check(packed_linear(66_311)) == []


def test_verifying_is_quick():
    seconds = []
    for step in programs.steps(programs.BUNDLED):
        start = time.process_time()
        check(step.after)
        seconds.append(time.process_time() - start)
    assert min(seconds) < 0.3 and sorted(seconds)[len(seconds) // 2] < 0.3


def test_the_pass_manager_names_the_pass(monkeypatch):
    from mpq_compiler.passes.layout import Layout
    from mpq_compiler.pipeline import manager, parser
    from mpq_compiler.pipeline import session as pipeline_session

    start = programs.after(MODEL, "trace", programs.RESIDUAL)

    def broken(self, program, session):
        program = program.fork(stage=Stage.REWRITTEN)
        program.fallbacks["x"] = ""
        return program

    monkeypatch.setattr(Layout, "run", broken)
    with pytest.raises(VerificationError, match="after pass 'layout'"):
        manager.run_pipeline(
            parser.parse("layout"), start, pipeline_session.Session(), present={"graph"}
        )


def test_rules_are_documented():
    text = (ROOT / "docs" / "ir.md").read_text()
    assert not [name for name in verifier.RULES if f"`{name}`" not in text]
