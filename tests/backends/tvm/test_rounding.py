"""What a GPU reads in bfloat16 is stored so where it is made: attentions' operands, and products' activations."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest

from mpq_compiler.backends.tvm import lowering
from mpq_compiler.backends.tvm.compile import signatures
from mpq_compiler.backends.tvm.plan import printer
from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Function, Kernel, Lowered, Value, record
from mpq_compiler.backends.tvm.plan.rounding import round_where_made
from mpq_compiler.backends.tvm.plan.verifier import verify
from mpq_compiler.backends.tvm.plan.weight_only import keep_codes
from mpq_compiler.targets.numerics import BF16, ready_shapes
from mpq_compiler.targets.table import TARGETS
from tests.harness import packed, programs


@pytest.fixture(scope="module")
def plan() -> Lowered:
    """Of a UNet with a text whose attentions are in bfloat16, before what is rounded is stored so."""
    plan = lowering.lower(packed.program("sd15", "int8").program, (1, 2), hoisted=False)
    (function,) = plan.functions
    own, made = [], []
    for call in function.own:
        problem, operands = call.kernel.problem, dict(call.operands)
        if problem.type == "attention.Attention":
            sizes = {name: problem.get(name) for name in ("keys", "heads", "dim")}
            ready = Kernel("fast_attention", record("fast_attention.Ready", numerics=BF16, **sizes))
            values = {
                name: Value(f"{call.node}|{name}", (BATCH, *shape), dtype)
                for name, (shape, dtype) in ready_shapes(BF16, *sizes.values()).items()
            }
            results = {name: value.name for name, value in values.items()}
            own.append(Call(ready, tuple((a, operands.pop(a)) for a in "kv"), tuple(results.items()), call.node))
            fast = record("fast_attention.FastAttention", numerics=BF16, **dict(problem.fields))
            call = replace(call, kernel=Kernel("fast_attention", fast), operands=(*(operands | results).items(),))
            made += values.values()
        own.append(call)
    assert len(made) > 4
    return replace(plan, functions=(replace(function, own=tuple(own), made=(*function.made, *made)),))


def changed(plan: Lowered) -> Function:
    """The function after the stage; kernels take and yield what the plan has."""
    after = replace(plan, functions=tuple(map(round_where_made, plan.functions)))
    verify(after)
    assert not signatures.check(after, TARGETS["cuda-sm90"])
    (function,) = after.functions
    return function


def kinds(function: Function) -> Counter[str]:
    """How many calls there are of each type of problem."""
    return Counter(call.kernel.problem.type for call in function.own)


def attentions(function: Function) -> list[Call]:
    return [call for call in function.own if call.kernel.problem.type == "fast_attention.FastAttention"]


def test_products_store_what_attentions_read(plan):
    after, (before,) = changed(plan), plan.functions
    assert kinds(before)["fast_attention.Ready"] and not kinds(after)["fast_attention.Ready"]
    assert not kinds(after)["rounding.Rounding"]
    makers = {name: call for call in after.own for _, name in call.results}
    for call in attentions(after):
        for argument in "qkv":
            epilogue = makers[dict(call.operands)[argument]].kernel.problem.get("epilogue")
            assert epilogue.get("rounded")
            assert [step.get("op") for step in epilogue.get("steps")] == (["mul"] if argument == "q" else [])
    assert "bf16[B," in printer.text(replace(plan, functions=(after,)))


def test_what_others_read_stays_and_is_rounded_beside(plan):
    (before,) = plan.functions
    call = next(c for c in before.own if c.kernel.problem.type == "fast_attention.Ready")
    key, query = dict(call.operands)["k"], dict(attentions(before)[0].operands)["q"]
    for name in (key, query):
        after = changed(replace(plan, functions=(_with_reader(before, name),)))
        (rounding,) = (c for c in after.own if c.kernel.problem.type == "rounding.Rounding")
        assert rounding.operands == (("x", name),) and name in {n for c in after.own for _, n in c.results}
        assert (rounding.kernel.problem.get("factor") is None) == (name == key)


def _with_reader(function: Function, name: str) -> Function:
    """The function with another call at its end that reads a value; nothing reads what it makes."""
    size = function.values[name].size
    call = next(
        c for c in function.own
        if c.kernel.problem.type == "norms.LayerNorm" and function.values[dict(c.results)["y"]].size == size
    )  # fmt: skip
    made = function.values[dict(call.results)["y"]]
    again = replace(made, name=f"{made.name}|again")
    operands = tuple((a, name if a == "x" else n) for a, n in call.operands)
    more = replace(call, operands=operands, results=(("y", again.name),))
    return replace(function, own=(*function.own, more), made=(*function.made, again))


def test_one_tensor_for_queries_and_keys(plan):
    """It is rounded twice, once by way of the factor."""
    (before,) = plan.functions
    own = next(c for c in attentions(before) if c.kernel.problem.get("queries") == c.kernel.problem.get("keys"))
    query = dict(own.operands)["q"]
    packed_k = dict(own.operands)["packed_k"]
    calls = [
        replace(c, operands=(("k", query), ("v", query))) if packed_k in {n for _, n in c.results} else c
        for c in before.own
    ]
    after = changed(replace(plan, functions=(replace(before, own=tuple(calls)),)))
    roundings = [c for c in after.own if c.kernel.problem.type == "rounding.Rounding"]
    assert [(c.operands[0][1], c.kernel.problem.get("factor") is None) for c in roundings] in (
        [(query, False), (query, True)], [(query, True), (query, False)],
    )  # fmt: skip


def test_products_in_bfloat16_read_what_norms_and_products_round():
    program, _ = programs.bfloat16_layers()
    after = changed(keep_codes(lowering.lower(program, (1, 2), hoisted=False)))
    assert kinds(after)["rounding.Rounding"] == 1  # the input's
    stored = [c for c in after.own if "rounded=True" in str(c.kernel)]
    assert len(stored) == 3 and after.values[after.output.name].dtype == "float32"
