"""A linear layer or a convolution alone, as torch, onnxruntime and OpenVINO run it on one thread.

Every peer reads tensors that are ready in the type and the layout that it is fastest with. In 8 bits that are u8 codes
and s8 weights with a scale a channel: onnxruntime's QLinearMatMul and QLinearConv (channels last) give u8, its
MatMulIntegerToFloat and OpenVINO's products f32. MatMulNBits takes f32 and makes its own 8 bits of it, block by block.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from mpq_compiler.backends.tvm.kernels.problems.quant_matmul import QuantMatmul

Call = Callable[[], object]
MICROSOFT = "com.microsoft"


def linear(rows: int, channels: int, outputs: int) -> dict[str, Call]:
    """Peers of ``y[rows, outputs] = x[rows, channels] w + bias``."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((rows, channels)).astype(np.float32)
    w = (rng.standard_normal((channels, outputs)) / channels**0.5).astype(np.float32)
    bias = rng.standard_normal(outputs).astype(np.float32)
    codes, scale, weights = _quantized(x, w, 1)
    per_channel = {"b": weights, "b_scale": scale, "b_zero": np.zeros(outputs, np.int8)}
    constants = {"x_scale": np.float32(0.02), "x_zero": np.uint8(128), **per_channel}
    own = {"y_scale": np.float32(0.03), "y_zero": np.uint8(128)}
    inputs = ("x", "x_scale", "x_zero", "b", "b_scale", "b_zero")
    to_float = ("x", "b", "x_scale", "b_scale", "x_zero", "b_zero", "bias")
    result = (rows, outputs)
    return {
        **_torch_linear(x, w, bias),
        "onnxruntime-fp32": _onnx("Gemm", ("x", "w", "bias"), x, {"w": w, "bias": bias}, np.zeros(result, np.float32)),
        "onnxruntime-int8": _onnx(
            "QLinearMatMul", (*inputs, *own), codes, constants | own, np.zeros(result, np.uint8)
        ),
        "onnxruntime-int8-to-float": _onnx(
            "MatMulIntegerToFloat", to_float, codes, constants | {"bias": bias}, np.zeros(result, np.float32), MICROSOFT
        ),
        **{f"openvino-{kind}": _openvino(kind, x, codes, weights, scale, w, bias) for kind in ("fp32", "bf16", "int8")},
    }  # fmt: skip


def convolution(problem: QuantMatmul) -> dict[str, Call]:
    """Peers of a convolution at batch 1; in 8 bits requantized, as ours."""
    p, rng = problem, np.random.default_rng(0)
    x = rng.standard_normal((1, p.channels, p.height, p.width)).astype(np.float32)
    w = (rng.standard_normal((p.outputs, p.channels, *p.kernel)) / p.reduction**0.5).astype(np.float32)
    bias = rng.standard_normal(p.outputs).astype(np.float32)
    codes, scale, weights = _quantized(x, w, 0)
    top, bottom, left, right = p.padding
    spatial: dict[str, Any] = {"strides": p.stride, "pads": (top, left, bottom, right), "kernel_shape": p.kernel}
    constants = {
        "x_scale": np.float32(0.02), "x_zero": np.uint8(128), "w": weights, "w_scale": scale.reshape(-1),
        "w_zero": np.zeros(p.outputs, np.int8), "y_scale": np.float32(0.03), "y_zero": np.uint8(128),
        "bias": np.zeros(p.outputs, np.int32),
    }  # fmt: skip
    last = np.ascontiguousarray(codes.transpose(0, 2, 3, 1))
    y = np.zeros((1, p.outputs, p.out_height, p.out_width), np.float32)
    return {
        **_torch_convolution(x, w, bias, p),
        "onnxruntime-fp32": _onnx("Conv", ("x", "w", "bias"), x, {"w": w, "bias": bias}, y, **spatial),
        "onnxruntime-int8": _onnx(
            "QLinearConv", ("x", *constants), last, constants, np.zeros((1, *y.shape[2:], p.outputs), np.uint8),
            MICROSOFT, channels_last=1, **spatial,
        ),
        **{
            f"openvino-{kind}": _openvino(kind, x, last, weights, scale, w, bias, problem=p)
            for kind in ("fp32", "bf16", "int8")
        },
    }  # fmt: skip


