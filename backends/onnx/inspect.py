"""ONNX models between the stages of a lowering, as dumps look at them: as text, and run by onnxruntime."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
from onnx import helper

from mpq_compiler.artifact.bundle import WEIGHTS
from mpq_compiler.backends.onnx import FUNCTION, PRECISION, saturates
from mpq_compiler.backends.onnx.graph import ELEMENT
from mpq_compiler.backends.onnx.lowering import Models
from mpq_compiler.ir import ops, views
from mpq_compiler.ir.program import Program
from mpq_compiler.pipeline.stages import Inspectable
from mpq_compiler.support import tensorfile
from mpq_compiler.support.errors import UserError

ROUNDING = 1e-5
"""How far the results of float kernels may differ, relative to the largest one (docs/ir.md)."""
TIES = 1e-2
"""How far a tie within a quantized attention may move its result, relative to the largest one."""
SMALL_FLOAT_STEP = 0.5
"""How far a tie of a small float may move a value at most, relative to the largest one."""
Arrays = Mapping[str, np.ndarray]


class InspectableModels(Inspectable):
    """The models with the tensors that they read. The first of them is run."""

    def __init__(self, plan: Models, program: Program, tensors: Arrays) -> None:
        self.plan, self.program, self.tensors = plan, program, tensors
        self._selected = plan.models[FUNCTION]
        self._targets = {call.name: call.target for call in views.flatten(program)}

    def text(self, stage: str) -> str:
        counts = [f"{len(each.model.graph.node)} operators" for each in self.plan.models.values()]
        lines = [f"// {stage + ': ' if stage else ''}lowered stage, {', '.join(counts)}"]
        for name, selected in self.plan.models.items():
            lines += _text(name, selected.model.graph)
        return "\n".join(lines) + "\n"

    def output(self) -> str:
        result = self.program.graph.output_node().args[0]
        return str(getattr(result, "name", ""))

    def tolerance(self, value: str) -> float:
        target = self._targets.get(value)
        if target in (ops.quantize, ops.dynamic_quantize):
            return 1.0
        if target is ops.fake_quantize_float:
            return SMALL_FLOAT_STEP
        return TIES if target is ops.quant_attention else ROUNDING

    def run(self, inputs: Arrays, known: Arrays | None = None) -> dict[str, np.ndarray]:
        values = {node: value for node, value in self._selected.values.items() if node in self._targets}
        model = onnx.ModelProto()
        model.CopyFrom(self._selected.model)
        given = dict(inputs)
        for node, value in values.items() if known else ():
            if known is not None and node in known and value.name not in inputs:
                array = known[node].astype(self._selected.dtypes[node])
                given |= _forced(model, value.name, np.moveaxis(array, -1, 1) if value.first else array)
        made = dict.fromkeys(value.name for value in values.values())
        made = {name: None for name in made if name not in inputs}
        present = {value.name for value in model.graph.output}
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in made if name not in present)
        results = dict(zip(made, _session(model, self.tensors).run([*made], _contiguous(given)), strict=True))
        found = {}
        for node, value in values.items():
            if value.name in results:
                array = np.asarray(results[value.name])
                array = array.astype(np.float32) if array.dtype == bool else array
                found[node] = np.ascontiguousarray(np.moveaxis(array, 1, -1) if value.first else array)
        return found


def _forced(model: onnx.ModelProto, name: str, array: np.ndarray) -> dict[str, np.ndarray]:
    """Makes operators read a value from an input of the model, in place of the one that is computed."""
    fed, readers = f"known/{name}", [node for node in model.graph.node if name in node.input]
    for node in readers:
        operands = [fed if operand == name else operand for operand in node.input]
        del node.input[:]
        node.input.extend(operands)
    if not readers or any(value.name == fed for value in model.graph.input):
        return {}
    model.graph.input.append(helper.make_tensor_value_info(fed, ELEMENT[str(array.dtype)], array.shape))
    return {fed: array}


def _session(model: onnx.ModelProto, tensors: Arrays) -> onnxruntime.InferenceSession:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if saturates():
        options.add_session_config_entry(PRECISION, "1")
    with tempfile.TemporaryDirectory(prefix="mpq-") as folder:
        path = Path(folder, "model.onnx")
        path.write_bytes(model.SerializeToString(deterministic=True))
        with Path(folder, WEIGHTS).open("wb") as stream:
            tensorfile.save(stream, tensors)
        try:
            return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's errors have no base of their own
            said = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
            raise UserError(f"onnxruntime cannot run it: {said}") from error


def _contiguous(arrays: Arrays) -> dict[str, np.ndarray]:
    return {name: np.ascontiguousarray(array) for name, array in arrays.items()}


def _text(name: str, graph: onnx.GraphProto) -> Iterator[str]:
    stored = {tensor.name for tensor in graph.initializer}
    inputs = ", ".join(f"%{value.name}" for value in graph.input)
    yield f"{name}({inputs}) -> {', '.join(f'%{value.name}' for value in graph.output)} {{  // {len(stored)} constants"
    for node in graph.node:
        operands = [operand if operand in stored or not operand else f"%{operand}" for operand in node.input]
        attributes = [f"{a.name}={_attribute(a)}" for a in sorted(node.attribute, key=lambda a: a.name)]
        results = ", ".join(f"%{result}" for result in node.output)
        yield f"  {results} = {node.op_type}({', '.join([*operands, *attributes])})"
    for constant in sorted(stored):
        yield f"  // constant {constant}"
    yield "}"


def _attribute(attribute: onnx.AttributeProto) -> str:
    value = helper.get_attribute_value(attribute)
    if isinstance(value, bytes):
        return value.decode()
    if isinstance(value, onnx.TensorProto):
        return str(onnx.numpy_helper.to_array(value).tolist())
    return str(value).replace(" ", "")
