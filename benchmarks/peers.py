"""Peers' quantizers on the models of `benchmarks.realistic`, as their users call them, each in a process of its own.

    python -m benchmarks.peers rows MODEL FOLDER ROWS                  # what all are calibrated on and judged by
    python -m benchmarks.peers make PEER MODEL FOLDER ROWS TARGET      # quantizes, and writes what is run
    python -m benchmarks.peers judge PEER MODEL FOLDER ROWS TARGET     # its outputs on the held-out rows
    python -m benchmarks.peers step PEER MODEL FOLDER ROWS TARGET THREADS CALLS INTO

`benchmarks.scale_peers` and `benchmarks.scale_steps` run these. Rows of a model lie as arrays beside the float model's
outputs, so that no peer's process holds another model than its own. What a peer does:

- *onnxruntime*: `torch.onnx.export`, `quant_pre_process` (without the optimizer above 2 GB, as its documentation asks),
  `quantize_static` with QDQ, a scale a channel, u8 activations and s8 weights of convolutions and products, and ranges
  by minima and maxima, or by percentiles, for which it keeps all tensors, so that it gets fewer rows; or the export
  alone, in float32, where quantizing it takes more memory than there is;
- *OpenVINO*: `openvino.convert_model` of the module, `nncf.quantize` with the mixed preset, with and without what it
  does for transformers, or `nncf.compress_weights`, to 8 bits by default;
- *torchao*: `quantize_` of the linear layers of the bfloat16 model, to 8-bit weights with 8-bit activations whose
  ranges are found in each call, or to 4-bit weights in groups of 32.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import logging
import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import realistic
from benchmarks.cells import SIZE, sentence

ONNXRUNTIME = {"onnxruntime": "MinMax", "onnxruntime-percentile": "Percentile", "onnxruntime-float": None}
"""Variants by the method that ranges activations; None leaves the model in float32, which takes less memory to make."""
PERCENTILE_ROWS = 8
"""The rows, spread over time, whose tensors onnxruntime keeps all at once to find percentiles: 48 of a UNet of 81 M
parameters take more than 15 GiB."""
OPENVINO = {"openvino": False, "openvino-transformer": True, "openvino-weights": None}
"""Variants by whether the model is said to be a transformer, which smooths activations (SmoothQuant); None quantizes
weights alone, which runs the model on no rows."""
TORCHAO = ("torchao-int8", "torchao-int4")
PEERS = (*ONNXRUNTIME, *OPENVINO, *TORCHAO)
FLOAT = "torch-bf16"
"""The float model in bfloat16, which is made of nothing but the checkpoint."""
OURS = "mpq"
"""The first word of the names of our artifacts, which `step` runs too."""
PACKAGES = {"onnxruntime": ("onnxruntime", "onnx", "onnxscript"), "openvino": ("openvino", "nncf"),
            "torchao": ("torchao",), "torch": (), "mpq": ()}  # fmt: skip
"""The packages of a peer by the first word of its name, beside torch."""
GROUP = 32
"""Weights that share a scale in torchao's 4 bits."""
LARGEST = 2 << 30
"""The bytes of a model that onnxruntime's optimizer can write; of a larger checkpoint OpenVINO gets 16-bit weights."""

Call = Callable[[Mapping[str, np.ndarray]], np.ndarray]


def main() -> None:
    task, *arguments = sys.argv[1:]
    tasks: dict[str, Callable[..., dict[str, Any] | None]] = {"rows": rows, "make": make, "judge": judge, "step": step}
    try:
        told = tasks[task](*arguments)
        if told is not None:
            (Path(arguments[-1]) / f"{task}.json").write_text(json.dumps(told), encoding="utf-8")
    except Exception as error:  # peers raise errors of many kinds; the last line is what stands in the table
        text = (str(error).strip().splitlines() or [""])[0]
        print(f"\n{type(error).__name__}: {sentence(text)}", file=sys.stderr, flush=True)
        os._exit(1)  # threads of a runtime may have more to say while they end


# --- the model and its rows -----------------------------------------------------------------------------------------