def blocks_of_bits(rows: int, channels: int, outputs: int, block: int) -> dict[str, Call]:
    """onnxruntime's MatMulNBits of 4 bits with a scale for each ``block`` values of k, computed in 8 bits."""
    rng, blocks = np.random.default_rng(0), channels // block
    constants = {
        "b": rng.integers(0, 256, (outputs, blocks, block // 2)).astype(np.uint8),
        "scales": (0.01 + rng.random(outputs * blocks) / 100).astype(np.float32),
    }
    x, y = rng.standard_normal((rows, channels)).astype(np.float32), np.zeros((rows, outputs), np.float32)
    sizes = {"K": channels, "N": outputs, "bits": 4, "block_size": block, "accuracy_level": 4}
    call = _onnx("MatMulNBits", ("x", "b", "scales"), x, constants, y, MICROSOFT, **sizes)
    return {"onnxruntime-nbits": call}


def _quantized(x: np.ndarray, w: np.ndarray, axis: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """(codes u8, scales of the weights along an axis, weights s8)."""
    others = tuple(i for i in range(w.ndim) if i != axis)
    scale = np.abs(w).max(others, keepdims=True) / 127
    codes = np.clip(np.rint(x / 0.02) + 128, 0, 255).astype(np.uint8)
    flat = scale.reshape(-1) if w.ndim == 2 else scale
    return codes, flat.astype(np.float32), np.rint(w / scale).astype(np.int8)


def _torch_linear(x: np.ndarray, w: np.ndarray, bias: np.ndarray) -> dict[str, Call]:
    import torch
    from torch.nn import functional

    def of(dtype: torch.dtype) -> Call:
        operands = [torch.from_numpy(np.ascontiguousarray(a)).to(dtype) for a in (x, w.T, bias)]
        return lambda: functional.linear(*operands)

    return {"torch-fp32": of(torch.float32), "torch-bf16": of(torch.bfloat16)}


def _torch_convolution(x: np.ndarray, w: np.ndarray, bias: np.ndarray, p: QuantMatmul) -> dict[str, Call]:
    import torch
    from torch.nn import functional

    top, bottom, left, right = p.padding
    if top != bottom or left != right:
        return {}  # torch pads alike on both sides

    def of(dtype: torch.dtype, layout: torch.memory_format) -> Call:
        image, weight = (torch.from_numpy(a).to(dtype).contiguous(memory_format=layout) for a in (x, w))
        b = torch.from_numpy(bias).to(dtype)
        return lambda: functional.conv2d(image, weight, b, p.stride, (top, left))

    return {
        "torch-fp32": of(torch.float32, torch.contiguous_format),
        "torch-bf16": of(torch.bfloat16, torch.channels_last),
    }


def _onnx(
    op: str, inputs: tuple[str, ...], x: np.ndarray, constants: Mapping[str, Any], y: np.ndarray, domain: str = "",
    **attributes: Any,
) -> Call:  # fmt: skip
    """A session of one node ``y = op(inputs)``, x being what is not constant; on buffers of its own."""
    import onnxruntime
    from onnx import helper, numpy_helper

    def described(name: str, value: np.ndarray) -> Any:
        return helper.make_tensor_value_info(name, helper.np_dtype_to_tensor_dtype(value.dtype), value.shape)

    node = helper.make_node(op, inputs, ["y"], domain=domain, **attributes)
    stored = [numpy_helper.from_array(np.asarray(value), name) for name, value in constants.items()]
    graph = helper.make_graph([node], "g", [described("x", x)], [described("y", y)], stored)
    domains = [helper.make_opsetid("", 21), helper.make_opsetid(MICROSOFT, 1)]
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    model = helper.make_model(graph, opset_imports=domains, ir_version=10)
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    binding = session.io_binding()
    binding.bind_ortvalue_input("x", onnxruntime.OrtValue.ortvalue_from_numpy(x))
    binding.bind_ortvalue_output("y", onnxruntime.OrtValue.ortvalue_from_numpy(y))
    return lambda: session.run_with_iobinding(binding)


def _openvino(
    kind: str, x: np.ndarray, codes: np.ndarray, weights: np.ndarray, scale: np.ndarray, w: np.ndarray,
    bias: np.ndarray, problem: QuantMatmul | None = None,
) -> Call:  # fmt: skip
    import openvino
    from openvino import opset13 as op

    quantized = kind == "int8"
    given = codes if quantized else x
    parameter = op.parameter(given.shape, openvino.Type.u8 if quantized else openvino.Type.f32)
    value, weight = parameter, op.constant(w)
    if quantized:  # OpenVINO takes a network for quantized that has a FakeQuantize
        value = op.convert(value, openvino.Type.f32)
        limits = (np.float32(n) for n in (0, 255, -2.56, 2.54))
        value = op.fake_quantize(value, *limits, 256)
        weight = op.multiply(op.convert(op.constant(weights), openvino.Type.f32), op.constant(scale))
    if problem is None:
        y = op.add(op.matmul(value, weight, False, False), op.constant(bias[None]))
    else:
        (top, bottom, left, right), n = problem.padding, len(bias)
        if quantized:
            value = op.transpose(value, np.array([0, 3, 1, 2]))
        y = op.convolution(value, weight, problem.stride, (top, left), (bottom, right), (1, 1))
        y = op.add(y, op.constant(bias.reshape(1, n, 1, 1)))
        if quantized:
            y = op.fake_quantize(y, *(np.float32(n) for n in (-3.84, 3.81, 0, 255)), 256)
            y = op.convert(op.transpose(y, np.array([0, 2, 3, 1])), openvino.Type.u8)
    options = {
        "INFERENCE_NUM_THREADS": 1, "NUM_STREAMS": 1, "INFERENCE_PRECISION_HINT": "bf16" if kind == "bf16" else "f32"
    }  # fmt: skip
    model = openvino.Model([op.result(y)], [parameter], "m")
    request = openvino.Core().compile_model(model, "CPU", options).create_infer_request()
    request.set_input_tensor(0, openvino.Tensor(given))
    return request.infer
