"""From the packed graph to kernel calls.

The emitter walks the graph once. A node becomes a call of one kernel, or no call at all where only its shape
changes; a region becomes one call of its anchor's kernel with the pointwise calls behind it as epilogue. What
an epilogue cannot hold becomes a pointwise kernel behind it, and is recorded in `Program.fallbacks`.

Values are contiguous, the batch outermost: a tensor of m*B rows is [B, m, ...] here. Shapes are free: a call
may see an operand in any shape of as many elements.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from mpq_compiler import ops, storage
from mpq_compiler.aten import MOVEMENT, aten, is_permute, is_pointwise
from mpq_compiler.backends.tvm.lowered import BATCH, Call, Kernel, Lowered, Record, Shape, Value, record
from mpq_compiler.errors import UserError
from mpq_compiler.program import Program, _MetaInterpreter, arguments, operand

OUTPUT = "sample"
"""Name of the output in the manifest."""


def lower(program: Program, batches: Sequence[int]) -> Lowered:
    """The packed program as kernel calls, with specializations for `batches`.

    Slow forms are added to ``program.fallbacks``. UserError: a node that no kernel computes; a batch size below 1.
    """
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {list(batches)} cannot be compiled: name at least one, all of them positive")
    return _Emitter(program).lower(tuple(sorted(set(batches))))


class _Shapes(_MetaInterpreter):
    """Meta tensors of all nodes, those inside regions too."""

    def __init__(self, program: Program, batch: int) -> None:
        super().__init__(program)
        self.found: dict[str, Any] = {}
        inputs = {s.name: torch.empty(s.sized(batch), dtype=s.dtype, device="meta") for s in program.inputs}
        with torch.no_grad():
            self.run(inputs, watch=self._watch)

    def _watch(self, node: fx.Node, value: Any) -> None:
        self.found[node.name] = value

    def evaluate(self, node: fx.Node, env: Any) -> Any:
        if node.op == "call_module":
            arguments = fx.map_arg(node.args, env.__getitem__)
            return self.execute(self.program.regions[str(node.target)], list(arguments), self._watch)
        return super().evaluate(node, env)


@dataclass
class _Task:
    """A node or region being emitted: its calls in order, and what they read from outside."""

    node: fx.Node
    members: list[fx.Node]
    outer: dict[fx.Node, fx.Node] = field(default_factory=dict)
    """Placeholder of the region -> node of the program."""

    @property
    def anchor(self) -> fx.Node:
        return self.members[0]


@dataclass
class _Epilogue:
    """The steps that fit behind an anchor, and how many of the members they cover."""

    steps: list[Record] = field(default_factory=list)
    operands: list[tuple[str, Value]] = field(default_factory=list)
    quantizer: fx.Node | None = None
    covered: int = 1

    @property
    def record(self) -> Record:
        kinds = [record("epilogue.Operand", kind=kind) for kind, _ in self.operands]
        return record("epilogue.Epilogue", steps=self.steps, operands=kinds)

    def reference(self, kind: str, value: Value) -> int:
        if (kind, value) not in self.operands:
            self.operands.append((kind, value))
        return self.operands.index((kind, value))


class _Emitter:
    def __init__(self, program: Program) -> None:
        self.program = program
        self.two, self.three = (_Shapes(program, batch).found for batch in (2, 3))
        self.tensors = storage.stored(program)
        self.values: dict[fx.Node, Value] = {}
        self.parts: dict[fx.Node, list[Value]] = {}
        self.static: set[str] = set()
        self.preparation: list[Call] = []
        self.calls: list[Call] = []
        self.made: dict[tuple[Any, ...], list[Value]] = {}
        self.task = _Task(next(iter(program.graph.nodes)), [])

    def lower(self, batches: tuple[int, ...]) -> Lowered:
        program = self.program
        inputs = tuple(
            Value(s.name, tuple(BATCH if d == "B" else d for d in s.shape), _dtype(s.dtype)) for s in program.inputs
        )
        stored = tuple(Value(n, t.array.shape, str(t.array.dtype)) for n, t in self.tensors.items())
        self.static |= {value.name for value in stored}
        placeholders = iter(inputs)
        output: Value | None = None
        for node in program.graph.nodes:
            if node.op == "placeholder":
                self.values[node] = next(placeholders)
            elif node.op == "output":
                output = self.values[operand(node, 0)]
            elif node.op != "get_attr":
                self._emit(node)
        assert output is not None
        shape = self._shape(operand(self.program.graph.output_node(), 0))
        if not output.batched or output.dtype != "float32" or shape[:1] != (BATCH,):
            kind = f"{output.dtype} {_text(shape)}"
            raise UserError(f"the output '{output.name}' is {kind}, where a denoiser yields float32 [B, ...]")
        read = dict.fromkeys(name for call in self.calls for _, name in call.operands)
        return Lowered(
            inputs,
            stored,
            tuple(self.preparation),
            tuple(name for name in read if name in self.static),
            tuple(self.calls),
            Value(output.name, shape, output.dtype),
            batches,
        )

    # -------------------------------------------------------------------------------------------- values

    def _shape(self, node: fx.Node) -> Shape:
        return self._shape_of(self.two[node.name], self.three[node.name])

    def _shape_of(self, two: Tensor, three: Tensor) -> Shape:
        """The shape with the batch outermost, from those at batch sizes 2 and 3."""
        differing = [d for d in range(two.dim()) if two.shape[d] != three.shape[d]]
        if not differing:
            return tuple(two.shape)
        rows = int(two.shape[0]) // 2
        if differing != [0] or 2 * rows != two.shape[0] or 3 * rows != three.shape[0]:
            raise self._refusal(f"its shape {_text(two.shape)} does not have the batch outermost")
        return (BATCH, *([rows] if rows != 1 else []), *(int(d) for d in two.shape[1:]))

    def _refusal(self, reason: str) -> UserError:
        anchor = self.task.members[0] if self.task.members else self.task.node
        return UserError(
            f"node '{self.task.node.name}' ({ops.name_of(anchor.target)}) cannot be compiled for a CPU: {reason}; "
            "use --target reference, or report the model"
        )

    def _axis(self, node: fx.Node, dim: int) -> int:
        """Dimension `dim` of the node's tensor as a dimension of its value."""
        rank = self.two[node.name].dim()
        dim %= rank
        shifted = len(self._shape(node)) - rank
        if shifted and dim == 0:
            raise self._refusal("it works along a dimension that holds the batch")
        return dim + shifted

    def _value(self, node: Any) -> Value:
        """The value of a node of the program (or of a placeholder of the region), stored floats as f32."""
        node = self.task.outer.get(node, node)
        if node.op == "get_attr":
            return self._float(str(node.target))
        if node not in self.values:
            raise self._refusal(f"it reads '{node.name}', which is no tensor")
        return self.values[node]

    def _stored(self, node: Any) -> Value:
        """A tensor in its stored form."""
        node = self.task.outer.get(node, node)
        if node.op != "get_attr":
            raise self._refusal(f"'{node.name}' is computed where a stored tensor is expected")
        array = self.tensors[str(node.target)].array
        return Value(str(node.target), array.shape, str(array.dtype))

    def _float(self, name: str) -> Value:
        array = self.tensors[name].array
        value = Value(name, array.shape, str(array.dtype))
        return self._converted(value, "float32") if value.dtype == "float16" else value

    def _converted(self, value: Value, dtype: str) -> Value:
        problem = record(
            "pointwise.PointwiseProgram",
            inputs=[((value.size,), value.dtype)],
            steps=[record("pointwise.PointwiseStep", op="cast", args=[record("pointwise.Input", index=0)])],
            shape=(value.size,),
            dtype=dtype,
        )
        made = Value(f"{value.name}|{dtype}", value.shape, dtype)
        return self._call(Kernel("pointwise", problem), {"x0": value}, {"y": made})[0]

    def _call(self, kernel: Kernel, operands: dict[str, Value], results: dict[str, Value]) -> list[Value]:
        """Emits a call, once for equal ones; into `prepare` where everything it reads is known at load."""
        names = tuple((argument, value.name) for argument, value in operands.items())
        if (kernel, names) in self.made:
            return self.made[kernel, names]
        call = Call(kernel, names, tuple((a, v.name) for a, v in results.items()), self.task.node.name)
        if all(name in self.static for _, name in names) and names:
            self.preparation.append(call)
            self.static |= {value.name for value in results.values()}
        else:
            self.calls.append(call)
        self.made[kernel, names] = list(results.values())
        return self.made[kernel, names]

    # --------------------------------------------------------------------------------------------- nodes

    def _emit(self, node: fx.Node) -> None:
        if node.op == "call_module":
            region = self.program.regions[str(node.target)]
            inside = [n for n in region.nodes if n.op not in ("placeholder", "output")]
            outer = dict(zip((n for n in region.nodes if n.op == "placeholder"), node.args, strict=True))
            self.task = _Task(node, inside, outer)
        else:
            self.task = _Task(node, [node])
        anchor = self.task.anchor
        if is_pointwise(anchor):
            self.values[node] = self._pointwise(self.task.members)
            return
        if anchor.target in ANCHORS:
            self._anchored(ANCHORS[anchor.target])
            return
        if anchor.target not in PLAIN:
            raise self._refusal("no kernel computes it")
        result = PLAIN[anchor.target](self, anchor)
        if isinstance(result, list):
            self.parts[node] = result
        else:
            self.values[node] = result

    def _anchored(self, emit: Anchor) -> None:
        """An anchor with as much of its region as its epilogue holds, and a pointwise kernel for what it does not."""
        members = self.task.members
        epilogue = self._epilogue(members)
        last = members[epilogue.covered - 1]
        whole = epilogue.covered == len(members)
        name = self.task.node.name if whole else last.name
        out = Value(name, self._shape(last), "uint8" if epilogue.quantizer else "float32")
        value = emit(self, members[0], epilogue, out)
        if not whole:
            self.values[last] = value
            rest = members[epilogue.covered :]
            self.program.fallbacks[self.task.node.name] = (
                f"{ops.name_of(rest[0].target)} does not fit behind {ops.name_of(members[0].target)}: a second kernel"
            )
            value = self._pointwise(rest)
        self.values[self.task.node] = value

    # ----------------------------------------------------------------------------------------- epilogues

    def _epilogue(self, members: list[fx.Node]) -> _Epilogue:
        """As many members behind the first as can be epilogue steps."""
        found = _Epilogue()
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
            steps = self._steps(member, running, found)
            if steps is None:
                return found
            found.steps += steps
            found.covered = index + 1
            running = member
        found.covered = len(members)
        return found

    def _steps(self, member: fx.Node, running: fx.Node, epilogue: _Epilogue) -> list[Record] | None:
        """A pointwise call on the running value as steps, or None where they cannot say it."""
        operations = self._operations(member)
        if len(operations) != 1:
            return None
        op, operands = operations[0]
        if op == "cast":
            return []
        if len(operands) == 1:
            return [record("epilogue.Step", op=op)] if operands[0] is running else None
        left, right = operands
        if right is running and left is not running:
            swapped = {"sub": "rsub", "rsub": "sub", "div": "rdiv", "rdiv": "div"}
            op, left, right = swapped.get(op, op), right, left
        if left is not running or right is running:
            return [record("epilogue.Step", op="square")] if op == "mul" and left is right else None
        if not isinstance(right, fx.Node):
            return [record("epilogue.Step", op=op, value=float(right))]
        value = self._value(right)
        kind = _kind(value, self._shape(member))
        if kind is None or value.dtype != "float32":
            return None
        return [record("epilogue.Step", op=op, operand=epilogue.reference(kind, value))]

    def _finish(self, epilogue: _Epilogue) -> dict[str, Value]:
        """The operands of an epilogue by the names of the kernel's arguments."""
        operands = {f"operand{i}": value for i, (_, value) in enumerate(epilogue.operands)}
        if epilogue.quantizer is not None:
            operands |= self._quantizer(epilogue.quantizer)
        return operands

    def _quantizer(self, node: fx.Node) -> dict[str, Value]:
        _, scale, zero, group, _ = arguments(node)
        return {
            "qscale": self._converted(self._stored(scale), "float32"),
            "qzero": self._converted(self._stored(zero), "int32"),
            "group": self._value(group),
        }

    def _groups(self, epilogue: _Epilogue) -> int:
        """Time groups of the quantizer at the end, 1 without."""
        return 1 if epilogue.quantizer is None else self._stored(epilogue.quantizer.args[1]).size

    # ----------------------------------------------------------------------------------------- pointwise

    def _operations(self, node: fx.Node) -> list[tuple[str, tuple[Any, ...]]]:
        """A pointwise call as operations of `vmath`, on nodes, numbers and results of earlier ones."""
        target, args, kwargs = node.target, arguments(node), dict(node.kwargs)
        if target in UNARY:
            return [(UNARY[target], (args[0],))]
        if target is aten.gelu.default:
            approximate = kwargs.get("approximate", args[1] if len(args) > 1 else "none")
            return [("gelu_tanh" if approximate == "tanh" else "gelu", (args[0],))]
        if target in (aten.to.dtype, aten._to_copy.default):
            if self.two[node.name].dtype != torch.float32:
                other = _dtype(self.two[node.name].dtype)
                raise self._refusal(f"it converts to {other}, and kernels compute in float32")
            return [("cast", (args[0],))]
        if target is aten.abs.default:
            return [("neg", (args[0],)), ("maximum", (args[0], _Earlier(0)))]
        if target is aten.pow.Tensor_Scalar:
            return self._power(args[0], float(args[1]))
        if target in BINARY:
            op, (left, right) = BINARY[target], args[:2]
            alpha = kwargs.get("alpha", args[2] if len(args) > 2 else 1)
            if alpha == 1:
                return [(op, (left, right))]
            scaled = left if op == "rsub" else right
            operands = (_Earlier(0), right) if op == "rsub" else (left, _Earlier(0))
            return [("mul", (scaled, alpha)), (op, operands)]
        raise self._refusal(f"{ops.name_of(target)} has no pointwise kernel")

    def _power(self, x: Any, exponent: float) -> list[tuple[str, tuple[Any, ...]]]:
        powers: dict[float, list[tuple[str, tuple[Any, ...]]]] = {
            1.0: [("mul", (x, 1.0))],
            2.0: [("square", (x,))],
            3.0: [("square", (x,)), ("mul", (_Earlier(0), x))],
            0.5: [("sqrt", (x,))],
            -0.5: [("rsqrt", (x,))],
            -1.0: [("rdiv", (x, 1.0))],
        }
        if exponent not in powers:
            raise self._refusal(f"a power of {exponent} has no kernel")
        return powers[exponent]

    def _pointwise(self, members: list[fx.Node]) -> Value:
        """Pointwise calls that read one another as one kernel (as several where the shape changes between them)."""
        cut = next((i for i, m in enumerate(members) if m.target in MOVEMENT), None)
        if cut is not None:
            before = self._pointwise(members[:cut]) if cut else self._value(members[0].args[0])
            self.values[members[cut]] = Value(before.name, self._shape(members[cut]), before.dtype)
            return self._pointwise(members[cut + 1 :]) if cut + 1 < len(members) else self.values[members[cut]]
        last = members[-1]
        shape = self._shape(last)
        inputs: list[Value] = []
        steps: list[Record] = []
        results: dict[fx.Node, int] = {}
        quantizer: dict[str, Value] = {}

        def reference(read: Any, first: int) -> Any:
            if isinstance(read, _Earlier):
                return record("pointwise.Result", index=first + read.index)
            if not isinstance(read, fx.Node):
                return float(read)
            if read in results:
                return record("pointwise.Result", index=results[read])
            value = self._value(read)
            if value not in inputs:
                inputs.append(value)
            return record("pointwise.Input", index=inputs.index(value))

        for member in members:
            if member.target is ops.quantize:
                quantizer = self._quantizer(member)
                x = reference(member.args[0], len(steps))
                bits = int(arguments(member)[4])
                steps.append(record("pointwise.PointwiseStep", op="quantize", args=(x,), value=bits))
                continue
            if self.two[member.name].dtype != torch.float32:
                raise self._refusal("it computes on integers, and kernels compute in float32")
            first = len(steps)
            for op, operands in self._operations(member):
                args = tuple(reference(o, first) for o in operands)
                steps.append(record("pointwise.PointwiseStep", op=op, args=args))
            results[member] = len(steps) - 1
        groups = quantizer["qscale"].size if quantizer else 1
        problem = record(
            "pointwise.PointwiseProgram",
            inputs=[(self._broadcast(v, shape), v.dtype) for v in inputs],
            steps=steps,
            shape=shape,
            time_groups=groups,
        )
        read = {f"x{i}": value for i, value in enumerate(inputs)} | quantizer
        name = self.task.node.name if last is self.task.members[-1] else last.name
        out = Value(name, shape, "uint8" if quantizer else "float32")
        return self._call(Kernel("pointwise", problem), read, {"y": out})[0]

    def _broadcast(self, value: Value, shape: Shape) -> Shape:
        """The value's shape as it broadcasts to `shape`: [B, m, ...] and [m*B, ...] may meet, and 1 may stand for B."""
        own = value.shape
        if value.batched and len(own) < len(shape):
            own = (BATCH, *[1] * (len(shape) - len(own)), *own[1:])
        return own

    # ------------------------------------------------------------------------------------------ movement

    def _alias(self, node: fx.Node) -> Value:
        x = self._value(node.args[0])
        return Value(x.name, self._shape(node), x.dtype)

    def _moved(self, node: fx.Node, problem: Record, inputs: Sequence[Value], shape: Shape, name: str = "") -> Value:
        operands = {f"x{i}": value for i, value in enumerate(inputs)}
        out = Value(name or node.name, shape, inputs[0].dtype)
        return self._call(Kernel("movement", problem), operands, {"y": out})[0]

    def _permute(self, node: fx.Node, order: Sequence[int] | None = None) -> Value:
        x, rank = self._value(node.args[0]), self.two[node.name].dim()
        order = order or _order(node, rank)
        if len(x.shape) != rank:
            raise self._refusal("it permutes a tensor whose rows are not samples")
        order = [d % rank for d in order]
        problem = record("movement.permute", shape=x.shape, order=order, dtype=x.dtype)
        return self._moved(node, problem, [x], tuple(x.shape[d] for d in order))

    def _einsum(self, node: fx.Node) -> Value:
        """A single operand whose indices are all kept is permuted; nothing else is an einsum here."""
        equation, operands = str(node.args[0]).replace(" ", ""), arguments(node)[1]
        source, _, target = equation.partition("->")
        if len(operands) != 1 or sorted(source) != sorted(target) or len({*source}) != len(source):
            raise self._refusal(f"einsum '{equation}' is no permutation")
        x = self._value(operands[0])
        order = [source.index(c) for c in target]
        problem = record("movement.permute", shape=x.shape, order=order, dtype=x.dtype)
        return self._moved(node, problem, [x], tuple(x.shape[d] for d in order))

    def _concatenate(self, node: fx.Node) -> Value:
        nodes = list(arguments(node)[0])
        dim = int(arguments(node)[1] if len(node.args) > 1 else node.kwargs.get("dim", 0))  # type: ignore[arg-type]
        axis = self._axis(nodes[0], dim)
        values = [self._value(n) for n in nodes]
        if len({v.dtype for v in values}) > 1 or len({v.batched for v in values}) > 1:
            raise self._refusal("it joins tensors of several types, or with and without a batch")
        problem = record("movement.concat", shapes=[v.shape for v in values], dim=axis, dtype=values[0].dtype)
        return self._moved(node, problem, values, self._shape(node))

    def _sliced(self, node: fx.Node, source: Any, axis: int, start: int, stop: int, step: int, name: str = "") -> Value:
        x = self._value(source)
        if x.shape[axis] == BATCH:
            raise self._refusal("it takes a part of the batch")
        extent = int(x.shape[axis])
        span = range(*slice(start, stop, step).indices(extent))
        shape = (*x.shape[:axis], len(span), *x.shape[axis + 1 :])
        if len(span) == extent:
            return Value(x.name, x.shape, x.dtype)
        starts = [span.start if d == axis else 0 for d in range(len(x.shape))]
        stops = [span.stop if d == axis else 0 if e == BATCH else int(e) for d, e in enumerate(x.shape)]
        steps = [span.step if d == axis else 1 for d in range(len(x.shape))]
        problem = record("movement.slice_", shape=x.shape, starts=starts, stops=stops, steps=steps, dtype=x.dtype)
        return self._moved(node, problem, [x], shape, name)

    def _slice(self, node: fx.Node) -> Value:
        x, dim, start, stop, step = _arguments(node, None, 0, None, None, 1)
        if self.two[x.name].shape[dim] != self.three[x.name].shape[dim] and not start and step == 1:
            return self._alias(node)  # the whole batch
        return self._sliced(node, x, self._axis(x, dim), start or 0, 1 << 62 if stop is None else stop, step)

    def _select(self, node: fx.Node) -> Value:
        x, dim, index = arguments(node)
        axis = self._axis(x, dim)
        start = index % int(self._shape(x)[axis])
        part = self._sliced(node, x, axis, start, start + 1, 1)
        return Value(part.name, self._shape(node), part.dtype)

    def _parts(self, node: fx.Node) -> list[Value]:
        """chunk, split and unbind: each part that is read becomes a slice."""
        x, single = operand(node, 0), node.target is aten.unbind.int
        dim = int(_arguments(node, None, 0)[1] if single else _arguments(node, None, None, 0)[2])
        axis, used = self._axis(x, dim), {arguments(u)[1]: u for u in node.users if u.target is operator.getitem}
        parts, start = [], 0
        for i, (two, three) in enumerate(zip(self.two[node.name], self.three[node.name], strict=True)):
            size = 1 if single else int(two.shape[dim])
            shape = self._shape_of(two, three)
            if i in used:
                part = self._sliced(node, x, axis, start, start + size, 1, used[i].name)
                parts.append(Value(part.name, shape, part.dtype))
            else:
                parts.append(Value("", shape, "float32"))
            start += size
        return parts

    def _item(self, node: fx.Node) -> Value:
        return self.parts[operand(node, 0)][arguments(node)[1]]

    def _expand(self, node: fx.Node) -> Value:
        x, shape = self._value(node.args[0]), self._shape(node)
        if math.prod(self._as_ints(x.shape)) == math.prod(self._as_ints(shape)):
            return self._alias(node)
        problem = record("movement.expand", shape=self._broadcast(x, shape), target=shape, dtype=x.dtype)
        return self._moved(node, problem, [x], shape)

    @staticmethod
    def _as_ints(shape: Shape) -> list[int]:
        return [2 if d == BATCH else int(d) for d in shape]

    def _pad(self, node: fx.Node) -> Value:
        x, pads, *rest = arguments(node)
        value = self._value(x)
        mode = next((r for r in rest if isinstance(r, str)), node.kwargs.get("mode", "constant"))
        fill: Any = next((r for r in rest if isinstance(r, int | float)), node.kwargs.get("value")) or 0.0
        rank = len(value.shape)
        before, after = [0] * rank, [0] * rank
        for i, (low, high) in enumerate(_pairs(pads)):
            before[rank - 1 - i], after[rank - 1 - i] = low, high
        if mode != "constant" or min(before + after) < 0 or (value.batched and before[0] + after[0]):
            raise self._refusal("only padding by a constant, of other dimensions than the batch, has a kernel")
        problem = record(
            "movement.pad", shape=value.shape, before=before, after=after, fill=float(fill), dtype=value.dtype
        )
        return self._moved(node, problem, [value], self._shape(node))

    def _upsample(self, node: fx.Node) -> Value:
        x, factors = self._value(node.args[0]), arguments(node)[1]
        problem = record("movement.upsample", shape=x.shape, factors=factors, dtype=x.dtype)
        return self._moved(node, problem, [x], self._shape(node))

    def _embedding(self, node: fx.Node) -> Value:
        table, index = self._value(node.args[0]), self._value(node.args[1])
        if table.batched or not index.batched:
            raise self._refusal("its table must be a stored tensor and its indices an input")
        rows, width = table.inner
        problem = record(
            "movement.Gather", rows=rows, width=width, positions=index.inner, dtype=table.dtype, index_dtype=index.dtype
        )
        out = Value(node.name, self._shape(node), table.dtype)
        return self._call(Kernel("movement", problem), {"index": index, "table": table}, {"y": out})[0]

    # -------------------------------------------------------------------------------------- quantization

    def _time_group(self, node: fx.Node) -> Value:
        timestep, boundaries = self._value(node.args[0]), self._stored(node.args[1])
        out = Value(node.name, (BATCH,), "int64")
        if not boundaries.size:
            fill = record("movement.Movement", inputs=(), shape=(BATCH,), copies=(), dtype="int64", fill=0)
            return self._call(Kernel("movement", fill), {}, {"y": out})[0]
        problem = record("quantize.TimeGroup", groups=boundaries.size + 1, dtype=timestep.dtype)
        operands = {"timestep": timestep, "boundaries": boundaries}
        return self._call(Kernel("quantize", problem), operands, {"out": out})[0]

    def _quantize(self, node: fx.Node) -> Value:
        x, quantizer, bits = self._value(node.args[0]), self._quantizer(node), arguments(node)[4]
        if not x.batched or x.dtype != "float32":
            raise self._refusal("it quantizes what has no batch or is no float32")
        problem = record("quantize.Quantize", shape=(x.size,), bits=bits, groups=quantizer["qscale"].size)
        out = Value(node.name, x.shape, "uint8")
        return self._call(Kernel("quantize", problem), {"x": x, **quantizer}, {"out": out})[0]

    def _stacked(self, nodes: Sequence[Any], convert: str | None) -> Value:
        """Stored tables [G], one a segment, as one [J, G]."""
        values = [self._stored(n) for n in nodes]
        if convert:
            values = [self._converted(v, convert) for v in values]
        if len(values) == 1:
            return values[0]
        problem = record("movement.concat", shapes=[v.shape for v in values], dim=0, dtype=values[0].dtype)
        name = "+".join(v.name for v in values)
        shape = (sum(v.size for v in values),)
        out = Value(name, shape, values[0].dtype)
        operands = {f"x{i}": v for i, v in enumerate(values)}
        return self._call(Kernel("movement", problem), operands, {"y": out})[0]

    def _contraction(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        x, group, codes, scale, offset, lut, row_class, act_scale, act_zero, bias, segments, *spatial = arguments(node)
        source = self._value(x)
        parts = {"codes": codes, "scale": scale, "stored_offset": offset, "tables": lut, "row_class": row_class}
        parts["stored_bias"] = bias
        stored = {name: self._stored(part) for name, part in parts.items() if part is not None}
        stored["act_zero"] = self._stacked(act_zero, None)
        bits = storage.code_bits(self.program, stored["tables"].name if "tables" in stored else None)
        if "tables" in stored and "row_class" not in stored:
            stored["row_class"] = self._single_class(stored["scale"].inner[0])
        if "stored_bias" in stored and stored["stored_bias"].dtype != "float16":
            raise self._refusal("its bias exceeds the range of half-precision floats")
        channels = source.inner[-1]
        shared: dict[str, Any] = {
            "channels": channels,
            "outputs": stored["scale"].inner[0],
            "bits": bits,
            "classes": stored["tables"].inner[0] if "tables" in stored else 1,
            "segments": tuple(segments),
            "groups": self._stored(act_scale[0]).size,
            "has_offset": "stored_offset" in stored,
            "has_bias": "stored_bias" in stored,
        }
        if node.target is ops.quant_conv2d:
            if len(source.inner) != 3:
                raise self._refusal("its input is no image [B, H, W, C]")
            kernel, stride, padding = spatial
            problem = record(
                "problem.QuantMatmul", height=source.inner[0], width=source.inner[1], kernel=kernel, stride=stride,
                padding=padding, epilogue=epilogue.record, **shared,
            )  # fmt: skip
            prepare = record("problem.QuantMatmul", height=kernel[0], width=kernel[1], kernel=kernel, **shared)
        else:
            rows = source.size // channels
            rank = 2 if rows == 1 else 3
            problem = record(
                "problem.QuantMatmul", height=rows, width=1, rank=rank, epilogue=epilogue.record, **shared
            )
            prepare = record("problem.QuantMatmul", height=1, width=1, **shared)
        names = ["tiles", "lut", "start", "weight_scale", "offset", "bias"]
        absent = {"lut": bits == 8, "offset": not shared["has_offset"], "bias": not shared["has_bias"]}
        prefix = f"{node.name}|"
        results = {n: Value(prefix + n, (), "") for n in names if not absent.get(n)}
        panels = self._call(Kernel("prepare", prepare), stored, results)
        operands = {
            "x": source,
            "group": self._value(group),
            "act_scale": self._stacked(act_scale, "float32"),
            "act_zero": stored["act_zero"],
            **dict(zip(results, panels, strict=True)),
            **self._finish(epilogue),
        }
        return self._call(Kernel("gemm", problem), operands, {"out": out})[0]

    def _single_class(self, outputs: int) -> Value:
        """Row classes of a weight with one table for all rows: zeros, made at load and stored nowhere."""
        blocks = -(-outputs // ops.TILE_ROWS)
        fill = record("movement.Movement", inputs=(), shape=(blocks,), copies=(), dtype="uint8", fill=0)
        out = Value(f"|row_class{blocks}", (blocks,), "uint8")
        kernel = Kernel("movement", fill)
        if (kernel, ()) not in self.made:
            self.made[kernel, ()] = [out]
            self.static.add(out.name)
            self.preparation.append(Call(kernel, (), (("y", out.name),), self.task.node.name))
        return out

    # ------------------------------------------------------------------------------------ float anchors

    def _anchor(
        self, template: str, problem: Record, operands: dict[str, Value | None], epilogue: _Epilogue, out: Value
    ) -> Value:
        given = {k: v for k, v in operands.items() if v is not None}
        problem = problem.replace(epilogue=epilogue.record, time_groups=self._groups(epilogue))
        return self._call(Kernel(template, problem), given | self._finish(epilogue), {"y": out})[0]

    def _optional(self, node: Any) -> Value | None:
        return None if node is None else self._value(node)

    def _group_norm(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        source, groups, weight, bias, eps = arguments(node)
        x, gamma, beta = self._value(source), self._optional(weight), self._optional(bias)
        if (gamma is None) != (beta is None):
            raise self._refusal("it has a weight without a bias, or a bias without a weight")
        channels = x.inner[-1]
        problem = record(
            "norms.GroupNorm", positions=x.size // channels, channels=channels, groups=groups, eps=eps,
            affine=gamma is not None,
        )  # fmt: skip
        return self._anchor("norms", problem, {"x": x, "gamma": gamma, "beta": beta}, epilogue, out)

    def _layer_norm(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        source, shape, weight, bias, eps = _arguments(node, None, None, None, None, 1e-5)
        x, gamma, beta = self._value(source), self._optional(weight), self._optional(bias)
        if len(shape) != 1:
            raise self._refusal(f"it normalizes over {len(shape)} dimensions, and the kernel over one")
        channels = int(shape[0])
        problem = record(
            "norms.LayerNorm", positions=x.size // channels, channels=channels, eps=eps, scale=gamma is not None,
            shift=beta is not None,
        )  # fmt: skip
        return self._anchor("norms", problem, {"x": x, "gamma": gamma, "beta": beta}, epilogue, out)

    def _attention(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        q, k, v, heads, scale, mask = _arguments(node, None, None, None, None, None, None)
        query, key, additive = self._value(q), self._value(k), self._optional(mask)
        if len(query.inner) != 2 or len(key.inner) != 2:
            raise self._refusal("its operands are not [B, tokens, channels]")
        shape = None
        if additive is not None:
            own = additive.inner
            shape = (BATCH if additive.batched else 1, *[1] * (3 - len(own)), *(own if additive.batched else own[-3:]))
        problem = record(
            "attention.Attention", queries=query.inner[0], keys=key.inner[0], heads=heads, dim=query.inner[1] // heads,
            scale=scale, mask=shape,
        )  # fmt: skip
        operands = {"q": query, "k": key, "v": self._value(v), "mask": additive}
        return self._anchor("attention", problem, operands, epilogue, out)

    def _linear(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        source, weight, bias = _arguments(node, None, None, None)
        x, w, b = self._value(source), self._value(weight), self._optional(bias)
        if w.batched:
            raise self._refusal("its weight is computed from the inputs")
        outputs, inputs = w.inner
        problem = record(
            "float_gemm.Linear", positions=x.size // inputs, inputs=inputs, outputs=outputs, bias=b is not None
        )
        return self._float_contraction(problem, x, w, b, epilogue, out)

    def _conv2d(self, node: fx.Node, epilogue: _Epilogue, out: Value) -> Value:
        source, weight, bias, stride, padding, groups = _arguments(node, None, None, None, (1, 1), (0, 0, 0, 0), 1)
        x, w, b = self._value(source), self._value(weight), self._optional(bias)
        if w.batched or len(x.inner) != 3:
            raise self._refusal("its weight is computed from the inputs, or its input is no image [B, H, W, C]")
        height, width, channels = x.inner
        outputs, *kernel, _ = w.inner
        problem = record(
            "float_gemm.Conv2d", height=height, width=width, channels=channels, outputs=outputs, kernel=kernel,
            stride=stride, padding=padding, groups=groups, bias=b is not None,
        )  # fmt: skip
        return self._float_contraction(problem, x, w, b, epilogue, out)

    def _float_contraction(
        self, problem: Record, x: Value, weight: Value, bias: Value | None, epilogue: _Epilogue, out: Value
    ) -> Value:
        """Weights that the kernel reads in panels are packed at load."""
        self.program.fallbacks.setdefault(self.task.anchor.name, "computed in float32: the plan leaves it unquantized")
        plain = problem.type == "float_gemm.Linear" and (problem.get("positions") < 8 or problem.get("outputs") < 4)
        if not plain and weight.name in self.static:
            problem = problem.replace(packed=True)
            panel = Value(f"{weight.name}|panel", (), "float32")
            weight = self._call(Kernel("pack", problem), {"weight": weight}, {"panel": panel})[0]
        return self._anchor("float_gemm", problem, {"x": x, "weight": weight, "bias": bias}, epilogue, out)


Anchor = Callable[[_Emitter, fx.Node, _Epilogue, Value], Value]


@dataclass(frozen=True)
class _Earlier:
    """The result of operation `index` of the same call."""

    index: int


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
}

ANCHORS: dict[Any, Anchor] = {
    ops.quant_linear: _Emitter._contraction,
    ops.quant_conv2d: _Emitter._contraction,
    ops.group_norm: _Emitter._group_norm,
    aten.layer_norm.default: _Emitter._layer_norm,
    ops.attention: _Emitter._attention,
    aten.linear.default: _Emitter._linear,
    ops.conv2d: _Emitter._conv2d,
}
"""Operators whose kernels take an epilogue."""

PLAIN: dict[Any, Callable[[_Emitter, fx.Node], Value | list[Value]]] = {
    ops.time_group: _Emitter._time_group,
    ops.quantize: _Emitter._quantize,
    ops.upsample_nearest2d: _Emitter._upsample,
    aten.embedding.default: _Emitter._embedding,
    aten.cat.default: _Emitter._concatenate,
    aten.concat.default: _Emitter._concatenate,
    aten.slice.Tensor: _Emitter._slice,
    aten.select.int: _Emitter._select,
    aten.chunk.default: _Emitter._parts,
    aten.split.Tensor: _Emitter._parts,
    aten.split_with_sizes.default: _Emitter._parts,
    aten.unbind.int: _Emitter._parts,
    operator.getitem: _Emitter._item,
    aten.expand.default: _Emitter._expand,
    aten.pad.default: _Emitter._pad,
    aten.constant_pad_nd.default: _Emitter._pad,
    aten.einsum.default: _Emitter._einsum,
    **{target: _Emitter._alias for target in MOVEMENT},
    aten.permute.default: _Emitter._permute,
    aten.transpose.int: _Emitter._permute,
    aten.t.default: _Emitter._permute,
}
"""Operators that stand alone."""


def _kind(value: Value, shape: Shape) -> str | None:
    """How an operand broadcasts to rows of `shape` in an epilogue (`epilogue.OPERAND_KINDS`), or None."""
    channels = shape[-1]
    if not value.batched and value.size == 1:
        return "scalar"
    if value.batched and value.size == math.prod(int(d) for d in shape[1:]):
        return "full"
    if value.size != channels or value.shape[-1:] != (channels,):
        return None
    return "sample" if value.batched else "channel"


def _order(node: fx.Node, rank: int) -> list[int]:
    if is_permute(node):
        return [int(d) for d in arguments(node)[1]]
    a, b = (0, 1) if node.target is aten.t.default else arguments(node)[1:3]
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


def _arguments(node: fx.Node, *defaults: Any) -> list[Any]:
    """The positional arguments, filled up with `defaults` (the graph's own operators take no keywords)."""
    return [*arguments(node)[: len(defaults)], *defaults[len(node.args) :]]


def _pairs(values: Any) -> list[tuple[int, int]]:
    return list(zip(values[::2], values[1::2], strict=True))


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _text(shape: Sequence[Any]) -> str:
    return "[" + ", ".join(map(str, shape)) + "]"


__all__ = ["OUTPUT", "lower"]
