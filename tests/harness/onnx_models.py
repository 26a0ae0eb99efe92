"""Programs as ONNX models in onnxruntime, for tests.

>>> onnx_models.run(program, inputs, folder)           # what onnxruntime computes
>>> onnx_models.graph_of(call, inputs, tensors)        # a program around one call
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Tensor, fx

from mpq_compiler.backends import onnx as backend
from mpq_compiler.backends.onnx.emit import emit
from mpq_compiler.ir import stored_tensors
from mpq_compiler.ir.program import InputSpec, Program, Stage, TensorStore
from mpq_compiler.support import tensorfile

WEIGHTS = "weights.safetensors"


def write(program: Program, folder: Path, stored: Mapping[str, stored_tensors.Stored] | None = None) -> Path:
    """The program's model in ``folder``, checked by the package onnx."""
    stored = stored_tensors.stored(program) if stored is None else stored
    path = folder / "model.onnx"
    path.write_bytes(emit(program, stored, WEIGHTS).SerializeToString(deterministic=True))
    with (folder / WEIGHTS).open("wb") as stream:
        tensorfile.save(stream, {name: tensor.array for name, tensor in stored.items()})
    onnx.checker.check_model(str(path), full_check=True)
    return path


def session(path: Path, optimized: Path | None = None) -> onnxruntime.InferenceSession:
    """``optimized``: where to write what onnxruntime makes of the model."""
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 4
    if backend.saturates():
        options.add_session_config_entry(backend.PRECISION, "1")
    if optimized is not None:
        options.optimized_model_filepath = str(optimized)
    return onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def run(program: Program, inputs: Mapping[str, Tensor], folder: Path) -> Tensor:
    feed = {name: value.numpy() for name, value in inputs.items()}
    return torch.from_numpy(np.asarray(session(write(program, folder)).run(None, feed)[0]))


def graph_of(
    build: Callable[[fx.Graph, dict[str, fx.Node]], fx.Node],
    inputs: Mapping[str, Tensor],
    tensors: Mapping[str, Tensor],
    stage: Stage = Stage.PACKED,
) -> Program:
    """A program of what ``build(graph, nodes)`` makes of inputs and stored tensors by name; its result is made f32."""
    graph, nodes = fx.Graph(), {}
    for name in inputs:
        nodes[name] = graph.placeholder(name)
    for name in tensors:
        nodes[name] = graph.get_attr(name)
        nodes[name].name = name.replace(":", "_").replace(".", "_")
    result: Any = build(graph, nodes)
    result = graph.call_function(torch.ops.aten.to.dtype, (result, torch.float32))
    graph.output(result)
    specs = tuple(InputSpec(name, ("B", *value.shape[1:]), value.dtype) for name, value in inputs.items())
    return Program(graph, TensorStore(tensors), specs, stage)
