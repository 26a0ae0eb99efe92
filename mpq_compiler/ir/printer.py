"""Prints the textual IR: one node a line, stable and diffable; docs/ir.md says how to read it.

It has no times, addresses or memory, so a program gives the same text on every machine.
"""

from __future__ import annotations

import dataclasses
import inspect
import sys
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import formats
from mpq_compiler.ir import costs, ops, views
from mpq_compiler.ir.findings import ALLOCATION, ATTENTION_NUMERICS, NO_LOSSES, SENSITIVITY
from mpq_compiler.ir.graph import softmax
from mpq_compiler.ir.interpreter import shapes
from mpq_compiler.ir.program import NOTES, PARAMETERS, TIME_GROUPS, Program, Stage

NAME_WIDTH, CALL_WIDTH, TYPE_WIDTH = 48, 88, 18
"""The widths up to which columns are aligned; longer entries push the columns behind them."""
DTYPES = {
    torch.float32: "f32",
    torch.float16: "f16",
    torch.bfloat16: "bf16",
    torch.float64: "f64",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "bool",
}


# --- values -------------------------------------------------------------------------------------------------


def number(value: float) -> str:
    """Formats a number in two significant digits; short decimals stay as they are."""
    exact = repr(value)
    return exact if len(exact) <= 5 else f"{value:.1e}" if not 0.01 <= abs(value) < 100 else f"{value:.2g}"


def _dims(two: tuple[int, ...], three: tuple[int, ...]) -> str:
    """Formats sizes at batch 2 and 3 as one shape in terms of the batch B."""
    dims = []
    for a, b in zip(two, three, strict=True):
        dims.append(str(a) if a == b else "B" if a == 2 else f"{a // 2}B")
    return ",".join(dims)


def _type(two: Any, three: Any) -> str:
    if isinstance(two, Tensor):
        return f"{DTYPES[two.dtype]}[{_dims(tuple(two.shape), tuple(three.shape))}]"
    if isinstance(two, tuple | list):
        kinds = {_type(a, b) for a, b in zip(two, three, strict=True)}
        if len(kinds) == 1:
            return f"{len(two)} x {kinds.pop()}"
        return "(" + ", ".join(_type(a, b) for a, b in zip(two, three, strict=True)) + ")"
    return type(two).__name__


def _value(value: Any) -> str:
    """Formats an operand: %node, a stored tensor by name, or a literal."""
    if value == sys.maxsize:
        return "end"
    if isinstance(value, fx.Node):
        return views.stored(value) or f"%{value.name}"
    if isinstance(value, bool) or value is None:
        return str(value).lower()
    if isinstance(value, float):
        return number(value)
    if isinstance(value, torch.dtype):
        return DTYPES.get(value, str(value).removeprefix("torch."))
    if isinstance(value, tuple | list):
        return "[" + ",".join(_value(v) for v in value) + "]"
    return str(value)


def operator_name(target: Any) -> str:
    """The printed name of an operator: ``mpq::quantize``, ``aten.add`` without the overload, which operands show."""
    if target in ops.OPS:
        return ops.OPS[target].name
    if views.is_aten(target):
        return "aten." + str(target._schema.name).partition("::")[2]
    return str(getattr(target, "__name__", target))


def _operands(call: views.Call) -> list[str]:
    """The operands in order; for the compiler's own operators literals have names, and absent operands are left out."""
    if call.target not in ops.OPS:
        named = [f"{k}={_value(v)}" for k, v in call.kwargs.items()]
        return [*_joined([_value(a) for a in call.args]), *named]
    parameters = list(inspect.signature(call.target).parameters.values())
    values = dict(zip((p.name for p in parameters), call.args, strict=False)) | call.kwargs
    tensors, literals = [], []
    for p in parameters:
        value = values.get(p.name, p.default)
        if isinstance(value, tuple | list) and len(value) == 1 and isinstance(value[0], fx.Node):
            value = value[0]  # a table of one segment
        if isinstance(value, fx.Node) or (isinstance(value, tuple | list) and isinstance(value[0], fx.Node)):
            tensors.append(_value(value))
        elif value is not None and value != p.default:
            literals.append(f"{p.name}={_value(value)}")
    return [*_joined(tensors), *literals]


