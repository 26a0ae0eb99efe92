"""The rules that every plan of kernel calls obeys, checked after each stage of the lowering.

A rule is a small generator of (node, what is wrong). Those of the order come first: where a value is missing the others
are not asked. What kernels take, their shapes and types, is checked where TVM is (`compile.signatures`).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from mpq_compiler.backends.tvm.plan.calls import Call, Lowered, Record, Value
from mpq_compiler.backends.tvm.plan.hoist import changes_with_steps
from mpq_compiler.ir.verifier import VerificationError, Violation

DTYPES = ("float32", "float16", "bfloat16", "int64", "int32", "int8", "uint16", "uint8")
"""Element types of values."""

Findings = Iterator[tuple[str, str]]


@dataclass(frozen=True)
class Scope:
    """Calls that run one after the other: those of `prepare`, of a part, of a function."""

    calls: Sequence[Call]
    given: frozenset[str]
    """Names of values that are known before the first call."""


def _scopes(plan: Lowered) -> Iterator[Scope]:
    yield Scope(plan.preparation, frozenset(value.name for value in plan.stored))
    prepared = frozenset(plan.prepared)
    for function in plan.functions:
        for part in function.parts:
            yield Scope(part.calls, prepared.union(value.name for value in part.inputs))
        yield Scope(function.own, prepared.union(value.name for value in function.arguments))


RULES: dict[str, Callable[[Lowered], Findings]] = {}
STRUCTURAL = ("order", "single-assignment", "values")
"""Rules that the others build on: those are checked where these find nothing."""


def _rule(name: str) -> Callable[[Callable[[Lowered], Findings]], Callable[[Lowered], Findings]]:
    def register(check: Callable[[Lowered], Findings]) -> Callable[[Lowered], Findings]:
        RULES[name] = check
        return check

    return register


@_rule("order")
def _order(plan: Lowered) -> Findings:
    """Operands are made before they are read."""
    for scope in _scopes(plan):
        known = set(scope.given)
        for call in scope.calls:
            for argument, name in call.operands:
                if name not in known:
                    yield call.node, f"'{argument}' reads '{name}', which nothing has made by then"
            known.update(name for _, name in call.results)
            if call.into:
                known.add(call.into)


@_rule("single-assignment")
def _single_assignment(plan: Lowered) -> Findings:
    """A value is made once, and takes no name of what is given."""
    for scope in _scopes(plan):
        made = Counter(name for call in scope.calls for _, name in call.results)
        for call in scope.calls:
            for _, name in call.results:
                if name in scope.given:
                    yield call.node, f"it makes '{name}', which is given"
                elif made[name] > 1:
                    yield call.node, f"'{name}' is made {made[name]} times"


@_rule("values")
def _values(plan: Lowered) -> Findings:
    """The shape and the element type of every value are known, and only the first dimension can be the batch."""
    for function in plan.functions:
        values = function.values
        for call in function.calls:
            for name in [call.into] if call.into else [name for _, name in call.results]:
                value = values.get(name)
                if value is None:
                    yield call.node, f"nothing is known of '{name}'"
                elif not all(isinstance(extent, int) and extent > 0 for extent in value.shape[value.batched :]):
                    yield call.node, f"'{name}' has the shape {list(value.shape)}"
                elif value.dtype not in DTYPES:
                    yield call.node, f"'{name}' is of the type {value.dtype}"


@_rule("arguments")
def _arguments(plan: Lowered) -> Findings:
    """A call names each argument of its kernel once, and makes something."""
    for call in plan.calls():
        names = Counter(argument for argument, _ in (*call.operands, *call.results))
        twice = [argument for argument, count in names.items() if count > 1]
        if twice:
            yield call.node, f"the argument '{twice[0]}' is given {names[twice[0]]} times"
        if not call.results:
            yield call.node, "it makes nothing"


@_rule("output")
def _output(plan: Lowered) -> Findings:
    """The denoiser's output is made by the step, f32 of every sample."""
    for function in plan.functions:
        output = function.output
        made = function.values.get(output.name)
        if not any(output.name in (call.into, *(name for _, name in call.results)) for call in function.own):
            yield output.name, "it is the output, and no call of the step makes it"
        elif made is not None and (output.dtype, output.size, output.batched) != ("float32", made.size, made.batched):
            yield output.name, f"it is made as {made.dtype} {list(made.shape)}, and put out as {list(output.shape)}"


@_rule("prepared")
def _prepared(plan: Lowered) -> Findings:
    """`prepare` makes what functions read, and nothing else."""
    if plan != plan.linked():
        expected = plan.linked().prepared
        missing = [name for name in expected if name not in plan.prepared]
        more = [name for name in plan.prepared if name not in expected]
        what = f"'{missing[0]}' is read" if missing else f"'{more[0]}' is not read" if more else "the order differs"
        yield "prepare", f"it does not make what functions read: {what}"


