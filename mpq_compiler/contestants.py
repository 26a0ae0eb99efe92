"""What `mpqc bench` compares: artifacts, and the float model in torch, onnxruntime and OpenVINO."""

from __future__ import annotations

import functools
import importlib
import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from mpq_compiler import artifact as artifacts
from mpq_compiler import checkpoint, runtime, terminal
from mpq_compiler.errors import UserError
from mpq_compiler.runtime import CompiledDenoiser

PEERS = ("torch", "onnxruntime", "openvino")
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Contestant:
    """Something that computes the same function: a call, its stored bytes, and how another process would load it."""

    name: str
    call: Callable[[], object]
    bytes: int | None = None
    loader: tuple[str, ...] = ()
    """Its kind and its path or model, for `child`; empty where its memory is not asked for."""


def random_inputs(manifest: Mapping[str, Any], batch: int) -> dict[str, np.ndarray]:
    """Inputs of an artifact, always the same: normal floats, a timestep of 500, class 0, tokens as were compiled in."""
    generator = np.random.default_rng(0)
    found = {}
    for value in manifest["functions"][0]["inputs"]:
        shape, dtype = (batch, *value["shape"][1:]), np.dtype(value["dtype"])
        if value["name"] == "timestep":
            found["timestep"] = np.full(shape, 500, dtype)
        elif dtype.kind == "f":
            found[value["name"]] = generator.standard_normal(shape).astype(dtype)
        else:
            found[value["name"]] = np.full(shape, dtype.kind == "b", dtype)
    for assumed in manifest.get("assumptions", ()):
        found[assumed["input"]][:, assumed["token"]] = np.asarray(assumed["values"], np.float32)
    return found


def of_artifact(path: str | Path, compiled: CompiledDenoiser, inputs: Arrays, name: str) -> Contestant:
    size = compiled.manifest["weights"]["payload_bytes"]
    return Contestant(name, functools.partial(compiled.run, inputs), size, ("artifact", str(path)))


def peers(
    against: Sequence[str], model: str | None, manifest: Mapping[str, Any], inputs: Arrays, threads: int, scratch: Path
) -> tuple[list[Contestant], dict[str, str]]:
    """The peers that can be run here, and why the others cannot."""
    skipped = {name: f"{name} is not installed" for name in against if importlib.util.find_spec(name) is None}
    wanted = [name for name in PEERS if name in against and name not in skipped]
    if not wanted:
        return [], skipped
    source = model or manifest["name"]
    if model is None and source not in checkpoint.bundled():
        raise UserError(f"'{source}' is no bundled model: name the float model with --model")
    loaded = _float_model(source, inputs)
    theirs = {name: tuple(spec.shape) for name, spec in loaded.input_specs.items()}
    ours = {name: value.shape[1:] for name, value in inputs.items()}
    if theirs != ours:
        raise UserError(f"'{source}' takes {_text(theirs)}, the artifact {_text(ours)}: name its model with --model")
    found = []
    exported: Path | None = None
    for name in wanted:
        if name == "torch":
            found.append(Contestant("torch", _torch_call(loaded, inputs), 4 * loaded.parameters, ("torch", source)))
            continue
        try:
            exported = exported or _exported(loaded, scratch)
            call = _LOADERS[name](exported, inputs, threads)
        except UserError as error:
            skipped[name] = str(error)
            continue
        size = sum(file.stat().st_size for file in scratch.iterdir())
        found.append(Contestant(name, call, size, (name, str(exported))))
    return found, skipped


def _float_model(source: str, inputs: Arrays) -> Any:
    """The denoiser at the size of the inputs."""
    from mpq_compiler import denoiser

    latent = next(iter(inputs.values())).shape[1:]
    text = inputs.get("encoder_hidden_states")
    size = (latent[1], latent[2]) if len(latent) == 3 else None
    return denoiser.load(source, size=size, tokens=None if text is None else text.shape[1])