def _joined(operands: list[str]) -> list[str]:
    """Joins neighbours that are parts of one parameter: ``w:codes, w:scale`` becomes ``w:{codes,scale}``."""
    found: list[tuple[str, list[str]]] = []
    for operand in operands:
        base, colon, part = operand.partition(":")
        if colon and not operand.startswith("[") and found and found[-1][0] == base and found[-1][1]:
            found[-1][1].append(part)
        else:
            found.append((base, [part]) if colon and not operand.startswith("[") else (operand, []))
    return [b if not p else f"{b}:{p[0]}" if len(p) == 1 else f"{b}:{{{','.join(p)}}}" for b, p in found]


def expression(call: views.Call) -> str:
    """The right-hand side of a call's line.

    ``.weight`` is a parameter of the module that the call is named after, and ``:{scale,zero_point}`` are parts of the
    tensor that a quantizer reads.
    """
    operands = [_own(o, call.name) for o in _operands(call)]
    if call.target in views.QUANTIZERS:
        operands[1] = operands[1].removeprefix(operands[0].removeprefix("%"))
    return f"{operator_name(call.target)}({', '.join(operands)})"


def _own(operand: str, name: str) -> str:
    """Shortens ``conv_in.weight:ohwi`` to ``.weight:ohwi`` in a line of %conv_in or %conv_in_w."""
    path = operand.partition(":")[0].rpartition(".")[0]
    flat = path.replace(".", "_")
    own = path and operand[0] not in "%[" and (name == flat or name.startswith(flat + "_w"))
    return operand.removeprefix(path) if own else operand


# --- plans --------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class LayerRow:
    """The plan of one linear or conv2d call."""

    name: str
    """The call."""
    parameter: str
    weight: str
    """The name of the format, or "float"."""
    activation: str
    """The width and number of time groups, ``u8/t4``; ``u8/token``; or "float"."""
    bytes: int
    share: float
    """The share of all stored bytes."""
    loss: float | None
    """The measured relative noise power of the weight in this format."""
    fallback: str | None
    """The reason why the layer stays float."""


def stored_bytes(program: Program) -> int | None:
    """The payload bytes of a program, planned, simulated or packed; None before there is a plan."""
    if not program.weights:
        return None
    if program.stage == Stage.PLANNED:
        return costs.stored_bytes(program)
    flat = views.flatten(program)
    levels = views.levels_of(flat)
    parts = {name for found in levels for name in _parts(found)}
    for call in flat:
        if call.target is ops.binary_branch:
            parts |= {str(views.stored(a)) for a in call.args[:3]}
    read = {str(n.target) for n in program.graph.nodes if n.op == "get_attr"}
    floats = {name: program.tensors[name] for name in read - parts}
    floats = {name: tensor for name, tensor in floats.items() if not views.factor(name)}  # those of their format
    weights = {path: _weight_bytes(program, path) for path in {found.path for found in levels}}
    return sum(weights.values()) + sum(t.numel() * costs.stored_dtype(n, t).itemsize for n, t in floats.items())


def _parts(levels: views.Levels) -> Iterator[str]:
    for name in (levels.weight, levels.codes, *levels.tables.operands):
        if name is not None:
            yield name


def _weight_bytes(program: Program, path: str) -> int:
    shape = program.tensors[path].shape
    channels = int(shape[1])  # the weight of a convolution is [O, C, kh, kw] under its own name
    return formats.get(program.weights[path].format).stored_bytes(int(shape[0]), int(shape[2:].numel()), channels)


