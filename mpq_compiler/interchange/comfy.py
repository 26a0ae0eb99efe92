"""ComfyUI's quantized checkpoints: safetensors with ``<module>.weight``, ``.weight_scale`` and ``.comfy_quant``.

Linear layers are `int8_tensorwise` (comfy-kitchen's `TensorWiseINT8Layout`) with a scale a row: every table of integers
without an offset is that exactly, of up to 8 bits. Other weights are f16, and vectors f32.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from mpq_compiler.interchange.container import Layer, Written
from mpq_compiler.support import tensorfile
from mpq_compiler.support.decibels import sqnr

LARGEST = 127
MARK = np.frombuffer(json.dumps({"format": "int8_tensorwise"}).encode(), np.uint8)
"""The content of ``.comfy_quant``."""


def rows(layer: Layer) -> tuple[np.ndarray, np.ndarray]:
    """(int8 codes [O, K], f32 scales [O, 1]) of a weight, by its own grid where it has one."""
    scale = np.abs(layer.value).max(1, keepdims=True) / LARGEST
    if layer.step is not None and (scale <= layer.step[:, None]).all():
        scale = layer.step[:, None]
    scale = np.where(scale == 0, 1, scale).astype(np.float32)
    return np.rint(layer.value / scale).clip(-LARGEST, LARGEST).astype(np.int8), scale


def write(path: Path, layers: Mapping[str, Layer]) -> list[Written]:
    """Writes a file, and says what became of each layer; ``layers`` have their names in the file."""
    tensors: dict[str, np.ndarray] = {}
    written = []
    for name, layer in layers.items():
        if layer.bits is not None and layer.value.ndim == 2 and name.endswith(".weight"):
            codes, scale = rows(layer)
            tensors |= {name: codes, f"{name}_scale": scale, f"{name.removesuffix('.weight')}.comfy_quant": MARK}
            made, kind, size = codes * scale, "int8", codes.nbytes + scale.nbytes + MARK.nbytes
        else:
            tensors[name] = layer.value.astype(np.float32 if layer.value.ndim < 2 else np.float16)
            made, kind, size = tensors[name].astype(np.float32), str(tensors[name].dtype), tensors[name].nbytes
        written.append(Written(layer, kind, size, sqnr(layer.value, made)))
    with path.open("wb") as stream:
        tensorfile.save(stream, tensors)
    return written
