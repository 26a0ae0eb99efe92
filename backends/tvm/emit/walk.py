"""Lowers the packed graph to kernel calls, in one walk: the first stage of the lowering.

A node becomes a call of one kernel, or no call at all where only its shape changes. A region becomes one call of its
anchor's kernel, with the pointwise calls behind it as epilogue. Calls that do not fit the epilogue become a pointwise
kernel behind it, and are recorded in `Program.fallbacks`.

The operators are in `packed` (codes), `floats`, `pointwise` and `movement`, which share the `emitter`.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import fx

from mpq_compiler.backends.tvm.emit import floats, movement, packed, pointwise
from mpq_compiler.backends.tvm.emit.emitter import Emitter, Epilogue, Preparation, Task, text, type_name
from mpq_compiler.backends.tvm.plan.calls import BATCH, Function, Lowered, Value, needed
from mpq_compiler.ir import ops, stored_tensors
from mpq_compiler.ir.aten import MOVEMENT, aten, is_pointwise
from mpq_compiler.ir.findings import STORED_HALVES
from mpq_compiler.ir.graph import operand
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.specialization import Specialization
from mpq_compiler.pipeline.passes import Contract
from mpq_compiler.pipeline.stages import LoweringStage
from mpq_compiler.support.errors import UserError

OUTPUT = "sample"
"""The name of the output in the manifest."""

Anchor = Callable[[Emitter, fx.Node, Epilogue, Value], Value]
Plain = Callable[[Emitter, fx.Node], Value | list[Value]]

ANCHORS: dict[Any, Anchor] = {
    ops.quant_linear: packed.contraction,
    ops.quant_conv2d: packed.contraction,
    ops.group_norm: floats.group_norm,
    aten.layer_norm.default: floats.layer_norm,
    ops.rms_norm: floats.rms_norm,
    ops.hadamard: floats.hadamard,
    ops.attention: floats.attention,
    aten.linear.default: floats.linear,
    ops.linear: floats.linear,
    ops.conv2d: floats.conv2d,
}
"""The emission of operators whose kernels take an epilogue."""

PLAIN: dict[Any, Plain] = {
    ops.time_group: packed.time_group,
    ops.quantize: packed.quantize,
    ops.dynamic_quantize: packed.dynamic_quantize,
    ops.quant_attention: packed.quant_attention,
    ops.fake_quantize_float: packed.fake_quantize_float,
    ops.dequantize_weight: packed.dequantize_weight,
    ops.dequantize_float8: packed.dequantize_float8,
    ops.keep: movement.alias,
    ops.upsample_nearest2d: movement.upsample,
    aten.embedding.default: movement.embedding,
    aten.cat.default: movement.concatenate,
    aten.concat.default: movement.concatenate,
    aten.slice.Tensor: movement.slice_,
    aten.select.int: movement.select,
    aten.chunk.default: movement.parts,
    aten.split.Tensor: movement.parts,
    aten.split_with_sizes.default: movement.parts,
    aten.unbind.int: movement.parts,
    operator.getitem: movement.item,
    aten.expand.default: movement.expand,
    aten.pad.default: movement.pad,
    aten.constant_pad_nd.default: movement.pad,
    aten.einsum.default: floats.einsum,
    aten.matmul.default: floats.matmul,
    aten.bmm.default: floats.matmul,
    aten.mean.dim: floats.mean,
    ops.for_each_sample: movement.for_each_sample,
    ops.prepend: movement.prepend,
    ops.row_of_token: movement.row_of_token,
    **{target: pointwise.alone for target in pointwise.ALONE},
    **{target: movement.alias for target in MOVEMENT},
    aten.permute.default: movement.permute,
    aten.transpose.int: movement.permute,
    aten.t.default: movement.permute,
}
"""The emission of operators that take no epilogue."""


@dataclass(frozen=True, eq=False)
class SelectKernels(LoweringStage[Lowered]):
    """Each node or region becomes the call of a kernel; what hangs on stored tensors alone is left to `prepare`.

    The program is specialized for ``batches``, and at ``others`` of its image sizes for theirs. Slow forms are added to
    ``program.fallbacks``. UserError: a node that no kernel computes; a batch size below 1.
    """

    program: Program
    batches: Sequence[int]
    others: Sequence[Specialization] = ()
    tensors: Mapping[str, stored_tensors.Stored] | None = None
    """The stored tensors, where they are packed already: packing takes long."""

    contract: ClassVar[Contract] = Contract.LOWERED

    def run(self, plan: Lowered) -> Lowered:
        tensors = self.tensors
        if tensors is None:
            tensors = stored_tensors.stored(self.program, *(other.program for other in self.others))
        preparation = Preparation(tensors)
        functions = [_function(self.program, self.batches, preparation)]
        functions += [_function(o.program, o.batches, preparation, f"_{o.name}") for o in self.others]
        stored = tuple(Value(name, t.array.shape, str(t.array.dtype)) for name, t in tensors.items())
        integers = frozenset(name for name, each in tensors.items() if _holds_integers(each.array))
        halves = self.program.facts.get(STORED_HALVES, False)
        return Lowered(stored, tuple(preparation.calls), (), tuple(functions), integers, halves).linked()


def _holds_integers(table: np.ndarray) -> bool:
    """Whether each row of a table of 16 entries is -8 to 7."""
    return table.dtype == np.int8 and table.shape[1:] == (16,) and bool((table == np.arange(-8, 8)).all())


def _function(program: Program, batches: Sequence[int], preparation: Preparation, suffix: str = "") -> Function:
    if not batches or min(batches) < 1:
        raise UserError(f"batch sizes {list(batches)} cannot be compiled: name at least one, all of them positive")
    e = Emitter(program, preparation)
    inputs = tuple(
        Value(s.name, tuple(BATCH if d == "B" else d for d in s.shape), type_name(s.dtype)) for s in program.inputs
    )
    placeholders = iter(inputs)
    output: Value | None = None
    for node in program.graph.nodes:
        if node.op == "placeholder":
            e.values[node] = next(placeholders)
        elif node.op == "output":
            output = e.values[operand(node, 0)]
        elif node.op != "get_attr":
            _emit(e, node)
    _require_countable(e.values.values(), max(batches))
    assert output is not None
    shape = e.shape(operand(program.graph.output_node(), 0))
    if not output.batched or output.dtype != "float32" or shape[:1] != (BATCH,):
        kind = f"{output.dtype} {text(shape)}"
        raise UserError(f"the output '{output.name}' is {kind}, where a denoiser yields float32 [B, ...]")
    calls = needed(e.calls, [output.name])  # copies whose readers read the source
    result, made = Value(output.name, shape, output.dtype), tuple(e.results.values())
    return Function(inputs, calls, result, tuple(sorted({*batches})), suffix, made=made)


def _require_countable(values: Iterable[Value], batch: int) -> None:
    """Raises a UserError where a tensor has more elements than the indices of kernels can count."""
    for value in values:
        elements = math.prod(batch if extent == BATCH else int(extent) for extent in value.shape)
        if elements >= 2**31:
            raise UserError(
                f"'{value.name}' has {elements} elements at a batch of {batch}, and kernels count to {2**31 - 1}: "
                "compile for smaller batches or images (--shapes)"
            )


def _emit(e: Emitter, node: fx.Node) -> None:
    if node.op == "call_module":
        region = e.program.regions[str(node.target)]
        inside = [n for n in region.nodes if n.op not in ("placeholder", "output")]
        outer = dict(zip((n for n in region.nodes if n.op == "placeholder"), node.args, strict=True))
        e.task = Task(node, inside, outer)
    else:
        e.task = Task(node, [node])
    anchor = e.task.anchor
    if is_pointwise(anchor):
        e.values[node] = pointwise.kernel(e, e.task.members)
    elif anchor.target in ANCHORS:
        e.values[node] = _anchored(e, ANCHORS[anchor.target])
    elif anchor.target in PLAIN:
        result = PLAIN[anchor.target](e, anchor)
        if isinstance(result, list):
            e.parts[node] = result
        else:
            e.values[node] = result
    else:
        raise e.refusal("no kernel computes it")


def _anchored(e: Emitter, emit: Anchor) -> Value:
    """Emits an anchor with as much of its region as its epilogue holds, and a pointwise kernel for the rest."""
    members = e.task.members
    epilogue = pointwise.epilogue(e, members)
    last = members[epilogue.covered - 1]
    whole = epilogue.covered == len(members)
    name = e.task.node.name if whole else last.name
    out = Value(name, e.shape(last), "uint8" if epilogue.quantizer else "float32")
    value = emit(e, members[0], epilogue, out)
    if whole:
        return value
    e.values[last] = value
    rest = members[epilogue.covered :]
    e.program.fallbacks[e.task.node.name] = (
        f"{ops.name_of(rest[0].target)} does not fit behind {ops.name_of(members[0].target)}: a second kernel"
    )
    return pointwise.kernel(e, rest)


__all__ = ["OUTPUT", "SelectKernels"]
