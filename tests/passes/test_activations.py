"""Dynamic activations and quantized attentions: planned, measured, simulated and packed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
import torch
from torch import fx

from mpq_compiler.allocation import pose
from mpq_compiler.allocation.costs import describe
from mpq_compiler.analysis.noise_power import noise_power
from mpq_compiler.ir import costs, ops, printer, stored_tensors, views
from mpq_compiler.ir.aten import aten
from mpq_compiler.ir.edges import attention_edges, input_edge
from mpq_compiler.ir.exact_interpreter import run_exact
from mpq_compiler.ir.facts import Facts
from mpq_compiler.ir.findings import SENSITIVITY
from mpq_compiler.ir.graph import softmax
from mpq_compiler.ir.interpreter import run, shapes
from mpq_compiler.ir.program import PARAMETERS, ActivationPlan, InputSpec, Program, Stage, TensorStore
from mpq_compiler.ir.verifier import check
from mpq_compiler.passes.bit_allocation import BitAllocation
from mpq_compiler.passes.insert_fake_quant import InsertFakeQuant
from mpq_compiler.pipeline import manager, parser
from mpq_compiler.pipeline.session import Session
from mpq_compiler.quantization.statistics import CALIBRATION, RANGE, VALUES, collect
from mpq_compiler.support.errors import UserError
from tests.harness import programs
from tests.passes import test_contracts as contracts

MODEL = "pixart"
MODELS = (programs.BUNDLED, "sd15", MODEL)
SIMULATING = ("insert-fake-quant", "round-weights", "fold-fake-quant", "fuse-epilogues")


UNIFORM = f"{programs.FRONT},bit-allocation{{uniform=int8,dynamic=true,attention=8}},{programs.BACK}"
"""The same without measuring."""


def pipeline(model: str) -> str:
    return programs.ACTIVATIONS if model == MODEL else UNIFORM


def after(name: str, model: str = MODEL) -> Program:
    return programs.after(model, name, pipeline(model))


def planned(**options) -> Program:
    return BitAllocation(**options).run(after("sensitivity"), Session())


@pytest.mark.parametrize("name", SIMULATING)
@pytest.mark.parametrize("model", MODELS)
def test_contracts(model, name):
    contracts.check(programs.step(model, name, pipeline(model)), dict(programs.inputs(model, 3)))


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("batch", [1, 2])
def test_exact_at_other_batches(model, batch):
    before, x = after("round-weights", model), programs.inputs(model, batch)
    assert torch.equal(run_exact(before, x), run(after("fuse-epilogues", model), x))


@pytest.mark.parametrize("model", MODELS)
def test_the_plan_says_who_is_dynamic(model):
    """All edges that linear layers alone read, and no others; every attention with its operands."""
    program = after("bit-allocation", model)
    readers: dict[str, set] = {}
    for node in program.quantizable:
        readers.setdefault(node.args[0].name, set()).add(node.target)
    operands = {e.name for n in program.attentions for e in attention_edges(n)}
    dynamic = {edge for edge, plan in program.activations.items() if plan.dynamic}
    assert dynamic == {e for e, kinds in readers.items() if kinds == {aten.linear.default}} - operands
    assert dynamic and operands
    attentions = {softmax(n.name) for n in program.attentions}
    assert {*program.activations} == {*readers} | operands | attentions
    assert all(program.tensors[program.activations[name].zero_point].sum() == 0 for name in attentions)


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.invariant("compiler-7")
def test_stored_bytes_are_those_of_the_artifact(model):
    plan = after("bit-allocation", model)
    for name in ("fold-fake-quant", "fuse-epilogues"):
        program = after(name, model)
        total = sum(s.array.nbytes for s in stored_tensors.stored(program).values())
        assert costs.stored_bytes(plan) == printer.stored_bytes(program) == total
    static = BitAllocation(attention=8, uniform="int8").run(after("time-groups", model), Session())
    dynamic = sum(p.dynamic for p in plan.activations.values())
    assert costs.stored_bytes(static) - costs.stored_bytes(plan) == 3 * 3 * dynamic


def test_a_program_without_static_activations_has_no_time_groups():
    """Linear layers alone: nothing reads the group of a sample, so the graph has none and stores no boundaries."""
    graph, weight = fx.Graph(), torch.randn(6, 4)
    x, _ = graph.placeholder("sample"), graph.placeholder("timestep")
    graph.output(graph.call_function(aten.linear.default, (x, graph.get_attr("to.weight"), None)))
    specs = InputSpec("sample", ("B", 4), torch.float32), InputSpec("timestep", ("B",), torch.int64)
    tensors, facts = TensorStore({"to.weight": weight}), Facts({PARAMETERS: 24})
    start = Program(graph, tensors, specs, Stage.REWRITTEN, facts=facts)
    inputs = {"sample": torch.randn(8, 4), "timestep": torch.arange(8) * 100}
    passes = f"calibrate,time-groups,bit-allocation{{uniform=int8,dynamic=true}},{programs.BACK}"
    steps = []
    manager.run_pipeline(
        parser.parse(passes),
        start,
        Session(programs.denoiser(MODEL), inputs),
        [lambda i, p, before, after: steps.append((p.name(), before, after))],
        present={"channels-last"},
    )
    packed = steps[-1][2]
    assert not [n for n in packed.graph.nodes if n.target is ops.time_group]
    (before,) = (b for name, b, _ in steps if name == "fold-fake-quant")
    assert torch.equal(run_exact(before, inputs), run(packed, inputs))
    planned = next(p for name, _, p in steps if name == "bit-allocation")
    assert costs.stored_bytes(planned) == sum(s.array.nbytes for s in stored_tensors.stored(packed).values())


# --- q, k and v share a plan --------------------------------------------------------------------------------


@pytest.mark.parametrize("passes", [programs.MIXED, UNIFORM])
def test_layers_of_one_edge_share_a_plan_and_a_quantizer(passes):
    """to_q, to_k and to_v of a self-attention: one plan, one quantizer, one pass over the tensor."""
    name = "mid_block_attentions_0"
    plan, packed = (programs.after("unet2d", n, passes) for n in ("bit-allocation", "fold-fake-quant"))
    edges = {plan.node(f"{name}_to_{part}").args[0].name for part in "qkv"}
    assert len(edges) == 1
    (edge,) = edges
    flat = views.flatten(packed)
    readers = [c for c in flat if c.name in {f"{name}_to_{part}" for part in "qkv"}]
    assert len(readers) == 3 and len({c.args[0] for c in readers}) == 1
    assert [q.edge for q in views.quantizers_of(flat)].count(edge) == 1
    assert len({tuple(c.args[7]) + tuple(c.args[8]) for c in readers}) == 1


# --- statistics and sensitivities ---------------------------------------------------------------------------


def test_statistics_of_an_attention_are_those_of_its_probabilities():
    program = after("calibrate")
    calibration = program.facts[CALIBRATION]
    values = {}
    run(program, calibration.inputs, lambda node, value: values.__setitem__(node, value))
    for node in program.attentions:
        q, k, _, heads, scale, mask = (*node.args, None, None)[:6]
        p = ops.attention_probabilities(values[q], values[k], heads, scale, None if mask is None else values[mask])
        found = calibration.edges[softmax(node.name)]
        rows = p.reshape(len(p), -1)
        torch.testing.assert_close(found.low, rows.amin(1))
        torch.testing.assert_close(found.high, rows.amax(1))
        assert found.elements == rows.shape[1] and 0 < found.values.shape[1] <= rows.shape[1]
        per_row = found.values.reshape(len(p), -1, p.shape[-1])
        torch.testing.assert_close(per_row.sum(-1), torch.ones(per_row.shape[:2]))  # whole rows


def test_attentions_are_observed_where_they_are_asked_for():
    program, x = after("layout"), programs.inputs(MODEL, 2)
    plain = collect(program, x, frozenset({RANGE, VALUES}), Session())
    asked = collect(program, x, frozenset({RANGE, VALUES}), Session(), attention=True)
    own = {softmax(n.name) for n in program.attentions}
    own |= {e.name for n in program.attentions for e in attention_edges(n)}
    assert {*asked.edges} - {*plain.edges} == own - {*plain.edges} and own


def test_sensitivities_are_those_of_what_is_used():
    """A dynamic edge is measured dynamic, an attention with all that is quantized in it."""
    program = after("sensitivity")
    table = program.facts[SENSITIVITY]
    assert table["dynamic"] and {*table["attention"]} == {n.name for n in program.attentions}
    plan, inputs = after("bit-allocation"), program.facts[CALIBRATION].select(3)
    reference = run(program, inputs)

    def alone(*edges: str) -> float:
        """Noise of the simulated program that quantizes these edges alone."""
        single = plan.fork(weights={}, activations={e: plan.activations[e] for e in edges})
        simulated = single.fork(graph=_only(InsertFakeQuant().run(single, Session()), single, edges))
        return noise_power(run(simulated, inputs), reference)

    node = program.attentions[0]
    edges = (*(e.name for e in attention_edges(node)), softmax(node.name))
    assert alone(*edges) == pytest.approx(table["attention"][node.name]["8"], rel=0.02)
    edge = next(e for e, p in plan.activations.items() if p.dynamic)
    single = plan.fork()
    made = single.node(edge)
    with single.graph.inserting_after(made):
        rounded = single.graph.call_function(ops.dynamic_fake_quantize, (made, 8))
    for reader in (n for n in single.quantizable if input_edge(n) is made):
        reader.replace_input_with(made, rounded)
    assert noise_power(run(single, inputs), reference) == pytest.approx(table["activations"][edge]["8"], rel=0.02)


def _only(simulated: Program, single: Program, edges: tuple[str, ...]) -> fx.Graph:
    """The graph with float leftovers as they were, so that quantization alone makes a difference."""
    for node in simulated.graph.nodes:
        if node.op == "get_attr" and str(node.target).endswith(":f16"):
            node.target = str(node.target).removesuffix(":f16")
    return simulated.graph


def test_an_attention_is_kept_in_float_where_the_budget_allows():
    """Most sensitive first: the allocation spends what `activations` allows beyond 8 bits on attentions."""
    table = after("sensitivity").facts[SENSITIVITY]
    costly = max(table["attention"], key=lambda n: table["attention"][n]["8"])
    counts = costs.attention_costs(after("sensitivity"))
    elements = sum(costs.activation_elements(after("sensitivity")).values())
    total = elements + sum(c["elements"] for c in counts.values())
    budget = 8 + 24 * counts[costly]["elements"] / total
    program = planned(dynamic=True, attention=8, activations=budget * (1 + 1e-9))
    kept = [n.name for n in program.attentions if softmax(n.name) not in program.activations]
    assert kept == [costly] and "float" in program.fallbacks[costly] and check(program) == []
    assert costs.activation_bits(program) == pytest.approx(budget)
    assert costs.activation_bits(planned(dynamic=True, attention=8)) == 8
    whole = planned(dynamic=True, attention=8, activations=32)
    assert not [name for name in whole.activations if name.endswith(":softmax")]


def test_sensitivities_of_another_kind_are_refused():
    with pytest.raises(UserError, match="those of dynamic activations, and bit-allocation plans static ones"):
        planned(attention=8)
    with pytest.raises(UserError, match=r"no attention '.*' at 4 bits: measure them with sensitivity{activations=4}"):
        planned(dynamic=True, attention=4)
    with pytest.raises(UserError, match="must be 2 to 8, not 16"):
        BitAllocation(attention=16)


def test_a_table_holds_attentions_and_is_allocated_without_the_model():
    table = after("sensitivity").facts[SENSITIVITY] | describe(after("sensitivity"), dynamic=True)
    problem = pose.problem(table, None, 8.0)
    names = {layer["name"]: [c["name"] for c in layer["choices"]] for layer in problem["layers"]}
    for name in table["attention"]:
        assert names[name] == ["float", "u8"]


# --- the packed attention -----------------------------------------------------------------------------------


def test_attention_operands_are_codes_of_static_tables():
    program = after("fold-fake-quant")
    attentions = [n for n in program.graph.nodes if n.target is ops.quant_attention]
    assert len(attentions) == 4
    for node in attentions:
        assert all(x.target is ops.quantize for x in node.args[:3])
    sizes = shapes(program, 2)
    assert all(sizes[n.name].dtype == torch.float32 for n in attentions)


def test_printed():
    text = printer.text(after("fold-fake-quant"))
    assert "a u8/token" in text and "p u8/t3   a u8/t3" in text and "mpq::quant_attention(" in text
    rows = printer.table_of_layers(after("fuse-epilogues"))
    assert {r.activation for r in rows} == {"u8/t3", "u8/token"}
    text = printer.text(after("bit-allocation"))
    assert "p u8/t3   a u8/t3 // loss" in text.replace("  //", " //")


# --- the verifier -------------------------------------------------------------------------------------------

MUTANTS: list[tuple[str, str, Callable[[Program], Program | None]]] = []


def mutant(rule: str, name: str):
    def register(change: Callable[[Program], Program | None]):
        MUTANTS.append((rule, name, change))
        return change

    return register


def attention(program: Program) -> fx.Node:
    return next(n for n in program.graph.nodes if n.target in (*views.ATTENTIONS, ops.attention))


@mutant("activation-plans", "bit-allocation")
def _(program):
    del program.activations[attention(program).args[1].name]


@mutant("dynamic-activations", "bit-allocation")
def _(program):
    edge = attention(program).args[0].name
    program.activations[edge] = ActivationPlan(8, None, None, dynamic=True)


@mutant("dynamic-activations", "bit-allocation")
def _(program):
    edge, plan = next((e, p) for e, p in program.activations.items() if p.dynamic)
    program.activations[edge] = dataclasses.replace(plan, dynamic=False)


@mutant("activation-plans", "fold-fake-quant")
def _(program):
    first = next(n for n in program.graph.nodes if n.target is ops.dynamic_quantize)
    first.update_arg(1, 4)


@mutant("one-time-group", "fold-fake-quant")
def _(program):
    layer = next(n for n in program.graph.nodes if n.target is ops.quant_linear and n.args[1] is None)
    layer.update_arg(1, program.node("g"))


@mutant("one-time-group", "fold-fake-quant")
def _(program):
    group = program.node("g")
    with program.graph.inserting_after(group):
        second = program.graph.call_function(ops.time_group, group.args)
    attention(program).update_arg(3, second)


@mutant("operand-tables", "fold-fake-quant")
def _(program):
    """A layer reads the scales of the rows of another tensor."""
    layers = [n for n in program.graph.nodes if n.target is ops.quant_linear and n.args[1] is None]
    first, other = layers[-2:]
    assert first.args[0] is not other.args[0]
    other.update_arg(7, list(first.args[7]))


@mutant("operand-tables", "fold-fake-quant")
def _(program):
    """k is read with the tables of q."""
    node = attention(program)
    node.update_arg(6, node.args[4])
    node.update_arg(7, node.args[5])


@mutant("simulated-operands", "round-weights")
def _(program):
    """An attention reads an operand behind its quantizer too, which something else goes on reading."""
    node = attention(program)
    key = node.args[1]
    with program.graph.inserting_before(node):
        total = program.graph.call_function(aten.neg.default, (key,))
        again = program.graph.call_function(aten.neg.default, (total,))
    node.update_arg(1, again)


@pytest.mark.parametrize("index", range(len(MUTANTS)))
def test_rules_reject_their_mutants(index):
    rule, name, change = MUTANTS[index]
    program = after(name).fork()
    program = change(program) or program
    for node in reversed(list(program.graph.nodes)):
        if not node.users and node.op not in ("placeholder", "output"):
            program.graph.erase_node(node)
    found = check(program)
    assert {v.rule for v in found} == {rule}, "\n".join(map(str, found))


@pytest.mark.parametrize("model", MODELS)
def test_programs_of_the_compiler_break_no_rule(model):
    for step in programs.steps(model, pipeline(model)):
        assert check(step.after) == [], step.step.name()
