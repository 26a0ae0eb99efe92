"""Gates that the product whose halves they join computes itself: GEGLU, SwiGLU (Shazeer, arXiv 2002.05202)."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mpq_compiler.backends.tvm.kernels.problems.operations import UNARY
from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import GATED
from mpq_compiler.backends.tvm.plan.calls import Call, Function, Kernel, Lowered, Record, record
from mpq_compiler.backends.tvm.plan.views import contiguous


@dataclass(frozen=True)
class _Join:
    """A pointwise call that joins the two halves of what a product makes, and nothing else reads."""

    product: Call
    call: Call
    gate: Record
    bits: int | None

    @property
    def panels(self) -> str:
        """The value that stands for the product's weights as `prepare` lays them out."""
        return dict(self.product.operands)["tiles"]

    def joined(self) -> Call:
        """The product with the gate and, where the call quantizes, its quantizer."""
        operands, own = dict(self.call.operands), dict(self.product.operands)
        quantizer = {name: value for name, value in operands.items() if not name.startswith("x")}
        problem = self.product.kernel.problem.replace(gate=self.gate)
        if self.bits is not None:
            step = record("epilogue.Step", op="quantize", value=self.bits)
            epilogue = problem.get("epilogue").replace(steps=(step,))
            problem = problem.replace(epilogue=epilogue, groups=self.call.kernel.problem.get("time_groups"))
        ((_, result),) = self.call.results
        kernel = Kernel(self.product.kernel.template, problem)
        return Call(kernel, tuple((own | quantizer).items()), (("out", result),), self.product.node)


def join(lowered: Lowered) -> Lowered:
    """Let products compute the gates behind them, where all products with these weights do."""
    joins = [join for function in lowered.functions for join in _joins(function)]
    done, gates = Counter(join.panels for join in joins), {join.panels: join.gate for join in joins}
    reads = Counter(name for function in lowered.functions for call in function.calls for _, name in call.operands)
    wanted = {name for name, count in done.items() if count == reads[name]}

    def prepared(call: Call) -> Call:
        for _, name in call.results:
            if name in wanted:
                return replace(call, kernel=Kernel(call.kernel.template, call.kernel.problem.replace(gate=gates[name])))
        return call

    def changed(function: Function) -> Function:
        own = [join for join in _joins(function) if join.panels in wanted]
        replaced = {join.call: [join.joined()] for join in own} | {join.product: [] for join in own}
        return replace(function, own=tuple(new for call in function.own for new in replaced.get(call, [call])))

    functions = tuple(map(changed, lowered.functions))
    return replace(lowered, preparation=tuple(map(prepared, lowered.preparation)), functions=functions).linked()


def _joins(function: Function) -> Iterator[_Join]:
    makers = {name: call for call in function.own for _, name in call.results}
    reads = Counter(name for call in function.own for name in {name for _, name in call.operands})
    reads[function.output.name] += 1
    for call in function.own:
        names = {name for argument, name in call.operands if argument.startswith("x")}
        if call.kernel.problem.type != "pointwise.PointwiseProgram" or len(names) > 1:
            continue
        product = makers.get(next(iter(names), ""))
        if product is None or product.kernel.problem.type != "problem.QuantMatmul" or reads[product.results[0][1]] > 1:
            continue
        if (found := _gate(call.kernel.problem, product)) is not None and _fits(product, call, found[1]):
            yield _Join(product, call, *found)


def _fits(product: Call, call: Call, bits: int | None) -> bool:
    """Whether a product may quantize its result: its own groups of time are those of the quantizer."""
    own, theirs = dict(product.operands), dict(call.operands)
    if bits is None or "group" not in own:
        return True
    same = product.kernel.problem.get("groups") == call.kernel.problem.get("time_groups")
    return same and own["group"] == theirs["group"]


def _gate(program: Record, product: Call) -> tuple[Record, int | None] | None:
    """(the gate, bits of a quantizer) where a program is that of the halves of a product; else None."""
    problem, steps, shape = product.kernel.problem, program.get("steps"), program.get("shape")
    outputs, windows = problem.get("outputs"), dict(program.fields).get("windows") or ()
    plain = not problem.get("epilogue").get("steps") and not product.into and len(product.results) == 1
    if not plain or outputs % (2 * GATED) or shape[-1] != outputs // 2 or len(windows) != 2 or None in windows:
        return None
    source = (*shape[:-1], outputs)
    strides = contiguous(source).strides
    halves = [record("pointwise.Window", shape=source, strides=strides, offset=at) for at in (0, outputs // 2)]
    if {*windows} != {*halves} or {own for own, _ in program.get("inputs")} != {shape}:
        return None
    op, bits = steps[0].get("op"), steps[-1].get("value")
    inputs, results = ([record(f"pointwise.{kind}", index=i) for i in range(2)] for kind in ("Input", "Result"))
    for through, kept in (inputs, inputs[::-1]):
        for factors in itertools.permutations((kept, results[0])):
            expected = [_step(op, through), _step("mul", *factors)]
            if bits is not None:
                expected.append(_step("quantize", results[1], value=bits))
            if op in UNARY and steps == tuple(expected):
                first = windows[through.get("index")] == halves[0]
                return record("problem.Gate", op=op, first=first), bits
    return None


def _step(op: str, *args: Record, value: int | None = None) -> Record:
    return record("pointwise.PointwiseStep", op=op, args=args, value=value)
