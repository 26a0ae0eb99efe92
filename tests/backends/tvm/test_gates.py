"""What products of GPUs compute themselves: gates behind them, and integers of 4 bits without a table."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mpq_compiler.backends.tvm import lowering
from mpq_compiler.backends.tvm.plan import gates, integers
from mpq_compiler.backends.tvm.plan.calls import Call, Lowered, Value
from mpq_compiler.backends.tvm.plan.verifier import verify
from tests.harness import packed


@pytest.fixture(scope="module")
def plan() -> Lowered:
    """Of a UNet with GEGLU, before what is for GPUs alone."""
    return lowering.lower(packed.program("sd15", "int4").program, (1, 2), hoisted=False)


def gated(plan: Lowered) -> int:
    """How many products have a gate, each with weights that lie for one."""
    verify(plan)
    made = {name: call for call in plan.preparation for _, name in call.results}
    products = [call for call in plan.functions[0].own if "gate" in dict(call.kernel.problem.fields)]
    for product in products:
        prepared = made[dict(product.operands)["tiles"]]
        assert prepared.kernel.problem.get("gate") == product.kernel.problem.get("gate")
    return len(products)


def gelus(plan: Lowered) -> list[Call]:
    return [call for call in plan.functions[0].own if "op=gelu" in str(call.kernel) and "Pointwise" in str(call.kernel)]


def test_products_compute_the_gates_behind_them(plan):
    after = gates.join(plan)
    count = len(gelus(plan))
    assert count > 1 and gated(after) == count and not gelus(after)
    assert len(plan.functions[0].own) - len(after.functions[0].own) == count
    (gate,) = {call.kernel.problem.get("gate") for call in after.preparation if "gate=" in str(call.kernel)}
    assert str(gate) == "Gate(first=False, op=gelu)"


def changed(plan: Lowered, *calls: Call, instead: Call | None = None, **values: Value) -> Lowered:
    """The plan with calls at its end, or the last of them in place of another."""
    (function,) = plan.functions
    own = [calls[-1] if call == instead else call for call in function.own]
    own += calls if instead is None else []
    return replace(plan, functions=(replace(function, own=tuple(own), made=(*function.made, *values.values())),))


def test_what_others_read_is_not_joined(plan):
    call = gelus(plan)[0]
    ((argument, result),) = call.results
    again = replace(call, results=((argument, "again"),))
    value = replace(plan.functions[0].values[result], name="again")
    assert gated(gates.join(changed(plan, again, again=value))) == len(gelus(plan)) - 1


def test_the_output_is_not_joined(plan):
    source = dict(gelus(plan)[0].operands)["x0"]
    (function,) = plan.functions
    output = replace(function.output, name=source)
    assert len(list(gates._joins(replace(function, output=output)))) == len(gelus(plan)) - 1


def test_weights_that_lie_for_a_gate_are_read_by_no_other_product(plan):
    source = dict(gelus(plan)[0].operands)["x0"]
    product = next(call for call in plan.functions[0].own if call.results[0][1] == source)
    value = replace(plan.functions[0].values[product.results[0][1]], name="again")
    again = replace(product, results=(("out", "again"),))
    assert gated(gates.join(changed(plan, again, again=value))) == len(gelus(plan)) - 1


@pytest.mark.parametrize("what", ["time groups", "square", "windows"])
def test_what_is_no_gate_of_its_halves_stays(plan, what):
    call = gelus(plan)[0]
    problem = call.kernel.problem
    gelu, mul, quantize = problem.get("steps")
    other = {
        "time groups": problem.replace(time_groups=problem.get("time_groups") + 1),
        "square": problem.replace(steps=(gelu, mul.replace(args=mul.get("args")[1:] * 2), quantize)),
        "windows": problem.replace(windows=problem.get("windows")[:1] * 2),
    }[what]
    kernel = replace(call.kernel, problem=other)
    assert gated(gates.join(changed(plan, replace(call, kernel=kernel), instead=call))) == len(gelus(plan)) - 1


def shifted(plan: Lowered) -> tuple[int, int]:
    """How many products, and how much of what `prepare` makes, are of integers."""
    verify(plan)
    found = [calls for calls in (plan.functions[0].own, plan.preparation)]
    products, prepared = (sum("integers=True" in str(call.kernel) for call in calls) for calls in found)
    return products, prepared


def test_integers_are_decoded_without_a_table(plan):
    after = integers.decode_by_shifts(plan)
    products, prepared = shifted(after)
    assert products >= prepared == len(plan.integers) > 10
    for call in (*after.functions[0].own, *after.preparation):
        if "integers=True" in str(call.kernel):
            assert "lut" not in {name for name, _ in (*call.operands, *call.results)}
    assert shifted(integers.decode_by_shifts(replace(plan, integers=frozenset()))) == (0, 0)


def test_sums_that_overflow_are_looked_up(plan):
    def longer(call: Call) -> Call:
        if call.kernel.template != "prepare":
            return call
        return replace(call, kernel=replace(call.kernel, problem=call.kernel.problem.replace(channels=65794)))

    assert shifted(integers.decode_by_shifts(replace(plan, preparation=tuple(map(longer, plan.preparation))))) == (0, 0)