def table_of_layers(program: Program) -> list[LayerRow]:
    """A row for each linear and conv2d call of a program with a plan, in graph order."""
    flat = views.flatten(program)
    levels = {found.call.name: found for found in views.levels_of(flat)}
    quantizers = {q.call.name: q for q in views.quantizers_of(flat) if q.call.target not in views.ATTENTIONS}
    groups = len(program.facts[TIME_GROUPS]) + 1 if TIME_GROUPS in program.facts else 1
    total = stored_bytes(program) or 1
    losses = program.facts.get(SENSITIVITY, NO_LOSSES)["weights"]
    rows = []
    for call in flat:
        path = views.weight_path(call, levels)
        if path is None:
            continue
        x = getattr(views.made_by(call.args[0]), "name", "")
        edge = quantizers[x].edge if x in quantizers else x
        plan, activation = program.weights.get(path), program.activations.get(edge)
        shape = program.tensors[path].shape
        stored = _weight_bytes(program, path) if plan else 2 * shape.numel()
        rows.append(
            LayerRow(
                call.name,
                path,
                plan.format if plan else "float",
                activation.label(groups) if plan and activation else "float",
                stored,
                stored / total,
                losses.get(path, {}).get(plan.format) if plan else None,
                program.fallbacks.get(call.name) or program.fallbacks.get(path),
            )
        )
    return rows


def header(program: Program, pass_name: str = "") -> str:
    """The first line of a dump: stage, size and bytes of the program."""
    parts = [f"{program.stage} stage, {_count(program)}"]
    total = stored_bytes(program)
    if total is not None:
        parameters = program.facts[PARAMETERS]
        bits = costs.average_bits(total, parameters)
        parts.append(f"weights {bits:.2f} bit ({total} of {4 * parameters} bytes)")
        if program.activations:
            widths = [plan.bits for plan in program.activations.values()]
            planned = program.stage == Stage.PLANNED
            mean = costs.activation_bits(program) if planned else sum(widths) / len(widths)
            parts.append(f"activations {number(round(mean, 2))} bit")
        allocation = program.facts.get(ALLOCATION)
        if allocation:
            parts.append(f"predicted loss {allocation['objective']:.1e}")
            if program.stage == Stage.PLANNED and (together := allocation.get("additivity")):
                parts.append(f"{together['measured']:.1e} measured together")
    if program.fallbacks:
        parts.append(f"{len(program.fallbacks)} float leftovers")
    return f"// {pass_name + ': ' if pass_name else ''}{', '.join(parts)}"


def _count(program: Program) -> str:
    count = len(views.flatten(program))
    regions = f" in {len(program.regions)} regions and alone" if program.regions else ""
    return f"{count} calls{regions}"


# --- the program --------------------------------------------------------------------------------------------


def text(program: Program, pass_name: str = "") -> str:
    """Prints a program, with the plan at its layers and the reasons of float leftovers at the end."""
    two, three = shapes(program, 2), shapes(program, 3)
    types = {name: _type(two[name], three[name]) for name in two}
    notes = {row.name: _note(row) for row in table_of_layers(program)} if program.weights else {}
    notes |= _attention_notes(program) if program.activations else {}
    if not program.weights:  # with a plan, its own losses stand at the layers
        notes |= _measured_notes(program)
    if program.stage == Stage.PLANNED:  # later the calls say so themselves
        for name, kind in program.facts.get(ATTENTION_NUMERICS, {}).items():
            notes[name] = "  ".join(filter(None, (f"numerics {kind}", notes.get(name))))
    inputs = ", ".join(f"%{s.name} {DTYPES[s.dtype]}[{','.join(map(str, s.shape))}]" for s in program.inputs)
    output = program.graph.output_node().args[0]
    lines = [header(program, pass_name), f"graph {program.model}({inputs}) -> {_output_type(output, types)} {{"]
    body = list(_lines(program, types, notes))
    name_width = min(NAME_WIDTH, max((len(n) for _, n, *_ in body), default=0))
    call_width = min(CALL_WIDTH, max((len(c) for _, _, c, *_ in body), default=0))
    for indent, name, call, kind, note in body:
        width = name_width + 2 - len(indent)
        line = f"{indent}{name:{width}} = {call:{call_width}}  {kind:{TYPE_WIDTH}}  {note}" if call else indent + name
        lines.append(line.rstrip())
    lines.append(f"  return {_value(output)}")
    lines.append("}")
    for name, reason in sorted(program.fallbacks.items()):
        lines.append(f"// float: {name}: {reason}")
    lines += [f"// {notes[s.name].removeprefix('// ')} of %{s.name}" for s in program.inputs if s.name in notes]
    lines += [f"// note: {sentence}" for sentence in program.facts.get(NOTES, ())]
    return "\n".join(lines) + "\n"