@_rule("parts")
def _parts(plan: Lowered) -> Findings:
    """A part reads no latents, only inputs and results of parts before it, and yields rows of samples that it made."""
    for function in plan.functions:
        known = {value.name for i, value in enumerate(function.inputs) if not changes_with_steps(i, value)}
        for part in function.parts:
            for value in part.inputs:
                if value.name not in known:
                    yield part.name, f"it reads '{value.name}', which hangs on the latents or comes later"
            made = {name for call in part.calls for _, name in call.results}
            for value in part.outputs:
                if value.name not in made or not value.batched:
                    yield part.name, f"'{value.name}' is no row of each sample that it makes"
            known |= {value.name for value in part.outputs}


@_rule("in-place")
def _in_place(plan: Lowered) -> Findings:
    """A concatenation that is written in place has every element written once, before anything reads it."""
    for function in plan.functions:
        values = function.values
        for calls in (*(part.calls for part in function.parts), function.own):
            for joined in dict.fromkeys(call.into for call in calls if call.into):
                writers = [i for i, call in enumerate(calls) if call.into == joined]
                readers = [i for i, call in enumerate(calls) if any(name == joined for _, name in call.operands)]
                makers = [call for call in calls if any(name == joined for _, name in call.results)]
                if makers:
                    yield joined, f"'{makers[0].node}' makes it whole, and others write parts of it"
                if readers and min(readers) < max(writers):
                    yield joined, f"'{calls[min(readers)].node}' reads it before '{calls[max(writers)].node}' writes it"
                parts = {name for i in writers for _, name in calls[i].results}
                if read := [name for call in calls for _, name in call.operands if name in parts]:
                    yield joined, f"'{read[0]}' is a part of it, and is read as a value of its own"
                written = np.zeros(values[joined].size, np.int64)
                for i in writers:
                    places = _places(calls[i], values)
                    if places.size and not 0 <= places.min() <= places.max() < written.size:
                        yield joined, f"'{calls[i].node}' writes beyond its {written.size} elements"
                        break
                    np.add.at(written, places, 1)
                else:
                    if (written != 1).any():
                        first = int(np.flatnonzero(written != 1)[0])
                        yield joined, f"element {first} of a sample is written {int(written[first])} times"


def _places(call: Call, values: dict[str, Value]) -> np.ndarray:
    """The elements of a sample that a call writes of the value into which it writes."""
    fields = dict(call.kernel.problem.fields)
    if "copies" in fields:
        return np.concatenate([np.zeros(0, np.int64), *map(_copied, fields["copies"])])
    _, offset, row = fields["into"]
    width = fields.get("outputs") or fields["channels"]
    ((_, name),) = call.results
    rows = values[name.split("|")[0]].size // width
    places: np.ndarray = offset + np.arange(rows)[:, None] * row + np.arange(width)
    return places.reshape(-1)


def _copied(copy: Record) -> np.ndarray:
    fields = {"target_offset": 0, **dict(copy.fields)}
    places = np.full((), fields["target_offset"], np.int64)
    for extent, stride in zip(fields["extents"], fields["target_strides"], strict=True):
        places = places[..., None] + np.arange(extent) * stride
    return places.reshape(-1)


@_rule("specializations")
def _specializations(plan: Lowered) -> Findings:
    """Functions and parts have names of their own, and batches of at least one sample."""
    names = Counter(f.name(batch) for f in plan.functions for batch in f.batches)
    for function in plan.functions:
        if not function.batches or min(function.batches) < 1:
            yield function.output.name, f"its batch sizes are {list(function.batches)}"
    yield from ((name, f"there are {count} functions of that name") for name, count in names.items() if count > 1)
    parts: dict[str, object] = {}
    for function in plan.functions:
        for part in function.parts:
            if parts.setdefault(part.name, part) != part:
                yield part.name, "two parts have that name"


def check(plan: Lowered, rules: Iterable[str] | None = None) -> list[Violation]:
    """Everything that is wrong with the plan, in the order of the rules (all of them, or the named ones)."""
    chosen = [name for name in RULES if rules is None or name in rules]
    found: list[Violation] = []
    for structural in (True, False):
        for name in chosen:
            if (name in STRUCTURAL) == structural:
                found += [Violation(name, node, what) for node, what in RULES[name](plan)]
        if found:
            break
    return found


def verify(plan: Lowered, after: str = "") -> None:
    """Raises VerificationError with the first violation; ``after`` names the stage that made the plan."""
    if found := check(plan):
        more = f" (and {len(found) - 1} more)" if len(found) > 1 else ""
        where = f" after stage '{after}'" if after else ""
        raise VerificationError(f"{found[0]}{where}{more}; this is a fault of the compiler, please report it")
