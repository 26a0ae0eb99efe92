"""The float model in torch, onnxruntime and OpenVINO, as it is and quantized as their users would.

Each *variant* of a peer is a subject of its own: f32; bfloat16, where the CPU has instructions for it; and 8 bits.
onnxruntime's 8 bits are static QDQ with a scale a channel (`quantize_static`, u8 activations, s8 weights) of
convolutions and products, which is faster than its default of all operators and 5 to 16 dB better; OpenVINO's are
NNCF's post-training quantization (preset *mixed*). Both are calibrated on the same `CALIBRATION` inputs.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler.bench.subject import Subject
from mpq_compiler.frontend import checkpoint
from mpq_compiler.latency.timing import Arrays
from mpq_compiler.support.errors import UserError, nearest
from mpq_compiler.support.execution import tracked
from mpq_compiler.targets.table import host_features

PEERS: Mapping[str, tuple[str, ...]] = {
    "torch": ("torch-fp32", "torch-bf16"),
    "onnxruntime": ("onnxruntime-fp32", "onnxruntime-int8"),
    "openvino": ("openvino-fp32", "openvino-bf16", "openvino-int8", "openvino-int8-bf16"),
}
"""The variants of each peer."""
CALIBRATION = (8, 4)
"""Trajectories and steps on whose inputs the peers' activations are ranged."""
JUDGED = (4, 4)
"""Trajectories and steps, of another seed, on whose inputs the output of every subject is judged."""


def chosen(against: Sequence[str]) -> list[str]:
    """The variants that are asked for, by peer or one by one. UserError: an unknown name."""
    known = [*PEERS, *(variant for variants in PEERS.values() for variant in variants)]
    found: dict[str, None] = {}
    for name in against:
        if name not in known:
            raise UserError(f"--against '{name}' is no peer: {nearest(name, known)}")
        found |= dict.fromkeys(PEERS.get(name, (name,)))
    return list(found)


