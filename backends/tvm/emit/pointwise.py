"""Emits pointwise calls: as kernels of their own, and as epilogues of the kernel that computes their operand."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from mpq_compiler.backends.tvm.emit.emitter import Emitter, Epilogue, Formula
from mpq_compiler.backends.tvm.plan.calls import Kernel, Record, Shape, Value, record
from mpq_compiler.ir import ops
from mpq_compiler.ir.aten import MOVEMENT, aten
from mpq_compiler.ir.editor import bound
from mpq_compiler.ir.graph import arguments, operand

UNARY: dict[Any, str] = {
    aten.silu.default: "silu",
    aten.sigmoid.default: "sigmoid",
    aten.tanh.default: "tanh",
    aten.relu.default: "relu",
    aten.exp.default: "exp",
    aten.log.default: "log",
    aten.sin.default: "sin",
    aten.cos.default: "cos",
    aten.sqrt.default: "sqrt",
    aten.rsqrt.default: "rsqrt",
    aten.neg.default: "neg",
    aten.square.default: "square",
}

BINARY: dict[Any, str] = {
    aten.add.Tensor: "add",
    aten.add.Scalar: "add",
    aten.sub.Tensor: "sub",
    aten.sub.Scalar: "sub",
    aten.rsub.Tensor: "rsub",
    aten.rsub.Scalar: "rsub",
    aten.mul.Tensor: "mul",
    aten.mul.Scalar: "mul",
    aten.div.Tensor: "div",
    aten.div.Scalar: "div",
    aten.maximum.default: "maximum",
    aten.minimum.default: "minimum",
    **{
        getattr(getattr(aten, name), overload): name
        for name in ("eq", "ne", "lt", "le", "gt", "ge")
        for overload in ("Tensor", "Scalar")
    },
}

WHERE = (aten.where.self, aten.where.ScalarSelf, aten.where.ScalarOther, aten.where.Scalar)

ALONE = (*WHERE, *(target for target, name in BINARY.items() if name in ("eq", "ne", "lt", "le", "gt", "ge")))
"""Calls that make or read truth values, which kernels hold as float32 1 and 0; they are never part of a region."""

SWAPPED = {"sub": "rsub", "rsub": "sub", "div": "rdiv", "rdiv": "div"}


@dataclass(frozen=True)
class _Earlier:
    """The result of operation `index` of the same call."""

    index: int


Operation = tuple[str, tuple[Any, ...]]
"""The name of a function of `vmath`, and its operands: nodes, numbers and results of earlier operations."""


def operations(e: Emitter, node: fx.Node) -> list[Operation]:
    """Translates a pointwise call to operations of `vmath`. UserError: no operations express it."""
    target, args, kwargs = node.target, arguments(node), dict(node.kwargs)
    if target in UNARY:
        return [(UNARY[target], (args[0],))]
    if target is aten.gelu.default:
        approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
        return [("gelu_tanh" if approximate == "tanh" else "gelu", (args[0],))]
    if target in (aten.to.dtype, aten._to_copy.default):
        if e.two[node.name].dtype == torch.bool:
            return [("ne", (args[0], 0.0))]
        if e.two[node.name].dtype != torch.float32:
            raise e.refusal(f"it converts to {e.dtype(node)}, and kernels compute in float32")
        return [("cast", (args[0],))]
    if target in WHERE:
        return [("where", args)]
    if target is aten.abs.default:
        return [("neg", (args[0],)), ("maximum", (args[0], _Earlier(0)))]
    if target is aten.clamp.default:
        _, low, high = bound(node, None, None, None)
        least: list[Operation] = [] if low is None else [("maximum", (args[0], low))]
        return least if high is None else [*least, ("minimum", (_Earlier(0) if least else args[0], high))]
    if target is aten.pow.Tensor_Scalar:
        return _power(e, args[0], float(args[1]))
    if target in BINARY:
        op, (left, right) = BINARY[target], args[:2]
        alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
        if alpha == 1:
            return [(op, (left, right))]
        scaled = left if op == "rsub" else right
        operands = (_Earlier(0), right) if op == "rsub" else (left, _Earlier(0))
        return [("mul", (scaled, alpha)), (op, operands)]
    raise e.refusal(f"{ops.name_of(target)} has no pointwise kernel")


def _power(e: Emitter, x: Any, exponent: float) -> list[Operation]:
    powers: dict[float, list[Operation]] = {
        1.0: [("mul", (x, 1.0))],
        2.0: [("square", (x,))],
        3.0: [("square", (x,)), ("mul", (_Earlier(0), x))],
        0.5: [("sqrt", (x,))],
        -0.5: [("rsqrt", (x,))],
        -1.0: [("rdiv", (x, 1.0))],
    }
    if exponent not in powers:
        raise e.refusal(f"a power of {exponent} has no kernel")
    return powers[exponent]


# ------------------------------------------------------------------------------------------------- kernels


def kernel(e: Emitter, members: list[fx.Node]) -> Value:
    """Emits pointwise calls that read one another as one kernel, or as several where the shape changes between them."""
    cut = next((i for i, m in enumerate(members) if m.target in MOVEMENT), None)
    if cut is not None:
        before = kernel(e, members[:cut]) if cut else e.value(members[0].args[0])
        e.values[members[cut]] = Value(before.name, e.shape(members[cut]), before.dtype)
        return kernel(e, members[cut + 1 :]) if cut + 1 < len(members) else e.values[members[cut]]
    last = members[-1]
    formula = Formula(e.shape(last))
    quantizer: dict[str, Value] = {}
    known: dict[Any, Any] = {}

    def read(operand: Any) -> Any:
        if not isinstance(operand, fx.Node):
            return float(operand)
        if operand not in known:
            other = _only_read_here(e, operand, formula.shape)
            known[operand] = formula.include(other) if other else formula.read(e.value(operand))
        return known[operand]

    for member in members:
        if member.target is ops.quantize:
            quantizer = e.quantizer(member)
            formula.step("quantize", read(member.args[0]), value=int(arguments(member)[4]))
            continue
        if e.two[member.name].dtype not in (torch.float32, torch.bool):
            raise e.refusal("it computes on integers, and kernels compute in float32")
        own: list[Any] = []
        for op, operands in operations(e, member):
            own.append(formula.step(op, *(own[o.index] if isinstance(o, _Earlier) else read(o) for o in operands)))
        known[member] = own[-1]
    return run(e, formula, quantizer, e.task.node.name if last is e.task.members[-1] else last.name)


def _only_read_here(e: Emitter, node: fx.Node, shape: Shape) -> Formula | None:
    """The formula of a node's value, where a pointwise kernel of this shape computes it for this reader alone."""
    value = e.value(node)
    formula = e.formulas.get(value.name)
    node = e.task.outer.get(node, node)
    while len(node.users) == 1 and node.target in MOVEMENT:
        node = operand(node, 0)
    only = len(node.users) == 1 and formula is not None and formula.shape == value.shape == shape
    return formula if only else None


