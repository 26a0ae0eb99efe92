"""A plan of kernel calls as text: one call a line, stable and diffable; docs/ir.md says how to read it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mpq_compiler.backends.tvm.plan.calls import Call, Function, Lowered, Record, Value

NAME_WIDTH, CALL_WIDTH, TYPE_WIDTH = 48, 88, 18
"""Widest columns that are aligned; longer entries push what follows."""
SHORT = {"float32": "f32", "float16": "f16", "int64": "i64", "int32": "i32", "int8": "i8", "uint8": "u8",
         "uint16": "bf16"}  # fmt: skip

Line = tuple[str, str, str, str]
"""Results, call, type, problem of the kernel."""


def text(plan: Lowered, stage: str = "") -> str:
    """The plan: `prepare`, then of each function its parts and its own calls, each with the kernel's problem."""
    count = sum(len(function.own) for function in plan.functions) + sum(len(p.calls) for p in plan.parts().values())
    said = f"lowered stage, {count} kernel calls and {len(plan.preparation)} to prepare, {len(plan.kernels())} kernels"
    lines = [f"// {stage + ': ' if stage else ''}{said}"]
    lines += _block("prepare() {", [_line(call, {}, frozenset()) for call in plan.preparation])
    prepared = frozenset(plan.prepared)
    printed: set[str] = set()
    for function in plan.functions:
        for part in function.parts:
            if part.name not in printed:
                head = f"{part.name}({_signature(part.inputs)}) -> {_signature(part.outputs)} {{"
                lines += _block(head, list(_lines(part.calls, function, prepared)))
                printed.add(part.name)
        batches = "/".join(map(str, function.batches))
        head = f"denoise{function.suffix}({_signature(function.arguments)}) -> {_signature([function.output])} {{"
        lines += _block(head, list(_lines(function.own, function, prepared)), f"  // batches of {batches}")
    return "\n".join(lines) + "\n"


def _block(head: str, lines: Sequence[Line], note: str = "") -> Iterator[str]:
    yield head + note
    names = min(NAME_WIDTH, max((len(name) for name, *_ in lines), default=0))
    calls = min(CALL_WIDTH, max((len(call) for _, call, *_ in lines), default=0))
    for name, call, kind, problem in lines:
        yield f"  {name:{names}} = {call:{calls}}  {kind:{TYPE_WIDTH}}  {problem}".rstrip()
    yield "}"


def _lines(calls: Sequence[Call], function: Function, static: frozenset[str]) -> Iterator[Line]:
    values = function.values
    for call in calls:
        yield _line(call, values, static)


def _line(call: Call, values: Mapping[str, Value], static: frozenset[str]) -> Line:
    results = [f"%{name}" if values else _own(name, call.node) for _, name in call.results]
    if call.into:
        results = [f"%{call.into}[..]"]
    operands: dict[str, list[str]] = {}
    for argument, name in call.operands:
        kept = not values or name in static
        operands.setdefault(_own(name, call.node) if kept else f"%{name}", []).append(argument)
    given = ", ".join(f"{'/'.join(arguments)}={name}" for name, arguments in operands.items())
    made = [call.into] if call.into else [name for _, name in call.results]
    kinds = dict.fromkeys(_type(values[name]) for name in made if name in values)
    template = call.kernel.template
    return ", ".join(results), f"{template}({given})", ", ".join(kinds), _problem(call.kernel.problem)


def _own(name: str, node: str) -> str:
    """``conv_in|tiles`` as ``|tiles`` in a line of the node conv_in."""
    return name.removeprefix(node) if name.startswith(f"{node}|") else name


def _signature(values: Sequence[Value]) -> str:
    return ", ".join(f"%{value.name} {_type(value)}" for value in values)


def _type(value: Value) -> str:
    return f"{SHORT.get(value.dtype, value.dtype)}[{','.join(map(str, value.shape))}]"


def _problem(value: Any) -> str:
    """A record without what is absent, empty or false."""
    if isinstance(value, Record):
        present = [(name, field) for name, field in value.fields if field not in (None, ()) and field is not False]
        fields = [f"{name}={_problem(field)}" for name, field in present]
        return f"{value.type.rsplit('.', 1)[-1]}({', '.join(fields)})"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_problem, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)