class Model:
    """The float model that the peers run, and what is made of it in a folder, once each."""

    def __init__(self, source: str, inputs: Arrays, scratch: Path) -> None:
        """``source``: a folder or bundled name. UserError: its inputs are not those of the artifact."""
        self.source, self.inputs, self.scratch = source, inputs, scratch
        self.denoiser = float_model(source, inputs)
        theirs = {name: spec.sample for name, spec in self.denoiser.input_specs.items()}
        ours = {name: value.shape[1:] for name, value in inputs.items()}
        if theirs != ours:
            takes = f"'{source}' takes {_text(theirs)}, the artifact {_text(ours)}"
            raise UserError(f"{takes}: name its model with --model")

    def recorded(self, samples: int, steps: int, seed: int) -> list[dict[str, np.ndarray]]:
        """Inputs along trajectories, in batches like ``inputs``; random ones where the model cannot be sampled."""
        import torch

        from mpq_compiler.frontend.trajectories import record_calibration

        batch = len(next(iter(self.inputs.values())))
        with torch.no_grad():
            if self.denoiser.conditioning.possible:
                found = record_calibration(self.denoiser, samples, steps, seed)
            else:
                found = self.denoiser.random_inputs(samples * steps, seed)
        count = len(next(iter(found.values()))) // batch
        every = max(1, count // max(1, samples * steps // batch))  # guidance calls the model twice a step
        parts = range(0, count, every)
        return [{name: value[i * batch : (i + 1) * batch].numpy() for name, value in found.items()} for i in parts]

    @functools.cached_property
    def calibration(self) -> list[dict[str, np.ndarray]]:
        return self.recorded(*CALIBRATION, seed=0)

    @functools.cached_property
    def onnx(self) -> Path:
        """The float model as ONNX: as it was traced, or laid out where ONNX cannot say that."""
        from torch import fx

        from mpq_compiler.backends.onnx import build
        from mpq_compiler.ir.program import Program, Stage, TensorStore
        from mpq_compiler.pipeline import manager, parser
        from mpq_compiler.pipeline.session import Session

        empty = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
        program, _ = manager.run_pipeline(parser.parse("trace"), empty, Session(self.denoiser))
        path = self._folder("float") / "model.onnx"
        try:
            build.export_float(program, path)
        except UserError:  # sizes that the model computes are constants once it is laid out
            (layout,) = parser.parse("layout")
            build.export_float(layout.run(program, Session(self.denoiser)), path)
        return path

    @functools.cached_property
    def onnx_int8(self) -> Path:
        """The float model quantized by onnxruntime, as a file."""
        from onnxruntime import quantization

        path = self._folder("onnxruntime-int8") / "model.onnx"
        prepared = self._folder("onnxruntime-prepared") / "model.onnx"
        rows = iter(self.calibration)

        class Reader:  # what onnxruntime takes for a CalibrationDataReader: it asks for `get_next` alone
            def get_next(self) -> Any:
                return next(rows, None)

        with _quiet():
            quantization.shape_inference.quant_pre_process(
                str(self.onnx), str(prepared), skip_symbolic_shape=True, save_as_external_data=True
            )
            quantization.quantize_static(
                str(prepared), str(path), Reader(), quant_format=quantization.QuantFormat.QDQ, per_channel=True,
                activation_type=quantization.QuantType.QUInt8, weight_type=quantization.QuantType.QInt8,
                op_types_to_quantize=["Conv", "MatMul", "Gemm"], use_external_data_format=True,
            )  # fmt: skip
        return path

    @functools.cached_property
    def openvino_int8(self) -> Path:
        """The float model quantized by NNCF, as a file."""
        with _quiet():
            import nncf
            import openvino

            nncf.set_log_level(logging.ERROR)
            path = self._folder("openvino-int8") / "model.xml"
            model = openvino.Core().read_model(str(self.onnx))
            quantized = nncf.quantize(
                model,
                nncf.Dataset(self.calibration),
                preset=nncf.QuantizationPreset.MIXED,
                subset_size=len(self.calibration),
            )
            openvino.save_model(quantized, str(path), compress_to_fp16=False)
        return path

    def _folder(self, name: str) -> Path:
        path = self.scratch / name
        path.mkdir()
        return path


def variants(
    against: Sequence[str], source: str, inputs: Arrays, threads: int, scratch: Path, progress: Any = None
) -> tuple[list[Subject], dict[str, str], Model | None]:
    """The variants that can be run here, why the others cannot, and the float model where any can."""
    skipped = {}
    wanted = []
    for name in chosen(against):
        if reason := _missing(name):
            skipped[name] = reason
        else:
            wanted.append(name)
    if not wanted:
        return [], skipped, None
    model = Model(source, inputs, scratch)
    found = []
    with tracked(progress, "preparing peers", len(wanted)) as advance:
        for name in wanted:
            try:
                path = _file(model, name)
                call = load(name, str(path or source), inputs, threads, model.denoiser)
            except UserError as error:
                skipped[name] = str(error)
                continue
            finally:
                advance(1)
            size = _bytes(model, name) if path is None else sum(f.stat().st_size for f in path.parent.iterdir())
            found.append(Subject(name, call, size, (name, str(path or source))))
    return found, skipped, model


def load(name: str, path: str, inputs: Arrays, threads: int, model: Any = None) -> Callable[..., np.ndarray]:
    """A call of a variant on other inputs of the same shapes, or on ``inputs``. UserError: its runtime refuses it."""
    if name.startswith("torch"):
        return _torch_call(model if model is not None else float_model(path, inputs), inputs, name.endswith("bf16"))
    if name.startswith("onnxruntime"):
        return _onnxruntime_call(Path(path), inputs, threads)
    return _openvino_call(Path(path), inputs, threads, name.endswith("bf16"))


def _missing(name: str) -> str | None:
    """Why a variant cannot be run here."""
    modules = {"onnxruntime": ("onnxruntime", "onnx"), "openvino": ("openvino", "onnx"), "torch": ("torch",)}
    needed = [*modules[name.split("-")[0]], *(["nncf"] if name.startswith("openvino-int8") else [])]
    if absent := [module for module in needed if importlib.util.find_spec(module) is None]:
        return f"{' and '.join(absent)} is not installed"
    if name.endswith("bf16") and not {"avx512_bf16", "amx_bf16", "bf16"} & host_features():
        return "this CPU has no instructions for bfloat16"
    return None


def _file(model: Model, name: str) -> Path | None:
    """The file that the variant loads; None where it loads the model itself."""
    if name.startswith("torch"):
        return None
    try:
        if "int8" in name:
            return model.onnx_int8 if name.startswith("onnxruntime") else model.openvino_int8
        return model.onnx
    except UserError:
        raise
    except Exception as error:  # the peers' tools raise errors of many kinds
        text = (str(error).strip().splitlines() or [""])[0]
        raise UserError(f"its own tool cannot quantize the float model ({type(error).__name__}: {text})") from error


def _bytes(model: Model, name: str) -> int:
    return (2 if name.endswith("bf16") else 4) * int(model.denoiser.parameters)


def float_model(source: str, inputs: Arrays) -> Any:
    """The denoiser at the size of the inputs."""
    from mpq_compiler.frontend import denoiser

    latent = next(iter(inputs.values())).shape[1:]
    text = inputs.get("encoder_hidden_states")
    size = (latent[1], latent[2]) if len(latent) == 3 else None
    return denoiser.load(source, size=size, tokens=None if text is None else text.shape[1])


def source_of(model: str | None, manifest: Mapping[str, Any]) -> str:
    """The float model of an artifact. UserError: it is none of the bundled ones, and none is named."""
    source = model or str(manifest["name"])
    if model is None and source not in checkpoint.bundled():
        raise UserError(f"'{source}' is no bundled model: name the float model with --model")
    return source


def _text(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(name + (str(list(shape)) if shape else "") for name, shape in shapes.items())


def _torch_call(loaded: Any, inputs: Arrays, bf16: bool) -> Callable[..., np.ndarray]:
    import copy

    import torch

    if bf16:  # channels last is the faster layout of the two there
        loaded = copy.deepcopy(loaded.module).to(torch.bfloat16).to(memory_format=torch.channels_last)

    def tensors(arrays: Arrays) -> dict[str, Any]:
        found = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in arrays.items()}
        if not bf16:
            return found
        return {n: t.to(torch.bfloat16) if t.dtype == torch.float32 and t.ndim > 1 else t for n, t in found.items()}

    own = tensors(inputs)

    def call(arrays: Arrays | None = None) -> np.ndarray:
        with torch.no_grad():
            return np.asarray(loaded(**(own if arrays is None else tensors(arrays))).float().numpy())

    return call


def _onnxruntime_call(path: Path, inputs: Arrays, threads: int) -> Callable[..., np.ndarray]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise UserError(f"onnxruntime refuses the model: {str(error).splitlines()[0]}") from error
    return lambda arrays=None: session.run(None, dict(inputs if arrays is None else arrays))[0]


def _openvino_call(path: Path, inputs: Arrays, threads: int, bf16: bool) -> Callable[..., np.ndarray]:
    import openvino

    options = {
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
    }
    try:
        request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise UserError(f"OpenVINO refuses the model: {str(error).splitlines()[0]}") from error

    def call(arrays: Arrays | None = None) -> np.ndarray:
        return np.asarray(request.infer(dict(inputs if arrays is None else arrays))[0])

    return call


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the progress of quantizers: standard output is for our own results."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logging.disable(level)


@contextmanager
def torch_threads(threads: int, wanted: bool) -> Iterator[None]:
    """Run torch on so many threads within the block."""
    if not wanted or importlib.util.find_spec("torch") is None:
        yield
        return
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)