def rows(name: str, folder: str, target: str) -> None:
    """Writes rows to calibrate on and rows to judge by as arrays, and the float model's outputs on the latter."""
    from mpq_compiler.driver.held_out import held_out
    from mpq_compiler.driver.options import Options
    from mpq_compiler.frontend import calibration_file

    calls = Path(folder) / "calls.safetensors"
    denoiser = loaded(name, folder)
    parts = {
        "calibration": calibration_file.split(calibration_file.load(denoiser, calls))[0],
        "held_out": held_out(denoiser, Options(calibration=calls)),
    }
    for part, tensors in parts.items():
        (Path(target) / part).mkdir(parents=True, exist_ok=True)
        for key, tensor in tensors.items():
            np.save(Path(target) / part / f"{key}.npy", tensor.numpy())
    (Path(target) / "inputs.json").write_text(json.dumps(list(denoiser.input_specs)), encoding="utf-8")
    expected = [denoiser(**row).numpy() for row in each(Path(target), "held_out")]
    np.save(Path(target) / "expected.npy", np.concatenate(expected))


def each(rows: Path, part: str) -> Iterator[dict[str, np.ndarray]]:
    """The rows of a part, each a batch of one; arrays are mapped, so that they are none of the process's own memory."""
    names = json.loads((rows / "inputs.json").read_text(encoding="utf-8"))
    arrays = {name: np.load(rows / part / f"{name}.npy", mmap_mode="r") for name in names}
    for index in range(len(arrays[names[0]])):
        yield {name: np.array(array[index : index + 1]) for name, array in arrays.items()}


def loaded(name: str, folder: str) -> Any:
    """The f32 denoiser, its model loaded as diffusers' users do."""
    import torch

    from mpq_compiler.frontend import call_file, denoiser

    model, calls = pretrained(name, folder, torch.float32), Path(folder) / "calls.safetensors"
    if call_file.has_call(calls):
        return denoiser.wrap_calls(model, calls, name=name)
    return denoiser.wrap(model, name=name, size=SIZE)


def pretrained(name: str, folder: str, dtype: Any) -> Any:
    """The model in a type, by diffusers."""
    import diffusers

    return getattr(diffusers, realistic.MODELS[name].cls).from_pretrained(folder, torch_dtype=dtype).eval()


def half(name: str, folder: str) -> Any:
    """The module in bfloat16, a function of named tensors; a model that is taken by its calls is in f32 before."""
    import torch

    from mpq_compiler.frontend import call_file, denoiser
    from mpq_compiler.frontend.input_specs import TensorModule

    if call_file.has_call(Path(folder) / "calls.safetensors"):
        return loaded(name, folder).module.to(torch.bfloat16)
    specs = denoiser.wrap(realistic.empty(name), name=name, size=SIZE).input_specs
    return TensorModule(pretrained(name, folder, torch.bfloat16).requires_grad_(False), specs).to(torch.bfloat16).eval()