def _text(shapes: Mapping[str, Sequence[int]]) -> str:
    return ", ".join(name + (str(list(shape)) if shape else "") for name, shape in shapes.items())


def _torch_call(loaded: Any, inputs: Arrays) -> Callable[[], object]:
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(value)) for name, value in inputs.items()}

    def call() -> object:
        with torch.no_grad():
            return loaded(**tensors)

    return call


@contextmanager
def torch_threads(threads: int, wanted: bool) -> Iterator[None]:
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


def _exported(loaded: Any, folder: Path) -> Path:
    """The float model as ONNX: as it was traced, or laid out where ONNX cannot say that. UserError: nor this."""
    from torch import fx

    from mpq_compiler import pass_manager
    from mpq_compiler.pass_manager import Session
    from mpq_compiler.program import Program, Stage, TensorStore

    # By name, for the ground floor imports no backend.
    build = importlib.import_module("mpq_compiler.backends.onnx.build")
    empty = Program(fx.Graph(), TensorStore(), (), Stage.FLOAT)
    program, _ = pass_manager.run_pipeline(pass_manager.parse("trace"), empty, Session(loaded))
    path = folder / "float.onnx"
    try:
        build.export_float(program, path)
    except UserError:  # sizes that the model computes are constants once it is laid out
        (layout,) = pass_manager.parse("layout")
        build.export_float(layout.run(program, Session(loaded)), path)
    return path


def _onnxruntime_call(path: Path, inputs: Arrays, threads: int) -> Callable[[], object]:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4
    try:
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no base of their own
        raise UserError(f"onnxruntime refuses the float model: {str(error).splitlines()[0]}") from error
    return lambda: session.run(None, dict(inputs))


def _openvino_call(path: Path, inputs: Arrays, threads: int) -> Callable[[], object]:
    import openvino

    options = {"INFERENCE_NUM_THREADS": threads, "PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": "f32"}
    try:
        request = openvino.Core().compile_model(str(path), "CPU", options).create_infer_request()
    except RuntimeError as error:
        raise UserError(f"OpenVINO refuses the float model: {str(error).splitlines()[0]}") from error
    return lambda: request.infer(dict(inputs))


_LOADERS: dict[str, Callable[[Path, Arrays, int], Callable[[], object]]] = {
    "onnxruntime": _onnxruntime_call,
    "openvino": _openvino_call,
}


# --- memory -------------------------------------------------------------------------------------------------


def peak_memory(entries: Sequence[Contestant], batch: int, threads: int) -> dict[str, int | None]:
    """Peak resident bytes of a process of its own that loads each and calls it once."""
    found: dict[str, int | None] = {}
    root = str(Path(__file__).resolve().parents[1])
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH"))))}
    for entry in entries:
        if not entry.loader:
            continue
        code = "import sys; from mpq_compiler import contestants; contestants.child(sys.argv[1])"
        asked = {"loader": entry.loader, "reference": entries[0].loader[1], "batch": batch, "threads": threads}
        request = json.dumps(asked)
        done = subprocess.run([sys.executable, "-c", code, request], env=environment, capture_output=True, text=True)
        found[entry.name] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no word"])[-1]
            terminal.note(f"the peak memory of {entry.name} is not known: its process ended with {last}")
    return found


def child(request: str) -> None:
    """Loads one contestant, calls it once, and prints its process's peak resident bytes."""
    asked = json.loads(request)
    kind, source = asked["loader"]
    threads = asked["threads"]
    inputs = random_inputs(artifacts.read(asked["reference"]).manifest, asked["batch"])
    if kind == "artifact":
        runtime.load(source, threads).run(inputs)
    elif kind == "torch":
        with torch_threads(threads, True):
            _torch_call(_float_model(source, inputs), inputs)()
    else:
        _LOADERS[kind](Path(source), inputs, threads)()
    status = Path("/proc/self/status").read_text()
    print(1024 * int(status.partition("VmHWM:")[2].split()[0]))
