"""Products of one input that a GPU computes in one launch: queries, keys and values, what time makes of every block.

Each by itself has too few tiles for all processors, and some take less than the launch. Their weights lie behind one
another, as those of one wide layer; results stay tensors of their own.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import BLOCK, of_sibling
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel, Lowered, Record

MOST = 8
"""Products of a launch: each is a case in the code that stores results."""
SHARED = ("x", "group", "act_scale", "act_zero")
"""What siblings read in common; their other operands are weights, as `prepare` lays them out."""


@dataclass(frozen=True)
class _Siblings:
    """Calls of products that may be one."""

    calls: tuple[Call, ...]

    @property
    def panels(self) -> tuple[str, ...]:
        """The values that stand for their weights as `prepare` lays them out."""
        return tuple(dict(call.operands)["tiles"] for call in self.calls)

    def joined(self) -> Call:
        """All of them as one call."""
        first, *rest = self.calls
        operands = tuple((a, name if a in SHARED else _beside(name)) for a, name in first.operands)
        results = tuple((of_sibling("out", i), call.results[0][1]) for i, call in enumerate(self.calls))
        kernel = _joined(first.kernel, [dict(call.kernel.problem.fields).get("epilogue") for call in rest])
        beside = tuple(call.node for call in rest)
        return replace(first, kernel=kernel, operands=operands, results=results, beside=beside)


def multiply_together(lowered: Lowered) -> Lowered:
    """Join products of one input, where all that read their weights can be joined so."""
    makers = {name: call for call in lowered.preparation for _, name in call.results}
    found = [list(_siblings(function, makers)) for function in lowered.functions]
    done = Counter(siblings.panels for own in found for siblings in own)
    reads = Counter(name for function in lowered.functions for call in function.calls for _, name in call.operands)
    wanted = {panels for panels, count in done.items() if all(reads[name] == count for name in panels)}
    preparation = (*lowered.preparation, *(_prepared([makers[name] for name in panels]) for panels in sorted(wanted)))

    def changed(function: Function, found: Sequence[_Siblings]) -> Function:
        replaced: dict[Call, list[Call]] = {}
        for siblings in found:
            if siblings.panels in wanted:
                first, *rest = siblings.calls
                replaced |= {first: [siblings.joined()], **{call: [] for call in rest}}
        return replace(function, own=tuple(new for call in function.own for new in replaced.get(call, [call])))

    functions = tuple(map(changed, lowered.functions, found))
    return replace(lowered, preparation=preparation, functions=functions).linked()


def _siblings(function: Function, makers: dict[str, Call]) -> Iterator[_Siblings]:
    """Products of a function that differ in weights and epilogues alone, in groups of equal sizes."""
    alike: dict[object, list[Call]] = defaultdict(list)
    for call in function.own:
        operands = dict(call.operands)
        maker = makers.get(operands.get("tiles", ""))
        if maker is not None and _fits(call):
            shared = tuple(operands.get(name) for name in SHARED)
            zeros = dict(maker.operands).get("act_zero")
            alike[shared, call.kernel.problem.replace(epilogue=None), maker.kernel, zeros].append(call)
    for calls in alike.values():
        launches = -(-len(calls) // MOST)
        for i in range(launches):
            part = calls[len(calls) * i // launches : len(calls) * (i + 1) // launches]
            if len(part) > 1:
                yield _Siblings(tuple(part))


def _fits(call: Call) -> bool:
    """Whether a call is a product whose results can be told apart, and whose epilogue reads nothing else."""
    problem = call.kernel.problem
    if problem.type != "problem.QuantMatmul" or call.into or len(call.results) != 1:
        return False
    fields = dict(problem.fields)
    epilogue: Record | None = fields.get("epilogue")
    plain = epilogue is None or not (
        epilogue.get("operands") or any(step.get("op") == "quantize" for step in epilogue.get("steps"))
    )
    return plain and not fields.get("gate") and fields["outputs"] % BLOCK == 0


def _prepared(calls: Sequence[Call]) -> Call:
    """The call that lays out the weights of several products behind one another."""
    first, *rest = calls
    theirs = [
        (of_sibling(argument, i), name)
        for i, call in enumerate(rest, 1)
        for argument, name in call.operands
        if argument not in SHARED
    ]
    results = tuple((argument, _beside(name)) for argument, name in first.results)
    kernel = _joined(first.kernel, [None] * len(rest))
    return replace(first, kernel=kernel, operands=(*first.operands, *theirs), results=results)


def _joined(kernel: Kernel, epilogues: Sequence[Record | None]) -> Kernel:
    """A kernel of products like that of another, with these epilogues."""
    problem = kernel.problem
    outputs = problem.get("outputs") * (1 + len(epilogues))
    return Kernel(kernel.template, problem.replace(outputs=outputs, siblings=tuple(epilogues)))


def _beside(name: str) -> str:
    """The name of what `prepare` makes for several products, by what it would make for the first."""
    return f"{name}|siblings"