def _output_type(output: Any, types: dict[str, str]) -> str:
    return types[output.name] if isinstance(output, fx.Node) else "(...)"


def _note(row: LayerRow) -> str:
    loss = "" if row.loss is None else f", loss {row.loss:.1e}"
    return f"w {row.weight:7} a {row.activation:6} // {100 * row.share:.1f} % of bytes{loss}"


def _attention_notes(program: Program) -> dict[str, str]:
    """The widths of attentions' probabilities and operands, ``p u8/t4 a u8/t4``, by call."""
    flat = views.flatten(program)
    quantizers = {q.call.name: q.edge for q in views.quantizers_of(flat)}
    groups = len(program.facts[TIME_GROUPS]) + 1
    losses = program.facts.get(SENSITIVITY, NO_LOSSES).get("attention", {})
    notes = {}
    for call in flat:
        plan = program.activations.get(softmax(call.name))
        if plan is None:
            continue
        names = [getattr(x, "name", "") for x in call.args[:3]]
        plans = [program.activations.get(quantizers.get(name, name)) for name in names]
        operands = "/".join(dict.fromkeys(p.label(groups) for p in plans if p))
        loss = losses.get(call.name, {}).get(str(plan.bits))
        note = f"p {plan.label(groups):7} a {operands:6}"
        notes[call.name] = note if loss is None else f"{note} // loss {loss:.1e}"
    return notes


def _measured_notes(program: Program) -> dict[str, str]:
    """``// loss w int2 6.6e-06, int4 4.4e-07; a 8 1.2e-08; p 8 3.1e-07``: what `sensitivity` has measured, by node.

    w: of a layer's weight in each format. a: of the value as an activation of so many bits. p: of an attention whose
    operands and probabilities have so many.
    """
    table = program.facts.get(SENSITIVITY)
    if table is None:
        return {}
    flat = views.flatten(program)
    levels = {found.call.name: found for found in views.levels_of(flat)}
    paths = {call.name: views.weight_path(call, levels) for call in flat}
    measured = [
        ("w", {name: table["weights"].get(path, {}) for name, path in paths.items() if path}),
        ("a", table["activations"]),
        ("p", table.get("attention", {})),
    ]
    notes: dict[str, list[str]] = {}
    for kind, losses in measured:
        for name, choices in losses.items():
            if choices:
                listed = ", ".join(f"{choice} {loss:.1e}" for choice, loss in choices.items())
                notes.setdefault(name, []).append(f"{kind} {listed}")
    return {name: f"// loss {'; '.join(parts)}" for name, parts in notes.items()}


def _lines(
    program: Program, types: dict[str, str], notes: dict[str, str]
) -> Iterator[tuple[str, str, str, str, str]]:
    """The lines of the body: indent, name, call, type and note of each."""
    flat = {call.name: call for call in views.flatten(program) if call.region is None}
    for node in program.graph.nodes:
        if node.op == "call_function":
            yield "  ", f"%{node.name}", expression(flat[node.name]), types[node.name], notes.get(node.name, "")
        elif node.op == "call_module":
            inner = list(views.inside(program, node))
            kinds = [operator_name(c.target).split("::")[-1].removeprefix("aten.") for c in inner]
            yield "  ", f"%{node.name}", f"{kinds[0]}[{', '.join(kinds[1:])}] {{", types[node.name], ""
            for call in inner:
                yield "    ", f"%{call.name}", expression(call), "", notes.get(call.name, "")
            yield "  ", "}", "", "", ""
