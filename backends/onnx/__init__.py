"""The target `onnx`: models in integer arithmetic for onnxruntime, over the same weight file as every other target.

This module runs them, and needs neither torch nor the package onnx.
"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

import numpy as np

from mpq_compiler.artifact.bundle import WEIGHTS, Artifact
from mpq_compiler.support.errors import UserError
from mpq_compiler.targets import table as targets

FUNCTION = "denoise"
PRECISION = "session.x64quantprecision"
"""The option of onnxruntime's sessions for exact products of 8-bit integers (`saturates`)."""


def model_file(function: str) -> str:
    """The name of the file with a function's model: model.onnx, model_24x32.onnx."""
    return function.replace(FUNCTION, "model", 1) + ".onnx"


def load(artifact: Artifact, threads: int) -> Executor:
    """Loads the executor of an artifact (`runtime.compiled_denoiser`). UserError: onnxruntime refuses it."""
    return Executor(artifact, threads)


class Executor:
    """Executes functions by onnxruntime, with one session for each function that is called."""

    def __init__(self, artifact: Artifact, threads: int) -> None:
        self._artifact, self._threads = artifact, threads
        self._inputs = [value["name"] for value in artifact.manifest["functions"][0]["inputs"]]
        self._sessions: dict[str, Any] = {}
        self._session(artifact.manifest["functions"][0]["name"])

    def run(self, function: str, inputs: Sequence[np.ndarray]) -> np.ndarray:
        """Runs a function on inputs in the manifest's order; returns its output."""
        feed = dict(zip(self._inputs, map(np.ascontiguousarray, inputs), strict=True))
        try:
            return np.asarray(self._session(function).run(None, feed)[0])
        except Exception as error:  # onnxruntime's errors have no base of their own
            raise UserError(f"onnxruntime cannot run {self._artifact.path}: {_first(error)}") from error

    def _session(self, function: str) -> Any:
        if function not in self._sessions:
            self._sessions[function] = _session(self._artifact, function, self._threads)
        return self._sessions[function]


def _session(artifact: Artifact, function: str, threads: int) -> Any:
    import onnxruntime

    model = artifact.file(model_file(function))
    artifact.file(WEIGHTS)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.inter_op_num_threads = threads, 1
    options.log_severity_level = 4  # what goes wrong is raised as well
    if saturates():
        options.add_session_config_entry(PRECISION, "1")
    try:
        return onnxruntime.InferenceSession(str(model), options, providers=["CPUExecutionProvider"])
    except Exception as error:
        raise UserError(f"onnxruntime {onnxruntime.__version__} cannot load {model}: {_first(error)}") from error


def saturates() -> bool:
    """Whether onnxruntime's products of u8 and i8 lose bits on this CPU, as on x86 without VNNI.

    There pairs are added in 16 bits. `PRECISION` makes onnxruntime convert such weights to u8, whose products are exact
    on every CPU. With VNNI all products are exact, and those of u8 take twice the time.
    """
    return platform.machine() in ("x86_64", "AMD64") and not {"avx512_vnni", "avx_vnni"} & targets.host_features()


def _first(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
