"""Products of one input that GPUs compute in one launch."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpq_compiler.backends.tvm import lowering
from mpq_compiler.backends.tvm.emit.walk import SelectKernels
from mpq_compiler.backends.tvm.plan import siblings, stages
from mpq_compiler.backends.tvm.plan.calls import Call, Lowered
from mpq_compiler.backends.tvm.plan.verifier import verify
from mpq_compiler.latency import kernel_schedule
from tests.harness import packed

FIRST = "mid_block_attentions_0_transformer_blocks_0_attn"


@pytest.fixture(scope="module")
def plan() -> Lowered:
    """Of a UNet with attention, before its products are joined."""
    before = [stage for stage in lowering.behind_selection(False, False) if not isinstance(stage, stages.FuseSiblings)]
    return lowering.run([SelectKernels(packed.program("sd15", "int4").program, (1, 2), ()), *before])


def products(plan: Lowered) -> list[Call]:
    return [call for call in plan.functions[0].own if call.kernel.template == "gemm"]


def together(plan: Lowered) -> list[list[str]]:
    """The results of products that are joined, each with the weights of its siblings, in their order."""
    verify(plan)
    made = {name: call for call in plan.preparation for _, name in call.results}
    found = []
    for call in products(plan):
        if len(call.results) > 1 and "siblings" in dict(call.kernel.problem.fields):
            maker = made[dict(call.operands)["tiles"]]
            assert len(maker.kernel.problem.get("siblings")) + 1 == len(call.results)
            assert maker.kernel.problem.get("outputs") == call.kernel.problem.get("outputs")
            found.append([name for _, name in call.results])
    return found


def named(plan: Lowered, name: str) -> Call:
    return next(call for call in products(plan) if any(name in result for _, result in call.results))


def test_queries_keys_and_values_are_one_launch(plan):
    after = siblings.multiply_together(plan)
    found = [[name.split("|")[0].removeprefix(FIRST) for name in names] for names in together(after)]
    assert ["1_to_q", "1_to_k", "1_to_v"] in found and ["2_to_k", "2_to_v"] in found
    assert any(len(names) > 2 and all("time_emb_proj" in name for name in names) for names in found)
    gone = sum(map(len, found)) - len(found)
    assert len(products(plan)) - len(products(after)) == gone > 5
    assert len(plan.preparation) - len(after.preparation) == gone


def test_weights_of_siblings_are_theirs_in_order(plan):
    after = siblings.multiply_together(plan)
    maker = next(
        call
        for call in after.preparation
        if ("tiles", dict(named(after, FIRST + "1_to_q").operands)["tiles"]) in call.results
    )
    operands, makers = dict(maker.operands), {name: call for call in plan.preparation for _, name in call.results}
    for i, which in enumerate("qkv"):
        own = makers[dict(named(plan, f"{FIRST}1_to_{which}").operands)["tiles"]]
        for argument, name in own.operands:
            assert operands[siblings.of_sibling(argument, i if argument != "act_zero" else 0)] == name


def test_each_has_its_epilogue(plan):
    """Attention in bfloat16 has its queries scaled, and all three rounded (`plan.rounding`)."""
    (function,), keys = plan.functions, named(plan, FIRST + "1_to_k")
    epilogue = keys.kernel.problem.get("epilogue").replace(rounded=True)
    kernel = replace(keys.kernel, problem=keys.kernel.problem.replace(epilogue=epilogue))
    own = [replace(call, kernel=kernel) if call == keys else call for call in function.own]
    after = siblings.multiply_together(replace(plan, functions=(replace(function, own=tuple(own)),)))
    problem = named(after, FIRST + "1_to_q").kernel.problem
    assert problem.get("siblings") == (epilogue, problem.get("epilogue"))


def test_the_schedule_knows_every_layer(plan):
    program, found = packed.program("sd15", "int4").program, []
    for of in (plan, siblings.multiply_together(plan)):
        calls = [
            {"node": call.node, "beside": call.beside, "kernel": call.kernel.name, "template": call.kernel.template}
            for call in of.functions[0].own
        ]
        rows = kernel_schedule.describe(program, calls)
        layers = kernel_schedule.by_layer(rows)
        of_layers = {layer: sum(kernel["macs"] for kernel in own["kernels"]) for layer, own in layers.items()}
        found.append((sum(row["macs"] for row in rows), of_layers))
    assert found[0] == found[1] and {*found[0][1]} == {*program.weights}


def test_the_last_call_of_a_node_has_its_multiplications():
    """What comes before makes ready what it reads, as fast attention does keys and values."""
    program = packed.program("sd15", "int4").program
    made = (node.name for node in program.graph.nodes if node.op.startswith("call"))
    attention = next(name for name in made if "scaled_dot_product" in name)
    calls = [{"node": attention, "kernel": kernel, "template": "fast_attention"} for kernel in ("ready", "products")]
    ready, products = kernel_schedule.describe(program, calls)
    assert not ready["macs"] and products["macs"]


@pytest.mark.parametrize("what", ["input", "groups", "epilogue", "outputs", "weights"])
def test_what_is_not_alike_stays_alone(plan, what):
    keys = named(plan, FIRST + "1_to_k")
    problem, operands = keys.kernel.problem, dict(keys.operands)
    full = problem.get("epilogue").replace(operands=("full",))
    other = {
        "input": replace(keys, operands=tuple((operands | {"x": "another"}).items())),
        "groups": replace(keys, kernel=replace(keys.kernel, problem=problem.replace(groups=7))),
        "epilogue": replace(keys, kernel=replace(keys.kernel, problem=problem.replace(epilogue=full))),
        "outputs": replace(keys, kernel=replace(keys.kernel, problem=problem.replace(outputs=96))),
        "weights": replace(keys, node="another", results=(("out", "again"),)),
    }[what]
    (function,) = plan.functions
    own = [*function.own, other] if what == "weights" else [other if call == keys else call for call in function.own]
    found = siblings.multiply_together(replace(plan, functions=(replace(function, own=tuple(own)),)))
    joined = [name.split("|")[0] for call in products(found) if len(call.results) > 1 for _, name in call.results]
    assert FIRST + "1_to_k" not in joined and FIRST + "2_to_k" in joined


def test_launches_of_many_are_of_equal_sizes(plan):
    keys = named(plan, FIRST + "2_to_k")
    maker = next(call for call in plan.preparation if ("tiles", dict(keys.operands)["tiles"]) in call.results)
    own, preparation = [], []
    for i in range(siblings.MOST + 1):
        copies = {name: f"{name}.{i}" for _, name in maker.results}
        preparation.append(replace(maker, results=tuple((a, copies[name]) for a, name in maker.results)))
        operands = tuple((a, copies.get(name, name)) for a, name in keys.operands)
        own.append(replace(keys, operands=operands, results=(("out", f"result.{i}"),)))
    (function,) = plan.functions
    many = replace(plan, preparation=(*plan.preparation, *preparation), functions=(replace(function, own=tuple(own)),))
    sizes = [len(call.results) for call in products(siblings.multiply_together(many))]
    assert sum(sizes) == siblings.MOST + 1 and max(sizes) - min(sizes) == 1
