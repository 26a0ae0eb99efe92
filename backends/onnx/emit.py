"""Writes a program as an ONNX model, operator by operator."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import onnx

from mpq_compiler.backends.onnx import float_ops, integer_ops
from mpq_compiler.backends.onnx.emitter import Emitter, Emitters, Value
from mpq_compiler.ir.program import Program
from mpq_compiler.ir.stored_tensors import Stored

EMITTERS = Emitters(float_ops.EMITTERS | integer_ops.EMITTERS)
"""The function that emits calls of each operator."""


def emit(program: Program, stored: Mapping[str, Stored], location: str) -> onnx.ModelProto:
    """Emits a program as an ONNX model; nodes that do not run as planned are added to ``program.fallbacks``.

    Args:
        program: packed, or before quantization.
        stored: its stored tensors by name.
        location: the name of the file beside the model that holds them.

    Raises:
        UserError: a node that ONNX cannot express.
    """
    return read_constants(select(program, stored, location).model)


@dataclass(frozen=True)
class Selected:
    """A program as an ONNX model, with constants that nothing reads still among the others.

    values: what computes each node, by the node's name.
    dtypes: the element types of these values.
    """

    model: onnx.ModelProto
    values: Mapping[str, Value]
    dtypes: Mapping[str, str]


def select(program: Program, stored: Mapping[str, Stored], location: str) -> Selected:
    """Writes each call of a program as ONNX operators, as `emit` does; equal ones are written once."""
    emitter = Emitter(program, stored, location, EMITTERS)
    model = emitter.model()
    values = {node: value for node, value in emitter.made.items() if isinstance(value, Value)}
    dtypes = {node.name: emitter.dtype(node) for node in values}
    return Selected(model, {node.name: value for node, value in values.items()}, dtypes)


def read_constants(model: onnx.ModelProto) -> onnx.ModelProto:
    """The model without constants that nothing reads."""
    read = {name for node in model.graph.node for name in node.input}
    kept = [tensor for tensor in model.graph.initializer if tensor.name in read]
    changed = onnx.ModelProto()
    changed.CopyFrom(model)
    del changed.graph.initializer[:]
    changed.graph.initializer.extend(kept)
    return changed
