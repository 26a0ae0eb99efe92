"""Values that a GPU reads in bfloat16: they are stored so, by what makes them where nothing else reads them.

Attentions in bfloat16 round queries, keys and values, products in bfloat16 round activations: each value once, where it
is made, for half of the bytes. Queries are multiplied by the factor of their scores before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from mpq_compiler.backends.tvm.kernels.problems.argument import ROUNDED
from mpq_compiler.backends.tvm.kernels.problems.fast_attention import query_factor
from mpq_compiler.backends.tvm.plan.calls import BATCH, Call, Function, Kernel, Record, Value, record
from mpq_compiler.targets.numerics import BF16


@dataclass(frozen=True)
class _Wish:
    """A value to be had in bfloat16.

    width:  of its rows, 0 where any will do; behind those of an odd width stands a zero
    factor: by which it is multiplied before
    """

    name: str
    width: int = 0
    factor: float | None = None

    @property
    def even(self) -> bool:
        """Whether values lie in bfloat16 as they lie in float32."""
        return self.width % 2 == 0

    @property
    def rounded(self) -> str:
        """The name of the value in bfloat16."""
        return f"{self.name}|{'rounded' if self.factor is None else 'scaled'}"


def round_where_made(function: Function) -> Function:
    """Let everything that rounds what it reads read what is rounded."""
    calls, wishes = _without_ready(function.own), Counter[_Wish]()
    for call in calls:
        wishes.update(wish for _, wish in _wishes(call))
    reads = Counter(name for call in calls for _, name in call.operands) + Counter([function.output.name])
    alone = {wish.name: wish for wish, count in wishes.items() if count == reads[wish.name]}
    values = {value.name: value for value in (*function.inputs, *function.made)}
    own: list[Call] = []
    known: dict[_Wish, None] = {}
    for call in calls:
        granted = dict(_wishes(call))
        for wish in dict.fromkeys(granted.values()):
            if wish not in known:
                own.append(_rounding(wish, values[wish.name], call.node))
                known[wish] = None
        operands = tuple((a, granted[a].rounded if a in granted else name) for a, name in call.operands)
        changed = replace(call, operands=operands)
        for _, name in call.results:
            own_wish = alone.get(name)
            if own_wish and own_wish.even and (stored := _storing(changed, own_wish)) is not None:
                changed = stored
                known[own_wish] = None
        own.append(changed)
    for wish in known:
        value = values[wish.name]
        shape = value.shape if wish.even else (BATCH, value.size // wish.width, wish.width + 1)
        values[wish.rounded] = Value(wish.rounded, shape, ROUNDED)
    made = {name for call in own for name in (call.into, *(name for _, name in call.results))}
    return replace(function, own=tuple(own), made=tuple(value for name, value in values.items() if name in made))


def _without_ready(calls: tuple[Call, ...]) -> list[Call]:
    """The calls without those that make keys and values ready: attentions read these themselves."""
    ready = {name: call for call in calls if _is_ready(call) for _, name in call.results}
    found = []
    for call in calls:
        operands = dict(call.operands)
        made = ready.get(operands.pop("packed_k", ""))
        if made is not None:
            del operands["packed_v"]
            call = replace(call, operands=(*operands.items(), *made.operands))
        if not _is_ready(call):
            found.append(call)
    return found


def _is_ready(call: Call) -> bool:
    return call.kernel.problem.type == "fast_attention.Ready" and call.kernel.numerics == BF16


def _wishes(call: Call) -> Iterator[tuple[str, _Wish]]:
    """The operands of a call that it reads in bfloat16, by its arguments."""
    problem, operands, template = call.kernel.problem, dict(call.operands), call.kernel.template
    if problem.type == "fast_attention.FastAttention" and call.kernel.numerics == BF16:
        dim = problem.get("dim")
        yield "q", _Wish(operands["q"], dim, query_factor(problem.get("scale"), dim))
        yield from ((name, _Wish(operands[name], dim)) for name in ("k", "v"))
    elif template == "weight_only" or (template == "float_gemm" and call.kernel.numerics == BF16):
        yield "x", _Wish(operands["x"])


def _rounding(wish: _Wish, value: Value, node: str) -> Call:
    """The call that rounds a value."""
    width = wish.width or value.size
    pitch = width if wish.even else width + 1
    problem = record("rounding.Rounding", rows=value.size // width, width=width, pitch=pitch, factor=wish.factor)
    return Call(Kernel("rounding", problem), (("x", wish.name),), (("y", wish.rounded),), node)


def _storing(call: Call, wish: _Wish) -> Call | None:
    """The call with the value as its result in bfloat16; None where its kernel has other results, or cannot."""
    if call.into or len(call.results) != 1:
        return None
    problem = _stored(call.kernel.problem, wish.factor)
    if problem is None:
        return None
    ((argument, _),) = call.results
    return replace(call, kernel=Kernel(call.kernel.template, problem), results=((argument, wish.rounded),))


def _stored(problem: Record, factor: float | None) -> Record | None:
    """A problem whose result is multiplied, and stored in bfloat16; None where there is no such problem."""
    fields: dict[str, Any] = dict(problem.fields)
    if problem.type == "dequantize.WeightOnly":
        product = _stored(problem.get("product"), factor)
        return None if product is None else problem.replace(product=product)
    if problem.type == "pointwise.PointwiseProgram":
        if fields.get("dtype", "float32") != "float32":
            return None
        steps = fields["steps"]
        if factor is not None:
            last = record("pointwise.Result", index=len(steps) - 1)
            steps = (*steps, record("pointwise.PointwiseStep", op="mul", args=(last, factor), value=None))
        return problem.replace(steps=steps, dtype="bfloat16")
    epilogue = fields.get("epilogue")
    if epilogue is None:
        return None
    steps = epilogue.get("steps")
    if factor is not None:
        steps = (*steps, record("epilogue.Step", op="mul", value=factor))
    return problem.replace(epilogue=epilogue.replace(steps=steps, rounded=True))
