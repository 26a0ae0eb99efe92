"""Small graphs of float operators as onnxruntime and OpenVINO run them on one thread: what users export to ONNX.

`norms` and concatenations for benchmarks/float_kernels.py; each peer has its own layout, channels first for images.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

Call = Callable[[], object]
SCALE, ZERO = np.float32(1 / 30), np.uint8(128)
"""Of the quantizer at the end."""


def group_norm(side: int, channels: int, groups: int, eps: float, quantizes: bool) -> dict[str, Call]:
    """SiLU(group_norm(x)) of an image, quantized or not."""
    x = np.random.default_rng(0).standard_normal((1, channels, side, side)).astype(np.float32)
    constants = {
        "apart": np.array([0, groups, -1]), "whole": np.array(x.shape), "ones": np.ones(groups, np.float32),
        "zeros": np.zeros(groups, np.float32), "gamma": np.ones((channels, 1, 1), np.float32),
        "beta": np.zeros((channels, 1, 1), np.float32),
    }  # fmt: skip
    nodes = [
        ("Reshape", ("x", "apart"), "a", {}),
        ("InstanceNormalization", ("a", "ones", "zeros"), "b", {"epsilon": eps}),
        ("Reshape", ("b", "whole"), "c", {}),
        ("Mul", ("c", "gamma"), "d", {}),
        ("Add", ("d", "beta"), "e", {}),
        ("Sigmoid", ("e",), "f", {}),
        ("Mul", ("e", "f"), "g", {}),
    ]
    return run(nodes, {"x": x}, constants, quantizes)


def layer_norm(rows: int, channels: int, eps: float, quantizes: bool) -> dict[str, Call]:
    """layer_norm(x) * scale + shift, quantized or not."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((1, rows, channels)).astype(np.float32)
    given = {name: rng.standard_normal((1, 1, channels)).astype(np.float32) for name in ("scale", "shift")}
    nodes = [
        ("LayerNormalization", ("x", "ones"), "a", {"epsilon": eps, "axis": -1}),
        ("Mul", ("a", "scale"), "b", {}),
        ("Add", ("b", "shift"), "c", {}),
    ]
    return run(nodes, {"x": x, **given}, {"ones": np.ones(channels, np.float32)}, quantizes)


def run(
    nodes: Sequence[tuple[str, tuple[str, ...], str, dict[str, Any]]],
    inputs: Mapping[str, np.ndarray],
    constants: Mapping[str, np.ndarray],
    quantizes: bool = False,
) -> dict[str, Call]:
    """Calls of onnxruntime and of OpenVINO, in float32 and with its bfloat16, on the graph of the nodes
    (operator, inputs, output, attributes), the last of which makes the result."""
    from onnx import TensorProto, helper, numpy_helper

    nodes, constants = list(nodes), dict(constants)
    if quantizes:
        nodes.append(("QuantizeLinear", (nodes[-1][2], "q_scale", "q_zero"), "codes", {}))
        constants |= {"q_scale": np.asarray(SCALE), "q_zero": np.asarray(ZERO)}
    made = [helper.make_node(op, read, [written], **attributes) for op, read, written, attributes in nodes]
    kind = TensorProto.UINT8 if quantizes else TensorProto.FLOAT
    graph = helper.make_graph(
        made,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, x.shape) for name, x in inputs.items()],
        [helper.make_tensor_value_info(nodes[-1][2], kind, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10).SerializeToString()
    return {
        "onnxruntime": _onnxruntime(model, inputs),
        "openvino": _openvino(model, inputs, "f32"),
        "openvino-bf16": _openvino(model, inputs, "bf16"),
    }


def _onnxruntime(model: bytes, inputs: Mapping[str, np.ndarray]) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    session = onnxruntime.InferenceSession(model, options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    for name, x in inputs.items():
        binding.bind_ortvalue_input(name, onnxruntime.OrtValue.ortvalue_from_numpy(x))
    output = session.get_outputs()[0].name
    first = session.run(None, dict(inputs))[0]
    binding.bind_ortvalue_output(output, onnxruntime.OrtValue.ortvalue_from_numpy(first))
    return lambda: session.run_with_iobinding(binding)


def _openvino(model: bytes, inputs: Mapping[str, np.ndarray], precision: str) -> Call:
    import openvino

    core = openvino.Core()
    options = {"INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": precision}
    request = core.compile_model(core.read_model(model, b""), "CPU", options).create_infer_request()
    for name, x in inputs.items():
        request.set_tensor(name, openvino.Tensor(x))
    return request.infer