def alone(e: Emitter, node: fx.Node) -> Value:
    """Emits a single pointwise call as a kernel."""
    return kernel(e, [node])


def run(e: Emitter, formula: Formula, quantizer: dict[str, Value], name: str) -> Value:
    """Emits a formula as a pointwise kernel; inputs that are views are read in place.

    Args:
        e: the emitter.
        formula: what is computed.
        quantizer: the operands of the quantizer at the end; empty without one.
        name: of the result.
    """
    shapes = [e.broadcast(value, formula.shape) for value in formula.inputs]
    views = [e.view(Value(v.name, s, v.dtype)) for v, s in zip(formula.inputs, shapes, strict=True)]
    windows = [
        None if v.is_whole else record("pointwise.Window", shape=v.source.shape, strides=v.strides, offset=v.offset)
        for v in views
    ]
    problem = record(
        "pointwise.PointwiseProgram",
        inputs=[(s, v.dtype) for s, v in zip(shapes, formula.inputs, strict=True)],
        steps=formula.steps,
        shape=formula.shape,
        time_groups=quantizer["qscale"].size if quantizer else 1,
    )
    if any(windows):
        problem = problem.replace(windows=windows)
    read = {f"x{i}": view.source for i, view in enumerate(views)} | quantizer
    out = Value(name, formula.shape, "uint8" if quantizer else "float32")
    made = e.call(Kernel("pointwise", problem), read, {"y": out})[0]
    if not quantizer:
        e.formulas[made.name] = formula
    return made


# ----------------------------------------------------------------------------------------------- epilogues


def epilogue(e: Emitter, members: list[fx.Node]) -> Epilogue:
    """Collects as many members behind the first as fit an epilogue."""
    found = Epilogue()
    running = members[0]
    for index, member in enumerate(members[1:], 1):
        if member.target in MOVEMENT and member.args[0] is running:
            running = member  # the same rows under another shape
            continue
        if member.target is ops.quantize:
            found.quantizer = member
            found.steps.append(record("epilogue.Step", op="quantize", value=int(arguments(member)[4])))
            found.covered = index + 1
            return found
        steps = _steps(e, member, running, found)
        if steps is None:
            return found
        found.steps += steps
        found.covered = index + 1
        running = member
    found.covered = len(members)
    return found


def _steps(e: Emitter, member: fx.Node, running: fx.Node, found: Epilogue) -> list[Record] | None:
    """Translates a pointwise call on the running value to steps; None where steps cannot express it."""
    made = operations(e, member)
    if len(made) != 1:
        return None
    op, operands = made[0]
    if op == "cast":
        return []
    if len(operands) == 1:
        return [record("epilogue.Step", op=op)] if operands[0] is running else None
    if len(operands) != 2:
        return None
    left, right = operands
    if right is running and left is not running:
        op, left, right = SWAPPED.get(op, op), right, left
    if left is not running or right is running:
        return [record("epilogue.Step", op="square")] if op == "mul" and left is right else None
    if not isinstance(right, fx.Node):
        return [record("epilogue.Step", op=op, value=float(right))]
    value = e.value(right)
    kind = _kind(value, e.shape(member))
    if kind is None or value.dtype != "float32":
        return None
    return [record("epilogue.Step", op=op, operand=found.reference(kind, value))]


def _kind(value: Value, shape: Shape) -> str | None:
    """How an operand broadcasts to rows of `shape` (`epilogue.OPERAND_KINDS`); None where it does not fit."""
    channels = shape[-1]
    if not value.batched and value.size == 1:
        return "scalar"
    if value.batched and value.size == math.prod(int(d) for d in shape[1:]):
        return "full"
    if value.size != channels or value.shape[-1:] != (channels,):
        return None
    return "sample" if value.batched else "channel"


def finish(e: Emitter, found: Epilogue) -> dict[str, Value]:
    """The operands of an epilogue, by the names of the kernel's arguments."""
    operands = {f"operand{i}": value for i, (_, value) in enumerate(found.operands)}
    return operands if found.quantizer is None else operands | e.quantizer(found.quantizer)


def groups(e: Emitter, found: Epilogue) -> int:
    """The number of time groups of the quantizer at the end; 1 without a quantizer."""
    return 1 if found.quantizer is None else e.stored(found.quantizer.args[1]).size
