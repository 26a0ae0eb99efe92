"""An ONNX graph under construction: named nodes, constants, and tensors that lie in a file beside it."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.metadata import version
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from mpq_compiler.ir.program import InputSpec

OPSET = 21
"""The opset: the first whose quantization operators know 4 bits; onnxruntime loads it since 1.18 (May 2024)."""
IR_VERSION = 10
"""The IR version of the ONNX release that introduced the opset."""
BATCH = "batch"

ELEMENT: dict[str, int] = {
    "float32": TensorProto.FLOAT,
    "float16": TensorProto.FLOAT16,
    "float64": TensorProto.DOUBLE,
    "int64": TensorProto.INT64,
    "int32": TensorProto.INT32,
    "int8": TensorProto.INT8,
    "uint8": TensorProto.UINT8,
    "uint4": TensorProto.UINT4,
    "bool": TensorProto.BOOL,
}
"""ONNX's element types, by NumPy's and torch's names."""
_SHORT = {"float32": "f32", "int64": "i64", "int32": "i32", "int8": "i8", "uint8": "u8"}
_LISTED = 8
"""The most values of a constant whose name lists them."""


class Graph:
    """A graph that grows node by node; an equal node is emitted once."""

    def __init__(self, location: str) -> None:
        self.location = location
        """The name of the file beside the model that holds the stored tensors."""
        self.scope = ""
        """The node of the program that is being emitted, after which values are named."""
        self._nodes: list[onnx.NodeProto] = []
        self._initializers: list[onnx.TensorProto] = []
        self._names: set[str] = set()
        self._made: dict[tuple[Any, ...], list[str]] = {}

    def reserve(self, name: str) -> str:
        """Reserves a name that no value may take, for inputs and output."""
        self._names.add(name)
        return name

    def op(self, kind: str, *inputs: str, name: str | None = None, **attributes: Any) -> str:
        """Emits a node with one result, named ``name`` or after scope and operator; an absent operand is ""."""
        return self.ops(kind, 1, *inputs, name=name, **attributes)[0]

    def ops(self, kind: str, results: int, *inputs: str, name: str | None = None, **attributes: Any) -> list[str]:
        """Emits a node with several results; an absent operand is ""."""
        key = (kind, results, inputs, repr(sorted(attributes.items())))
        if key not in self._made:
            base = self._unique(name or f"{self.scope}/{kind}")
            outputs = [base] if results == 1 else [self._unique(f"{base}.{i}") for i in range(results)]
            self._nodes.append(helper.make_node(kind, inputs, outputs, name=base, **attributes))
            self._made[key] = outputs
        return self._made[key]

    def constant(self, value: Any, dtype: str, name: str = "") -> str:
        """Adds a constant to the model, named by its values, or ``name`` where they are many."""
        array = np.asarray(value, np.dtype(dtype))
        key = ("constant", dtype, array.shape, array.tobytes())
        if key not in self._made:
            values = [repr(v.item()) for v in array.reshape(-1)[: _LISTED + 1]]
            text = "[" + ",".join(values) + "]" if array.ndim else values[0]
            label = name if len(values) > _LISTED else _SHORT.get(dtype, dtype) + ":" + text
            tensor = numpy_helper.from_array(array, self._unique(label))
            self._initializers.append(tensor)
            self._made[key] = [tensor.name]
        return self._made[key][0]

    def ints(self, *values: int) -> str:
        """Adds a constant i64 [n]: a shape, axes, positions."""
        return self.constant(values, "int64")

    def external(self, name: str, dtype: str, shape: Sequence[int], begin: int, end: int) -> str:
        """Adds the tensor in bytes begin .. end of the file beside the model."""
        key = ("external", name)
        if key not in self._made:
            tensor = TensorProto(name=self._unique(name), data_type=ELEMENT[dtype], dims=shape)
            tensor.data_location = TensorProto.EXTERNAL
            for field, value in (("location", self.location), ("offset", begin), ("length", end - begin)):
                tensor.external_data.add(key=field, value=str(value))
            self._initializers.append(tensor)
            self._made[key] = [tensor.name]
        return self._made[key][0]

    def model(
        self, name: str, inputs: Sequence[InputSpec], output: str, shape: Sequence[int], source: str
    ) -> onnx.ModelProto:
        """Completes the model.

        Args:
            name: of the graph.
            inputs: the program's inputs.
            output: the name of the output, f32 [batch, *shape].
            shape: of a sample.
            source: the value that becomes the output.
        """
        self._nodes.append(helper.make_node("Identity", [source], [output], name=output))

        def value(spec: InputSpec) -> onnx.ValueInfoProto:
            dims = [BATCH if d == "B" else int(d) for d in spec.shape]
            return helper.make_tensor_value_info(spec.name, ELEMENT[str(spec.dtype).removeprefix("torch.")], dims)

        result = helper.make_tensor_value_info(output, TensorProto.FLOAT, [BATCH, *shape])
        graph = helper.make_graph(self._nodes, name, [value(s) for s in inputs], [result], self._initializers)
        return helper.make_model(
            graph,
            ir_version=IR_VERSION,
            opset_imports=[helper.make_opsetid("", OPSET)],
            producer_name="mpq-compiler",
            producer_version=version("mpq-compiler"),
        )

    def _unique(self, name: str) -> str:
        unique, n = name, 0
        while unique in self._names:
            n += 1
            unique = f"{name}.{n}"
        self._names.add(unique)
        return unique