def positional(module: Any, names: Sequence[str]) -> Any:
    """A module as a function of tensors in order, which exporters can trace."""
    import torch

    class Positional(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = module

        def forward(self, *values: torch.Tensor) -> torch.Tensor:
            output: torch.Tensor = self.module(**dict(zip(names, values, strict=True)))
            return output

    return Positional().eval()


# --- making ---------------------------------------------------------------------------------------------------------


def make(peer: str, name: str, folder: str, rows: str, target: str) -> dict[str, Any]:
    """Quantizes a model into a folder; returns the seconds of what comes before, and of quantizing."""
    logging.disable(logging.WARNING)
    begin = time.perf_counter()
    if peer in ONNXRUNTIME:
        exported = _exported(name, folder, Path(rows))
        between = time.perf_counter()
        if (method := ONNXRUNTIME[peer]) is None:
            for file, place in ((exported, "model.onnx"), (_data_of(exported), _data_of(exported).name)):
                shutil.move(file, Path(target) / place)
        else:
            _quantize_onnx(exported, Path(rows), Path(target), method)
    elif peer in OPENVINO:
        converted = _converted(name, folder, Path(rows))
        between = time.perf_counter()
        _quantize_openvino(converted, Path(rows), Path(target), OPENVINO[peer])
    else:
        module = half(name, folder)
        between = time.perf_counter()
        _quantize_torch(module, peer, Path(target))
    done = time.perf_counter()
    return {"before_seconds": round(between - begin, 1), "quantize_seconds": round(done - between, 1)}


def _example(module: Any, rows: Path) -> tuple[Any, list[str], tuple[Any, ...]]:
    """(the module as a function of tensors in order, their names, a call)."""
    import torch

    row = next(each(rows, "calibration"))
    return positional(module, [*row]), [*row], tuple(torch.from_numpy(value) for value in row.values())


def _exported(name: str, folder: str, rows: Path) -> Path:
    """The f32 model as ONNX, in the working folder; nothing of torch's is left in memory."""
    import gc

    import torch

    module, names, call = _example(loaded(name, folder).module, rows)
    path = Path("float.onnx").absolute()
    with torch.no_grad(), contextlib.redirect_stdout(sys.stderr):
        torch.onnx.export(
            module, call, str(path), input_names=names, output_names=["output"], dynamo=True, external_data=True
        )
    del module, call
    gc.collect()
    _without_idle_squeezes(path)
    return path


def _data_of(exported: Path) -> Path:
    """The file with the weights of an exported model."""
    return exported.with_name(f"{exported.name}.data")


def _without_idle_squeezes(path: Path) -> None:
    """Makes the identity of each Squeeze of an axis that is longer than 1, which torch leaves as it is.

    ONNX forbids it, and onnxruntime refuses the model; torch's exporter writes it all the same (PixArt's has one).
    """
    import onnx
    from onnx import numpy_helper

    model = onnx.load(str(path), load_external_data=False)
    graph, found = model.graph, 0
    shapes = {value.name: value.type.tensor_type.shape.dim for value in (*graph.value_info, *graph.input)}
    numbers = {tensor.name: tensor for tensor in graph.initializer}
    for node in graph.node:
        if node.op_type == "Squeeze" and len(node.input) == 2 and node.input[1] in numbers and node.input[0] in shapes:
            axes, shape = numpy_helper.to_array(numbers[node.input[1]]).reshape(-1), shapes[node.input[0]]
            if any(shape[axis].dim_value > 1 for axis in axes):
                node.op_type, node.input[:] = "Identity", node.input[:1]
                found += 1
    if found:
        onnx.save(model, str(path))


def _quantize_onnx(exported: Path, rows: Path, target: Path, method: str) -> None:
    import onnx
    from onnxruntime import quantization
    from onnxruntime.quantization.shape_inference import quant_pre_process

    prepared = Path("prepared.onnx").absolute()
    data = _data_of(exported)
    large = data.exists() and data.stat().st_size > LARGEST
    graph = onnx.load(str(exported), load_external_data=False).graph
    inputs = {value.name for value in graph.input}
    quant_pre_process(
        str(exported), str(prepared), skip_optimization=large, skip_symbolic_shape=large, save_as_external_data=True,
        all_tensors_to_one_file=True, external_data_location="prepared.onnx.data",
    )  # fmt: skip
    for file in (exported, data):
        file.unlink(missing_ok=True)  # three copies of a large model are too many for a disk
    count = sum(1 for _ in each(rows, "calibration"))
    every = max(1, count // PERCENTILE_ROWS) if method == "Percentile" else 1
    chosen = itertools.islice(each(rows, "calibration"), 0, None, every)
    remaining = ({key: value for key, value in row.items() if key in inputs} for row in chosen)

    class Reader:  # what onnxruntime takes for a CalibrationDataReader: it asks for `get_next` alone
        def get_next(self) -> Any:
            return next(remaining, None)

    quantization.quantize_static(
        str(prepared), str(target / "model.onnx"), Reader(), quant_format=quantization.QuantFormat.QDQ,
        per_channel=True, activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
        op_types_to_quantize=["Conv", "MatMul", "Gemm"], use_external_data_format=True,
        calibrate_method=quantization.CalibrationMethod[method],
    )  # fmt: skip


def _converted(name: str, folder: str, rows: Path) -> Any:
    """OpenVINO's model; of a large checkpoint with its 16-bit weights, as optimum-intel converts those."""
    import openvino
    from openvino.frontend.pytorch import patch_model

    large = realistic.checkpoint_bytes(Path(folder)) > LARGEST
    module, _, call = _example(half(name, folder) if large else loaded(name, folder).module, rows)
    if large:
        patch_model.__make_16bit_traceable(module)
    shapes = [(list(value.shape), openvino.Type(value.numpy().dtype)) for value in call]
    return openvino.convert_model(module, example_input=call, input=[(shape, kind) for shape, kind in shapes])


def _quantize_openvino(model: Any, rows: Path, target: Path, transformer: bool | None) -> None:
    import nncf
    import openvino

    nncf.set_log_level(logging.ERROR)
    if transformer is None:
        quantized = nncf.compress_weights(model)
    else:
        inputs = [[*row.values()] for row in each(rows, "calibration")]
        quantized = nncf.quantize(
            model, nncf.Dataset(inputs), preset=nncf.QuantizationPreset.MIXED, subset_size=len(inputs),
            model_type=nncf.ModelType.TRANSFORMER if transformer else None,
        )  # fmt: skip
    openvino.save_model(quantized, str(target / "model.xml"), compress_to_fp16=True)


def _quantize_torch(module: Any, peer: str, target: Path) -> None:
    import torch
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    if peer == "torchao-int8":
        quantize_(module, Int8DynamicActivationInt8WeightConfig())
    else:
        from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig

        quantize_(module, PrototypeInt4WeightOnlyConfig(group_size=GROUP))
    torch.save(module.state_dict(), target / "model.pt")


# --- running --------------------------------------------------------------------------------------------------------


def judge(peer: str, name: str, folder: str, rows: str, target: str) -> None:
    """Writes the outputs of a model on the held-out rows to ``output.npy`` beside it."""
    call = load(peer, name, folder, Path(target), os.cpu_count() or 1)
    np.save(Path(target) / "output.npy", np.concatenate([call(row) for row in each(Path(rows), "held_out")]))


def step(
    peer: str, name: str, folder: str, rows: str, target: str, threads: str, calls: str, into: str
) -> dict[str, Any]:
    """Loads a model and calls it on held-out rows, one after the other; returns its seconds and its mapped bytes.

    The first output is left in the folder ``into``.
    """
    inputs = [row for row, _ in zip(each(Path(rows), "held_out"), range(int(calls) + 1), strict=False)]
    begin = time.perf_counter()
    call = load(peer, name, folder, Path(target), int(threads))
    load_seconds = time.perf_counter() - begin
    walls, cpus = [], []
    for row in inputs:
        wall, cpu = time.perf_counter(), time.process_time()
        output = call(row)
        walls.append(time.perf_counter() - wall)
        cpus.append(time.process_time() - cpu)
        if len(walls) == 1:
            np.save(Path(into) / "output.npy", output)
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    mapped = 1024 * int(status.partition("RssFile:")[2].split()[0])
    return {"load_seconds": load_seconds, "calls": walls, "cpu_calls": cpus, "mapped_bytes": mapped}


def load(peer: str, name: str, folder: str, target: Path, threads: int) -> Call:
    """A call of a model on a row, on so many threads; of OpenVINO with bfloat16 between if the name ends in it."""
    if peer.startswith(OURS):
        from mpq_compiler.runtime import compiled_denoiser

        return compiled_denoiser.load(target / "model.mpq", threads, reuse_bytes=0).run
    if peer.startswith("onnxruntime"):
        return _onnxruntime(target / "model.onnx", threads)
    if peer.startswith("openvino"):
        return _openvino(target / "model.xml", threads, peer.endswith("bf16"))
    return _torch(peer, name, folder, target, threads)


def _onnxruntime(path: Path, threads: int) -> Call:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads, options.log_severity_level = threads, 1, 4
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    inputs = {value.name for value in session.get_inputs()}
    return lambda row: np.asarray(session.run(None, {k: v for k, v in row.items() if k in inputs})[0])


def _openvino(path: Path, threads: int, bf16: bool) -> Call:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY",
               "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32"}  # fmt: skip
    request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    return lambda row: np.asarray(request.infer([*row.values()])[0])


def _torch(peer: str, name: str, folder: str, target: Path, threads: int) -> Call:
    import torch

    torch.set_num_threads(threads)
    if peer != FLOAT:
        import torchao.prototype.quantization.int4
        import torchao.quantization  # noqa: F401  (their tensors can be read then)
    module = half(name, folder)
    if peer != FLOAT:
        state = torch.load(target / "model.pt", weights_only=False, mmap=True)
        module.load_state_dict(state, assign=True)

    def call(row: Mapping[str, np.ndarray]) -> np.ndarray:
        tensors = {key: torch.from_numpy(value) for key, value in row.items()}
        given = {k: t.to(torch.bfloat16) if t.is_floating_point() and t.ndim > 1 else t for k, t in tensors.items()}
        with torch.no_grad():
            return np.asarray(module(**given).float().numpy())

    return call


if __name__ == "__main__":
    main()
